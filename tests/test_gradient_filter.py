"""Gradient filtering against the paper's equations in PyTorch (``filtered``), and what of it is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import relax_cases
import torch
import tvm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity import quick_device
from torch import nn
from tvm import relax
from tvm.ir.transform import Sequential
from tvm.relax import op as R
from tvm.runtime.vm import VirtualMachine

import tvmtrain as tt
from tvmtrain import filtering, lowering, signature
from tvmtrain.errors import PlanError
from tvmtrain.oracle import Filtered, Geometry, filtered_gradients, members
from tvmtrain.passes.append_optimizer import AppendOptimizer
from tvmtrain.passes.differentiate import Differentiate
from tvmtrain.passes.gradient_filter import GradientFilter
from tvmtrain.passes.pooled_domain import PooledDomain
from tvmtrain.passes.sparse_update import SparseUpdate
from tvmtrain.passes.stop_gradients import StopGradients
from tvmtrain.spec import SGD


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
            values[port] = np.asarray(random.normal(size=[int(d) for d in var.ty.shape]), str(var.ty.dtype))
    return values


def run(mod: tvm.IRModule, values: Mapping[signature.Port, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients by name."""
    function = mod["adjoint"]
    with tvm.ir.transform.PassContext():
        executable = lowering.compile_module(mod, quick_device())
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
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate])
@given(st.lists(drawn(), min_size=12, max_size=12))
def test_any_convolution_follows_the_equations_or_is_refused(cases: list[Case]) -> None:
    for case in cases:
        if not case.defined:
            with pytest.raises(PlanError, match="gradient filter, weight 'w0'"):
                filtered([case])
    check([case for case in cases if case.defined] or [Case(Geometry())])


def test_one_by_one_kernels_in_patches_of_one_are_exact() -> None:
    case = Case(Geometry(kernel=(1, 1), padding=(0, 0), patch=(1, 1)), (5, 6))
    values = data(filtered([case]))
    x, w, gy = (torch.from_numpy(values[port]) for port in (("parameter", "x0"), ("parameter", "w0"), ("target", "t0")))
    dx, dw = torch.nn.grad.conv2d_input(x.shape, w, gy), torch.nn.grad.conv2d_weight(x, w.shape, gy)
    for got, wanted in zip(expected(case, 0, values), (dx, dw), strict=True):
        close(got, wanted.numpy(), case, 1e-6)


def test_unbiased_gradients_of_a_constant_are_exact_where_the_paper_s_are_four_times_too_large() -> None:
    case = Case(Geometry(kernel=(1, 1), stride=(2, 2), padding=(0, 0)), (8, 8))
    values = data(filtered([case]))
    ports = [("parameter", "x0"), ("parameter", "w0"), ("target", "t0")]
    for port in ports:
        values[port] = np.ones_like(values[port]) * (1 if port[1] != "w0" else values[port])
    x, w, gy = (torch.from_numpy(values[port]) for port in ports)
    exact = torch.nn.grad.conv2d_weight(x, w.shape, gy, stride=2).numpy()
    for scaling, factor in (("unbiased", 1), ("paper", 4)):
        scaled = replace(case, geometry=replace(case.geometry, scaling=scaling))
        gradients = run(filtered([scaled]), values)
        close(gradients["w0"], factor * exact, scaling)
        close(gradients["x0"].sum(), factor * (w.sum(0).sum() * 2 * 16).numpy(), scaling)


SPARSE = {
    "dense": (Case(Geometry(patch=(2, 3)), (7, 8), group_in=5, group_out=3), [4, 1, 2]),
    "strided": (Case(Geometry(stride=(2, 1), scaling="paper"), (9, 6), group_in=4, group_out=2), [3, 0]),
    "depthwise": (Case(Geometry(groups=6), (8, 5), group_in=1, group_out=1), [5, 0, 3]),
    "depthwise, two outputs each": (Case(Geometry(groups=4), (6, 6), group_in=1, group_out=2), [2, 1]),
}


@pytest.mark.parametrize("name", SPARSE)
def test_chosen_channels_of_a_filtered_layer(name: str) -> None:
    case, channels = SPARSE[name]
    mod = filtered([case], before=[SparseUpdate({"w0": len(channels)})])
    values = data(mod, {"w0": channels})
    gradients = run(mod, values)
    dx, dw = expected(case, 0, values)
    each = case.group_out
    depthwise = case.geometry.groups > 1
    wanted = dw[[c * each + i for c in channels for i in range(each)]] if depthwise else dw[:, channels]
    assert gradients["w0"].shape == (*wanted.shape[:2], 1, 1)
    close(gradients["w0"], wanted[..., :1, :1], name)
    close(gradients["x0"], dx, name)


