"""Windows: neighbours of a map read the same lines with other taps of a kernel, and the same weights.

    for ky: for y in 4: sum[y] += w[ky] * x[y + ky]   -->   x0 = x[0]; .. x5 = x[5]; sum[0] += w[0] * x0; sum[0] += w[1] * x1; ..

A tile of such neighbours loads each line once, where its taps are written out: 6 lines instead of 12. In a weight's gradient taps are
the neighbours, and places what is summed up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from tvmtrain.schedules.blocks import Access, Block
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.schedules.tiles import LARGEST_TILE, Tile, divisors, extent_of, lanes_of, register_tile, vector_axis
from tvmtrain.targets import Device

# Multiplications to which a tile's taps are written out: of wide vectors, and of others or by decision.
WRITTEN_OUT, LARGEST_TAPS = 144, (128, 32, 512)
# Sums that hide how long a multiplication takes. Tiles that are looked at.
FEWEST, BEST = 8, 4
# Numbers in a cache line.
CACHE_LINE = 16
# How much less a tile of neighbours must load than one without: it also reads from more rows of a map at once.
WORTH = 1.2


@dataclass(frozen=True)
class Window:
    """``lines``: what neighbours along ``axis`` read, each ``step`` lines further on, ``taps`` of them. ``inside``: products for a line."""

    lines: Access
    axis: int
    step: int
    taps: int
    inside: int

    def loaded(self, neighbours: int, size: int) -> float:
        """Lines for each tap of so many neighbours, in a tile of ``size``."""
        written_out = size * self.inside <= WRITTEN_OUT
        return (self.step * (neighbours - 1) + self.taps) / self.taps if written_out else neighbours


def wide(lanes: int) -> bool:
    """Whether a vector is a whole cache line: loads, of two lines each where they begin anywhere, then are what a tile waits for.

    With narrower ones they are not, and taps that are written out need more registers than there are: ``benchmarks/inner_loops.py``
    shows what a change here costs.
    """
    return lanes >= CACHE_LINE


def window_tiles(block: Block, device: Device, most: int) -> list[Tile]:
    """Register tiles of some rows times some neighbours, those first that load least for their arithmetic; none where others load less.

    most: vectors side by side.
    """
    axis = vector_axis(block) if wide(device.lanes()) else None
    window = None if axis is None else min(_windows(block, axis), key=lambda w: w.inside, default=None)
    width = lanes_of(block.extents[axis], device) if axis is not None and window is not None else None
    if axis is None or window is None or width is None:
        return []
    row = next(
        (a for a in reversed(block.spatial) if a != axis and block.extents[a] > 1 and window.lines.strides[a] == 0), None
    )
    if row is None:
        return []
    found: dict[Tile, float] = {}
    heights, neighbours = (divisors(block.extents[a], LARGEST_TILE) for a in (row, window.axis))
    for columns, height, along in product(divisors(block.extents[axis] // width, most), heights, neighbours):
        size = height * along * columns
        if FEWEST <= size < device.vector_registers - columns:
            rows = tuple((a, n) for a, n in ((row, height), (window.axis, along)) if n > 1)
            # Vectors side by side share lines, whose ends others read too.
            found[Tile(axis, width, columns, rows)] = size / (height + (columns + 1) * window.loaded(along, size))
    # Of those that load the same, the widest, whose vectors share lines, and the lowest, which keeps fewer of them.
    best = sorted(found, key=lambda tile: (-found[tile], -tile.columns, tile.rows[-1:]))
    alone = max((found[tile] for tile in best if window.axis not in dict(tile.rows)), default=0.0)
    return [tile for tile in best if found[tile] > WORTH * alone][:BEST]


def _windows(block: Block, vector: int) -> Iterator[Window]:
    for read, axis, (i, tap) in product(block.reads, block.spatial, enumerate(block.reductions)):
        across, along = abs(read.strides[axis] or 0), abs(read.strides[tap] or 0)
        if axis == vector or read.strides[vector] != 1 or not across or not along:
            continue
        step, between = divmod(across, along)
        if not between and step < block.extents[tap]:
            yield Window(read, axis, step, block.extents[tap], prod(block.extents[a] for a in block.reductions[i:]))


def tile_of(block: Block, device: Device, whole: bool, rank: int, most: int) -> Tile | None:
    """The register tile of this rank: first those of neighbours that share lines, then those of whole vectors alone."""
    overlapping = [] if whole else window_tiles(block, device, most)
    return overlapping[rank] if rank < len(overlapping) else register_tile(block, device, whole, rank - len(overlapping), most)


def write_out_taps(
    sch: Schedule, reductions: Sequence[LoopRV], inner: Sequence[LoopRV], device: Device, decisions: Decisions
) -> None:
    """Unroll the innermost reductions around a tile's ``inner`` loops, if they are short: neighbouring taps then share what they read."""
    most = WRITTEN_OUT if wide(device.lanes()) and decisions.taps == 0 else LARGEST_TAPS[decisions.taps]
    size = prod(extent_of(sch, loop) for loop in inner[:-1])
    for loop in reversed(reductions):
        size *= extent_of(sch, loop)
        if size > most:
            break
        sch.unroll(loop)
