"""The schedule of every kernel on an NVIDIA GPU: products in tiles of shared memory, sums by many threads, results side by side.

``schedule`` first turns each product (a convolution, one of its gradients, a matrix product) into C[b, i, j] += A[b, k, i] *
B[b, k, j], whatever its axes are, and inlines what is cheap. Then each block of a PrimFunc gets the first of these that fits it:

1. tile: a product. A tile of A and one of B lie in shared memory while a tile of C is summed up in registers.
2. share: a sum with few results or many terms (column sums, softmax). The threads of a block have a partial sum each.
3. gather: a sum of few terms (depthwise convolutions, pooling). Each thread makes one result.
4. sweep: one result for each place (elementwise, padding, copies), vectors of them where memory is contiguous.

What none of them fits runs in plain loops, as parallel as its axes say (``plain``): without threads, a GPU would run no kernel. All
arithmetic is in the dtypes of the model: tensor cores round float32 to 10 bits (TF32), which three products in place of one could undo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.tirx import IndexMap

from tvmtrain.schedules.blocks import FAILURES, Access, Block, buffer_of, describe, merged, realize, uses, uses_variable
from tvmtrain.targets import Device

THREADS = 256
WARP = 32
# Threads that a multiprocessor needs to hide the latency of its memory, roughly.
BUSY = 512
# Multiplications of a multiprocessor in one clock cycle, and the cycles it takes to start one more kernel, roughly.
LANES = 128
LAUNCH = 4000
# Terms of a sum that one thread adds up alone.
ALONE = 64
# Statements that are written out instead of being looped over.
UNROLLED = 32
# Elements for each multiprocessor from which on a thread makes a vector of them.
VECTORS = 2048
# Terms along the reduction in one tile of shared memory.
DEPTH = 16
# A product with fewer rows or columns is a sum.
SMALLEST = 4
# Into how many parts a sum may be split, and the fewest terms of a part of a product.
PARTS = 64
SMALLEST_PART = 4 * DEPTH

SHARED = "shared"

Template = Callable[[Schedule, Block, Device], bool]


@dataclass(frozen=True)
class Tile:
    """``rows`` by ``columns`` results of a product for one block of threads, ``each_row`` by ``each_column`` of them for a thread."""

    rows: int
    columns: int
    each_row: int
    each_column: int
    # Into how many parts the sum is split, for blocks of their own.
    parts: int = 1

    @property
    def threads(self) -> int:
        return self.rows * self.columns // (self.each_row * self.each_column)


TILES = tuple(
    Tile(rows, columns, each_row, each_column)
    for rows, columns in product((16, 32, 64, 128), repeat=2)
    for each_row, each_column in ((8, 8), (8, 4), (4, 8), (4, 4), (2, 4), (4, 2), (2, 2))
    if 64 <= rows * columns // (each_row * each_column) <= THREADS
)


def schedule(func: tirx.PrimFunc, device: Device) -> tirx.PrimFunc:
    """``func`` with every loop nest spread over threads; its results stay the same but for rounding."""
    if _has_threads(func):
        return func
    sch = Schedule(_rooted(func), error_render_level="none")
    forms: dict[str, Form] = {}
    if blocks := _blocks(sch):
        before = set(_names(sch))
        sch, forms = _as_products(sch, blocks, device)
        _inline(sch, set(_names(sch)) - before)
    names = _names(sch)
    reducing = {name: _is_reduction(sch, name) for name in names}
    for name in sorted(names, key=lambda n: not reducing[n]):
        if _bare(sch, name):
            sch = _fit(sch, name, forms.get(name), device)
    return sch.mod["main"]


def _has_threads(func: tirx.PrimFunc) -> bool:
    """Whether the function comes with threads of its own, as sorting and scanning do."""
    found: list[Any] = []
    visits = [
        (tirx.AttrStmt, lambda node: found.append(node) if node.attr_key == "thread_extent" else None),
        (tirx.For, lambda node: found.append(node) if node.kind == tirx.ForKind.THREAD_BINDING else None),
    ]
    tvm_ffi.structural_walk(func.body, visits, order="post")
    return bool(found)


def _rooted(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """``func`` as a row of loop nests: one block that has all of its loops inside (scatter) becomes a nest of one step."""
    block = func.body.block
    if block.name_hint == "root":
        return func
    body = tvm_ffi.structural_map(func.body, (tirx.For, _in_order))
    nest = tirx.For(tirx.Var("one", "int64"), 0, 1, tirx.ForKind.SERIAL, body)
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", nest))
    return tirx.PrimFunc(func.params, root, func.ret_type, func.attrs)


def _in_order(loop: tirx.For) -> tirx.For:
    """No core runs a GPU's loops beside another."""
    if loop.kind != tirx.ForKind.PARALLEL:
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def _names(sch: Schedule) -> list[str]:
    return [sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))]