def test_the_update_reaches_all_taps_of_chosen_channels_and_counts_each_in_the_clip_norm() -> None:
    case, channels = SPARSE["dense"]
    mod = filtered([case], before=[SparseUpdate({"w0": 3})], trained=["w0"])
    step = AppendOptimizer(SGD(momentum=0.5, clip_norm=2.0))(mod)
    values = data(mod, {"w0": channels})
    values |= {("rate", "rate"): np.array(0.1, "float32")}
    ports = signature.inputs(step["train_step"])
    values[ports[-1]] = old = np.ones((3, 5, 1, 1), "float32")
    with tvm.ir.transform.PassContext():
        executable = lowering.compile_module(step, quick_device())
    results = VirtualMachine(executable, tvm.cpu())["train_step"](*[tvm.runtime.tensor(values[port]) for port in ports])
    new = {port: out.numpy() for port, out in zip(signature.outputs(step["train_step"]), results, strict=True)}

    gradient = torch.from_numpy(expected(case, 0, values)[1][:, channels])
    gradient *= 2.0 / gradient.norm()
    momentum, w = old.copy(), values[("parameter", "w0")].copy()
    momentum[:, channels] = 0.5 * momentum[:, channels] + gradient.numpy()[..., :1, :1]
    w[:, channels] -= 0.1 * momentum[:, channels]
    close(new[ports[-1]], momentum, "momentum")
    close(new[("parameter", "w0")], w, "weight")


def test_a_frozen_weight_filters_the_gradient_of_its_input_alone() -> None:
    case = Case(Geometry())
    mod = filtered([case], trained=["x0"])
    assert signature.outputs(mod["adjoint"]) == [("loss", "loss"), ("gradient", "x0")]
    assert {role for role, _ in signature.inputs(mod["adjoint"])} == {"target", "parameter"}
    values = data(mod)
    mod = relax.transform.DeadCodeElimination()(mod)
    assert filtering.PATCH_SUM not in names(mod)
    close(run(mod, values)["x0"], expected(case, 0, values)[0], case)


@pytest.mark.parametrize(
    ("size", "patch"),
    [
        ((1, 1), (2, 2)),
        ((5, 7), (2, 3)),
        ((9, 30), (4, 4)),
        ((64, 33), (3, 2)),
        ((8, 300), (2, 16)),
        ((7, 40), (1, 5)),
        ((12, 9), (3, 1)),
    ],
)
def test_patches_have_sums_and_means(size: tuple[int, int], patch: tuple[int, int]) -> None:
    patches = filtering.of_output(size, patch)
    x = np.random.default_rng(0).normal(size=(3, 5, *size)).astype("float32")
    totals, means = relax_cases.run(
        lambda v: relax.Tuple([f(v, patches) for f in (filtering.patch_sum, filtering.patch_mean)]), x
    )
    rows, columns = (members(n, r, p).numpy() for n, r, p in zip(size, patch, patches.places, strict=True))
    wanted = np.einsum("ph,qw,nchw->ncpq", rows, columns, x)
    close(totals, wanted, patches)
    close(means, wanted / np.outer(rows.sum(1), columns.sum(1)), patches)


def test_summed_patches_of_x_are_all_that_the_weight_gradient_reads() -> None:
    clean = Sequential([relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination()])
    mod = clean(filtered([Case(Geometry())], trained=["w0"]))
    calls = [b.value for b in mod["adjoint"].body.blocks[0].bindings if isinstance(b.value, relax.Call)]
    x = next(v for p, v in zip(signature.inputs(mod["adjoint"]), mod["adjoint"].params, strict=True) if p[1] == "x0")
    readers = [str(call.op.name) for call in calls if any(arg.same_as(x) for arg in call.args)]
    assert readers == ["relax.nn.conv2d", filtering.PATCH_SUM]


def names(mod: tvm.IRModule) -> list[str]:
    """Operators of ``adjoint``, in order."""
    calls = [b.value for b in mod["adjoint"].body.blocks[0].bindings if isinstance(b.value, relax.Call)]
    return [str(call.op.name) for call in calls]


# ---- refusals ----


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        pytest.param(
            Case(Geometry(padding=(0, 0)), (8, 8)), "6 rows of its input belong to them, and it has 8", id="no padding"
        ),
        pytest.param(Case(Geometry(padding=(1, 4)), (8, 8)), "14 columns of its input", id="too much padding"),
        pytest.param(
            Case(Geometry(kernel=(3, 2), dilation=(1, 2)), (8, 9)), "columns are dilated by 2.*2 taps", id="even dilated kernel"
        ),
    ],
)
def test_geometries_outside_the_paper_are_refused(case: Case, reason: str) -> None:
    with pytest.raises(PlanError, match=f"weight 'w0': .*{reason}"):
        filtered([case])


