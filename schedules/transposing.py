"""Copies that write along an axis across the one along which they read neighbours: eight rows become columns in registers.

    for c in 8: for v in 4: local[c, v] = f(x[c, v])      vectors along v
    for v in 4: out[v, 0:8] = shuffle(local)              vectors along c

Written out as loops alone, such a copy scatters each number by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule, TensorIntrin
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.script import tirx as T

from tvmtrain.schedules.blocks import FAILURES, Block
from tvmtrain.schedules.tiles import extent_of
from tvmtrain.targets import Device

# Rows read at once: a small map's rows are a power of two apart, and caches keep few such. Numbers of each.
ROWS, COLUMNS = 8, 4
# The name under which TVM knows how a tile is transposed, and an annotation of the blocks that are to be. TVM 0.27 cannot copy a
# schedule in which something was tensorized.
INTRINSIC, TRANSPOSED = "tvmtrain.transpose", "tvmtrain.transposed"


def across(block: Block) -> int | None:
    """The axis along which a copy reads neighbours, if it writes them along the last axis."""
    last = len(block.extents) - 1
    if last < 1 or block.write.strides[last] != 1 or block.extents[last] % ROWS:
        return None
    return next((a for a in range(last) if block.extents[a] > 1 and {r.strides[a] for r in block.reads} - {0} == {1}), None)


def line_by_line(sch: Schedule, loops: Sequence[LoopRV]) -> tuple[LoopRV, LoopRV]:
    """Write ``ROWS`` neighbours at a time, and read on along their rows while these are in the nearest cache."""
    line, lane = sch.split(loops[-1], factors=[None, ROWS])
    sch.reorder(line, *loops[:-1], lane)
    return line, lane


def in_registers(block: Block) -> bool:
    """Whether a copy is one of whole tiles, with nothing to ask for each number, along neighbouring axes."""
    last = len(block.extents) - 1
    whole = block.extents[last - 1] % COLUMNS == 0 and str(block.write.buffer.dtype) == "float32"
    return across(block) == last - 1 and whole and not block.guarded


def rows_first(sch: Schedule, name: str) -> SBlockRV:
    """Let the copy ``name`` fill registers, rows first; the block that brings them to memory, whose loops are to be ``transpose``d."""
    made = sch.get_sblock(name)
    out = sch.cache_write(made, 0, "local")
    sch.transform_layout(made, ("write", 0), lambda *i: [*i[:-2], i[-1], i[-2]])
    return out


def transpose(sch: Schedule, name: str, loops: Sequence[LoopRV], device: Device) -> LoopRV:
    """Order the last ``loops`` over what ``rows_first`` made, tile by tile along lines of ``ROWS``; returns the outermost."""
    *outer, place, last = loops
    wide = [w for w in (2 * COLUMNS, 4 * COLUMNS) if extent_of(sch, place) % w == 0 and w <= device.lanes()]
    width = max(wide, default=COLUMNS)
    line, row = sch.split(last, factors=[None, ROWS])
    run, tile, column = sch.split(place, factors=[None, width // COLUMNS, COLUMNS])
    sch.reorder(line, *outer, run, tile, column, row)
    made = sch.get_sblock(name)
    sch.compute_at(made, run)
    *_, lane, each = sch.get_loops(made)
    sch.reorder(each, lane)
    sch.unroll(each)
    sch.vectorize(lane)
    sch.unroll(tile)
    sch.annotate(sch.get_consumers(made)[0], TRANSPOSED, 1)
    return line


def shuffle(sch: Schedule) -> None:
    """The last primitive: every tile that is to be transposed becomes shuffles of vectors."""
    for out in sch.get_child_blocks(sch.get_sblock("root")):
        if TRANSPOSED in sch.get(out).annotations:
            sch.unannotate(out, TRANSPOSED)
            with suppress(*FAILURES):
                sch.tensorize(sch.get_loops(out)[-2], _intrinsic())


@cache
def _intrinsic() -> str:
    TensorIntrin.register(INTRINSIC, _loops(), _shuffles(), override=True)
    return INTRINSIC


def _loops() -> tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def loops(source: T.handle, target: T.handle) -> None:
        a = T.match_buffer(source, (ROWS, COLUMNS), "float32", offset_factor=1, strides=[T.int64(), T.int64(1)], scope="local")
        b = T.match_buffer(target, (COLUMNS, ROWS), "float32", offset_factor=1, strides=[T.int64(), T.int64(1)])
        with T.sblock("root"):
            T.reads(a[0:ROWS, 0:COLUMNS])
            T.writes(b[0:COLUMNS, 0:ROWS])
            for i, j in T.grid(COLUMNS, ROWS):
                with T.sblock("transposed"):
                    v, c = T.axis.remap("SS", [i, j])
                    b[v, c] = a[c, v]

    return loops


def _shuffles() -> tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def shuffles(source: T.handle, target: T.handle) -> None:
        a = T.match_buffer(source, (ROWS, COLUMNS), "float32", offset_factor=1, strides=[T.int64(), T.int64(1)], scope="local")
        b = T.match_buffer(target, (COLUMNS, ROWS), "float32", offset_factor=1, strides=[T.int64(), T.int64(1)])
        with T.sblock("root"):
            T.reads(a[0:ROWS, 0:COLUMNS])
            T.writes(b[0:COLUMNS, 0:ROWS])
            b[0, T.Ramp(0, 1, ROWS)] = _column(a, 0)
            b[1, T.Ramp(0, 1, ROWS)] = _column(a, 1)
            b[2, T.Ramp(0, 1, ROWS)] = _column(a, 2)
            b[3, T.Ramp(0, 1, ROWS)] = _column(a, 3)

    return shuffles


def _column(a: Any, v: int) -> tirx.Shuffle:
    """Column v of the rows of ``a``: shuffles of two vectors each, within 128 bits, as processors have them."""
    both = [_shuffled((a[c, T.Ramp(0, 1, COLUMNS)], a[c + 4, T.Ramp(0, 1, COLUMNS)]), range(8)) for c in range(4)]
    half, low = divmod(v, 2)
    near = (0, 8, 1, 9, 4, 12, 5, 13) if half == 0 else (2, 10, 3, 11, 6, 14, 7, 15)
    pairs = [_shuffled((both[c], both[c + 1]), near) for c in (0, 2)]
    return _shuffled(pairs, (0, 1, 8, 9, 4, 5, 12, 13) if low == 0 else (2, 3, 10, 11, 6, 7, 14, 15))


def _shuffled(vectors: Sequence[Any], places: Sequence[int]) -> tirx.Shuffle:
    return tirx.Shuffle(list(vectors), [tirx.const(i, "int32") for i in places])
