"""Schedules change how fast a kernel is, never what it computes; and the ones that matter are really vectorized."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_cases import close, module, run
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.relax.op.grad import max_pool2d_backward
from tvm.s_tir import Schedule

from tvmtrain import filtering, lowering, operators, registers, schedules, targets
from tvmtrain.schedules import cpu, primitives, tiles, windows
from tvmtrain.schedules.blocks import FAILURES, Block
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.targets import Device

rng = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("float32")


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def normalized(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


AVX2 = targets.load("x86-64-v3")
AVX512 = replace(AVX2, vector_bits=512, vector_registers=32, caches=replace(AVX2.caches, l2=2**20))


def updated(x: relax.Expr, w: relax.Expr, gy: relax.Expr) -> relax.Expr:
    """The weight of a pointwise convolution of relu(x) after a step of SGD."""
    gradient = operators.conv2d_wgrad(R.nn.conv2d(R.nn.relu(x), w), gy)
    return R.subtract(w, R.multiply(gradient, relax.const(0.125)))


def updated_in_numpy(x: np.ndarray, w: np.ndarray, gy: np.ndarray) -> np.ndarray:
    return w - 0.125 * np.einsum("nchw,nohw->oc", np.maximum(x, 0), gy)[..., None, None]


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    # name: in Relax, in NumPy, shapes
    "add": (R.add, np.add, ((7, 11), (7, 11))),
    "add, long": (R.add, np.add, ((3, 40000), (3, 40000))),
    "add, prime": (R.add, np.add, ((10007,), (10007,))),
    "scalar": (R.add, np.add, ((), ())),
    "channel scale": (lambda x, s: R.nn.relu(R.multiply(x, s)), lambda x, s: np.maximum(x * s, 0), ((4, 24, 7, 7), (24, 1, 1))),
    "channel scale, even": (R.multiply, np.multiply, ((8, 24, 16, 16), (24, 1, 1))),
    "row scale": (R.multiply, np.multiply, ((64, 100), (64, 1))),
    "transpose": (lambda x: R.permute_dims(x, [1, 0]), np.transpose, ((200, 137),)),
    "heads": (lambda x: R.permute_dims(x, [0, 2, 1, 3]), lambda x: x.transpose(0, 2, 1, 3), ((2, 19, 3, 64),)),
    "pad": (
        lambda x: R.nn.pad(x, [0, 0, 0, 0, 1, 2, 3, 1]),
        lambda x: np.pad(x, ((0, 0), (0, 0), (1, 2), (3, 1))),
        ((2, 8, 30, 30),),
    ),
    "concat": (lambda a, b: R.concat([a, b], 1), lambda a, b: np.concatenate([a, b], 1), ((2, 8, 14, 14), (2, 5, 14, 14))),
    "matmul": (R.matmul, np.matmul, ((64, 96), (96, 160))),
    "matmul, primes": (R.matmul, np.matmul, ((13, 31), (31, 197))),
    "matmul, classes": (R.matmul, np.matmul, ((8, 1280), (1280, 10))),
    "matmul, one row": (R.matmul, np.matmul, ((1, 64), (64, 1000))),
    "matmul, batches": (R.matmul, np.matmul, ((2, 3, 197, 64), (2, 3, 64, 197))),
    "matmul, transposed": (lambda a, b: R.matmul(a, R.permute_dims(b)), lambda a, b: a @ b.T, ((64, 96), (160, 96))),
    "matmul, wide": (R.matmul, np.matmul, ((96, 33), (33, 528))),
    "pointwise, large map": (
        R.nn.conv2d,
        lambda x, w: np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]),
        ((4, 96, 32, 32), (24, 96, 1, 1)),
    ),
    "pointwise, large map of a prime": (
        R.nn.conv2d,
        lambda x, w: np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]),
        ((3, 40, 37, 41), (18, 40, 1, 1)),
    ),
    "pointwise, runs of four, then more": (
        lambda x, w, s, r: R.add(R.nn.relu(R.add(R.nn.conv2d(x, w), s)), r),
        lambda x, w, s, r: np.maximum(np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]) + s, 0) + r,
        ((4, 23, 14, 14), (26, 23, 1, 1), (26, 1, 1), (4, 26, 14, 14)),
    ),
    "pointwise, runs of four, one row": (
        lambda x, w, s: R.nn.relu(R.add(R.nn.conv2d(x, w), s)),
        lambda x, w, s: np.maximum(np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]) + s, 0),
        ((4, 23, 1, 36), (26, 23, 1, 1), (26, 1, 1)),
    ),
    "weight, blocks of channels": (updated, updated_in_numpy, ((4, 96, 8, 8), (24, 96, 1, 1), (4, 24, 8, 8))),
    "weight, 4x4": (updated, updated_in_numpy, ((3, 64, 4, 4), (40, 64, 1, 1), (3, 40, 4, 4))),
    "weight, over filters": (updated, updated_in_numpy, ((2, 80, 32, 32), (24, 80, 1, 1), (2, 24, 32, 32))),
    "weight, all filters in a tile": (updated, updated_in_numpy, ((2, 96, 32, 32), (16, 96, 1, 1), (2, 16, 32, 32))),
    "weight, 28x28": (updated, updated_in_numpy, ((4, 72, 28, 28), (24, 72, 1, 1), (4, 24, 28, 28))),
    "weight, no whole tiles": (updated, updated_in_numpy, ((2, 37, 7, 7), (19, 37, 1, 1), (2, 19, 7, 7))),
    "pointwise, 4x4": (
        lambda x, w, s: R.nn.relu(R.add(R.nn.conv2d(x, w), s)),
        lambda x, w, s: np.maximum(np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]) + s, 0),
        ((8, 48, 4, 4), (40, 48, 1, 1), (40, 1, 1)),
    ),
    "pointwise, a weight in panels": (
        lambda x, w, gy: operators.conv2d_dgrad(R.nn.conv2d(x, w), gy),
        lambda x, w, gy: np.einsum("nohw,oc->nchw", gy, w[:, :, 0, 0]),
        ((8, 72, 8, 8), (400, 72, 1, 1), (8, 400, 8, 8)),
    ),
    "pointwise, forward in panels": (
        lambda x, w: R.nn.conv2d(x, w),
        lambda x, w: np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]),
        ((4, 520, 16, 16), (136, 520, 1, 1)),
    ),
    "matmul, then more": (
        lambda a, b, c, d: R.add(R.nn.relu(R.add(R.matmul(a, b), c)), d),
        lambda a, b, c, d: np.maximum(a @ b + c, 0) + d,
        ((64, 96), (96, 160), (160,), (64, 160)),
    ),
    "sum of everything": (R.sum, np.sum, ((8, 96, 16, 16),)),
    "sum of squares": (lambda x: R.sum(R.multiply(x, x)), lambda x: (x * x).sum(), ((1280, 320),)),
    "sum, prime": (R.sum, np.sum, ((100003,),)),
    "sum, small": (R.sum, np.sum, ((5, 3),)),
    "bias": (lambda x: R.sum(x, [0, 2, 3]), lambda x: x.sum((0, 2, 3)), ((8, 24, 14, 14),)),
    "bias, 7x7": (lambda x: R.sum(x, [0, 2, 3]), lambda x: x.sum((0, 2, 3)), ((8, 24, 7, 7),)),
    "bias, one image": (lambda x: R.sum(x, [0, 2, 3]), lambda x: x.sum((0, 2, 3)), ((1, 3, 128, 128),)),
    "bias of linear": (lambda x: R.sum(x, [0]), lambda x: x.sum(0), ((50, 768),)),
    "bias of tokens": (lambda x: R.sum(x, [0, 1]), lambda x: x.sum((0, 1)), ((4, 197, 10),)),
    "batch statistics": (lambda x: R.variance(x, [0, 2, 3]), lambda x: x.var((0, 2, 3)), ((8, 24, 14, 14),)),
    "spatial mean": (lambda x: R.mean(x, [2, 3]), lambda x: x.mean((2, 3)), ((8, 40, 7, 7),)),
    "softmax": (lambda x: R.nn.softmax(x, -1), lambda x: softmax(x, -1), ((8, 10),)),
    "softmax, attention": (lambda x: R.nn.softmax(x, -1), lambda x: softmax(x, -1), ((2, 3, 197, 197),)),
    "softmax, dense": (lambda x: R.nn.log_softmax(x, 1), lambda x: np.log(softmax(x, 1)), ((2, 21, 16, 16),)),
    "layer norm": (
        lambda x, s, b: R.nn.layer_norm(x, s, b, [-1]),
        lambda x, s, b: normalized(x, (-1,)) * s + b,
        ((4, 65, 192), (192,), (192,)),
    ),
    "group norm": (
        lambda x, s, b: R.nn.group_norm(x, s, b, 4, 1, [2, 3]),
        lambda x, s, b: normalized(x.reshape(2, 4, -1), (2,)).reshape(x.shape) * s[:, None, None] + b[:, None, None],
        ((2, 16, 9, 9), (16,), (16,)),
    ),
    "largest": (lambda x: R.max(x, [1]), lambda x: x.max(1), ((64, 1000),)),
    "running sum": (lambda x: R.cumsum(x, 1), lambda x: np.cumsum(x, 1), ((4, 33),)),
    "position of the largest": (lambda x: R.argmax(x, 1), lambda x: x.argmax(1), ((8, 10),)),
}


def right(name: str, device: Device | None = None) -> None:
    """The case's kernel gives NumPy's numbers."""
    in_relax, in_numpy, shapes = CASES[name]
    # Numbers of its own: a sum that happens to come out near zero says nothing of its addends' rounding.
    own = np.random.default_rng(zlib.crc32(name.encode()))
    arrays = [own.standard_normal(shape).astype("float32") for shape in shapes]
    (got,) = run(in_relax, *arrays, device=device)
    close(got, np.asarray(in_numpy(*(a.astype("float64") for a in arrays))))


@pytest.mark.parametrize("name", CASES)
def test_numbers_stay_the_same(name: str) -> None:
    right(name)


@pytest.mark.parametrize("cores", [2, 6])
@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("weight", "pointwise"))])
def test_vectors_of_any_length_give_the_same_numbers(name: str, bits: int, cores: int) -> None:
    """LLVM makes shorter vectors of those that this machine does not have."""
    registers_of = 16 if bits == 256 else 32
    right(name, replace(targets.load("host"), vector_bits=bits, vector_registers=registers_of, cores=cores))


def scheduled(make: Callable[..., relax.Expr], *shapes: tuple[int, ...], device: Device = AVX2) -> str:
    """The scheduled loops of the one kernel that ``make`` becomes."""
    lowered = lowering.lower(module(make, *(array(*s) for s in shapes)), device)
    (kernel,) = [f for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]
    return kernel.script()


def test_a_matrix_product_keeps_a_tile_in_registers_and_writes_what_follows_at_once() -> None:
    text = scheduled(lambda a, b, c: R.nn.relu(R.add(R.matmul(a, b), c)), (64, 96), (96, 160), (160,))
    assert 'scope="local"' in text
    assert text.count("T.parallel") == 1
    assert "T.vectorized(T.int64(8))" in text


def test_the_images_of_a_pointwise_convolution_are_rows_of_a_matrix() -> None:
    text = scheduled(lambda x, w: R.nn.conv2d(x, w), (2, 32, 28, 28), (64, 32, 1, 1))
    assert text.count("T.parallel") == 1
    assert "T.int64(784)" in text


def test_columns_that_many_rows_read_are_copied_first() -> None:
    text = scheduled(R.matmul, (64, 48), (48, 480))
    assert text.count("T.parallel") == 1
    assert "v1_global" in text
    assert "v1_global" not in scheduled(R.matmul, (8, 48), (48, 480)), "too few tiles would read them"


def test_strips_are_brought_together() -> None:
    """As many as divide the map's (64, 256) and fill a quarter of the cache; the numbers are test_numbers_stay_the_same's."""
    many = scheduled(R.nn.conv2d, (4, 96, 32, 32), (24, 96, 1, 1))
    (loops,) = [line for line in many.splitlines() if "in T.grid(T.int64(96), T.int64(16))" in line]
    assert loops, "eight strips of two vectors for each of 96 channels"
    pages = scheduled(R.nn.conv2d, (8, 144, 28, 28), (16, 144, 1, 1))
    assert "in T.grid(T.int64(144), T.int64(14))" in pages, "few tiles of rows, but channels nearly a page apart"
    few = scheduled(R.nn.conv2d, (4, 16, 64, 64), (32, 16, 1, 1))
    assert "for o_0, j_0_1 in T.grid(T.int64(8), T.int64(32))" in few, "each tile of rows writes runs of 32 strips"


def test_a_weight_that_all_columns_read_anew_is_brought_into_panels() -> None:
    """dX goes across the weight's rows, and 128 KB are more than the columns leave in the cache; 16 KB are not."""

    def dgrad(x: relax.Expr, w: relax.Expr, gy: relax.Expr) -> relax.Expr:
        return operators.conv2d_dgrad(R.nn.conv2d(x, w), gy)

    panels = "T.sblock_alloc_buffer((T.int64(16), T.int64(512), T.int64(1), T.int64(1), T.int64(4)))"
    assert panels in scheduled(dgrad, (8, 64, 8, 8), (512, 64, 1, 1), (8, 512, 8, 8), device=AVX512)
    assert "v1_global" not in scheduled(dgrad, (8, 64, 8, 8), (64, 64, 1, 1), (8, 64, 8, 8), device=AVX512)