def test_padding_that_the_patches_cover_is_not_refused() -> None:
    check([Case(Geometry(padding=(0, 0), patch=(4, 4)), (8, 8)), Case(Geometry(kernel=(4, 2), patch=(5, 3)), (9, 5))])


def test_a_weight_that_no_convolution_reads_alone_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    graph = tt.trace(model, torch.randn(2, 2, 2, 2), torch.zeros(2, dtype=torch.long))
    for name, reason in (("2.weight", "a linear layer reads it"), ("0.bias", "R?.*reads it"), ("1.weight", "no convolution")):
        with pytest.raises(PlanError, match=f"weight {name!r}: .*{reason}" if name != "2.weight" else "2.weight"):
            GradientFilter({name: (2, 2)})(graph.imported.module)


def test_layers_without_a_filter_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    graph = tt.trace(model.eval(), torch.randn(2, 2, 8, 8), torch.zeros(2, dtype=torch.long))
    for name in ("1", "3"):
        with pytest.raises(PlanError, match=f"layer '{name}': only 2-D convolutions"):
            graph.apply(tt.UpdatePlan({name: tt.LayerUpdate(filter=2)}))
    with pytest.raises(PlanError, match=r"weight .0\.weight.: 3 patches of 2"):
        graph.apply(tt.UpdatePlan.last(graph.layers, 1, filter=2))
    graph.apply(tt.UpdatePlan.last(graph.layers, 1, filter=4))


# ---- the pooled domain ----


