"""The schedule of every kernel on a processor: vectors along memory, sums in registers, cores over what is left.

``schedule`` first inlines what is cheap. A product that is part of what reads it (``schedules.chains``) is computed in the same tasks
(``chain``, or with the projection that follows ``schedules.bottleneck``). Every other block of a PrimFunc gets the first of these that
fits it:

1. side_by_side: a product over channels of maps that are no whole vectors. Some filters' results for all places stay in the cache.
2. pooled: sums of rows of a map of which others take sums of neighbours (patches). A row at a time stays in the cache.
3. accumulate: a reduction by parts (``schedules.accumulate``).
4. tile: a reduction whose results lie side by side (convolutions, matrix products, column sums). A tile of results stays in
   registers while the reduction runs; what is computed from the results is written at once (``schedules.epilogues``). Copies of what a
   task or a tile of rows alone reads are made there (``schedules.copies``), those across rows in registers.
5. lanes: a reduction along memory (row sums, softmax). Each lane of a vector has a partial sum.
6. interleave: another formula for each residue of a place modulo a stride. All residues of a row in one loop.
7. sweep: one result for each place (elementwise, padding, copies).

A template that does not fit a block is undone; the worst that can happen is a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from tvmtrain.schedules import transposing
from tvmtrain.schedules.accumulate import accumulate
from tvmtrain.schedules.blocks import FAILURES, Block, describe, merged
from tvmtrain.schedules.bottleneck import bottleneck
from tvmtrain.schedules.copies import bring, private_copies, read_by_rows
from tvmtrain.schedules.decisions import DEFAULT, Decisions
from tvmtrain.schedules.epilogues import epilogue_of, finish_in
from tvmtrain.schedules.interleave import interleave
from tvmtrain.schedules.panels import bring_panels
from tvmtrain.schedules.sharing import busy, cores_of, parallel, shared_prefix
from tvmtrain.schedules.side_by_side import side_by_side
from tvmtrain.schedules.strips import bring_strips, in_strips
from tvmtrain.schedules.tiles import (
    IN_STRIPS,
    LARGEST_TILE,
    ON_MAPS,
    PARALLEL,
    TILES,
    Tile,
    divisors,
    extent_of,
    fill_then_copy,
    keep_in_registers,
    known,
    lanes_of,
    leave_registers,
    loops_in,
    one_consumer,
    register_tile,
    split_tile,
    vector_axis,
    with_rows,
)
from tvmtrain.schedules.windows import tile_of, write_out_taps
from tvmtrain.targets import Device

# Bytes that the partial sums of one kernel may take.
LARGEST_PARTIAL = 4 * 2**20

Template = Callable[[Schedule, Block, Device, Decisions], bool]


def schedule(func: tirx.PrimFunc, device: Device, decisions: Decisions = DEFAULT) -> tirx.PrimFunc:
    """``func`` with its loops ordered, vectorized and spread over cores; its results stay the same but for rounding."""
    try:
        sch = Schedule(func, error_render_level="none")
    except FAILURES:
        return func
    return decided(sch, device, decisions).mod["main"]


def decided(sch: Schedule, device: Device, decisions: Decisions) -> Schedule:
    """What the templates make of a schedule, with these decisions: the space that tuning searches."""
    blocks = _prepared(sch, device)
    sch = _fit_chain(sch, blocks, device, decisions)
    for block in sorted(blocks, key=lambda b: not b.reduction and b.strides is None):
        if _alone(sch, block.name):
            sch = _fit(sch, block, device, decisions)
    with suppress(*FAILURES):  # a kernel of plain statements has no block to look into
        transposing.shuffle(sch)
    return sch


def _prepared(sch: Schedule, device: Device) -> list[Block]:
    """The blocks that need loops, after what is cheap was inlined and rows were padded to whole vectors."""
    blocks = blocks_of(sch)
    if len(blocks) > 1:
        _inline(sch, blocks)
        blocks = blocks_of(sch)
    return blocks_of(sch) if _pad(sch, blocks, device) else blocks


def _fit(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> Schedule:
    """The schedule after the template that is decided on, of those that fit the block; unchanged if none does."""
    fitting = []
    for template in REDUCTIONS if block.reduction else PLAIN:
        trial = sch.copy()
        with suppress(*FAILURES):
            if template(trial, block, device, decisions):
                fitting.append(trial)
                if template is accumulate:  # any other would keep what all parts add
                    return trial
        if len(fitting) > decisions.template:
            break
    return fitting[-1] if fitting else sch


def _alone(sch: Schedule, name: str) -> bool:
    """Whether the block still has loops of its own, untouched: it was neither inlined nor moved into another's."""
    blocks = {sch.get(block).name_hint: block for block in sch.get_child_blocks(sch.get_sblock("root"))}
    if name not in blocks:
        return False
    loops = sch.get_loops(blocks[name])
    return not loops or (len(sch.get_child_blocks(loops[0])) == 1 and sch.get(loops[0]).kind == tirx.ForKind.SERIAL)


