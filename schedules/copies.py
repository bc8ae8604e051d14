"""Copies of what one task, or one tile of rows, reads alone: made there, instead of for all before any of them starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from tvmtrain.schedules import transposing
from tvmtrain.schedules.blocks import Access, Block, describe
from tvmtrain.schedules.interleave import RESIDUES, residues_together
from tvmtrain.schedules.strips import in_strips
from tvmtrain.schedules.tiles import Tile, fill_then_copy, known, loops_in
from tvmtrain.targets import Device


def private_copies(sch: Schedule, block: Block, axes: Sequence[int]) -> list[str]:
    """Producers (padded copies) of which each step of the parallel axes reads a part of its own."""
    variables = [block.variables[a] for a in axes if block.extents[a] > 1]
    own = []
    for producer, access in made_for(sch, block):
        if variables and not in_strips(block, access) and all(any(i.same_as(v) for i in access.index) for v in variables):
            own.append(producer.name)
    return own


def made_for(sch: Schedule, block: Block) -> Iterator[tuple[Block, Access]]:
    """What is computed, without a sum, for this block alone, and how it reads that."""
    for rv in sch.get_producers(sch.get_sblock(block.name)):
        producer = describe(sch, rv)
        if producer is not None and not producer.reduction and len(sch.get_consumers(rv)) == 1:
            yield producer, next(r for r in block.reads if r.buffer.same_as(producer.write.buffer))


def bring(sch: Schedule, producer: str, at: LoopRV, device: Device, lines: bool) -> list[str]:
    """Copy what a step of the loop ``at`` reads, whole ``lines`` of a transposed copy or not; the names of the padded copies."""
    rv = sch.get_sblock(producer)
    block = known(sch, rv)
    across = transposing.across(block) if lines else None
    if lines and transposing.in_registers(block):
        out = transposing.rows_first(sch, producer)
        sch.compute_at(out, at)
        transposing.transpose(sch, producer, loops_in(sch, out, at), device)
        return []
    sch.compute_at(rv, at)
    if not producer.startswith(RESIDUES):
        if across is not None:
            transposing.line_by_line(sch, loops_in(sch, rv, at))
        return [producer]
    pads = [pad for pad in sch.get_producers(rv) if len(sch.get_consumers(pad)) == 1 and not known(sch, pad).chained]
    if not pads:
        fill_then_copy(sch, producer, at)
    residues_together(sch, rv)
    names = [sch.get(pad).name_hint for pad in pads]
    for pad in pads:
        sch.compute_at(pad, at)
    return names


def bring_all(sch: Schedule, block: Block, at: LoopRV, device: Device, lines: bool) -> None:
    """The copies for this block alone are made in each step of the loop ``at``; ``lines`` as in ``bring``."""
    for producer, _ in list(made_for(sch, block)):
        if not producer.chained:
            for copied in bring(sch, producer.name, at, device, lines):
                fill_then_copy(sch, copied, at)


def read_by_rows(sch: Schedule, block: Block, shape: Tile, device: Device) -> list[str]:
    """Producers of numbers each of which one tile of rows alone reads, as scalars, one for each step of the reduction."""
    found: list[str] = []
    size = 4 * prod(size for _, size in shape.rows) * prod(block.extents[axis] for axis in block.reductions)
    if block.extents[shape.axis] != shape.columns * shape.lanes or size > device.caches.l2 // 2:
        return found
    others = [axis for axis, extent in enumerate(block.extents) if axis != shape.axis and extent > 1]
    for producer, access in made_for(sch, block):
        once = producer.volume == prod(block.extents[axis] for axis in others)
        if once and not producer.kept and access.strides[shape.axis] == 0 and all(access.strides[axis] for axis in others):
            found.append(producer.name)
    return found