def _is_reduction(sch: Schedule, name: str) -> bool:
    return any(axis.iter_type == tirx.IterVar.CommReduce for axis in sch.get(sch.get_sblock(name)).iter_vars)


def _blocks(sch: Schedule) -> list[Block]:
    """The blocks of a function that is a row of loop nests with one block each; nothing for any other function."""
    try:
        blocks = [describe(sch, block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
    except FAILURES:
        return []
    known = [b for b in blocks if b is not None]
    return known if len({b.name for b in known}) == len(blocks) else []


def _bare(sch: Schedule, name: str) -> bool:
    """Whether the block still stands in a nest of its own without threads: it was neither inlined nor moved into another's."""
    if name not in _names(sch):
        return False
    loops = sch.get_loops(sch.get_sblock(name))
    return all(sch.get(loop).thread_binding is None for loop in loops)


def _fit(sch: Schedule, name: str, form: Form | None, device: Device) -> Schedule:
    """The schedule after the first template that fits the block."""
    templates: list[Template] = [share, gather] if _is_reduction(sch, name) else [sweep]
    if form is not None:
        templates.insert(0, lambda s, b, d: tile(s, b, form))
    for template in templates:
        trial = sch.copy()
        try:
            block = describe(trial, trial.get_sblock(name))
            if block is not None and template(trial, block, device):
                return trial
        except FAILURES:
            continue
    return plain(sch, name)


def _inline(sch: Schedule, kept: set[str]) -> None:
    """Compute values where they are read, but for blocks ``kept``, and for roots and exponentials that a sum would read repeatedly."""
    for name in _names(sch):
        rv = sch.get_sblock(name)
        block = describe(sch, rv)
        if block is None or block.reduction or name in kept:
            continue
        readers = [(sch.get(c).name_hint in kept, describe(sch, c)) for c in sch.get_consumers(rv)]
        repeated = any(
            fetches or reader is None or (reader.reduction and reader.volume > block.volume) for fetches, reader in readers
        )
        if readers and not (block.expensive and repeated):
            with suppress(*FAILURES):
                sch.compute_inline(rv)


def _finish(sch: Schedule, rv: SBlockRV, at: LoopRV) -> SBlockRV:
    """Sum up in registers; the thread that has a result writes it, or what is computed from it alone."""
    writer = sch.cache_write(rv, 0, "local")
    # TVM 0.27 forgets the bounds of a consumer that was inlined before its producer moves.
    sch.reverse_compute_at(writer, at)
    while len(consumers := sch.get_consumers(writer)) == 1 and _one_to_one(sch, writer, consumers[0]):
        try:
            sch.reverse_compute_inline(consumers[0])
        except FAILURES:
            break
    return writer


def _one_to_one(sch: Schedule, writer: SBlockRV, consumer: SBlockRV) -> bool:
    """Whether a block reads each result at most once; TVM 0.27 inlines others, too, which then miss most of their places."""
    after = describe(sch, consumer)
    if after is None or after.reduction:
        return False
    buffer = buffer_of(sch.get(writer).writes[0])
    reads = [read for read in after.reads if read.buffer.same_as(buffer)]
    moves = [stride for read in reads for stride, e in zip(read.strides, after.extents, strict=True) if e > 1]
    return len(reads) == 1 and all(moves) and after.volume <= prod(int(d) for d in buffer.shape)


# --- Products -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a product C[b, i, j] += A[b, k, i] * B[b, k, j] is computed.

    ``fetches`` are the names of the blocks that bring A and B to shared memory. ``along``: for A and for B, whether neighbours in
    memory differ in i or j (else in k).
    """

    tile: Tile
    fetches: tuple[str, str]
    along: tuple[bool, bool]


@dataclass(frozen=True)
class _Axes:
    """The axes of a block by their part in a product: batch, those of A alone, those of B alone, those that are summed over."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    summed: tuple[int, ...]

    def size(self, block: Block, group: str) -> int:
        return prod(block.extents[a] for a in getattr(self, group))


def _as_products(sch: Schedule, blocks: Sequence[Block], device: Device) -> tuple[Schedule, dict[str, Form]]:
    """Every product among the blocks as one of matrices, in tiles without remainder; block name -> how to compute it."""
    forms: dict[str, Form] = {}
    for block in blocks:
        axes = _axes(block)
        if axes is None:
            continue
        trial = sch.copy()
        with suppress(*FAILURES):
            name, form = _as_product(trial, block, axes, device)
            sch, forms = trial, {**forms, name: form}
    return sch, forms


def _axes(block: Block) -> _Axes | None:
    """The parts of the block's axes if it is a product of two tensors large enough to be tiled."""
    if not block.reduction or len(block.reads) != 2:
        return None
    used = [tuple(uses(read, v) for read in block.reads) for v in block.variables]
    every = range(len(used))
    if any(used[a] != (True, True) and block.extents[a] > 1 for a in block.reductions):
        return None
    rows = tuple(a for a in every if used[a] == (True, False) and not block.reduced[a])
    columns = tuple(a for a in every if used[a] == (False, True) and not block.reduced[a])
    batch = tuple(a for a in every if a not in (*rows, *columns) and not block.reduced[a])
    if any(used[a] == (False, False) and block.extents[a] > 1 for a in batch):
        return None
    axes = _Axes(batch, rows, columns, block.reductions)
    small = min(axes.size(block, "rows"), axes.size(block, "columns")) < SMALLEST or block.volume < 16 * THREADS
    return None if small else axes


def _as_product(sch: Schedule, block: Block, axes: _Axes, device: Device) -> tuple[str, Form]:
    """The name of the block that multiplies and its form."""
    rv = sch.get_sblock(block.name)
    before = set(_names(sch))
    reads = (0, 1)
    # A warp writes neighbours: the axis that is contiguous in C is one of the columns.
    if any(block.write.strides[a] == 1 and block.extents[a] > 1 for a in axes.rows):
        axes, reads = _Axes(axes.batch, axes.columns, axes.rows, axes.summed), (1, 0)
    own = (axes.rows, axes.columns)
    batch, rows, columns, depth = (axes.size(block, group) for group in ("batch", "rows", "columns", "summed"))
    shape = _tile(batch, rows, columns, depth, device)
    for read, mine in zip(reads, own, strict=True):
        made = sch.reindex(rv, ("read", read))
        used = [a for a in range(len(block.extents)) if uses(block.reads[read], block.variables[a])]
        sch.transform_layout(made, ("write", 0), _fused(block, used, (axes.batch, axes.summed, mine)))
    made = sch.reindex(rv, ("write", 0))
    sch.transform_layout(made, ("read", 0), _fused(block, list(block.spatial), (axes.batch, *own)))
    every = list(range(len(block.extents)))
    sch.transform_block_layout(rv, _fused(block, every, (axes.batch, *own, axes.summed)))
    sch.pad_einsum(rv, [1, shape.rows, shape.columns, DEPTH * shape.parts])
    if shape.parts > 1:
        part, _ = sch.split(sch.get_loops(rv)[-1], factors=[shape.parts, None])
        rv = sch.rfactor(part, 0)
    fetches = []
    for read in reads:
        shared = sch.cache_read(rv, read, SHARED)
        _inline_into(sch, shared, before)
        fetches.append(sch.get(shared).name_hint)
    along = tuple(_neighbours(block, block.reads[read], mine) for read, mine in zip(reads, own, strict=True))
    return sch.get(rv).name_hint, Form(shape, (fetches[0], fetches[1]), (along[0], along[1]))


def _fused(block: Block, present: Sequence[int], groups: Sequence[Sequence[int]]) -> IndexMap:
    """The index map of a buffer or block with the axes ``present``, in order, to one axis for each of the groups."""

    def forward(*index: Any) -> list[Any]:
        at = dict(zip(present, index, strict=True))
        places: list[Any] = []
        for group in groups:
            place: Any = tirx.const(0, "int64")
            for axis in (a for a in group if a in at):
                place = place * block.extents[axis] + at[axis]
            places.append(place)
        return places

    return IndexMap.from_func(forward, ndim=len(present), index_dtype="int64")


def _neighbours(block: Block, read: Access, mine: Sequence[int]) -> bool:
    """Whether what the last of these axes counts lies side by side in the tensor that is read."""
    wide = [a for a in mine if block.extents[a] > 1]
    return bool(wide) and read.strides[wide[-1]] == 1


def _inline_into(sch: Schedule, fetch: SBlockRV, own: set[str]) -> None:
    """Padded and reordered copies are never made: the tile in shared memory is read from where the values are."""
    while made := [p for p in sch.get_producers(fetch) if sch.get(p).name_hint not in own]:
        sch.compute_inline(made[0])


def _tile(batch: int, rows: int, columns: int, depth: int, device: Device) -> Tile:
    """The tile that should take the least time: much arithmetic for each load, little padding, and work for the whole GPU."""

    def cost(shape: Tile) -> float:
        """Clock cycles, roughly."""
        blocks = batch * ceil(rows / shape.rows) * ceil(columns / shape.columns)
        loads = 1 / shape.each_row + 1 / shape.each_column
        fetched = 4 * (1 / shape.rows + 1 / shape.columns)
        terms = ceil(depth / (DEPTH * shape.parts)) * DEPTH * shape.parts * (1 + loads + fetched)
        work = blocks * shape.rows * shape.columns * (terms + (16 * shape.parts if shape.parts > 1 else 0))
        busy = min(1.0, blocks * shape.parts * shape.threads / (device.cores * BUSY))
        return work / (busy * device.cores * LANES) + (LAUNCH if shape.parts > 1 else 0)

    most = max(1, min(PARTS, depth // SMALLEST_PART))
    parts = [p for p in (1, 2, 4, 8, 16, 32, 64) if p <= most]
    return min((replace(t, parts=p) for t in TILES for p in parts), key=cost)


def tile(sch: Schedule, block: Block, form: Form) -> bool:
    """A tile of results for each block of threads; what is multiplied comes through shared memory, ``DEPTH`` terms at a time."""
    shape = form.tile
    rv = sch.get_sblock(block.name)
    batch, i, j, *part, k = sch.get_loops(rv)
    i0, i1, i2 = sch.split(i, factors=[None, shape.rows // shape.each_row, shape.each_row])
    j0, j1, j2 = sch.split(j, factors=[None, shape.columns // shape.each_column, shape.each_column])
    k0, k1 = sch.split(k, factors=[None, DEPTH])
    sch.reorder(batch, *part, i0, j0, i1, j1, k0, k1, i2, j2)
    sch.bind(sch.fuse(batch, *part, i0, j0), "blockIdx.x")
    sch.bind(i1, "threadIdx.y")
    sch.bind(j1, "threadIdx.x")
    for loop in (k1, i2, j2):
        sch.unroll(loop)
    for name, along in zip(form.fetches, form.along, strict=True):
        _fetch(sch, sch.get_sblock(name), k0, along, shape)
    _vectorize(sch, _finish(sch, rv, j1))
    sch.decompose_reduction(rv, k0)
    return True


def _vectorize(sch: Schedule, writer: SBlockRV) -> None:
    """A thread writes its results side by side as vectors, if no bound cuts them and nothing but words is read with them."""
    *rows, last = sch.get_loops(writer)[-2:]
    for loop in rows:
        sch.unroll(loop)
    whole = isinstance(predicate := realize(sch, writer).predicate, tirx.IntImm) and bool(predicate.value)
    if whole and _plain_words(sch, writer) and _extent(sch, last) % 4 == 0:
        last, lane = sch.split(last, factors=[None, 4])
        sch.vectorize(lane)
    sch.unroll(last)


def _fetch(sch: Schedule, fetch: SBlockRV, at: LoopRV, along: bool, shape: Tile) -> None:
    """All threads of a block copy one tile into shared memory, neighbours in memory by neighbouring threads."""
    whole = _plain_words(sch, fetch)
    sch.compute_at(fetch, at, preserve_unit_loops=True)
    depth, own = sch.get_loops(fetch)[-2:]
    size = _extent(sch, depth) * _extent(sch, own)
    if not along:
        sch.reorder(own, depth)
        # Neighbouring threads write into different banks.
        sch.storage_align(fetch, 0, -2, _extent(sch, own), 4)
    vector = 4 if along and whole and size % (4 * shape.threads) == 0 else 1
    line = sch.fuse(*((depth, own) if along else (own, depth)))
    columns = shape.columns // shape.each_column
    _, y, x, lane = sch.split(line, factors=[None, shape.threads // columns, columns, vector])
    sch.bind(y, "threadIdx.y")
    sch.bind(x, "threadIdx.x")
    if vector > 1:
        sch.vectorize(lane)


# --- Sums -------------------------------------------------------------------------------------------------------------------


def share(sch: Schedule, block: Block, device: Device) -> bool:
    """A sum of many terms: the threads of a block have a partial sum each, and add them up through shared memory."""
    terms = prod(block.extents[a] for a in block.reductions)
    results = prod(block.extents[a] for a in block.spatial)
    if terms <= ALONE or results >= 2 * device.cores * BUSY:
        return False
    rv = sch.get_sblock(block.name)
    if results * THREADS < device.cores * BUSY and terms >= 16 * THREADS and (parts := _parts(block)) > 1:
        return _share_in_parts(sch, rv, block, parts, device)
    loops = sch.get_loops(rv)
    across = _across(block)
    sums = sch.fuse(*[loops[a] for a in block.reductions])
    spatial = [loops[a] for a in block.spatial if a != across]
    sch.reorder(*spatial, *([loops[across]] if across is not None else []), sums)
    if across is None:
        _share_rows(sch, rv, spatial or [sch.add_unit_loop(sums)], sums, terms)
    else:
        _share_columns(sch, spatial, loops[across], sums)
    return True


def _share_rows(sch: Schedule, rv: SBlockRV, spatial: Sequence[LoopRV], sums: LoopRV, terms: int) -> None:
    """Neighbouring threads add neighbouring terms: a warp for each of several short sums, or a block for a long one."""
    width = WARP if terms <= 8 * WARP else THREADS
    place, y = sch.split(sch.fuse(*spatial), factors=[None, THREADS // width])
    _, x = sch.split(sums, factors=[None, width])
    sch.reorder(place, y, x)
    sch.bind(place, "blockIdx.x")
    sch.bind(y, "threadIdx.y")
    sch.bind(x, "threadIdx.x")
    _finish_shared(sch, rv, y)


def _finish_shared(sch: Schedule, rv: SBlockRV, at: LoopRV) -> None:
    """What is computed from a sum alone is computed where the sum is, by each of its threads."""
    consumers = sch.get_consumers(rv)
    if len(consumers) == 1 and _one_to_one(sch, rv, consumers[0]):
        with suppress(*FAILURES):
            sch.reverse_compute_at(consumers[0], at)
            sch.set_scope(rv, 0, SHARED)


def _share_columns(sch: Schedule, spatial: Sequence[LoopRV], across: LoopRV, sums: LoopRV) -> None:
    """Neighbouring threads make neighbouring sums, of which every eighth term is theirs."""
    outer, x = sch.split(across, factors=[None, WARP])
    _, y = sch.split(sums, factors=[None, THREADS // WARP])
    place = sch.fuse(*spatial, outer)
    sch.reorder(place, x, y)
    sch.bind(place, "blockIdx.x")
    sch.bind(x, "threadIdx.x")
    sch.bind(y, "threadIdx.y")


def _across(block: Block) -> int | None:
    """The axis of the results along which what is summed is contiguous; None if it is contiguous along the sum."""
    read = max(block.reads, key=lambda r: prod(int(d) for d in r.buffer.shape))
    return next((a for a in block.spatial if read.strides[a] == 1 and block.extents[a] >= WARP // 4), None)


def _parts(block: Block) -> int:
    """Into how many parts the outermost axis of a sum is split."""
    size = block.extents[block.reductions[0]]
    return max(p for p in range(1, PARTS + 1) if size % p == 0)


def _share_in_parts(sch: Schedule, rv: SBlockRV, block: Block, parts: int, device: Device) -> bool:
    """Few sums of very many terms: parts of them first, for more blocks of threads."""
    outer, _ = sch.split(sch.get_loops(rv)[block.reductions[0]], factors=[parts, None])
    partial = sch.rfactor(outer, 0)
    both = [describe(sch, partial), describe(sch, rv)]
    return all(b is not None and (share(sch, b, device) or gather(sch, b, device)) for b in both)


def gather(sch: Schedule, block: Block, device: Device) -> bool:
    """One result for each thread, which adds up its terms alone."""
    rv = sch.get_sblock(block.name)
    loops = sch.get_loops(rv)
    sums = [loops[a] for a in block.reductions]
    spatial = [loops[a] for a in block.spatial] or [sch.add_unit_loop(loops[0])]
    sch.reorder(*spatial, *sums)
    _, thread = _bind(sch, spatial)
    _finish(sch, rv, thread)
    sch.decompose_reduction(rv, sums[0])
    if prod(block.extents[a] for a in block.reductions) <= UNROLLED:
        for loop in sums:
            sch.unroll(loop)
    return True


# --- One result for each place ------------------------------------------------------------------------------------------------


def sweep(sch: Schedule, block: Block, device: Device) -> bool:
    """One result, or a vector of them, for each thread."""
    loops = sch.get_loops(sch.get_sblock(block.name))
    if not loops:
        loops = [sch.add_unit_loop(sch.get_sblock(block.name))]
    run = min(merged(a, block.extents) for a in block.accesses)
    size = prod(block.extents[len(block.extents) - run :])
    words = all(_word(access.buffer) for access in block.accesses)
    width = device.lanes() if words and size % device.lanes() == 0 and block.volume >= VECTORS * device.cores else 1
    _bind(sch, loops, width)
    return True


def _bind(sch: Schedule, loops: Sequence[LoopRV], width: int = 1) -> tuple[LoopRV, LoopRV]:
    """The loops spread over blocks of threads, ``width`` neighbouring steps as one vector."""
    line = sch.fuse(*loops)
    place, thread, lane = sch.split(line, factors=[None, min(THREADS, _extent(sch, line)), width])
    sch.bind(place, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    if width > 1:
        sch.vectorize(lane)
    return place, thread


def _plain_words(sch: Schedule, rv: SBlockRV) -> bool:
    """Whether a block reads and writes nothing but words, and none of them under a condition."""
    source = sch.get(rv)
    return all(_word(buffer_of(r)) for r in (*source.reads, *source.writes)) and "if_then_else" not in str(source.body)


def _word(buffer: Any) -> bool:
    """Whether a buffer's elements are four bytes each: vectors of bytes and truth values are not worth what they risk."""
    return str(buffer.ty.dtype) in ("float32", "int32", "uint32")


def _extent(sch: Schedule, loop: LoopRV) -> int:
    return int(sch.get(loop).extent)


# --- Anything else ------------------------------------------------------------------------------------------------------------


def plain(sch: Schedule, name: str) -> Schedule:
    """As many of the outermost loops as have no order, spread over threads; one thread for a nest that has none of them."""
    count = _parallel_loops(sch, sch.get_sblock(name))
    for outer in range(count, 0, -1):
        trial = sch.copy()
        with suppress(*FAILURES):
            _bind(trial, trial.get_loops(trial.get_sblock(name))[:outer])
            return trial
    rv = sch.get_sblock(name)
    loops = sch.get_loops(rv)
    alone = sch.add_unit_loop(loops[0] if loops else rv)
    _bind(sch, [alone])
    return sch


def _parallel_loops(sch: Schedule, rv: SBlockRV) -> int:
    """How many of the loops around a block, from outside, move along axes of its results alone."""
    axes = sch.get(rv).iter_vars
    values = realize(sch, rv).iter_values
    ordered = [v for axis, v in zip(axes, values, strict=True) if axis.iter_type != tirx.IterVar.DataPar]
    count = 0
    for loop in sch.get_loops(rv):
        variable = sch.get(loop).loop_var
        if any(uses_variable(value, variable) for value in ordered):
            break
        count += 1
    return count
