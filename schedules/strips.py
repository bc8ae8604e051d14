"""Strips: the columns of a product's second operand that all tiles of rows read in turn, side by side in a cache.

They are copied there, or computed (``schedules.prologues``), once for each tile of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import IndexMap

from tvmtrain.schedules.blocks import Access, Block, describe
from tvmtrain.schedules.tiles import Tile, divisors, extent_of, vector_axis
from tvmtrain.targets import Device

# Tiles of rows for which a copy of the columns that they read is worth making; fewer do where rows lie far apart.
FEWEST_READERS, FEWEST_FAR = 6, 2
# Elements from which rows lie far apart: with two of them to a page of memory, prefetchers lose them and addresses are looked up anew.
FAR = 512
# Places of an image that a line of all images keeps together: a vector of a copy or of results is never of two images. The copy's block.
RUN, LINE = 4, "line"
# Strips that are brought together, at most, and the part of a core's second cache that they may fill.
TOGETHER, PART = 32, 4


def in_strips(block: Block, access: Access) -> bool:
    """Whether a block reads a column of neighbours for each step of its one reduction: a matrix product's second operand."""
    axis = vector_axis(block)
    return (
        axis is not None
        and len(block.reductions) == 1
        and access.strides[axis] == 1
        and access.strides[block.reductions[0]] != 1
    )


def bring_strips(sch: Schedule, block: Block, shape: Tile, outer: Sequence[LoopRV], device: Device) -> list[LoopRV]:
    """The columns that all tiles of rows read in turn: made there, or copied without gaps, that miss in every cache.

    outer: the loops over tiles, that over columns before those over rows. Returns them as they then are.
    """
    again = prod(block.extents[axis] // size for axis, size in shape.rows)
    rows = [axis for axis, _ in shape.rows]
    together = 0
    for i, read in enumerate(block.reads):
        if not in_strips(block, read) or any(read.strides[a] for a in rows):
            continue
        made = _maker(sch, block, read)
        gap = read.strides[block.reductions[0]] or 0
        fewest = FEWEST_FAR if gap >= FAR else FEWEST_READERS
        if made is None and gap > shape.columns * shape.lanes and again >= fewest:
            made = sch.cache_read(sch.get_sblock(block.name), i, "global")
        if made is not None:
            _as_lines(sch, made, [int(d) for d in read.buffer.shape], block.extents[shape.axis])
            if not together:
                outer, at, together = _group(sch, block, shape, outer, device)
            sch.compute_at(made, at)
            last = sch.get_loops(made)[-1]
            sch.vectorize(sch.split(last, factors=[None, min(shape.lanes, extent_of(sch, last))])[1])
            if together > 1 and gap:
                _strip_by_strip(sch, made, shape.columns * shape.lanes)
    return list(outer)


def _group(
    sch: Schedule, block: Block, shape: Tile, outer: Sequence[LoopRV], device: Device
) -> tuple[Sequence[LoopRV], LoopRV, int]:
    """The loops over tiles, the one of them in which strips are brought, and how many strips that are.

    Where they are several, each tile of rows goes through all of them: it reads and writes runs of memory that a prefetcher follows.
    """
    split = len(outer) - 1 - len(shape.rows)
    at, rows = outer[split], outer[split + 1 :]
    size = 4 * block.extents[block.reductions[0]] * shape.columns * shape.lanes
    together = max(divisors(extent_of(sch, at), min(TOGETHER, device.caches.l2 // PART // size)), default=1)
    # Without rows it is the innermost loop over tiles, which the caller goes on with.
    if together == 1 or not rows or sch.get(at).kind != tirx.ForKind.SERIAL:
        return outer, at, 1
    group, strip = sch.split(at, factors=[None, together])
    sch.reorder(*rows, strip)
    return [*outer[:split], group, *rows, strip], group, together


def _strip_by_strip(sch: Schedule, made: SBlockRV, width: int) -> None:
    """Strips lie one after the other."""
    sch.transform_layout(made, ("write", 0), lambda *i: [*i[:-2], i[-1] // width, i[-2], i[-1] % width])


def _maker(sch: Schedule, block: Block, read: Access) -> SBlockRV | None:
    """The block that computes what is read, element by element, for this reader alone."""
    for rv in sch.get_producers(sch.get_sblock(block.name)):
        producer = describe(sch, rv)
        if producer is not None and read.buffer.same_as(producer.write.buffer):
            alone = len(sch.get_consumers(rv)) == 1
            return rv if alone and not (producer.reduction or producer.guarded or producer.kept) else None
    return None


def _as_lines(sch: Schedule, copy: SBlockRV, shape: Sequence[int], line: int) -> None:
    """The rows and columns of a copied map become one axis, if it is this axis that is read; where they are runs, in the copy alone."""
    if len(shape) > 1 and shape[-1] < line == prod(shape[-2:]):
        merge = IndexMap.from_func(lambda *i: [*i[:-2], i[-2] * shape[-1] + i[-1]], ndim=len(shape), index_dtype="int64")
        sch.transform_layout(copy, ("write", 0), merge)
        if sch.get(copy).name_hint != LINE:
            sch.transform_block_layout(copy, merge)
