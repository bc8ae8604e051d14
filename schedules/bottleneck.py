"""Three layers in bands of rows: what a depthwise convolution reads, itself, and the product over channels (1x1) that reads its results.

    for a band of rows of an image:
        for some channels: z = clip(conv2d(x, w) + t);  y = clip(depthwise(z, v) + u)
        p = conv2d(y, q) + s, of all channels

Neither z nor y is ever in memory as a whole: the band's y and some channels' z wait in a core's second cache. The rows of z that two
bands read are computed twice.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvmtrain.schedules.blocks import Block
from tvmtrain.schedules.copies import bring_all
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.schedules.epilogues import epilogue_of
from tvmtrain.schedules.sharing import busy
from tvmtrain.schedules.tiles import (
    ON_MAPS,
    TILES,
    Tile,
    divisors,
    extent_of,
    keep_in_registers,
    leave_registers,
    loops_in,
    register_tile,
    split_tile,
    with_rows,
)
from tvmtrain.schedules.windows import tile_of, write_out_taps
from tvmtrain.targets import Device

# Of the rows that a band computes, one in so many may be another band's, too.
COMPUTED_TWICE = 4
# Tiles of channels of which z is made before the depthwise convolution reads it.
TILES_TOGETHER = 4


def bottleneck(sch: Schedule, product: Block, reader: Block, projection: Block, device: Device, decisions: Decisions) -> None:
    """``product`` makes z, ``reader`` y, ``projection`` p. Raises one of ``FAILURES`` where they do not fit each other, or the caches.

    decisions: ``tile`` of the projection; ``grain`` 1 and 2 for fewer rows; ``taps``.
    """
    if len(product.extents) == 4:
        product = with_rows(sch, product)
    shape = _tile(product, device, 1)
    together = _together(product, shape)
    rows = _rows_of_a_band(product, reader, together, device, decisions)
    task = _projected(sch, projection, rows * reader.extents[3], device, decisions)
    group = _depthwise(sch, reader, rows, task, together, device, decisions)
    _expanded(sch, product, shape, group, task, device, decisions)


def _rows_of_a_band(product: Block, reader: Block, together: int, device: Device, decisions: Decisions) -> int:
    """As many, of whole vectors, as leave half of the cache to others; fewer where that is decided on."""
    batch, channels, height, width = reader.extents[:4]
    above, across = product.extents[2:4]
    step, window = _steps(reader)
    read = max(prod(int(d) for d in r.buffer.shape) for r in product.reads if r.strides[3]) // batch
    fitting = []
    for rows in divisors(height, height):
        computed = min(above, step * (rows - 1) + window)
        size = 4 * (channels * rows * width + together * computed * across + read * computed // above)
        whole = rows * width % device.lanes() == 0 == across % device.lanes()
        little = rows == height or COMPUTED_TWICE * (computed - step * rows) <= computed
        if whole and little and size <= device.caches.l2 // 2 and busy(batch * height // rows, device.cores):
            fitting.append(rows)
    if not fitting:
        raise ValueError("no number of rows suits the cache and the cores")
    return fitting[max(0, len(fitting) - 1 - decisions.grain)]


def _steps(reader: Block) -> tuple[int, int]:
    """Rows that a window moves on for each row of the results, and rows that it is high."""
    data = next(r for r in reader.reads if r.strides[3])
    row = prod(int(d) for d in data.buffer.shape[3:])
    return (data.strides[2] or 0) // row, (reader.extents[5] - 1) * (data.strides[5] or 0) // row + 1


def _tile(block: Block, device: Device, axis: int) -> Tile:
    """The register tile of a map along its rows, with neighbours along ``axis`` alone."""
    shapes = (tile_of(block, device, False, rank, ON_MAPS) for rank in range(TILES))
    for shape in shapes:
        if shape is not None and shape.axis == 3 and all(other == axis for other, _ in shape.rows):
            return shape
    raise ValueError("results that do not lie side by side")


def _together(product: Block, shape: Tile) -> int:
    """Channels of z that are made before they are read."""
    tall = dict(shape.rows).get(1, 1)
    return max(tall * n for n in range(1, TILES_TOGETHER + 1) if product.extents[1] % (tall * n) == 0)


def _projected(sch: Schedule, block: Block, places: int, device: Device, decisions: Decisions) -> LoopRV:
    """[images, filters, places | channels]: the loop over tasks, which are bands of so many places."""
    rv, (end, _) = sch.get_sblock(block.name), epilogue_of(sch, block, device)
    band = replace(block, extents=(*block.extents[:2], places, block.extents[3]))
    shape = register_tile(band, device, False, decisions.tile, ON_MAPS)
    if end is None or shape is None or shape.axis != 2 or any(axis != 1 for axis, _ in shape.rows):
        raise ValueError("results that do not lie side by side, or are not read in their order")
    image, filters, place, channel = sch.get_loops(rv)
    bands, place = sch.split(place, factors=[None, places])
    inner, outer = split_tile(sch, {1: filters, 2: place}, shape)
    last = outer.get(1, filters)
    sch.reorder(image, bands, outer[2], last, channel, *inner)
    task = sch.fuse(image, bands)
    sch.parallel(task)
    sch.set_scope(rv, 0, "local")
    leave_registers(sch, end, last, device)
    keep_in_registers(sch, rv, inner, channel)
    return task


def _depthwise(
    sch: Schedule, block: Block, rows: int, task: LoopRV, together: int, device: Device, decisions: Decisions
) -> LoopRV:
    """[images, channels, rows, columns | 1, taps]: the loop over groups of ``together`` channels of a band of ``rows``."""
    rv, end = _in_task(sch, block, task, device)
    shape = _tile(replace(block, extents=(*block.extents[:2], rows, *block.extents[3:])), device, 2)
    _, channel, row, column, *taps = loops_in(sch, rv, task)
    group, channel = sch.split(channel, factors=[None, together])
    inner, outer = split_tile(sch, {2: row, 3: column}, shape)
    sch.reorder(group, channel, outer.get(2, row), outer[3], *taps, *inner)
    leave_registers(sch, end, outer[3], device)
    bring_all(sch, block, channel, device, lines=False)
    write_out_taps(sch, taps, inner, device, decisions)
    keep_in_registers(sch, rv, inner, taps[0])
    return group


def _expanded(
    sch: Schedule, block: Block, shape: Tile, group: LoopRV, task: LoopRV, device: Device, decisions: Decisions
) -> None:
    """[images, channels, rows, columns | channels, taps] of some channels of a band."""
    rv, end = _in_task(sch, block, group, device)
    _, channel, row, column, *sums = loops_in(sch, rv, group)
    if extent_of(sch, column) != block.extents[3]:
        raise ValueError("columns that nothing reads")
    inner, outer = split_tile(sch, {1: channel, 3: column}, shape)
    last = outer.get(1, channel)
    sch.reorder(row, outer[3], last, *sums, *inner)  # what a row is made from stays in the nearest cache for all its channels
    leave_registers(sch, end, last, device)
    bring_all(sch, block, task, device, lines=False)
    write_out_taps(sch, sums[1:], inner, device, decisions)
    keep_in_registers(sch, rv, inner, sums[0])


def _in_task(sch: Schedule, block: Block, at: LoopRV, device: Device) -> tuple[SBlockRV, SBlockRV]:
    """A reduction and what follows it, computed in a step of the loop ``at``."""
    rv, (end, cut) = sch.get_sblock(block.name), epilogue_of(sch, block, device)
    if end is None or cut:
        raise ValueError("results that are not read in their order")
    sch.set_scope(rv, 0, "local")
    for each in (end, rv):
        sch.compute_at(each, at, preserve_unit_loops=True)
    return rv, end
