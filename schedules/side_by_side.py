"""Products over channels on small maps, whose rows are no whole vectors: all images side by side.

What the taps of a convolution read is gathered first, [channels, taps, images, places]. Then the product is one of matrices: the
cores share the filters, a tile of filters and places is summed up in registers, and the results of some filters stay in the cache
until all their places are there and leave for the images in long runs.
"""

from __future__ import annotations

from contextlib import suppress
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
    one_consumer,
    register_tile,
)
from tvmtrain.targets import Device


def side_by_side(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> bool:
    """[layers, filters, images, places] of a product over channels, and the sum of the layers.

    The cores share the filters; the results leave for their maps in long runs.
    """
    layers = one_consumer(sch, block)
    if layers is None or block.reduced[:5] != (False,) * 4 + (True,):
        return False
    maps = _maps_of(sch, layers if layers.reduction else block)
    if maps is None:
        return False
    rv, (_, outputs, batch, each) = sch.get_sblock(block.name), block.extents[:4]
    registers = _line_up(sch, rv, each)
    shape = register_tile(known(sch, rv), device, False, decisions.tile)
    if shape is None or shape.axis != 2:
        return False
    rows = dict(shape.rows).get(1, 1)
    layer, o, j, *taps = sch.get_loops(rv)
    each_filter = max(batch * each, prod(block.extents[4:])) * DataType(str(block.write.buffer.dtype)).bits // 8
    together = _filters_together(outputs, rows, each_filter << decisions.grain, device)
    part, group, row = sch.split(o, factors=[None, together // rows, rows])
    run, column, lane = sch.split(j, factors=[None, shape.columns, shape.lanes])
    sch.reorder(part, layer, run, group, *taps, row, column, lane)
    if block.volume >= PARALLEL:
        sch.parallel(part)
    leave_registers(sch, registers, group, device)
    _weights_at_hand(sch, block, part, rows)
    if layers.reduction:
        _add_layers(sch, layers, part)
    finish_at(sch, maps, part)
    packed = next((p for p in sch.get_producers(rv) if sch.get(p).name_hint.startswith("packed")), None)
    if packed is None:
        return False
    _gather(sch, known(sch, packed), shape.columns * shape.lanes, block.volume >= PARALLEL)
    keep_in_registers(sch, rv, (row, column, lane), taps[0])
    return True


def _weights_at_hand(sch: Schedule, block: Block, part: LoopRV, rows: int) -> None:
    """A copy of the weights of some filters, where a sum goes across the rows in which they lie (dX): powers of two apart, or far."""
    found = next((i for i, r in enumerate(block.reads) if r.strides[3] == 0), None)
    strides = (None,) * 5 if found is None else block.reads[found].strides
    if found is not None and strides[1] is not None and strides[1] < (strides[4] or 0):
        for copy in panels(sch, block, found, 1, rows):
            sch.compute_at(copy, part)
            if rows > 1:
                sch.vectorize(sch.get_loops(copy)[-1])


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
    """[channels, taps, images, places] from images that are padded channel by channel; what a tile reads lies side by side."""
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


def _maps_of(sch: Schedule, block: Block) -> SBlockRV | None:
    """The one block that brings [.., filters, images, places] into the images' order, with rows and columns made one axis."""
    after = one_consumer(sch, block)
    if after is None or after.reduction or len(after.extents) != 4 or len(block.write.index) < 3:
        return None
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
