"""Convolutions that become part of the depthwise one that reads them, and both of the projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_cases import close, module, on, run
from torch.nn import functional as F
from tvm import relax, tirx
from tvm.relax import op as R

from tvmtrain import lowering, targets, workload
from tvmtrain.schedules import cpu
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.targets import Caches, Device

rng = np.random.default_rng(0)
# A core's second cache holds no map; the third one some channels.
SMALL = Caches(l2=256, l3=2**16)
TINY = replace(targets.load("host"), cores=2, caches=SMALL)
# What schedules look like is looked at for a processor of known registers.
AVX2 = replace(targets.load("x86-64-v3"), cores=2, caches=SMALL)


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with on(TINY):
        yield


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("float32")


def block(stride: int, kernel: int = 3, *, padded: bool = True, read_twice: bool = False, residual: bool = False) -> Any:
    """An expansion and a depthwise convolution, each with a shift and ReLU6."""
    padding = [kernel // 2] * 4 if padded else [0] * 4

    def make(x: relax.Var, w: relax.Var, t: relax.Var, v: relax.Var, u: relax.Var) -> relax.Expr:
        emit = relax.BlockBuilder.current().emit
        z = emit(R.clip(R.add(R.nn.conv2d(x, w), t), 0.0, 6.0))
        groups = int(v.ty.shape[0])
        y = emit(R.nn.conv2d(z, v, strides=[stride, stride], padding=padding, groups=groups))
        out = R.clip(R.add(R.add(y, u), z) if residual else R.add(y, u), 0.0, 6.0)
        return relax.Tuple([out, z]) if read_twice else out

    return make


def operands(batch: int, channels: int, wide: int, size: tuple[int, int], kernel: int = 3) -> list[np.ndarray]:
    return [
        array(batch, channels, *size),
        array(wide, channels, 1, 1),
        array(wide, 1, 1),
        array(wide, 1, kernel, kernel),
        array(wide, 1, 1),
    ]


def wanted(arrays: list[np.ndarray], stride: int, *, padded: bool = True, residual: bool = False) -> np.ndarray:
    """The same by PyTorch, in double precision."""
    x, w, t, v, u = (torch.from_numpy(a).double() for a in arrays)
    z = (F.conv2d(x, w) + t).clamp(0, 6)
    y = F.conv2d(z, v, stride=stride, padding=v.shape[-1] // 2 if padded else 0, groups=len(v)) + u
    return (y + z if residual else y).clamp(0, 6).numpy()


def kernels(arrays: list[np.ndarray], make: Any, device: Device = AVX2) -> list[str]:
    """The scheduled loops of each kernel."""
    lowered = lowering.lower(module(make, *arrays), device)
    return [f.script() for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]


@pytest.mark.parametrize("stride", [1, 2])
def test_some_channels_of_an_image_at_a_time(stride: int) -> None:
    arrays = operands(2, 7, 24, (16, 16))
    (text,) = kernels(arrays, block(stride))
    assert text.count("T.parallel") == 1
    assert "T.parallel(T.int64(4))" in text, "two tiles of six channels are a task"
    close(run(block(stride), *arrays)[0], wanted(arrays, stride))


def test_others_stay_two_kernels() -> None:
    arrays = operands(2, 7, 24, (16, 16))
    assert len(kernels(arrays, block(1, read_twice=True))) == 2, "a map that the backward reads, too"
    assert len(kernels(arrays, block(1), replace(AVX2, caches=Caches()))) == 2, "a map that stays in the caches by itself"
    assert len(kernels(arrays, block(1), replace(AVX2, caches=Caches(l2=256)))) == 2, "no cache holds some channels"
    assert len(kernels(arrays, block(1), replace(AVX2, cores=5))) == 2, "four tasks for five cores"
    assert len(kernels(operands(2, 7, 23, (16, 16)), block(1))) == 2, "a prime number of channels"
    assert len(kernels(arrays, block(2, padded=False))) == 2, "a row that nothing reads"


def test_who_else_reads_the_map_in_another_function_keeps_it() -> None:
    arrays = operands(2, 7, 24, (16, 16))
    both = module(block(1), *arrays)
    both["other"] = module(block(1, read_twice=True), *arrays)["main"].with_attr("global_symbol", "other")
    lowered = lowering.lower(both, AVX2)
    calls = {name: workload.calls(lowered[name]).total() for name in ("main", "other")}
    assert calls == {"main": 1, "other": 2}


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 19),
    wide=st.sampled_from([1, 6, 7, 12, 30, 36]),
    size=st.tuples(st.sampled_from([1, 7, 8, 12, 14, 19]), st.sampled_from([1, 4, 7, 8, 16, 23])),
    stride=st.integers(1, 2),
    kernel=st.sampled_from([3, 5]),
    residual=st.booleans(),
)
def test_numbers_of_any_shape(
    batch: int, channels: int, wide: int, size: tuple[int, int], stride: int, kernel: int, residual: bool
) -> None:
    """Most become one kernel, some cannot."""
    arrays, residual = operands(batch, channels, wide, size, kernel), residual and stride == 1
    close(run(block(stride, kernel, residual=residual), *arrays)[0], wanted(arrays, stride, residual=residual))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(15, 8), (16, 24), (9, 16)])
@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_of_some_shapes(batch: int, size: tuple[int, int], stride: int, padded: bool) -> None:
    arrays = operands(batch, 5, 48, size)
    close(run(block(stride, padded=padded), *arrays)[0], wanted(arrays, stride, padded=padded))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(16, 16), (33, 32), (40, 8), (1, 48)])
@pytest.mark.parametrize("registers", [16, 32])
def test_numbers_in_bands_of_rows(registers: int, size: tuple[int, int], kernel: int, stride: int) -> None:
    arrays = operands(2, 5, 48, size, kernel)
    device = replace(TINY, vector_bits=128, vector_registers=registers, caches=replace(SMALL, l2=2**14))
    (got,) = run(block(stride, kernel), *arrays, device=device)
    close(got, wanted(arrays, stride))


def test_a_band_of_a_large_map_at_a_time() -> None:
    """12 channels' results and 7 of the image are 19 KB: two bands of that fill half of the cache."""
    device = replace(AVX2, caches=replace(SMALL, l2=20 * 1024))
    (text,) = kernels(operands(2, 7, 24, (16, 16)), block(2), device)
    assert "T.parallel(T.int64(8))" in text, "two images, two bands, two tiles of six channels twice"
    assert "T.where(T.int64(1) <=" in text, "the row that the next band computes, too, is not above the map"
    (text,) = kernels(operands(2, 7, 24, (16, 20)), block(2), device)
    assert "T.parallel(T.int64(4))" in text, "rows of no whole vectors stay together"


