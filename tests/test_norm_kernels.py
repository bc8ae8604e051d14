"""Sums of normalizations: what they are for any shape, how often a step reads a map for them, and what is kept for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import relax_cases
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import quick_device
from torch import nn
from tvm import relax
from tvm.relax import op as R

import tvmtrain as tt
from tvmtrain import lowering, norm_kernels, operators, targets
from tvmtrain.schedules import SCHEDULED
from tvmtrain.spec import LayerUpdate, UpdatePlan

EPS = 1e-5
RATE = 2**-7  # a number of any precision
PLANES = ((1, 1), (5, 1), (2, 2), (3, 1), (3, 3), (7, 7), (1, 8), (4, 4), (11, 13), (16, 16), (17, 31))


def both(gy: relax.Var, x: relax.Var, centre: relax.Var, axes: list[int], centred: bool) -> relax.Expr:
    """All that the two kernels make, as one tuple."""
    builder = relax.BlockBuilder.current()
    assert builder is not None
    parts = [
        builder.emit(operators.statistics(x, axes, EPS)),
        builder.emit(operators.gradient_sums(gy, x, centre if centred else None, axes)),
    ]
    return relax.Tuple([builder.emit(relax.TupleGetItem(part, i)) for part in parts for i in range(len(part.ty.fields))])


def check(x: np.ndarray, gy: np.ndarray, axes: list[int], centred: bool = True) -> None:
    over = tuple(axes)
    wide = x.astype("float64")
    mean, var = wide.mean(over, keepdims=True), wide.var(over, keepdims=True)
    centre = mean.astype(x.dtype)
    got = relax_cases.run(lambda *v: both(*v, axes, centred), gy, x, centre)
    off = wide - centre if centred else wide
    want = [mean, var, 1 / np.sqrt(var + EPS), gy.sum(over, "float64", keepdims=True), (gy * off).sum(over, keepdims=True)]
    # Of what is added up, not of the sum, which may be next to nothing.
    scale = [np.abs(wide).max(), var.max() + 1e-30, want[2].max(), np.abs(gy).sum(over).max(), np.abs(gy * off).sum(over).max()]
    for name, ours, theirs, size in zip(("mean", "var", "rstd", "sum", "along"), got, want, scale, strict=True):
        assert ours.shape == theirs.shape
        error = np.abs(ours - theirs).max()
        assert error <= (1e-14 if x.dtype == np.float64 else 4e-6) * size, (name, error, size)


@pytest.mark.parametrize("bits", [128, 256, 512])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_all_but_the_channels(bits: int, data: st.DataObject) -> None:
    plane = data.draw(st.sampled_from(PLANES))
    rank = data.draw(st.sampled_from((2, 3, 4, 5))) if plane == (1, 1) else 4
    places = (1,) * (rank - 2) if plane == (1, 1) else plane
    shape = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 17)), *places)
    dtype = data.draw(st.sampled_from(("float32", "float64")))
    numbers = np.random.default_rng(data.draw(st.integers(0, 99)))
    x, gy = (numbers.standard_normal(shape).astype(dtype) for _ in range(2))
    x = (x * data.draw(st.sampled_from((1e-2, 1.0))) + data.draw(st.sampled_from((0.0, 3.0)))).astype(dtype)
    with relax_cases.on(replace(quick_device(), vector_bits=bits)):
        check(x, gy, [a for a in range(rank) if a != 1], data.draw(st.booleans()))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 5, 37), [2]),
        ((2, 3, 4, 5), [2, 3]),
        ((6, 10), [1]),
        ((4, 7, 1), [2]),
        ((2, 5, 3), [1]),
        ((2, 3, 2, 2, 3), [0, 2, 3, 4]),
        ((8, 24, 32, 32), [0, 2, 3]),
    ],
)
def test_other_axes_and_full_size(shape: tuple[int, ...], axes: list[int]) -> None:
    numbers = np.random.default_rng(0)
    check(*(numbers.standard_normal(shape).astype("float32") for _ in range(2)), axes)


def test_a_large_mean_beside_a_small_variance() -> None:
    """In float32, x carries 1e-4 of its deviation's digits less than these sums lose."""
    x = (1000 + 0.05 * np.random.default_rng(0).standard_normal((4, 6, 31, 31))).astype("float32")
    mean, var, _ = relax_cases.run(lambda v: operators.statistics(v, [0, 2, 3], EPS), x)
    wide = x.astype("float64")
    np.testing.assert_allclose(mean.ravel(), wide.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(var.ravel(), wide.var((0, 2, 3)), rtol=1e-4)


def test_not_a_number_stays_so() -> None:
    x = np.ones((2, 3, 4, 4), "float32")
    x[1, 1, 2, 2] = np.nan
    for result in relax_cases.run(lambda v: operators.statistics(v, [0, 2, 3], EPS), x):
        np.testing.assert_array_equal(np.isnan(result.ravel()), [False, True, False])


def test_which_tensors_are_planes() -> None:
    view = norm_kernels.planes((8, 3, 4, 5), (0, 2, 3))
    assert view is not None
    assert (view.images, view.channels, view.places, view.kept) == (8, 3, 20, (1, 3, 1, 1))
    rows = norm_kernels.planes((8, 3, 4, 5), (2, 3))
    assert rows is not None
    assert (rows.images, rows.channels, rows.places, rows.kept) == (1, 24, 20, (8, 3, 1, 1))
    assert norm_kernels.planes((8, 3, 4), (1,)) is None


def test_loops_stay_as_they_are_and_sums_in_registers() -> None:
    device = targets.load("x86-64-v3")
    x = np.zeros((8, 960, 4, 4), "float32")
    mod = relax_cases.module(lambda v: operators.statistics(v, [0, 2, 3], EPS), x)
    (kernel,) = (f for f in lowering.lower(mod, device).functions.values() if f.attrs and SCHEDULED in f.attrs)
    (made,) = (f for f in norm_kernels_of(mod, device) if SCHEDULED in f.attrs)
    tvm.ir.assert_structural_equal(kernel.body, made.body)
    assert "AllocWorkspace" not in code(lowering.compile_module(mod, device).mod, "statistics")


def norm_kernels_of(mod: tvm.IRModule, device: tt.Device) -> list[Any]:
    legal = relax.transform.LegalizeOps(norm_kernels.legalization(device))(mod)
    return [f for f in legal.functions.values() if not isinstance(f, relax.Function)]


def code(module: Any, name: str) -> str:
    """The assembly of what is named so, in a compiled module."""
    text = next(m.inspect_source("asm") for m in module.imports if m.kind == "llvm")
    begin = text.index(f"{name}_compute_:")
    return text[begin : text.index(".Lfunc_end", text.index(".L__tvm_parallel_lambda:", begin))]


# ---- a network ----


def network(channels: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return nn.Sequential(first, norm, nn.ReLU(), nn.Conv2d(channels, 2, 3, padding=1))


def graph(model: nn.Module, x: torch.Tensor, plan: dict[str, LayerUpdate] | None = None) -> tt.TrainGraph:
    made = tt.trace(model, x, torch.zeros_like(model(x)), loss="mse", optimizer=tt.SGD(lr=0.1))
    return made if plan is None else made.apply(UpdatePlan(plan))


def kernels(traced: tt.TrainGraph) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Of the training step: the name of each kernel, and the shapes of what it reads."""
    mod = traced.module()
    for name in ("predict", "loss"):
        del mod[mod.get_global_var(name)]
    lowered = lowering.lower(mod, targets.load("x86-64-v3"))["train_step"]
    calls = [b.value for block in lowered.body.blocks for b in block.bindings if isinstance(b.value, relax.Call)]
    calls = [call for call in calls if call.op == tvm.ir.Op.get("relax.call_tir")]
    return [(call.args[0].name_hint, [tuple(int(d) for d in arg.ty.shape) for arg in call.args[1]]) for call in calls]


def reading(traced: tt.TrainGraph, shape: tuple[int, ...]) -> list[str]:
    """The kernels, but for convolutions, that read a map of ``shape``."""
    return [name for name, shapes in kernels(traced) if shape in shapes and "conv2d" not in name]


@pytest.mark.parametrize(("activation", "alone"), [(nn.ReLU, 0), (nn.ReLU6, 0), (nn.SiLU, 2)], ids=["ReLU", "ReLU6", "SiLU"])
def test_a_map_is_read_as_rarely_as_can_be(activation: type[nn.Module], alone: int) -> None:
    """For statistics, and for the two sums of the backward. What reads an activation or dX computes it, unless it has an exp in it."""
    model = network()
    model[2] = activation()
    names = reading(graph(model, torch.randn(4, 3, 10, 10)), (4, 8, 10, 10))
    assert [name.rstrip("0123456789") for name in names if "sum" in name or "statistics" in name] == [
        "statistics",
        "gradient_sums",
    ]
    elementwise = [name for name in names if name.startswith("fused")]
    assert len(names) == 2 + len(elementwise)
    assert len(elementwise) == alone, elementwise
    assert not any("rsqrt" in name for name in names)


@pytest.mark.parametrize(
    ("update", "sums"),
    [
        ({"1": LayerUpdate(weight=1.0, bias=True)}, ["gradient_sums"]),
        ({"1": LayerUpdate(weight=1.0, bias=False)}, ["gradient_sums"]),
        ({"1": LayerUpdate(weight=0.0, bias=True)}, ["sum"]),
        ({"3": LayerUpdate()}, []),
    ],
    ids=["both", "gamma", "beta", "neither"],
)
def test_running_statistics_need_what_is_trained_alone(update: dict[str, LayerUpdate], sums: list[str]) -> None:
    names = reading(graph(network().eval(), torch.randn(4, 3, 10, 10), update), (4, 8, 10, 10))
    assert [name.rstrip("0123456789").split("_where_")[-1] for name in names if "sum" in name] == sums, names


def test_a_trained_normalization_keeps_its_input_and_no_more() -> None:
    x = torch.randn(4, 3, 16, 16)
    summary = graph(network(), x).summary()
    image = 4 * 4 * 8 * 16 * 16
    # Beside the map: the loss's own, of two channels, and statistics.
    assert image <= summary.saved_features <= image + image // 4 + 512
    assert summary.saved_masks == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@settings(max_examples=3, deadline=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 17),
    plane=st.sampled_from(((1, 2), (7, 7), (5, 1), (3, 3), (13, 11), (4, 4))),
    shift=st.sampled_from((0.0, 20.0)),
)
def test_steps_are_pytorchs(
    dtype: torch.dtype, training: bool, batch: int, channels: int, plane: tuple[int, int], shift: float
) -> None:
    """Loss, parameters and running statistics over three steps."""
    model = network(channels).to(dtype).train(training)
    x = torch.randn(batch, 3, *plane, dtype=dtype) + shift
    y = torch.randn(batch, 2, *plane, dtype=dtype)
    step = tt.build(tt.trace(model, x, y, loss="mse", optimizer=tt.SGD(lr=RATE)), quick_device()).load()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        assert step(x.numpy(), y.numpy(), lr=RATE) == pytest.approx(loss.item(), rel=tolerance)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(
            step.state_dict()[name],
            value.numpy(),
            rtol=10 * tolerance,
            atol=tolerance,
            err_msg=f"{name}, {batch}, {channels}, {plane}",
        )


def test_the_variance_of_an_operator_of_its_own_is_the_same() -> None:
    """LayerNorm in an expression that is no network: legalized without the pass."""
    x = np.random.default_rng(0).standard_normal((4, 6, 9)).astype("float32")

    def layer_norm(v: relax.Var) -> relax.Expr:
        builder = relax.BlockBuilder.current()
        assert builder is not None
        return R.add(
            builder.emit(relax.TupleGetItem(builder.emit(operators.normalize(v, [2], EPS)), 0)), relax.const(1.0, "float32")
        )

    (got,) = relax_cases.run(layer_norm, x)
    want = (x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + EPS) + 1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
