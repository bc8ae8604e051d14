"""Panels: the numbers of a product's first operand that a tile of rows multiplies with, side by side for each step of the reduction.

    for k: for r in rows: y[r, ..] += w[r, k] * x[k, ..]   -->   p[tile, k, row] = w[..];  for k: .. p[tile, k, row] * x[k, ..]

Each tile of columns reads all of them anew: what does not stay in a core's caches then comes as one run that a prefetcher follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.tirx import IndexMap

from tvmtrain.schedules.blocks import Access, Block
from tvmtrain.schedules.tiles import Tile
from tvmtrain.targets import Device

# Times that all of the operand is read for each time it is copied, at least, and the part of a core's second cache that it fills, at
# least: where a step of the reduction goes along the rows as they lie, and where it goes across them.
ALONG, ACROSS = (12, 4), (6, 16)


def bring_panels(sch: Schedule, block: Block, shape: Tile, device: Device) -> list[SBlockRV]:
    """Copy the operands of which a step of the reduction reads one number for each row, where that pays; the copies."""
    if len(shape.rows) != 1:
        return []
    ((axis, rows),) = shape.rows
    columns = prod(block.extents[a] for a in block.spatial if a != axis) // (shape.columns * shape.lanes)
    missing = [i for i, read in enumerate(block.reads) if _misses(block, read, axis, columns, device)]
    return [copy for i in missing for copy in panels(sch, block, i, axis, rows)]


def _misses(block: Block, read: Access, axis: int, columns: int, device: Device) -> bool:
    """Whether ``columns`` read all of the operand, which has one number for each row and step, and none of it stays near meanwhile."""
    across, *steps = read.strides[axis], *(read.strides[a] for a in block.reductions)
    repeated = all(read.strides[a] == 0 for a in block.spatial if a != axis)
    if not across or not all(steps) or not repeated:
        return False
    size = 4 * block.extents[axis] * prod(block.extents[a] for a in block.reductions)
    fewest, part = ACROSS if across < (steps[-1] or 0) else ALONG
    return columns >= fewest and size > device.caches.l2 // part


def panels(sch: Schedule, block: Block, operand: int, axis: int, rows: int) -> list[SBlockRV]:
    """A copy of what ``block`` reads as its ``operand``, in panels of ``rows`` steps along ``axis``; none where that is not an index."""
    index, shape = block.reads[operand].index, block.reads[operand].buffer.shape
    found = next((d for d, at in enumerate(index) if at.same_as(block.variables[axis])), None)
    if found is None or int(shape[found]) % rows:
        return []

    def panel(*at: Any) -> Sequence[Any]:
        return [at[found] // rows, *at[:found], *at[found + 1 :], at[found] % rows]

    copy = sch.cache_read(sch.get_sblock(block.name), operand, "global")
    sch.transform_layout(copy, ("write", 0), panel)
    sch.transform_block_layout(copy, IndexMap.from_func(panel, ndim=len(index), index_dtype="int64"))
    return [copy]