def test_what_parts_of_a_large_map_add_to_a_weight_stays_in_registers() -> None:
    text = scheduled(updated, (8, 256, 48, 48), (256, 256, 1, 1), (8, 256, 48, 48), device=AVX512)
    (tile,) = [line for line in text.splitlines() if "wgrad_local = " in line]
    assert 'scope="local"' in tile
    before, after = text.split('T.sblock("wgrad_part_init")')
    assert before.count("T.parallel") == 1
    assert 'T.sblock("channels_last_local_o")' in after, "parts are copied one by one"


def test_what_parts_add_is_never_kept_for_all_of_them() -> None:
    """Not by other decisions, and not where a kernel's schedule does not add it up."""
    shapes = (8, 256, 48, 48), (256, 256, 1, 1), (8, 256, 48, 48)
    fused = lowering.fuse(module(updated, *(array(*s) for s in shapes)), AVX512)
    (kernel,) = [f for f in fused.functions.values() if isinstance(f, tirx.PrimFunc)]
    assert "wgrad_local = " in cpu.schedule(kernel, AVX512, Decisions(template=1)).script(), "a tile of one part"
    for device, channels in ((targets.load("jetson-nano"), 256), (AVX512, 3)):
        shapes = (8, channels, 96, 96), (512, channels, 3, 3), (8, 512, 94, 94)
        text = lowering.fuse(
            module(lambda x, w, gy: operators.conv2d_wgrad(R.nn.conv2d(x, w), gy), *(array(*s) for s in shapes)), device
        )
        assert ("wgrad_part" in text.script()) == (channels == 3)


