"""Gradient filtering against the paper's equations in PyTorch (``filtered``), and what of it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import tvm
from filtered import Geometry, filtered_gradients
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity import quick_device
from tvm import relax
from tvm.ir.transform import Sequential
from tvm.relax import op as R
from tvm.runtime.vm import VirtualMachine

from tvmtrain import builder, signature
from tvmtrain.errors import PlanError
from tvmtrain.passes.differentiate import Differentiate
from tvmtrain.passes.gradient_filter import GradientFilter
from tvmtrain.passes.stop_gradients import StopGradients


@dataclass(frozen=True)
class Case:
    """One convolution with its sizes."""

    geometry: Geometry
    size: tuple[int, int] = (7, 7)
    batch: int = 2
    group_in: int = 2
    group_out: int = 3

    @property
    def shapes(self) -> tuple[list[int], list[int], list[int]]:
        """Of x, w and y."""
        g = self.geometry
        out = [g.output(self.size[axis], axis) for axis in (0, 1)]
        filters = g.groups * self.group_out
        x, w = [self.batch, g.groups * self.group_in, *self.size], [filters, self.group_in, *g.kernel]
        return x, w, [self.batch, filters, *out]

    @property
    def defined(self) -> bool:
        return all(self.geometry.defined(self.size[axis], axis) for axis in (0, 1))


def forward(cases: Sequence[Case]) -> tvm.IRModule:
    """loss = sum over cases k of sum(conv(x_k, w_k) * t_k); x and w are parameters, so that both have gradients."""
    bb = relax.BlockBuilder()
    ports, arguments = [], []
    for k, case in enumerate(cases):
        x, w, t = case.shapes
        for role, name, shape in (("target", "t", t), ("parameter", "x", x), ("parameter", "w", w)):
            ports.append((role, f"{name}{k}"))
            arguments.append(relax.Var(f"{name}{k}", relax.TensorType(shape, "float32")))
    with bb.function("forward", arguments):
        with bb.dataflow():
            total = bb.emit(R.zeros([], "float32"))
            for k, case in enumerate(cases):
                t, x, w = arguments[3 * k : 3 * k + 3]
                g = case.geometry
                border = (*g.padding, *g.padding)
                y = bb.emit(R.nn.conv2d(x, w, strides=g.stride, padding=border, dilation=g.dilation, groups=g.groups))
                total = bb.emit(R.add(total, bb.emit(R.sum(bb.emit(R.multiply(y, t))))))
            loss = bb.emit_output(total)
        bb.emit_func_output(relax.Tuple([loss]))
    mod = bb.get()
    mod["forward"] = signature.with_ports(mod["forward"], ports, [("loss", "loss")])
    return mod


def filtered(cases: Sequence[Case], before: Sequence = (), trained: Sequence[str] | None = None) -> tvm.IRModule:
    """``adjoint`` with the gradients of every x and w, in this order, or of ``trained``."""
    names = [f"w{k}" for k in range(len(cases))]
    patches = {name: case.geometry.patch for name, case in zip(names, cases, strict=True)}
    scaling = {name: case.geometry.scaling for name, case in zip(names, cases, strict=True)}
    wanted = tuple(trained if trained is not None else [f"x{k}" for k in range(len(cases))] + names)
    return Sequential([*before, GradientFilter(patches, scaling), StopGradients(wanted), Differentiate(wanted)])(forward(cases))


def data(mod: tvm.IRModule, channels: Mapping[str, Sequence[int]] | None = None) -> dict[signature.Port, np.ndarray]:
    """A value for every argument of ``adjoint``."""
    random = np.random.default_rng(0)
    function = mod["adjoint"]
    values = {}
    for port, var in zip(signature.inputs(function), function.params, strict=True):
        if port[0] == "channels":
            values[port] = np.array((channels or {})[port[1]], "int32")
        else:
            values[port] = random.normal(size=[int(d) for d in var.ty.shape]).astype("float32")
    return values


def run(mod: tvm.IRModule, values: Mapping[signature.Port, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients by name."""
    function = mod["adjoint"]
    with tvm.ir.transform.PassContext():
        executable = builder.compile_module(mod, quick_device())
    arguments = [tvm.runtime.tensor(values[port]) for port in signature.inputs(function)]
    results = VirtualMachine(executable, tvm.cpu())["adjoint"](*arguments)
    return {
        name: out.numpy() for (role, name), out in zip(signature.outputs(function), results, strict=True) if role == "gradient"
    }


def expected(case: Case, k: int, values: Mapping[signature.Port, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(dX, dW) of case k by the paper's equations."""
    ports = (("parameter", f"x{k}"), ("parameter", f"w{k}"), ("target", f"t{k}"))
    x, w, gy = (torch.from_numpy(values[port]).double() for port in ports)
    dx, dw = filtered_gradients(x, w, gy, case.geometry)
    return dx.numpy(), dw.numpy()


def close(got: np.ndarray, wanted: np.ndarray, what: object, tolerance: float = 1e-4) -> None:
    error = float(np.abs(got - wanted).max())
    assert error <= tolerance * max(float(np.abs(wanted).max()), 1e-6), f"{what}: off by {error}"


def check(cases: Sequence[Case]) -> None:
    mod = filtered(cases)
    values = data(mod)
    gradients = run(mod, values)
    for k, case in enumerate(cases):
        dx, dw = expected(case, k, values)
        close(gradients[f"x{k}"], dx, (case, "dX"))
        assert gradients[f"w{k}"].shape[2:] == (1, 1)
        close(np.broadcast_to(gradients[f"w{k}"], dw.shape), dw, (case, "dW"))


# ---- against the equations ----


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    """Any convolution with an output: more often with the padding that keeps its size."""
    pairs = {}
    for key, most in (("kernel", 7), ("stride", 3), ("dilation", 3), ("patch", 8), ("size", 40)):
        pairs[key] = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    reach = [d * (n - 1) for d, n in zip(pairs["dilation"], pairs["kernel"], strict=True)]
    same = draw(st.integers(0, 3)) > 0
    padding = tuple(r // 2 if same else draw(st.integers(0, r)) for r in reach)
    size = tuple(max(n, r + 1 - 2 * p) for n, r, p in zip(pairs.pop("size"), reach, padding, strict=True))
    group_in, group_out = draw(st.sampled_from([(1, 1), (1, 2), (2, 3), (3, 1)]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    geometry = Geometry(**pairs, padding=padding, groups=groups, scaling=draw(st.sampled_from(["paper", "unbiased"])))
    return Case(geometry, size, draw(st.integers(1, 2)), group_in, group_out)


# Compiling takes the time: many cases share a module, and none are made smaller after a failure, whose message names its case.
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate])
@given(st.lists(drawn(), min_size=12, max_size=12))
def test_any_convolution_follows_the_equations_or_is_refused(cases: list[Case]) -> None:
    for case in cases:
        if not case.defined:
            with pytest.raises(PlanError, match="gradient filter, weight 'w0'"):
                filtered([case])
    check([case for case in cases if case.defined] or [Case(Geometry())])
