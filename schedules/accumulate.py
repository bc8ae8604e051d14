"""A long reduction by parts: what a part adds to all results is added to them before the next part is read.

    for part: for each tile: acc = sum over the part; y[tile] += acc

All tiles of a part read the same rows, which stay in a core's cache; a tile that runs through all parts finds none of its rows there.
"""

from __future__ import annotations

from math import prod

from tvm.s_tir import Schedule

from tvmtrain.schedules import transposing
from tvmtrain.schedules.blocks import ACCUMULATED, Block
from tvmtrain.schedules.copies import bring_all
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.schedules.sharing import cores_of, parallel, shared_prefix
from tvmtrain.schedules.tiles import (
    extent_of,
    keep_in_registers,
    leave_registers,
    one_consumer,
    register_tile,
    split_tile,
)
from tvmtrain.targets import Device


def accumulate(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> bool:
    """[groups, .. parts, ..] of a reduction, and the sum over parts: a tile in registers, added to the results of the parts before."""
    after = one_consumer(sch, block)
    if after is None or ACCUMULATED not in after.source.annotations:
        return False
    shape = register_tile(block, device, False, decisions.tile)
    if shape is None:
        return False
    rv, total = sch.get_sblock(block.name), sch.get_sblock(after.name)
    loops = sch.get_loops(rv)
    inner, outer_of = split_tile(sch, loops, shape)
    own, rows = _parts(block, after), [axis for axis, _ in shape.rows]
    free = [loops[a] for a in block.spatial if a not in (*own, shape.axis, *rows)]
    parts, tiles = [loops[a] for a in own], [outer_of[a] for a in (shape.axis, *rows)]
    if prod(extent_of(sch, loop) for loop in free) < device.cores:
        free, tiles = [*free, *tiles[1:]], tiles[:1]
    reductions = [loops[a] for a in block.reductions]
    shared = shared_prefix([extent_of(sch, loop) for loop in free], cores_of(device, decisions))
    sch.reorder(*free[:shared], *parts, *free[shared:], *tiles, *reductions, *inner)
    parallel(sch, free, shared)
    lines = shape.columns * shape.lanes % transposing.ROWS == 0
    bring_all(sch, block, (*parts, *free[shared:])[-1], device, lines)
    sch.set_scope(rv, 0, "local")
    leave_registers(sch, total, tiles[-1], device)
    sch.decompose_reduction(total, parts[0])
    keep_in_registers(sch, rv, inner, reductions[0])
    return True


def _parts(block: Block, after: Block) -> list[int]:
    """The axes over whose results ``after`` sums."""
    access = next(r for r in after.reads if r.buffer.same_as(block.write.buffer))
    summed = [after.variables[a] for a in after.reductions]
    places = [made for made, read in zip(block.write.index, access.index, strict=True) if any(read.same_as(v) for v in summed)]
    return [a for a, variable in enumerate(block.variables) if any(place.same_as(variable) for place in places)]