class Residual(nn.Module):
    """Three convolutions, with BatchNorm on running statistics, and what came in added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def tail(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]


def network(name: str) -> nn.Module:
    if name == "chain":
        layers = [
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Hardtanh(),
            nn.Conv2d(4, 4, 3, padding=1),
        ]
    elif name == "residual":
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Residual(), Residual()]
    else:
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.SiLU()]
    return nn.Sequential(*layers, *tail(4)).eval()


def adjoints(name: str, size: tuple[int, int]) -> tuple[tvm.IRModule, tvm.IRModule]:
    """(with, without) the pooled domain; every convolution is filtered."""
    graph = tt.trace(network(name), torch.randn(2, 2, *size), torch.zeros(2, dtype=torch.long))
    patches = {layer.parameters[0]: (2, 2) for layer in graph.layers if layer.kind == "conv2d"}
    steps = [GradientFilter(patches), StopGradients(graph.trained), Differentiate(graph.trained)]
    last = relax.transform.DeadCodeElimination()
    return tuple(Sequential([*steps, *more, last])(graph.imported.module) for more in ([PooledDomain()], []))


def full_gradients(mod: tvm.IRModule, size: tuple[int, int]) -> list[str]:
    """Operators of the backward whose result is a real map of full resolution, other than what goes into the mean of masks."""
    bindings = mod["adjoint"].body.blocks[0].bindings
    first = next(i for i, b in enumerate(bindings) if b.var.name.endswith("_adjoint") or "adjoint" in b.var.name)
    maps = ("relax.where", "relax.broadcast_to", filtering.UNPATCH, "tvmtrain.conv2d_dgrad")
    calls = [b.value for b in bindings[first:] if isinstance(b.value, relax.Call)]
    return [
        str(c.op.name)
        for c in calls
        if str(c.op.name) in maps and len(c.ty.shape) == 4 and tuple(int(d) for d in list(c.ty.shape)[2:]) == size
    ]


@pytest.mark.parametrize(
    ("name", "size"), [("chain", (7, 10)), ("residual", (6, 5)), ("stride 2", (8, 16))], ids=["chain", "residual", "stride 2"]
)
def test_between_filtered_layers_gradients_stay_in_patches(name: str, size: tuple[int, int]) -> None:
    pooled, plain = adjoints(name, size)
    assert filtering.UNPATCH in full_gradients(plain, size)
    assert full_gradients(pooled, size) == []
    values = data(plain)
    values[next(port for port in values if port[0] == "target")] = np.array([0, 2])
    for port in values:
        if port[1].endswith("running_var"):
            values[port] = np.abs(values[port]) + 0.5
    ours, theirs = run(pooled, values), run(plain, values)
    assert set(ours) == set(theirs)
    for each, value in theirs.items():
        close(ours[each], value, (name, each), 1e-5)


def two_layers() -> tvm.IRModule:
    """loss = sum(conv(relu(conv(x, a)), b) * t), by hand; both layers are filtered in patches of 2."""
    shapes = {"x": (1, 2, 7, 6), "t": (1, 2, 7, 6), "a": (3, 2, 3, 3), "b": (2, 3, 3, 3)}
    x, t, a, b = (relax.Var(name, relax.TensorType(list(shape), "float32")) for name, shape in shapes.items())
    bb = relax.BlockBuilder()
    with bb.function("forward", [x, t, a, b]):
        with bb.dataflow():
            hidden = bb.emit(R.nn.relu(bb.emit(R.nn.conv2d(x, a, padding=1))))
            out = bb.emit(R.nn.conv2d(hidden, b, padding=1))
            loss = bb.emit_output(R.sum(bb.emit(R.multiply(out, t))))
        bb.emit_func_output(relax.Tuple([loss]))
    mod = bb.get()
    ports = [("input", "x"), ("target", "t"), ("parameter", "a"), ("parameter", "b")]
    mod["forward"] = signature.with_ports(mod["forward"], ports, [("loss", "loss")])
    return mod


def test_the_gradient_between_two_layers_becomes_a_product_with_the_mean_of_the_mask() -> None:
    steps = [GradientFilter({"a": (2, 2), "b": (2, 2)}), StopGradients(("a", "b")), Differentiate(("a", "b"))]
    clean = [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination()]
    before = names(Sequential([*steps, *clean])(two_layers()))
    after = names(Sequential([*steps, PooledDomain(), *clean])(two_layers()))
    dgrad = before.index("tvmtrain.conv2d_dgrad")
    short = [[name.rpartition(".")[2] for name in each[dgrad + 1 :]] for each in (before, after)]
    assert short[0] == ["patch_sum", "unpatch", "conv2d_wgrad", "greater", "where", "patch_mean", "patch_sum", "conv2d_wgrad"]
    assert short[1] == ["patch_sum", "conv2d_wgrad", "greater", "astype", "patch_mean", "multiply", "patch_sum", "conv2d_wgrad"]


def test_patches_that_overlap_in_part_go_through_the_full_resolution() -> None:
    """14 rows make 7 patches of 2; after a stride of 2, 4 patches of 4 that begin one row before the map."""
    pooled, _ = adjoints("stride 2", (14, 16))
    assert filtering.UNPATCH in full_gradients(pooled, (14, 16))


def test_patches_within_patches() -> None:
    fine, coarse = filtering.of_output((9, 8), (2, 2)), filtering.Patches((4, 8), (3, 0), (9, 8), (3, 1))
    inner = fine.within(coarse)
    assert inner == filtering.Patches((2, 4), (1, 0), (5, 4), (3, 1))
    owners = [(y + 3) // 4 for y in range(9)]
    assert all(owners[y] == ((y + 1) // 2 + inner.before[0]) // inner.size[0] for y in range(9))
    assert coarse.within(fine) is None
    assert fine.within(fine).trivial


def test_a_module_without_filtered_layers_stays_as_it_is() -> None:
    wanted = ("x0", "w0")
    mod = Sequential([StopGradients(wanted), Differentiate(wanted)])(forward([Case(Geometry())]))
    tvm.ir.assert_structural_equal(PooledDomain()(mod), mod)


# ---- a step ----


def test_a_filtered_step_is_pytorch_s_with_the_equations_in_its_convolutions() -> None:
    body = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Residual(), nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*body, *tail(6)).eval()
    x, y = torch.randn(3, 2, 9, 8), torch.tensor([0, 2, 1])
    graph = tt.trace(model, x, y, optimizer=tt.SGD(lr=0.2, momentum=0.9, weight_decay=0.01, clip_norm=0.1))
    plan = tt.UpdatePlan.last(graph.layers, 3, filter=2, batchnorm=True)
    step = tt.build(graph.apply(plan), quick_device(), gradients=True).load()

    theirs = copy.deepcopy(model)
    residual = theirs[2].body
    residual[3], residual[6], theirs[3] = (Filtered(c, (2, 2)) for c in (residual[3], residual[6], theirs[3]))
    trained = [p for name, p in theirs.named_parameters() if name in set(graph.apply(plan).trained)]
    for p in set(theirs.parameters()) - set(trained):
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(trained, lr=0.2, momentum=0.9, weight_decay=0.01)
    for number in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(theirs(x), y)
        loss.backward()
        if number == 0:
            gradients = step.gradients(x, y)
            assert len(gradients) == len(trained)
            for name, p in theirs.named_parameters():
                if p.requires_grad:
                    close(np.broadcast_to(gradients[name], p.shape), p.grad.numpy(), name)
        assert float(nn.utils.clip_grad_norm_(trained, 0.1)) > 0.1
        optimizer.step()
        assert step(x, y) == pytest.approx(loss.item(), rel=1e-4)
    state = step.state_dict()
    for name, value in theirs.state_dict().items():
        close(state[name], value.numpy(), name)
