"""Tiles of results in registers, and the copies around them: what the templates have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import gcd, prod

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import IndexMap

from tvmtrain.schedules.blocks import FAILURES, Block, describe
from tvmtrain.targets import Device

# Below this many steps, starting the other threads costs more than they save.
PARALLEL = 16384
# Tiles of up to this many results along one axis; more registers than any processor has would be needed beyond.
LARGEST_TILE = 16
# Register tiles that are looked at for one of a wanted form.
TILES = 16
# Vectors side by side in a tile, at most: of columns that were brought into strips, and of rows of a map that are read as they lie.
IN_STRIPS, ON_MAPS = 4, 7
# Bytes after which places of a nearest cache begin anew: what lies so far apart shares a set of a few lines.
WAY = 4096
# Statements to which the code that follows a tile may be unrolled.
LARGEST_EPILOGUE = 128


@dataclass(frozen=True)
class Tile:
    """A register tile: ``columns`` vectors of ``lanes`` along ``axis``, times ``rows`` (axis, how many)."""

    axis: int
    lanes: int
    columns: int
    rows: tuple[tuple[int, int], ...]


def register_tile(block: Block, device: Device, whole: bool, rank: int = 0, most: int = IN_STRIPS) -> Tile | None:
    """The register tile of a reduction, of whole rows if asked for; None if no axis of the result can be a vector.

    rank: 0 for the tile with most arithmetic for each value loaded, 1 for the next one; after the last the first comes again.
    most: vectors side by side.
    """
    axis = vector_axis(block)
    width = lanes_of(block.extents[axis], device) if axis is not None else None
    if axis is None or width is None:
        return None
    vectors = [r for r in block.reads if r.strides[axis] == 1]
    others = [a for a in reversed(block.spatial) if a != axis and block.extents[a] > 1]
    reusing = [a for a in others if any(r.strides[a] == 0 for r in vectors)]
    scalars = [a for a in others if len(block.reads) > 1 and any(r.strides[a] == 0 for r in block.reads)]
    count = block.extents[axis] // width
    columns = [count] if whole else divisors(count, most)
    tallest = LARGEST_TILE if reusing else 4
    sizes = {
        a: divisors(block.extents[a], min(tallest, _side_by_side(block, axis, a, device))) for a in (reusing or scalars[:1])
    }
    tiles = _tiles(Tile(axis, width, 1, ()), columns, sizes, device.vector_registers)
    return tiles[rank % len(tiles)] if tiles else None


def _side_by_side(block: Block, axis: int, row: int, device: Device) -> int:
    """How many rows' scalars stay in the nearest cache while they are read on: of rows a power of two apart only its few ways' lines."""
    steps = [4 * stride for r in block.reads if (stride := r.strides[row]) and not r.strides[axis]]
    return min((device.caches.l1 // gcd(step, WAY) for step in steps), default=LARGEST_TILE)


def _tiles(plain: Tile, widths: Sequence[int], sizes: Mapping[int, Sequence[int]], registers: int) -> list[Tile]:
    """The tiles that fit the registers, rows along two axes at most; first those with most arithmetic for each value loaded."""
    found: dict[Tile, float] = {}
    for axes in combinations(sizes, min(2, len(sizes))):
        for columns, *heights in product(widths, *(sizes[a] for a in axes)):
            height = prod(heights)
            if height * columns + columns + 1 <= registers:
                rows = tuple((axis, size) for axis, size in zip(axes, heights, strict=True) if size > 1)
                found.setdefault(replace(plain, columns=columns, rows=rows), height * columns / (height + columns))
    return sorted(found, key=lambda t: -found[t])


def vector_axis(block: Block) -> int | None:
    """The axis of a reduction's results along which a vector can run."""
    return next((a for a in reversed(block.spatial) if block.reduction and _contiguous(block, a)), None)


def _contiguous(block: Block, axis: int) -> bool:
    """Whether a vector along ``axis`` writes neighbours, and reads neighbours or one value for all."""
    steps = [r.strides[axis] for r in block.reads]
    return block.extents[axis] > 1 and block.write.strides[axis] == 1 and all(s in (0, 1) for s in steps) and 1 in steps


