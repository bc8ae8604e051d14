"""What follows a reduction: the block that reads its results is computed tile by tile, from registers.

    y[i] = sum over c of ..; z[i] = f(y[i])   -->   for each tile: acc = sum over c of ..; z[tile] = f(acc)

Where it has other axes than the results (h and w for a line of places, channels for blocks of them), they are made the same first.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import IndexMap

from tvmtrain.schedules.blocks import Access, Block, merged
from tvmtrain.schedules.strips import RUN
from tvmtrain.schedules.tiles import leave_registers, one_consumer
from tvmtrain.targets import Device


def epilogue_of(sch: Schedule, block: Block, device: Device) -> tuple[SBlockRV | None, bool]:
    """The one block that reads the results, if it does so in the order in which they are made; and whether it cuts rows short."""
    after = one_consumer(sch, block)
    access = [r for r in after.reads if r.buffer.same_as(block.write.buffer)] if after and not after.reduction else []
    if after is None or len(access) != 1:
        return None, False
    if _in_order(after, access[0]):
        cut = bool(after.extents) and after.extents[-1] < int(access[0].buffer.shape[-1])
        return sch.get_sblock(after.name), cut
    return _blocked_epilogue(sch, after, access[0], device) or _merged_epilogue(sch, after, access[0]), False


def _in_order(after: Block, access: Access) -> bool:
    """Whether each index of the access is an axis of the block, in order, whatever has one element left out."""
    sizes = [int(d) for d in access.buffer.shape]
    used = [next((a for a, v in enumerate(after.variables) if i.same_as(v)), -1) for i in access.index]
    used = [i for i, size in zip(used, sizes, strict=True) if size > 1]
    wide = [i for i, e in enumerate(after.extents) if e > 1]
    lengths = [after.extents[i] for i in wide]
    whole = [s for s in sizes if s > 1]
    # Rows that were padded to whole vectors are cut to their length on the way out.
    return used == wide and lengths[:-1] == whole[:-1] and lengths[-1:] <= whole[-1:]


def _merged_epilogue(sch: Schedule, after: Block, access: Access) -> SBlockRV | None:
    """A consumer over (.., h, w) of results over (.., h*W + w), with h and w made one axis, or over the line of all images."""
    *head, height, width = after.extents
    sizes = [int(d) for d in access.buffer.shape]
    if len(sizes) == 2 and len(head) == 2 and sizes == [head[1], head[0] * height * width]:
        return _epilogue_in_runs(sch, after, access)
    if len(after.extents) < 3 or sizes != [*head, height * width] or merged(access, after.extents) < 2:
        return None
    rv = sch.get_sblock(after.name)
    merge = IndexMap.from_func(lambda *i: [*i[:-2], i[-2] * width + i[-1]], ndim=len(after.extents), index_dtype="int64")
    sch.transform_block_layout(rv, merge)
    return rv


def _blocked_epilogue(sch: Schedule, after: Block, access: Access, device: Device) -> SBlockRV | None:
    """A consumer over (o, c) of results over (.., o, c // b, c % b): channels in blocks, as they are read channels last.

    Of more than a cache holds, such pieces arrive later than if they are read on in a loop of their own.
    """
    sizes = [int(d) for d in access.buffer.shape]
    wide = [(axis, extent) for axis, extent in enumerate(after.extents) if extent > 1]
    if (
        len(wide) != 2
        or len(sizes) < 3
        or 4 * prod(sizes) > device.caches.l2
        or sizes[-3:] != [wide[0][1], wide[1][1] // sizes[-1], sizes[-1]]
    ):
        return None
    (filters, _), (channels, _), block = *wide, sizes[-1]
    if prod(sizes[:-3]) > 1 or [access.strides[filters], access.strides[channels]] != [prod(sizes[-2:]), 1]:
        return None
    rv = sch.get_sblock(after.name)
    if len(sch.get_producers(rv)) > 1:
        return None
    blocked = IndexMap.from_func(
        lambda *i: [i[filters], i[channels] // block, i[channels] % block], ndim=len(after.extents), index_dtype="int64"
    )
    sch.transform_block_layout(rv, blocked)
    return rv


def _epilogue_in_runs(sch: Schedule, after: Block, access: Access) -> SBlockRV | None:
    """A consumer over (n, o, h, w) of results over (o, line of all images), with places in runs that are of one image each."""
    batch, _, height, width = after.extents
    each = height * width
    steps = zip(access.strides, (each, batch * each, width, 1), after.extents, strict=True)
    if each % RUN or any(stride != step for stride, step, extent in steps if extent > 1):
        return None

    def by_runs(n: Any, o: Any, h: Any, v: Any) -> list[Any]:
        place = h * width + v
        return [o, n * (each // RUN) + place // RUN, place % RUN]

    rv = sch.get_sblock(after.name)
    sch.transform_block_layout(rv, IndexMap.from_func(by_runs, ndim=4, index_dtype="int64"))
    # To the same places, but written down simplified: else TVM 0.27 does not see that a tile reads its own results alone.
    sch.transform_layout(rv, access.buffer, lambda *place: list(place))
    return rv


def finish_in(sch: Schedule, rv: SBlockRV, after: SBlockRV | None, at: LoopRV | None, device: Device) -> None:
    """Results leave the registers tile by tile: into their consumer, or into memory."""
    if after is None:
        after = sch.cache_write(rv, 0, "local")
    elif at is not None:
        sch.set_scope(rv, 0, "local")
    if at is not None:
        leave_registers(sch, after, at, device)