def test_copies_across_rows_are_shuffled_in_registers() -> None:
    shapes = (8, 96, 8, 8), (24, 96, 1, 1), (8, 24, 8, 8)
    assert "T.Shuffle" in scheduled(updated, *shapes)
    assert "T.Shuffle" in scheduled(updated, *shapes, device=targets.load("raspberry-pi-4b"))
    assert "T.Shuffle" not in scheduled(updated, (8, 96, 7, 7), (24, 96, 1, 1), (8, 24, 7, 7)), "rows of seven"


def test_a_small_weight_is_updated_as_soon_as_its_gradient_is_there() -> None:
    assert scheduled(updated, (8, 96, 8, 8), (24, 96, 1, 1), (8, 24, 8, 8)).count("T.parallel") == 1
    assert scheduled(updated, (8, 640, 4, 4), (320, 640, 1, 1), (8, 320, 4, 4)).count("T.parallel") == 3, (
        "panels, then more than the cache"
    )


def test_rows_that_one_tile_reads_are_made_there() -> None:
    text = scheduled(updated, (8, 96, 32, 32), (16, 96, 1, 1), (8, 16, 32, 32))
    (made,) = [line for line in text.splitlines() if 'T.sblock("pad")' in line]
    first, *_ = text.split(made)
    assert 'T.sblock("channels_last_local_o")' in first, "in the tasks"
    assert "for i0_0 in range" in first, "in the loop over tiles"