def blocks_of(sch: Schedule) -> list[Block]:
    """The blocks of a function that is a row of loop nests with one block each; nothing for any other function."""
    try:
        blocks = [describe(sch, block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
    except FAILURES:
        return []
    described = [b for b in blocks if b is not None]
    return described if len({b.name for b in described}) == len(blocks) else []


# --- Inlining ---------------------------------------------------------------------------------------------------------------


def _inline(sch: Schedule, blocks: Sequence[Block]) -> None:
    """Compute values where they are read, unless they are read often there or cost much."""
    by_name = {b.name: b for b in blocks}
    for block in blocks:
        rv = sch.get_sblock(block.name)
        consumers = [by_name[sch.get(c).name_hint] for c in sch.get_consumers(rv)]
        repeated = any(c.reduction and c.volume > block.volume for c in consumers)
        repeated |= block.guarded and any(c.volume > 2 * block.volume or _strided(c, block) for c in consumers)
        costly = block.expensive and sum(c.volume for c in consumers) > block.volume
        if consumers and not (block.reduction or repeated or costly or block.kept):
            with suppress(*FAILURES):
                sch.compute_inline(rv)


def _strided(reader: Block, block: Block) -> bool:
    """Whether a block reads another's results with gaps between neighbours."""
    return any(r.strides[-1] not in (0, 1) for r in reader.reads if r.buffer.same_as(block.write.buffer))


def _pad(sch: Schedule, blocks: Sequence[Block], device: Device) -> bool:
    """Matrix products whose rows are no whole vectors (197 tokens) get operands padded with zeros; whether there were any."""
    padded = False
    for block in blocks:
        axis = vector_axis(block) if len(block.reads) > 1 and block.volume >= PARALLEL else None
        if axis is None or lanes_of(block.extents[axis], device) is not None:
            continue
        steps = [device.lanes() if v.var.same_as(block.variables[axis]) else 1 for v in block.source.iter_vars]
        with suppress(*FAILURES):
            sch.pad_einsum(sch.get_sblock(block.name), steps)
            padded = True
    return padded


# --- Reductions -------------------------------------------------------------------------------------------------------------


def tile(sch: Schedule, block: Block, device: Device, decisions: Decisions, steps: int = 1, bands: int = 1) -> bool:
    """Results that lie side by side: a tile of them in registers, the reduction around it, cores over the tiles.

    steps: how many of the steps that the cores share are one of their tasks. bands: of rows, all of one for all channels of an image.
    """
    rv = sch.get_sblock(block.name)
    epilogue, cut = epilogue_of(sch, block, device) if block.reduction else (None, False)
    most = IN_STRIPS if any(in_strips(block, read) for read in block.reads) else ON_MAPS
    shape = tile_of(block, device, cut, decisions.tile, most) if block.reduction else None
    if shape is None and cut:
        epilogue, shape = None, tile_of(block, device, False, decisions.tile, most)
    if shape is None:
        return False
    loops = sch.get_loops(rv)
    inner, outer_of = split_tile(sch, loops, shape)
    axes = _outer_axes(block, shape, decisions.order)
    outer = [outer_of.get(a, loops[a]) for a in axes]
    reductions = [loops[a] for a in block.reductions]
    sch.reorder(*outer, *reductions, *inner)
    counts = [extent_of(sch, loop) for loop in outer]
    shared, private = _share(sch, block, axes, counts, cores_of(device, decisions)) if block.volume >= PARALLEL else (0, [])
    by_rows = [] if decisions.order else [each for each in read_by_rows(sch, block, shape, device) if each not in private]
    if bands > 1:
        outer, shared = _in_bands(sch, outer, axes.index(2), bands), shared + 1
    outer = parallel(sch, outer, shared, steps)
    lines = shape.columns * shape.lanes % transposing.ROWS == 0
    copies = [(copied, outer[0]) for producer in private for copied in bring(sch, producer, outer[0], device, lines)]
    if not private and decisions.order == 0 and len(outer) > len(shape.rows):
        outer = bring_strips(sch, block, shape, outer, device)
    for producer in by_rows:
        with suppress(*FAILURES):
            sch.compute_at(sch.get_sblock(producer), outer[-1])
            copies.append((producer, outer[-1]))
    for copy in bring_panels(sch, block, shape, device):
        sweep(sch, known(sch, copy), device, decisions)
    finish_in(sch, rv, epilogue, outer[-1] if outer else None, device)
    for copied, at in copies:
        fill_then_copy(sch, copied, at)
    write_out_taps(sch, reductions, inner, device, decisions)
    keep_in_registers(sch, rv, inner, reductions[0])
    return True


def _in_bands(sch: Schedule, outer: Sequence[LoopRV], rows: int, bands: int) -> list[LoopRV]:
    """The loops over tiles, that over ``rows`` in as many bands or some more, all of one for each step of the first loop."""
    loops = list(outer)
    count = extent_of(sch, loops[rows])
    cut = min(d for d in divisors(count, count) if d >= min(bands, count))
    band, loops[rows] = sch.split(loops[rows], factors=[cut, None])
    loops.insert(1, band)
    sch.reorder(*loops)
    return loops


def _outer_axes(block: Block, shape: Tile, order: int) -> list[int]:
    """The axes of the loops over tiles, from the outside."""
    rows = [a for a, _ in shape.rows]
    free = [a for a in block.spatial if a not in (shape.axis, *rows)]
    return ([*free, shape.axis, *rows], [*free, *rows, shape.axis], [*rows, *free, shape.axis])[order]


def _share(sch: Schedule, block: Block, axes: Sequence[int], counts: Sequence[int], cores: int) -> tuple[int, list[str]]:
    """How many outer loops the cores share, and the padded copies that each step then makes for itself: small ones are best."""
    fewest = shared_prefix(counts, cores)
    for shared in range(len(axes), fewest - 1, -1):
        if own := private_copies(sch, block, axes[:shared]):
            return shared, own
    return fewest, []


# --- A product, and what reads its results ------------------------------------------------------------------------------------


def chains(func: tirx.PrimFunc, device: Device) -> bool:
    """Whether ``func`` has a product marked as chained that is computed in the tasks of what reads it, with the default decisions."""
    sch = Schedule(func, error_render_level="none")
    return _fit_chain(sch, _prepared(sch, device), device, DEFAULT) is not sch


def _fit_chain(sch: Schedule, blocks: Sequence[Block], device: Device, decisions: Decisions) -> Schedule:
    """The schedule with all reductions of a chain in the same tasks; unchanged where there is none, or it does not fit."""
    if not any(block.chained for block in blocks):
        return sch
    trial = sch.copy()
    with suppress(*FAILURES):
        product, reader, *rest = (block for block in blocks if block.reduction)
        if rest:
            (projection,) = rest
            bottleneck(trial, product, reader, projection, device, decisions)
        else:
            chain(trial, product, reader, device, decisions)
        return trial
    return sch


def chain(sch: Schedule, product: Block, reader: Block, device: Device, decisions: Decisions) -> None:
    """Some channels of one image at a time: the product's results, then all that is computed from them, while they are in the cache.

    Of maps so large that what the product reads does not stay there meanwhile, a band of rows at a time: all channels of it, then the
    next one; the rows that two bands read are computed twice. Raises one of ``FAILURES`` where the two do not fit each other.
    """
    rows = _rows_of_channels(product, device, decisions)
    channels = _channels_together(product, rows.rows[0][1], device, decisions)
    bands = _bands(sch, product, reader, channels, device)
    rv = sch.get_sblock(product.name)
    if bands > 1:
        product = with_rows(sch, product)
        rows = _rows_of_channels(product, device, decisions, channels)
    order = decisions.order if bands == 1 else 0
    if not tile(sch, reader, device, replace(decisions, tile=0, grain=0, order=order), channels, bands):
        raise ValueError("results that do not lie side by side")
    end, _ = epilogue_of(sch, product, device)
    if end is None:
        raise ValueError("results that are not read in their order")
    task = sch.get_loops(sch.get_consumers(end)[0])[0]
    if sch.get(task).kind != tirx.ForKind.PARALLEL:
        raise ValueError("too little work for several cores")
    sch.set_scope(rv, 0, "local")
    for each in (end, rv):
        sch.compute_at(each, task)
    channel, *height, place, depth = loops_in(sch, rv, task)
    if (extent_of(sch, channel), extent_of(sch, place)) != (channels, product.extents[-2]):
        raise ValueError("a task reads other results than those of its channels")
    inner, outer_of = split_tile(sch, {1: channel, rows.axis: place}, rows)
    sch.reorder(*height, outer_of[rows.axis], outer_of[1], depth, *inner)
    leave_registers(sch, end, outer_of[1], device)
    keep_in_registers(sch, rv, inner, depth)


def _rows_of_channels(product: Block, device: Device, decisions: Decisions, channels: int = 0) -> Tile:
    """The tile of channels that is decided on, or the next one that divides ``channels``."""
    for rank in range(decisions.tile, decisions.tile + (TILES if channels else 1)):
        shape = register_tile(product, device, False, rank, ON_MAPS)
        if shape is not None and [axis for axis, _ in shape.rows] == [1] and channels % shape.rows[0][1] == 0:
            return shape
    raise ValueError("tiles of other axes than channels")


def _bands(sch: Schedule, product: Block, reader: Block, channels: int, device: Device) -> int:
    """Into how many bands of rows a map is cut, so that half of the cache holds what a task reads and computes.

    1 where rows are no whole vectors, or where bands would compute more than a quarter of their rows twice.
    """
    after = one_consumer(sch, product)
    if after is None or len(after.extents) != 4 or after.extents[-1] % device.lanes():
        return 1
    size, twice = 4 * product.extents[2] * (product.extents[3] + channels), reader.extents[5] - 1
    most = after.extents[-2] // (4 * twice) if twice else 1
    return next((bands for bands in divisors(after.extents[-2], most) if size <= bands * device.caches.l2 // 2), 1)


def _channels_together(product: Block, rows: int, device: Device, decisions: Decisions) -> int:
    """How many are one task: fewer read the product's operand too often, more do not stay in the cache, or leave cores idle."""
    batch, channels, places, _ = product.extents
    cache = max(device.caches.l2, device.caches.l3 // device.cores)
    for tiles in ((2, 1), (1,), (4, 2, 1))[decisions.grain]:
        together = tiles * rows
        if channels % together == 0 and 4 * together * places <= cache and busy(batch * channels // together, device.cores):
            return together
    raise ValueError("no number of channels suits the cache and the cores")


# --- Sums over patches --------------------------------------------------------------------------------------------------------


def pooled(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> bool:
    """Sums of a few rows, and of neighbours in them: row by row, so that what is read with gaps has just been made."""
    rv = sch.get_sblock(block.name)
    reader = one_consumer(sch, block)
    last = len(block.extents) - 1
    if reader is None or reader.reduction or block.reductions != (last,) or not _strided(reader, block):
        return False
    if block.extents[last] > LARGEST_TILE or block.write.strides[last - 1] != 1:
        return False
    *outer, at, _ = sch.get_loops(sch.get_sblock(reader.name))
    sch.compute_at(rv, at)
    if block.volume >= PARALLEL:
        parallel(sch, outer, shared_prefix([extent_of(sch, loop) for loop in outer], cores_of(device, decisions)))
    *_, place, row = sch.get_loops(rv)
    place, lane = sch.split(place, factors=[None, lanes_of(block.extents[last - 1], device) or 1])
    sch.reorder(place, row, lane)
    sch.vectorize(lane)
    sch.unroll(row)
    sch.decompose_reduction(rv, row)
    return True


# --- Reductions along memory --------------------------------------------------------------------------------------------------


def lanes(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> bool:
    """A sum along memory: partial sums side by side in a vector, added up at the end."""
    count = _run(block) if block.reduction and block.volume >= 1024 else 0
    if not count:
        return False
    rv = sch.get_sblock(block.name)
    results = prod(block.extents[a] for a in block.spatial)
    if results < 2 * device.cores and block.volume >= PARALLEL and (parts := _parts(block, device)):
        loop = sch.get_loops(rv)[block.reductions[0]]
        if block.extents[block.reductions[0]] != parts:
            loop, _ = sch.split(loop, factors=[parts, None])
        rv = sch.rfactor(loop, 0)
        return lanes(sch, known(sch, rv), device, decisions) or sweep(sch, known(sch, rv), device, decisions)
    width = _partial_sums(prod(block.extents[-count:]), device)
    if width is None or 4 * results * width > LARGEST_PARTIAL:
        return False
    loops = sch.get_loops(rv)
    line = sch.fuse(*loops[-count:]) if count > 1 else loops[-1]
    _, lane = sch.split(line, factors=[None, width])
    partial = sch.rfactor(lane, -1)
    if results * width >= PARALLEL:
        spatial = [loop for loop, reduced in zip(sch.get_loops(rv), known(sch, rv).reduced, strict=True) if not reduced]
        sch.reorder(*spatial, *[loop for loop in sch.get_loops(rv) if loop not in spatial])
        parallel(sch, spatial, len(spatial))
    return tile(sch, known(sch, partial), device, decisions)


def _run(block: Block) -> int:
    """How many of the last axes are reduced and one contiguous run in everything that is read."""
    trailing = 0
    for reduced in reversed(block.reduced):
        if not reduced:
            break
        trailing += 1
    return min(trailing, *(merged(r, block.extents) for r in block.reads)) if block.reads else 0


def _parts(block: Block, device: Device) -> int | None:
    """Into how many parts the outermost reduced axis is divided where there are too few results for all cores."""
    size = block.extents[block.reductions[0]]
    if len(block.reductions) > 1 and size <= 16 * device.cores:
        return size if size >= device.cores else None
    return next((p for p in (4 * device.cores, 2 * device.cores, device.cores) if size % p == 0 and size > p), None)


def _partial_sums(size: int, device: Device) -> int | None:
    """How many partial sums: several vectors of them, or the largest divisor that fits two vectors."""
    width = next(
        (k * device.lanes() for k in (4, 2, 1) if size % (k * device.lanes()) == 0 and size > k * device.lanes()), None
    )
    return width or next((d for d in range(2 * device.lanes(), 3, -1) if size % d == 0 and size > d), None)


# --- One result for each place ------------------------------------------------------------------------------------------------


def sweep(sch: Schedule, block: Block, device: Device, decisions: Decisions) -> bool:
    """One result for each place: vectors along what is contiguous everywhere, cores over the rest."""
    spatial = len(block.spatial)
    if list(block.spatial) != list(range(spatial)):
        return False
    loops = sch.get_loops(sch.get_sblock(block.name))
    together = 0 if block.reduction else min(merged(a, block.extents) for a in block.accesses)
    head = loops[: spatial - together]
    if together:
        size = prod(block.extents[spatial - together :])
        line = sch.fuse(*loops[spatial - together :]) if together > 1 else loops[-1]
        width = lanes_of(size, device) or 1
        parts = _chunks(size, width, prod(block.extents[: spatial - together]), device)
        part, _, lane = sch.split(line, factors=[parts, None, width])
        if width > 1:
            sch.vectorize(lane)
        head = [*head, part]
    elif not block.reduction and transposing.in_registers(block):
        *head, place, last = sch.get_loops(transposing.rows_first(sch, block.name))
        head.append(transposing.transpose(sch, block.name, (place, last), device))
    elif not block.reduction and (across := transposing.across(block)) is not None:
        line, lane = transposing.line_by_line(sch, loops[across:])
        sch.vectorize(lane)
        head = [*loops[:across], line]
    if block.volume >= PARALLEL and head:
        parallel(sch, head, shared_prefix([extent_of(sch, loop) for loop in head], cores_of(device, decisions)))
    return bool(head)


def _chunks(size: int, width: int, outside: int, device: Device) -> int:
    """Into how many parts a contiguous run is split for the cores: none if there are enough runs."""
    if outside >= device.cores:
        return 1
    count = size // width
    return next((c for c in (4 * device.cores, 2 * device.cores, device.cores) if count % c == 0), 1)


# What the template of a reduction is chosen from, in this order, and that of what has none.
REDUCTIONS: tuple[Template, ...] = (side_by_side, pooled, accumulate, tile, lanes, sweep)
PLAIN: tuple[Template, ...] = (interleave, sweep)
