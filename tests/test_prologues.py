"""Elementwise kernels that become part of what reads their results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_cases import close, module, run
from torch.nn import functional as F
from tvm import relax, tirx
from tvm.relax import op as R

from tvmtrain import lowering, operators, targets
from tvmtrain.schedules.prologues import FEWEST

rng = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("float32")


def activated(c: relax.Expr, s: relax.Expr, t: relax.Expr) -> relax.Expr:
    """A BatchNorm with statistics that are known, and its ReLU6."""
    return R.clip(R.add(R.multiply(c, s), t), 0.0, 6.0)


def gradients(geometry: dict[str, Any], readers: tuple[str, ...]) -> Any:
    """A convolution of an activation, and what its backward computes from the activation."""

    def make(c: relax.Var, s: relax.Var, t: relax.Var, w: relax.Var, gy: relax.Var) -> relax.Expr:
        z = relax.BlockBuilder.current().emit(activated(c, s, t))
        call = R.nn.conv2d(z, w, **geometry)
        passed = R.logical_and(R.greater(z, R.zeros_like(z)), R.less(z, R.full_like(z, relax.const(6.0, "float32"))))
        found = {
            "conv2d": lambda: call,
            "dgrad": lambda: R.where(passed, operators.conv2d_dgrad(call, gy), R.zeros_like(z)),
            "wgrad": lambda: operators.conv2d_wgrad(call, gy),
        }
        return relax.Tuple([found[name]() for name in readers])

    return make


def wanted(arrays: list[np.ndarray], geometry: dict[str, Any], readers: tuple[str, ...]) -> list[np.ndarray]:
    """The same by PyTorch, in double precision."""
    c, s, t, w, gy = (torch.from_numpy(a).double() for a in arrays)
    z = (c * s + t).clamp(0, 6).requires_grad_()
    w.requires_grad_()
    y = F.conv2d(z, w, stride=geometry["strides"], padding=geometry["padding"], groups=geometry["groups"])
    gz, gw = torch.autograd.grad(y, (z, w), gy)
    found = {"conv2d": y, "dgrad": torch.where((z > 0) & (z < 6), gz, 0.0), "wgrad": gw}
    return [found[name].detach().numpy() for name in readers]


def case(batch: int, channels: int, filters: int, size: int, kernel: int = 1, stride: int = 1, depthwise: bool = False) -> Any:
    """Arguments, and the geometry of the convolution."""
    padding, groups = kernel // 2, channels if depthwise else 1
    out = (size + 2 * padding - kernel) // stride + 1
    arrays = [array(batch, channels, size, size), array(1, channels, 1, 1), array(1, channels, 1, 1)]
    arrays += [array(filters, channels // groups, kernel, kernel), array(batch, filters, out, out)]
    return arrays, {"strides": [stride] * 2, "padding": [padding] * 2, "groups": groups}


def kernels_of(make: Any, arrays: list[np.ndarray]) -> list[str]:
    """The names of the kernels that are called."""
    block = lowering.fuse(module(make, *arrays), targets.load("host"))["main"].body.blocks[0]
    return [
        b.value.args[0].name_hint for b in block.bindings if isinstance(b.value, relax.Call) and b.value.args[0].ty is not None
    ]


CASES = {
    "pointwise, large map": ((2, 16, 24, 56), {}),
    "pointwise, 7x7": ((2, 96, 24, 7), {}),
    "pointwise, prime": ((1, 13, 11, 17), {}),
    "pointwise, 17 filters": ((2, 32, 17, 32), {}),
    "3x3": ((2, 16, 8, 14), {"kernel": 3}),
    "3x3, stride 2": ((2, 16, 8, 15), {"kernel": 3, "stride": 2}),
    "depthwise": ((2, 24, 24, 28), {"kernel": 3, "depthwise": True}),
    "depthwise, stride 2": ((2, 24, 24, 28), {"kernel": 3, "stride": 2, "depthwise": True}),
    "depthwise, prime": ((1, 7, 7, 19), {"kernel": 5, "depthwise": True}),
}


@pytest.mark.parametrize("readers", [("conv2d",), ("dgrad", "wgrad"), ("conv2d", "dgrad", "wgrad")], ids="+".join)
@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(name: str, readers: tuple[str, ...]):
    sizes, more = CASES[name]
    arrays, geometry = case(*sizes, **more)
    for got, want in zip(run(gradients(geometry, readers), *arrays), wanted(arrays, geometry, readers), strict=True):
        close(got, want, 1e-4)


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 33),
    filters=st.integers(1, 33),
    size=st.integers(6, 23),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
)
def test_awkward_shapes(batch: int, channels: int, filters: int, size: int, kernel: int, stride: int):
    arrays, geometry = case(batch, channels, filters, size, kernel, stride)
    readers = ("conv2d", "dgrad", "wgrad")
    for got, want in zip(run(gradients(geometry, readers), *arrays), wanted(arrays, geometry, readers), strict=True):
        close(got, want, 1e-4)


@pytest.mark.parametrize("name", ["pointwise, large map", "3x3", "depthwise", "depthwise, stride 2"])
def test_nothing_stands_by_itself(name: str):
    sizes, more = CASES[name]
    arrays, geometry = case(*sizes, **more)
    names = kernels_of(gradients(geometry, ("conv2d",)), arrays)
    assert len(names) == 1, names
    assert "clip" in names[0]
    assert "conv2d" in names[0]


def test_a_tile_without_rows_stays_a_tile():
    """17 filters are no whole rows of registers: the strips are brought for one filter at a time."""
    arrays, geometry = case(*CASES["pointwise, 17 filters"][0])
    lowered = lowering.lower(module(gradients(geometry, ("conv2d",)), *arrays), targets.load("x86-64-v3"))
    (kernel,) = [f.script() for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]
    assert 'scope="local"' in kernel


def test_a_value_that_is_returned_is_made_once():
    arrays, geometry = case(2, 16, 24, 28)

    def make(c: relax.Var, s: relax.Var, t: relax.Var, w: relax.Var, _gy: relax.Var) -> relax.Expr:
        z = relax.BlockBuilder.current().emit(activated(c, s, t))
        return relax.Tuple([z, R.nn.conv2d(z, w, **geometry)])

    assert len(kernels_of(make, arrays)) == 2


def test_small_ones_stay():
    arrays = [array(1, 8, 4, 4), array(1, 8, 1, 1), array(1, 8, 1, 1), array(8, 8, 1, 1), array(1, 8, 4, 4)]
    assert arrays[0].size < FEWEST
    geometry = {"strides": [1, 1], "padding": [0, 0], "groups": 1}
    assert len(kernels_of(gradients(geometry, ("conv2d",)), arrays)) == 2


def test_what_is_read_in_many_places_is_made_once():
    """A sum of two large tensors that three kernels read: three times two tensors are more than two, one and three."""

    def make(a: relax.Var, b: relax.Var, w: relax.Var) -> relax.Expr:
        z = relax.BlockBuilder.current().emit(R.add(a, b))
        return relax.Tuple([R.nn.conv2d(z, w), R.sum(z, axis=[1]), R.nn.conv2d(z, R.negative(w))])

    names = kernels_of(make, [array(2, 16, 28, 28), array(2, 16, 28, 28), array(24, 16, 1, 1)])
    assert "add" in names