def lanes_of(extent: int, device: Device) -> int | None:
    """How many elements a vector along ``extent`` has: no remainder; short odd extents become one odd vector."""
    width = device.lanes()
    while width > 2 and extent % width:
        width //= 2
    if width > 2 or extent == 2:
        return width
    return extent if extent <= 2 * device.lanes() else None


def divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def split_tile(
    sch: Schedule, loops: Sequence[LoopRV] | Mapping[int, LoopRV], shape: Tile
) -> tuple[list[LoopRV], dict[int, LoopRV]]:
    """The loops inside of a tile (rows, columns, lanes), and those that run over tiles, by axis."""
    outer: dict[int, LoopRV] = {}
    inner: list[LoopRV] = []
    for axis, size in shape.rows:
        outer[axis], row = sch.split(loops[axis], factors=[None, size])
        inner.append(row)
    outer[shape.axis], column, lane = sch.split(loops[shape.axis], factors=[None, shape.columns, shape.lanes])
    return [*inner, column, lane], outer


def leave_registers(sch: Schedule, epilogue: SBlockRV, at: LoopRV, device: Device) -> None:
    """Write a tile of results, vector by vector."""
    finish_at(sch, epilogue, at)
    *rows, last = loops_in(sch, epilogue, at)
    width = lanes_of(extent_of(sch, last), device) or 1
    if width > 1:
        last, lane = sch.split(last, factors=[None, width])
        sch.vectorize(lane)
    # Registers have no addresses: each result must be named.
    if prod(extent_of(sch, loop) for loop in (*rows, last)) <= LARGEST_EPILOGUE:
        for loop in (*rows, last):
            sch.unroll(loop)


def loops_in(sch: Schedule, rv: SBlockRV, at: LoopRV) -> list[LoopRV]:
    """The loops of a block inside of the loop ``at``."""
    loops = sch.get_loops(rv)
    return loops[1 + next(i for i, loop in enumerate(loops) if sch.get(loop).same_as(sch.get(at))) :]


def finish_at(sch: Schedule, rv: SBlockRV, at: LoopRV) -> None:
    """Compute a block as soon as a step of the loop ``at`` has made what it reads; ValueError if that is not all of it.

    Where it does not understand the places that are read, reverse_compute_at (TVM 0.27) leaves some of them out.
    """
    whole = prod(extent_of(sch, loop) for loop in sch.get_loops(rv))
    sch.reverse_compute_at(rv, at)
    if prod(extent_of(sch, loop) for loop in sch.get_loops(rv)) < whole:
        raise ValueError("some places are left out")


def fill_then_copy(sch: Schedule, name: str, at: LoopRV) -> None:
    """A padded copy in the loop ``at`` without a question for each element: zeros everywhere, then what lies inside."""
    rv = sch.get_sblock(name)
    with suppress(*FAILURES):
        sch.decompose_padding(rv, loops_in(sch, rv, at)[0])


def keep_in_registers(sch: Schedule, rv: SBlockRV, inner: Sequence[LoopRV], first: LoopRV) -> None:
    """A reduction's tile: the loops inside of it written out, the last one as a vector; zeros before its ``first`` reduced loop."""
    for loop in inner[:-1]:
        sch.unroll(loop)
    sch.vectorize(inner[-1])
    sch.decompose_reduction(rv, first)


def one_consumer(sch: Schedule, block: Block) -> Block | None:
    """The one block that reads a block's results; None where there are several, or it is not plain."""
    consumers = sch.get_consumers(sch.get_sblock(block.name))
    return describe(sch, consumers[0]) if len(consumers) == 1 else None


def known(sch: Schedule, rv: SBlockRV) -> Block:
    block = describe(sch, rv)
    if block is None:
        raise ValueError("a block of unexpected form")
    return block


def extent_of(sch: Schedule, loop: LoopRV) -> int:
    return int(sch.get(loop).extent)


def with_rows(sch: Schedule, product: Block) -> Block:
    """The product over [images, filters, places] with rows and columns for places."""
    rv, after = sch.get_sblock(product.name), one_consumer(sch, product)
    width = after.extents[-1] if after else 1
    places = IndexMap.from_func(lambda n, o, j, c: [n, o, j // width, j % width, c], ndim=4, index_dtype="int64")
    sch.transform_block_layout(rv, places)
    sch.transform_layout(rv, ("write", 0), lambda n, o, j: [n, o, j // width, j % width])
    return known(sch, rv)
