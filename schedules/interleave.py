"""Places whose formula depends on their residues modulo strides: gradients with respect to what a strided window reads.

    for y, x: dx[y, x] = even(y // 2, x // 2) if x % 2 == 0 else odd(y // 2, x // 2)
    -->  for y, half: dx[y, 2 * half] = even(y // 2, half); dx[y, 2 * half + 1] = odd(y // 2, half)

No question is left in the innermost loop, which LLVM turns into vectors that it interleaves in registers. What is read besides
(padded copies) is made for one channel of one image at a time, and stays in the nearest cache.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvmtrain.schedules.blocks import Block, describe
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.schedules.tiles import PARALLEL, extent_of, fill_then_copy, finish_at, lanes_of, one_consumer
from tvmtrain.targets import Device

# Residues of one axis that are written out.
LARGEST_STRIDE = 4
# How copies are called whose places are ordered by their residues (``tvmtrain.strided``); a second one of a kernel has a number, too.
RESIDUES = "residues"


def interleave(sch: Schedule, block: Block, device: Device, _decisions: Decisions) -> bool:
    """All residues of some rows at once, cores over planes; what is computed from a row follows while it is in the nearest cache."""
    if block.strides is None or max(block.strides) > LARGEST_STRIDE:
        return False
    rv, after = sch.get_sblock(block.name), _after(sch, block)
    *planes, row, column = sch.get_loops(rv)
    rows, residue = sch.split(row, factors=[None, block.strides[0]])
    plane = sch.fuse(*planes)
    if after is not None:
        finish_at(sch, after, rows)
        _vectors(sch, sch.get_loops(after)[-1], device)
    _bring(sch, rv, plane)
    if block.volume >= PARALLEL:
        sch.parallel(plane)
    _, odd = sch.split(column, factors=[None, block.strides[1]])
    sch.unroll(residue)
    sch.unroll(odd)
    return True


def _after(sch: Schedule, block: Block) -> SBlockRV | None:
    """The one block that reads the results, each once, at its own place."""
    after = one_consumer(sch, block)
    access = [r for r in after.reads if r.buffer.same_as(block.write.buffer)] if after and not after.reduction else []
    if after is None or len(access) != 1:
        return None
    index = [i for i, size in zip(access[0].index, access[0].buffer.shape, strict=True) if int(size) > 1]
    wide = [v for v, size in zip(after.variables, after.extents, strict=True) if size > 1]
    in_order = len(index) == len(wide) and all(i.same_as(v) for i, v in zip(index, wide, strict=True))
    return sch.get_sblock(after.name) if in_order else None


def _vectors(sch: Schedule, loop: LoopRV, device: Device) -> None:
    width = lanes_of(extent_of(sch, loop), device) or 1
    if width > 1:
        _, lane = sch.split(loop, factors=[None, width])
        sch.vectorize(lane)


def _bring(sch: Schedule, rv: SBlockRV, plane: LoopRV) -> None:
    """What a block alone reads of each plane is made there, and what that reads."""
    for producer in sch.get_producers(rv):
        known = describe(sch, producer)
        if known is None or known.reduction or len(sch.get_consumers(producer)) > 1:
            continue
        sch.compute_at(producer, plane)
        _bring(sch, producer, plane)
        if known.guarded:
            fill_then_copy(sch, known.name, plane)
        if known.name.startswith(RESIDUES):
            residues_together(sch, producer)


def residues_together(sch: Schedule, rv: SBlockRV) -> None:
    """Every second element for one row, and the others for the next: both rows at once."""
    *_, row, column = sch.get_loops(rv)
    if extent_of(sch, row) <= LARGEST_STRIDE < extent_of(sch, column):
        sch.reorder(column, row)
        sch.unroll(row)