@pytest.mark.parametrize(
    "chosen", [Decisions(tile=1), Decisions(tile=3, order=1), Decisions(grain=1), Decisions(grain=2, taps=2)]
)
def test_numbers_of_other_decisions(chosen: Decisions, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cpu.schedule
    monkeypatch.setattr(cpu, "schedule", lambda f, device, _: whole(f, device, chosen))
    arrays = operands(2, 5, 48, (8, 16))
    close(run(block(2), *arrays)[0], wanted(arrays, 2))
    (text,) = kernels(arrays, block(2))
    assert text.count("T.parallel") == 1, "both in the same tasks"


# ---- with the projection that follows ----


def below(batch: int, channels: int, *size: int) -> Device:
    """Of the caches in which a map does not stay, the largest: half of it holds a band."""
    return replace(AVX2, caches=Caches(l2=4 * batch * channels * size[0] * size[1] - 4))


BAND = below(2, 48, 16, 16)


def bottleneck(stride: int = 1, *, window: int = 1, residual: bool = False, read_twice: bool = False, **geometry: Any) -> Any:
    """A convolution of ``window`` x ``window`` taps, with stride 2 if there are several, a depthwise one, and a projection.

    geometry: of the depthwise convolution, where it is not ``stride`` and as much padding as keeps the size.
    """

    def make(x: relax.Var, w: relax.Var, t: relax.Var, v: relax.Var, u: relax.Var, q: relax.Var, s: relax.Var) -> relax.Expr:
        emit = relax.BlockBuilder.current().emit
        first = {"strides": [2, 2], "padding": [window // 2] * 4} if window > 1 else {}
        z = emit(R.clip(R.add(R.nn.conv2d(x, w, **first), t), 0.0, 6.0))
        depthwise = {"strides": [stride, stride], "padding": [int(v.ty.shape[2]) // 2] * 4, **geometry}
        y = R.nn.conv2d(z, v, groups=int(v.ty.shape[0]), **depthwise)
        y = emit(R.clip(R.add(y, u), 0.0, 6.0))
        p = emit(R.add(R.nn.conv2d(y, q), s))
        out = R.add(p, x) if residual else p
        return relax.Tuple([out, y]) if read_twice else out

    return make


def of_bottleneck(
    batch: int, channels: int, wide: int, out: int, size: tuple[int, int], window: int = 1, kernel: int = 3
) -> list[np.ndarray]:
    x, _, *rest = operands(batch, channels, wide, size, kernel)
    return [x, array(wide, channels, window, window), *rest, array(out, wide, 1, 1), array(out, 1, 1)]


def bottleneck_wanted(arrays: list[np.ndarray], stride: int, *, window: int = 1, residual: bool = False) -> np.ndarray:
    """The same by PyTorch, in double precision."""
    x, w, t, v, u, q, s = (torch.from_numpy(a).double() for a in arrays)
    z = (F.conv2d(x, w, stride=2 if window > 1 else 1, padding=window // 2) + t).clamp(0, 6)
    y = (F.conv2d(z, v, stride=stride, padding=v.shape[-1] // 2, groups=len(v)) + u).clamp(0, 6)
    p = F.conv2d(y, q) + s
    return (p + x if residual else p).numpy()


@pytest.mark.parametrize(
    ("stride", "window", "size", "tasks"), [(1, 1, (16, 16), 4), (2, 1, (32, 32), 8), (1, 3, (32, 32), 4), (2, 3, (64, 64), 16)]
)
def test_three_in_bands_of_rows(stride: int, window: int, size: tuple[int, int], tasks: int) -> None:
    arrays, make = of_bottleneck(2, 3, 48, 8, size, window), bottleneck(stride, window=window)
    (text,) = kernels(arrays, make, BAND)
    assert text.count("T.parallel") == 1
    assert f"T.parallel(T.int64({tasks}))" in text
    (got,) = run(make, *arrays, device=BAND)
    close(got, bottleneck_wanted(arrays, stride, window=window))


def test_who_does_not_become_part_of_the_projection() -> None:
    arrays = of_bottleneck(2, 7, 48, 8, (16, 16))
    assert len(kernels(arrays, bottleneck(1), BAND)) == 1
    assert len(kernels(arrays, bottleneck(1, read_twice=True), BAND)) == 2, "a map that the backward reads, too"
    assert len(kernels(arrays, bottleneck(1), replace(BAND, caches=Caches()))) == 3, (
        "maps that stay in the caches by themselves"
    )
    assert len(kernels(arrays, bottleneck(1), below(1, 48, 16, 16))) == 2, "too few rows fit"
    assert len(kernels(arrays, bottleneck(1), replace(BAND, cores=3))) == 3, "four tasks for three cores"
    strided = of_bottleneck(2, 3, 48, 8, (32, 32), 3)
    assert len(kernels(strided, bottleneck(1, window=3), below(1, 48, 16, 16))) == 3, (
        "without a band several taps are not chained"
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_no_whole_vectors_are_not_cut_into_bands(stride: int) -> None:
    size = (16, 20) if stride == 1 else (32, 24)  # those of the product; those of the results
    arrays, device = of_bottleneck(2, 7, 48, 8, size), below(2, 48, 16, 12)
    assert len(kernels(arrays, bottleneck(stride), device)) == 2
    (got,) = run(bottleneck(stride), *arrays, device=device)
    close(got, bottleneck_wanted(arrays, stride))


def test_a_product_is_part_of_one_row_only() -> None:
    """MobileNetV1: the projection of one depthwise convolution makes what the next one reads."""
    shapes = [(48, 7, 1, 1), (48, 1, 3, 3), (48, 48, 1, 1), (48, 1, 3, 3), (48, 48, 1, 1)]
    arrays = [array(2, 7, 16, 16), *(array(*shape) / 3 for shape in shapes)]

    def make(x: relax.Var, *weights: relax.Var) -> relax.Expr:
        for w in weights:
            groups = int(w.ty.shape[0]) if int(w.ty.shape[1]) == 1 else 1
            padding = [int(w.ty.shape[2]) // 2] * 4
            x = relax.BlockBuilder.current().emit(R.clip(R.nn.conv2d(x, w, padding=padding, groups=groups), 0.0, 6.0))
        return x

    functions = lowering.lower(module(make, *arrays), BAND).functions.items()
    layers = sorted(name.name_hint.count("conv2d") for name, f in functions if isinstance(f, tirx.PrimFunc))
    assert layers == [1, 1, 3], "the first three are one kernel; the last two begin with its results"
    want = torch.from_numpy(arrays[0]).double()
    for w in map(torch.from_numpy, arrays[1:]):
        want = F.conv2d(want, w.double(), padding=w.shape[-1] // 2, groups=len(w) if w.shape[1] == 1 else 1).clamp(0, 6)
    (got,) = run(make, *arrays, device=BAND)
    close(got, want.numpy())


@pytest.mark.parametrize("vector", [(128, 32), (256, 16), (512, 32)])
@pytest.mark.parametrize(
    ("kernel", "size", "results", "geometry"),
    [
        (5, (32, 16), (32, 16), {"padding": [2, 2, 2, 2]}),
        (7, (48, 16), (48, 16), {"padding": [3, 3, 3, 3]}),
        (5, (64, 32), (32, 16), {"padding": [2, 2, 2, 2], "strides": [2, 2]}),
        (3, (32, 16), (32, 16), {"padding": [2, 2, 2, 2], "dilation": [2, 2]}),
        (3, (32, 16), (32, 16), {"padding": [2, 1, 0, 1]}),
        (3, (34, 16), (32, 16), {"padding": [0, 1, 0, 1]}),
        (3, (64, 16), (32, 16), {"padding": [1, 1, 1, 1], "strides": [2, 1]}),
        (3, (32, 32), (32, 16), {"padding": [1, 1, 1, 1], "strides": [1, 2]}),
    ],
)
def test_numbers_of_any_geometry(
    kernel: int, size: tuple[int, int], results: tuple[int, int], geometry: dict[str, Any], vector: tuple[int, int]
) -> None:
    arrays = of_bottleneck(2, 5, 96, 8, size, kernel=kernel)
    device = replace(TINY, caches=below(2, 96, *results).caches, vector_bits=vector[0], vector_registers=vector[1])
    assert len(kernels(arrays, bottleneck(**geometry), device)) == 1
    x, w, t, v, u, q, s = (torch.from_numpy(a).double() for a in arrays)
    top, left, bottom, right = geometry["padding"]
    z = F.pad((F.conv2d(x, w) + t).clamp(0, 6), (left, right, top, bottom))
    y = F.conv2d(z, v, stride=geometry.get("strides", 1), dilation=geometry.get("dilation", 1), groups=len(v))
    (got,) = run(bottleneck(**geometry), *arrays, device=device)
    close(got, (F.conv2d((y + u).clamp(0, 6), q) + s).numpy())


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    wide=st.sampled_from([1, 7, 12, 30, 48]),
    out=st.sampled_from([1, 5, 8, 24]),
    size=st.tuples(st.sampled_from([8, 14, 16, 21, 40]), st.sampled_from([4, 8, 12, 16, 24])),
    stride=st.integers(1, 2),
    window=st.sampled_from([1, 3]),
    kernel=st.sampled_from([3, 5]),
    cache=st.sampled_from([4, 20, 48, 90]),
    vector=st.sampled_from([(128, 16), (128, 32), (256, 16)]),
)
def test_numbers_of_bottlenecks_of_any_shape(
    batch: int,
    channels: int,
    wide: int,
    out: int,
    size: tuple[int, int],
    stride: int,
    window: int,
    kernel: int,
    cache: int,
    vector: tuple[int, int],
) -> None:
    """Some become one kernel, some two, others stay three."""
    size = (size[0] * (2 if window > 1 else 1), size[1] * (2 if window > 1 else 1))
    arrays = of_bottleneck(batch, channels, wide, out, size, window, kernel)
    device = replace(TINY, vector_bits=vector[0], vector_registers=vector[1], caches=replace(SMALL, l2=cache * 1024))
    (got,) = run(bottleneck(stride, window=window), *arrays, device=device)
    close(got, bottleneck_wanted(arrays, stride, window=window))


@pytest.mark.parametrize("size", [(16, 16), (40, 8), (33, 24)])
@pytest.mark.parametrize("residual", [True, False])
def test_numbers_of_a_projection_and_what_is_added_to_it(residual: bool, size: tuple[int, int]) -> None:
    arrays, device = of_bottleneck(2, 8, 48, 8, size), below(2, 48, *size)
    assert len(kernels(arrays, bottleneck(1, residual=residual), device)) == 1
    (got,) = run(bottleneck(1, residual=residual), *arrays, device=device)
    close(got, bottleneck_wanted(arrays, 1, residual=residual))


@pytest.mark.parametrize(
    "chosen", [Decisions(tile=1), Decisions(tile=3, grain=1), Decisions(grain=2, taps=2), Decisions(taps=1)]
)
def test_numbers_of_bottlenecks_of_other_decisions(chosen: Decisions, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cpu.schedule
    monkeypatch.setattr(cpu, "schedule", lambda f, device, _: whole(f, device, chosen))
    arrays = of_bottleneck(2, 7, 48, 8, (32, 16))
    device = below(2, 48, 32, 16)
    (text,) = kernels(arrays, bottleneck(1), device)
    assert text.count("T.parallel") == 1, "all three in the same tasks"
    (got,) = run(bottleneck(1), *arrays, device=device)
    close(got, bottleneck_wanted(arrays, 1))