def test_a_weight_waits_for_what_else_its_update_reads() -> None:
    def step(x: relax.Expr, w: relax.Expr, gy: relax.Expr, s: relax.Expr) -> relax.Expr:
        return R.subtract(w, R.divide(operators.conv2d_wgrad(R.nn.conv2d(x, w), gy), R.sqrt(s)))

    text = scheduled(step, (8, 96, 8, 8), (24, 96, 1, 1), (8, 24, 8, 8), (24, 1, 1, 1))
    assert 'T.sblock("wgrad_init")' in text, "a tile in registers"


def test_lines_of_eight_are_not_cut() -> None:
    """Six cores with vectors of four share tiles of 12 channels."""
    text = scheduled(updated, (4, 72, 28, 28), (24, 72, 1, 1), (4, 24, 28, 28), device=targets.load("jetson-orin-nano-cpu"))
    assert "T.where" not in text


def test_rows_a_power_of_two_apart_are_few_enough_for_the_nearest_cache() -> None:
    """Of a 32x32 map, 4 KB apart: eight of them are all that one set of the cache holds."""
    text = scheduled(updated, (8, 16, 32, 32), (96, 16, 1, 1), (8, 96, 32, 32), device=AVX512)
    assert "in T.unroll(T.int64(8))" in text
    assert "in T.unroll(T.int64(16))" not in text


