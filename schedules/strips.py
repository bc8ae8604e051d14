"""Strips: the columns of a product's second operand that all tiles of rows read in turn, side by side in a cache.

They are copied there, or computed (``schedules.prologues``), once for each tile of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import IndexMap

from tvmtrain.schedules.blocks import Access, Block, describe
from tvmtrain.schedules.tiles import Tile, vector_axis

# Tiles of rows for which a copy of the columns that they read is worth making; fewer do where each element is on a page of its own.
FEWEST_READERS, FEWEST_OF_PAGES = 6, 2
# Elements of a page of memory.
PAGE = 1024


def in_strips(block: Block, access: Access) -> bool:
    """Whether a block reads a column of neighbours for each step of its one reduction: a matrix product's second operand."""
    axis = vector_axis(block)
    return (
        axis is not None
        and len(block.reductions) == 1
        and access.strides[axis] == 1
        and access.strides[block.reductions[0]] != 1
    )


def bring_strips(sch: Schedule, block: Block, shape: Tile, at: LoopRV) -> None:
    """The columns that all tiles of rows read in turn: made there, or copied without gaps, of a page each, that miss in every cache."""
    again = prod(block.extents[axis] // size for axis, size in shape.rows)
    rows = [axis for axis, _ in shape.rows]
    for i, read in enumerate(block.reads):
        if not in_strips(block, read) or any(read.strides[a] for a in rows):
            continue
        made = _maker(sch, block, read)
        gap = read.strides[block.reductions[0]] or 0
        fewest = FEWEST_OF_PAGES if gap >= PAGE else FEWEST_READERS
        if made is None and gap > shape.columns * shape.lanes and again >= fewest:
            made = sch.cache_read(sch.get_sblock(block.name), i, "global")
        if made is not None:
            _as_lines(sch, made, [int(d) for d in read.buffer.shape], block.extents[shape.axis])
            sch.compute_at(made, at)
            sch.vectorize(sch.split(sch.get_loops(made)[-1], factors=[None, shape.lanes])[1])


def _maker(sch: Schedule, block: Block, read: Access) -> SBlockRV | None:
    """The block that computes what is read, element by element, for this reader alone."""
    for rv in sch.get_producers(sch.get_sblock(block.name)):
        producer = describe(sch, rv)
        if producer is not None and read.buffer.same_as(producer.write.buffer):
            alone = len(sch.get_consumers(rv)) == 1
            return rv if alone and not (producer.reduction or producer.guarded or producer.kept) else None
    return None


def _as_lines(sch: Schedule, copy: SBlockRV, shape: Sequence[int], line: int) -> None:
    """The rows and columns of a copied map become one axis, if it is this axis that is read."""
    if len(shape) > 1 and shape[-1] < line == prod(shape[-2:]):
        merge = IndexMap.from_func(lambda *i: [*i[:-2], i[-2] * shape[-1] + i[-1]], ndim=len(shape), index_dtype="int64")
        sch.transform_layout(copy, ("write", 0), merge)
        sch.transform_block_layout(copy, merge)
