"""Products over channels on small maps, whose rows are no whole vectors: all images side by side.

What the taps of a convolution read is gathered first, [channels, taps, images, places]; or, where a row of all images is whole vectors,
what the taps of a row read, [channels, taps of a row, rows, images, places of a row]: another row of taps reads whole lines further on.
Then the product is one of matrices: the cores share the filters, a tile of filters and places is summed up in registers, and the
results of some filters stay in the cache until all their places are there and leave for the images in long runs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import prod

from tvm import DataType
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import IndexMap

from tvmtrain.schedules.blocks import FAILURES, Block, merged
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.schedules.panels import panels
from tvmtrain.schedules.tiles import (
    PARALLEL,
    divisors,
    fill_then_copy,
    finish_at,
    keep_in_registers,
    known,
    leave_registers,
    loops_in,
    one_consumer,
    register_tile,
)
from tvmtrain.schedules.windows import window_tiles
from tvmtrain.targets import Device

# How the copy is called of which a row of taps reads lines.
PACKED_ROWS = "packed_rows"


def side_by_side(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> bool:
    """[layers, filters, places of all images] of a product over channels, and the sum of the layers.

    The cores share the filters; the results leave for their maps in long runs.
    """
    layers = one_consumer(sch, block)
    if layers is None or block.reduced[:5] != (False,) * 4 + (True,):
        return False
    rv = sch.get_sblock(block.name)
    packed = next((p for p in sch.get_producers(rv) if sch.get(p).name_hint.startswith("packed")), None)
    in_rows = packed is not None and sch.get(packed).name_hint.startswith(PACKED_ROWS)
    maps = _maps_of(sch, layers if layers.reduction else block, in_rows)
    loops = None if packed is None or maps is None else (_by_rows if in_rows else _by_places)(sch, block, device, decisions)
    if packed is None or maps is None or loops is None:
        return False
    _, outputs, *places = block.extents[:4]
    each_filter = max(prod(places), prod(block.extents[4:])) * DataType(str(block.write.buffer.dtype)).bits // 8
    together = _filters_together(outputs, loops.rows, each_filter << decisions.grain, device)
    part, group, row = sch.split(loops.filters, factors=[None, together // loops.rows, loops.rows])
    sch.reorder(part, loops.layer, *loops.outer, group, *loops.taps, row, *loops.inner)
    if block.volume >= PARALLEL:
        sch.parallel(part)
    leave_registers(sch, loops.registers, group, device)
    _weights_at_hand(sch, block, loops.layer, loops.rows)
    if layers.reduction:
        _add_layers(sch, layers, part)
    finish_at(sch, maps, part)
    _gather(sch, known(sch, packed), loops.strip, block.volume >= PARALLEL)
    if in_rows:  # neighbouring rows of a tile read the same lines with other taps
        sch.unroll(loops.taps[-1])
    keep_in_registers(sch, rv, (row, *loops.inner), loops.taps[0])
    return True


@dataclass(frozen=True)
class _Loops:
    """Those of the product. ``outer``: over tiles of places; ``inner``: over the places of a tile. ``registers``: the copy out of them.

    rows: filters of a tile; strip: places that it reads side by side.
    """

    layer: LoopRV
    filters: LoopRV
    outer: tuple[LoopRV, ...]
    taps: tuple[LoopRV, ...]
    inner: tuple[LoopRV, LoopRV]
    registers: SBlockRV
    rows: int
    strip: int


def _by_places(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> _Loops | None:
    """[layers, filters, images, places]: images and places are one line, in tiles of neighbours."""
    rv = sch.get_sblock(block.name)
    registers = _line_up(sch, rv, block.extents[3])
    shape = register_tile(known(sch, rv), device, False, decisions.tile)
    if shape is None or shape.axis != 2:
        return None
    layer, filters, j, *taps = sch.get_loops(rv)
    run, column, lane = sch.split(j, factors=[None, shape.columns, shape.lanes])
    rows, strip = dict(shape.rows).get(1, 1), shape.columns * shape.lanes
    return _Loops(layer, filters, (run,), tuple(taps), (column, lane), registers, rows, strip)


def _by_rows(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> _Loops | None:
    """[layers, filters, rows, places of all images in a row]: tiles of some rows."""
    tiles = window_tiles(block, device, 1)
    if not tiles:
        return None
    shape = tiles[decisions.tile % len(tiles)]
    height = dict(shape.rows)
    rv = sch.get_sblock(block.name)
    registers = sch.cache_write(rv, 0, "local")
    layer, filters, y, place, c, ky, kx = sch.get_loops(rv)
    run, column = sch.split(y, factors=[None, height[2]])
    vector, lane = sch.split(place, factors=[None, shape.lanes])
    return _Loops(layer, filters, (vector, run), (c, kx, ky), (column, lane), registers, height.get(1, 1), shape.lanes)


def _weights_at_hand(sch: Schedule, block: Block, layer: LoopRV, rows: int) -> None:
    """A copy of one layer's weights of some filters, where a sum goes across the rows in which they lie (dX): powers of two apart, or far.

    It reads along the weights: each channel's numbers of all these filters, which are neighbours, before the next one's.
    """
    found = next((i for i, r in enumerate(block.reads) if r.strides[3] == 0), None)
    strides = (None,) * 5 if found is None else block.reads[found].strides
    if found is not None and strides[1] is not None and strides[1] < (strides[4] or 0):
        for copy in panels(sch, block, found, 1, rows):
            sch.compute_at(copy, layer, preserve_unit_loops=True)
            panel, channel, *taps, row = loops_in(sch, copy, layer)
            sch.reorder(channel, panel, *taps, row)
            for loop in taps:
                sch.unroll(loop)
            if strides[1] == 1:
                sch.vectorize(row)
            else:
                sch.unroll(row)


def _add_layers(sch: Schedule, layers: Block, part: LoopRV) -> None:
    """The sum of the layers of some filters."""
    rv = sch.get_sblock(layers.name)
    finish_at(sch, rv, part)
    *_, place, layer = sch.get_loops(rv)
    sch.reorder(layer, place)


def _line_up(sch: Schedule, rv: SBlockRV, each: int) -> SBlockRV:
    """Images and places become one axis; the copy that brings its results from the registers."""
    line = IndexMap.from_func(lambda k, o, n, j, *c: [k, o, n * each + j, *c], ndim=len(sch.get_loops(rv)), index_dtype="int64")
    flat = IndexMap.from_func(lambda k, o, n, j: [k, o, n * each + j], ndim=4, index_dtype="int64")
    registers = sch.cache_write(rv, 0, "local")
    sch.transform_layout(rv, ("write", 0), flat)
    sch.transform_block_layout(registers, flat)
    sch.transform_block_layout(rv, line)
    return registers


def _gather(sch: Schedule, block: Block, run: int, parallel: bool) -> None:
    """[channels, .., .., images, places] from images that are padded channel by channel; what a tile reads lies side by side."""
    rv, each = sch.get_sblock(block.name), block.extents[4]
    if block.extents[3] * each % run == 0:
        lines = IndexMap.from_func(
            lambda c, y, x, n, j: [(n * each + j) // run, c, y, x, (n * each + j) % run], ndim=5, index_dtype="int64"
        )
        sch.transform_layout(rv, ("write", 0), lines)
    channel, *_, last = sch.get_loops(rv)
    if parallel:
        sch.parallel(channel)
    pads = [sch.get(pad).name_hint for pad in sch.get_producers(rv) if len(sch.get_consumers(pad)) == 1]
    for pad in pads:
        sch.compute_at(sch.get_sblock(pad), channel)
    for pad in pads:
        fill_then_copy(sch, pad, channel)
    with suppress(*FAILURES):
        sch.decompose_padding(rv, last)


def _maps_of(sch: Schedule, block: Block, in_rows: bool) -> SBlockRV | None:
    """The one block that brings [.., filters, images, places] into the images' order, with rows and columns made one axis.

    in_rows: [.., filters, rows, places of all images in a row], whose rows stay an axis.
    """
    after = one_consumer(sch, block)
    if after is None or after.reduction or len(after.extents) != 4 or len(block.write.index) < 3:
        return None
    if in_rows:
        return sch.get_sblock(after.name)
    access = [r for r in after.reads if r.buffer.same_as(block.write.buffer)]
    (n, o, *_), width = after.variables, after.extents[3]
    if len(access) != 1 or merged(access[0], after.extents) < 2:
        return None
    *_, filters, image, _ = access[0].index
    if not (filters.same_as(o) or after.extents[1] == 1) or not (image.same_as(n) or after.extents[0] == 1):
        return None
    rv = sch.get_sblock(after.name)
    joined = IndexMap.from_func(lambda n, o, h, v: [n, o, h * width + v], ndim=4, index_dtype="int64")
    sch.transform_block_layout(rv, joined)
    return rv


def _filters_together(outputs: int, rows: int, size: int, device: Device) -> int:
    """How many filters one core works on at a time: their weights or results, of ``size`` bytes each, fill half of its cache."""
    groups = outputs // rows
    fitting = [d for d in divisors(groups, groups) if d * rows * size <= device.caches.l2 // 2 and groups // d >= device.cores]
    return rows * max(fitting, default=1)