def test_maps_of_one_vector_lie_side_by_side() -> None:
    shapes = (8, 48, 4, 4), (40, 48, 1, 1)
    assert "T.int64(128)" in scheduled(R.nn.conv2d, *shapes, device=AVX512), "a line of all images"
    assert "T.int64(128)" not in scheduled(R.nn.conv2d, *shapes), "two vectors each"


def test_rows_of_all_images_are_read_by_the_taps_of_several_rows() -> None:
    def conv(x: relax.Expr, w: relax.Expr) -> relax.Expr:
        return R.nn.conv2d(x, w, padding=1)

    text = scheduled(conv, (4, 32, 8, 8), (48, 32, 3, 3), device=AVX512)
    assert "packed_rows" in text
    assert "T.vectorized(T.int64(16))" in text
    assert re.search(r"for ky in T.unroll\(T.int64\(3\)\)", text), "a line that three taps read is loaded once"
    assert "packed_rows" not in scheduled(conv, (1, 32, 8, 8), (48, 32, 3, 3), device=AVX512), "half of a vector"
    assert "packed_rows" not in scheduled(conv, (4, 32, 8, 8), (48, 32, 3, 3)), "narrow vectors wait for no loads"


@pytest.mark.parametrize(
    ("w", "gy"),
    [
        pytest.param((144, 24, 1, 1), (8, 144, 7, 7), id="one tile of filters, one tap"),
        pytest.param((64, 24, 3, 3), (4, 64, 8, 8), id="rows of all images"),
        pytest.param((320, 24, 3, 3), (4, 320, 8, 8), id="rows of all images, a sum in layers"),
    ],
)
def test_weights_that_a_sum_goes_across_are_copied(w: tuple[int, ...], gy: tuple[int, ...]) -> None:
    def dgrad(x: relax.Expr, weight: relax.Expr, gy: relax.Expr) -> relax.Expr:
        return operators.conv2d_dgrad(R.nn.conv2d(x, weight, padding=w[2] // 2), gy)

    text = scheduled(dgrad, (gy[0], w[1], *gy[2:]), w, gy, device=AVX512)
    assert re.search(r'T.sblock\("\w+_global"\)', text)
    assert ("packed_rows" in text) == (w[2] == 3)


def blocks_of(make: Callable[..., relax.Expr], *shapes: tuple[int, ...]) -> list[Block]:
    """Those of the one kernel, before it is scheduled."""
    fused = lowering.fuse(module(make, *(array(*s) for s in shapes)), AVX512)
    (kernel,) = [f for f in fused.functions.values() if isinstance(f, tirx.PrimFunc)]
    return cpu.blocks_of(Schedule(kernel))


def product_of(make: Callable[..., relax.Expr], *shapes: tuple[int, ...]) -> Block:
    (product,) = [b for b in blocks_of(make, *shapes) if b.reduction and len(b.reads) > 1]
    return product


def tiles_of(make: Callable[..., relax.Expr], *shapes: tuple[int, ...]) -> list[dict[int, int]]:
    """Of the tiles of neighbours of a product: axis -> how many of it, with the vectors side by side under -1."""
    return [dict(tile.rows) | {-1: tile.columns} for tile in windows.window_tiles(product_of(make, *shapes), AVX512, 4)]


def test_a_weight_gradient_has_three_vectors_with_eight_filters() -> None:
    def wgrad(x: relax.Expr, w: relax.Expr, gy: relax.Expr) -> relax.Expr:
        return operators.conv2d_wgrad(R.nn.conv2d(x, w), gy)

    tile = tiles.register_tile(product_of(wgrad, (2, 96, 8, 8), (64, 96, 1, 1), (2, 64, 8, 8)), AVX512, whole=False)
    assert tile is not None
    assert (tile.columns, [size for _, size in tile.rows]) == (3, [8])


def test_a_step_along_an_axis_of_one_step_moves_nothing() -> None:
    (block,) = blocks_of(R.add, (1, 24), (1, 24))
    assert [read.strides for read in block.reads] == [(0, 1), (0, 1)]


def test_a_tile_of_neighbours_loads_the_lines_that_they_share_once() -> None:
    def conv(x: relax.Expr, w: relax.Expr) -> relax.Expr:
        return R.nn.conv2d(x, w, padding=1)

    def wgrad(x: relax.Expr, w: relax.Expr, gy: relax.Expr) -> relax.Expr:
        return operators.conv2d_wgrad(conv(x, w), gy)

    filters, rows, places = 1, 2, -1
    assert tiles_of(conv, (2, 16, 16, 16), (32, 16, 3, 3))[0] == {filters: 4, rows: 4, places: 1}
    assert tiles_of(conv, (2, 16, 32, 32), (32, 16, 3, 3))[0] == {filters: 4, rows: 2, places: 2}
    columns, filters = 1, 2
    assert tiles_of(wgrad, (2, 32, 16, 16), (32, 32, 3, 3), (2, 32, 16, 16))[0] == {filters: 4, columns: 3, places: 2}
    assert tiles_of(lambda x, w: R.nn.conv2d(x, w), (2, 16, 16, 16), (32, 16, 1, 1)) == [], "nobody shares lines"
    assert tiles_of(conv, (2, 16, 16, 16), (32, 16, 13, 13)) == [], "too many taps to write out"


@pytest.mark.parametrize("device", [AVX512, *map(targets.load, ("x86-64-v3", "aarch64", "raspberry-pi-3b", "jetson-nano-cpu"))])
def test_every_register_may_hold_results(device: Device) -> None:
    assert device.vector_registers * device.vector_bits // 8 <= registers.LARGEST["local"]


def test_primitives_are_called_without_a_check_in_python() -> None:
    wrapped = [name for name, f in vars(Schedule).items() if isinstance(f, FunctionType) and hasattr(f, "__wrapped__")]
    assert not wrapped
    lowered = lowering.lower(module(R.add, array(7, 11), array(7, 11)), targets.load("x86-64-v3"))
    (kernel,) = [f for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]
    sch = Schedule(kernel)
    block = sch.get_sblock("root")
    for refused in (lambda: sch.get_loops(3), lambda: sch.vectorize(block), lambda: sch.get_sblock(1.5)):
        with pytest.raises(FAILURES):
            refused()


@pytest.mark.parametrize("values", [[], [3], [3, "a", 2.5]])
def test_arrays_are_gone_through_element_by_element(values: list) -> None:
    array = tvm_ffi.Array(values)
    assert [*array] == values == [array[i] for i in range(len(array))]
    assert tvm_ffi.Array.__iter__ is primitives._elements


def test_a_line_of_all_images_is_read_and_written_in_runs_of_one_image() -> None:
    text = scheduled(lambda x, w: R.nn.relu(R.nn.conv2d(x, w)), (4, 24, 14, 14), (48, 24, 1, 1))
    assert text.count("T.parallel(T.int64(49))") == text.count("T.parallel") == 1, "strips of two vectors"
    assert text.count("T.vectorized(T.int64(4))") == 2, "the copy of a strip, and the results"
    assert "T.vectorized(T.int64(8))" in text, "the product"
    assert re.search(r"conv2d_local\[\w+, \w+ \* T.int64\(4\) \+ \w+\]", text), "places simple enough for results in registers"
    assert "T.int64(49)" not in scheduled(R.nn.conv2d, (3, 24, 14, 14), (48, 24, 1, 1)), "three images are no whole strips"


@pytest.mark.parametrize("size", [(24, 24), (23, 25)])
def test_patches_are_summed_row_by_row(size: tuple[int, int]) -> None:
    text = scheduled(lambda x: filtering.patch_mean(x, filtering.of_output(size, (4, 4))), (4, 16, *size))
    assert text.count("T.parallel") == 1, "one pass over the map"
    assert "T.vectorized(T.int64(8))" in text or size[1] % 8


def test_a_patch_of_two_columns_is_spread_by_pairs() -> None:
    def spread(size: tuple[int, int], patch: tuple[int, int]) -> str:
        patches = filtering.of_output(size, patch)
        return scheduled(lambda g: filtering.unpatch(g, patches), (4, 16, *patches.places))

    assert "for v_1 in T.unroll(T.int64(2))" in spread((28, 28), (2, 2))
    assert "T.unroll" not in spread((28, 28), (4, 4))
    assert "T.unroll" not in spread((27, 28), (2, 2)), "a row is left over"


def test_depthwise_padding_stays_with_its_core() -> None:
    text = scheduled(lambda x, w: R.nn.conv2d(x, w, padding=1, groups=32), (2, 32, 28, 28), (32, 1, 3, 3))
    assert text.count("T.parallel") == 1


def test_a_gradient_through_a_stride_is_made_plane_by_plane_and_masked_at_once() -> None:
    def step(x: relax.Expr, w: relax.Expr, gy: relax.Expr) -> relax.Expr:
        dx = operators.conv2d_dgrad(R.nn.conv2d(x, w, strides=2, padding=1, groups=32), gy)
        return R.where(R.greater(x, relax.const(0.0)), dx, relax.const(0.0))

    text = scheduled(step, (2, 32, 28, 28), (32, 1, 3, 3), (2, 32, 14, 14))
    assert text.count("T.parallel") == 1
    assert text.count("T.unroll(T.int64(2))") == 2


def test_max_poolings_gradient_is_made_plane_by_plane() -> None:
    options = ((3, 3), (2, 2), [1] * 4)
    text = scheduled(lambda gy, x: max_pool2d_backward(gy, x, *options), (2, 32, 14, 14), (2, 32, 28, 28))
    assert text.count("T.parallel") == 1


@pytest.mark.parametrize("shape", [(8, 96, 16, 16), (1, 96, 16, 16), (4096,)])
def test_long_sums_run_in_vectors_on_every_core(shape: tuple[int, ...]) -> None:
    text = scheduled(R.sum, (16, *shape))
    assert "T.parallel" in text
    assert "T.vectorized" in text


def test_little_work_stays_on_one_core() -> None:
    assert "T.parallel" not in scheduled(R.add, (7, 11), (7, 11))


def test_what_no_template_fits_keeps_its_loops() -> None:
    lowered = lowering.lower(module(lambda x: R.argsort(x), array(4, 5)), targets.load("host"))
    kernels = [f for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]
    again = schedules.apply(tvm.IRModule({f"k{i}": k for i, k in enumerate(kernels)}), targets.load("host"))
    assert len(again.functions) == len(kernels)


def test_a_sum_of_everything_with_a_scalar_after_it() -> None:
    x = np.random.default_rng(0).normal(size=(8, 500)).astype("float32")
    (got,) = run(lambda v: relax.op.divide(relax.op.sum(v), relax.const(4000.0)), x)
    close(got, np.asarray(x.sum() / 4000, "float32"))


DIMS = st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 10, 16, 17, 33]), min_size=0, max_size=4)


@given(dims=DIMS, data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_reduction_with_work_before_and_after(dims: list[int], data: st.DataObject) -> None:
    """Shapes nobody would choose: scalars, single elements, primes; a product before the sum, arithmetic after it."""
    axes = data.draw(st.lists(st.sampled_from(range(len(dims))), unique=True)) if dims else []
    keep = data.draw(st.booleans())
    x, scale = array(*dims), array(*[d if data.draw(st.booleans()) else 1 for d in dims])

    def make(v: relax.Var, w: relax.Var) -> relax.Expr:
        total = R.sum(R.multiply(v, w), axes, keepdims=keep) if axes else R.multiply(v, w)
        return R.subtract(R.multiply(total, relax.const(0.5)), R.exp(R.negative(R.multiply(total, total))))

    total = (x * scale).sum(tuple(axes), keepdims=keep) if axes else x * scale
    (got,) = run(make, x, scale)
    close(got, np.asarray(total * 0.5 - np.exp(-total * total), "float32"))
