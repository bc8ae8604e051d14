"""How the operators of a training step become loops, where Relax has no kernel or not a good one.

Convolutions are written so that the loop over which a vector runs is contiguous: strided inputs are de-interleaved while they are
padded, rows are padded to whole vectors, and of operands that must be read across their rows a transposed copy is made. Importing
this module registers everything.

Letters: n image, c channel of x, o channel of y, (y, x) a place, (ky, kx) a tap of the kernel, g a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import tvm
from tvm import relax, te, tirx
from tvm.relax.transform.legalize_ops.common import register_legalize

from tvmtrain.legalize_once import Legalization
from tvmtrain.operators import DGRAD, PACKED_CONV, WGRAD
from tvmtrain.schedules.blocks import ACCUMULATED, KEPT, STRIDES
from tvmtrain.schedules.side_by_side import PACKED_ROWS
from tvmtrain.schedules.strips import LINE, RUN
from tvmtrain.schedules.windows import wide
from tvmtrain.strided import (
    ROW,
    Axis,
    Taps,
    by_residues,
    guarded,
    reach,
    residues_of,
    residues_of_columns,
    shape_of,
    whole_vectors,
    window,
    zero,
)
from tvmtrain.targets import Device

# Fewer places than this, of a whole batch, are read from the cache for every tile of a weight's gradient.
LARGE_MAP = 4096
# Numbers of one operand that are read again and again from the cache; numbers that partial sums of a gradient may take.
LARGEST_PART, LARGEST_PARTIAL = 2**15, 2**20
# Numbers of an image that may be transposed without leaving the cache for long.
NEAR_IMAGE = 2**16
# Terms that are summed up in one go; sums into which deeper ones are split.
DEEPEST, MOST_LAYERS = 1152, 16
# Taps of a kernel whose products may be one formula.
LARGEST_FORMULA = 49
# Places of a map from which gathering what its taps read costs more than it saves.
SMALL_MAP = 16 * ROW
# Places of a map from which whole tiles of vectors cost little more than they save, and places of such a tile.
WIDE_MAP, TILES = 2 * SMALL_MAP, 6 * ROW
# Relax registers its own kernels at level 10; ours must win.
OVERRIDE = 11


@dataclass(frozen=True)
class _Conv:
    """A 2-D convolution x [N, C, H, W], w [O, C/groups, Kh, Kw] -> y [N, O, Ho, Wo]."""

    batch: int
    channels: int
    filters: int
    groups: int
    rows: Axis
    columns: Axis

    @property
    def group_in(self) -> int:
        return self.channels // self.groups

    @property
    def group_out(self) -> int:
        return self.filters // self.groups

    @property
    def pointwise(self) -> bool:
        """One tap, one group, and no place on padding, before the image or behind it: a matrix product over channels."""
        axes = (self.rows, self.columns)
        return self.groups == 1 and all(a.kernel == 1 and a.before == 0 and (a.out - 1) * a.stride < a.size for a in axes)


def _conv(attrs: Any, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> _Conv:
    strides, padding, dilation = ([int(v) for v in _attr(attrs, k)] for k in ("strides", "padding", "dilation"))
    axes = [Axis(int(w[2 + i]), strides[i], padding[i], dilation[i], int(x[2 + i]), int(y[2 + i])) for i in (0, 1)]
    return _Conv(int(x[0]), int(x[1]), int(w[0]), int(_attr(attrs, "groups")), axes[0], axes[1])


def _attr(attrs: tvm.ir.Attrs, name: str) -> Any:
    """An attribute of a Relax operator of TVM's (a field) or of ours (an entry)."""
    return attrs[name] if isinstance(attrs, tvm.ir.DictAttrs) else getattr(attrs, name)


def _crop(x: te.Tensor, shape: Sequence[int], name: str) -> te.Tensor:
    """The leading part of x that has ``shape``; x itself if that is all of it."""
    return x if shape_of(x) == list(shape) else te.compute(shape, lambda *i: x(*i), name=name)


# --- Products over channels -------------------------------------------------------------------------------------------------


def _mix_channels(x: te.Tensor, weight: Callable, outputs: int, name: str, gather: int) -> te.Tensor:
    """y[n, o, y, x] = sum over c of weight(o, c) * x[n, c, y, x]; gather: small maps side by side, as for ``conv2d``."""
    batch, channels, height, width = shape_of(x)
    area, c = height * width, te.reduce_axis((0, channels), "c")
    if gather and area % ROW and area >= WIDE_MAP:
        return _mix_lines(x, weight, outputs, name)
    alone = area % ROW == 0 and (area > gather or batch == 1)
    # A strip has two vectors, the width of a good register tile.
    if gather and not alone and not area % RUN and area > ROW and batch * area % max(2 * ROW, gather) == 0:
        return _mix_runs(x, weight, outputs, name)
    if area % ROW == 0 or not gather:
        product = te.compute(
            (batch, outputs, area), lambda n, o, j: te.sum(weight(o, c) * x[n, c, j // width, j % width], axis=[c]), name=name
        )
        shape = (batch, outputs, height, width)
        return te.compute(shape, lambda n, o, h, v: product[n, o, h * width + v], name=f"{name}_map")
    # Small maps (7x7): whole vectors only if the images lie side by side.
    shape = (batch, outputs, height, width)
    return _mix_taps(
        lambda n, c, y, v, *_: x[n, c, y, v], lambda o, c, *_: weight(o, c), shape, (channels, 1, 1), x.dtype, name
    )


def _mix_lines(x: te.Tensor, weight: Callable, outputs: int, name: str) -> te.Tensor:
    """y, each map as one line with a few zeros after it."""
    batch, channels, height, width = shape_of(x)
    area, c = height * width, te.reduce_axis((0, channels), "c")
    whole = -(-area // TILES) * TILES

    def padded(n: Any, c: Any, j: Any) -> Any:
        return tirx.if_then_else(j < area, x[n, c, j // width, j % width], zero(x))

    lines = te.compute((batch, channels, whole), padded, name="lines")
    product = te.compute((batch, outputs, whole), lambda n, o, j: te.sum(weight(o, c) * lines[n, c, j], axis=[c]), name=name)
    return te.compute((batch, outputs, height, width), lambda n, o, h, v: product[n, o, h * width + v], name=f"{name}_map")


def _gathers(conv: _Conv, height: int, width: int) -> bool:
    """Whether rows are so short that what their taps read is better gathered first: [channels, taps, images, places]."""
    small = width <= ROW and height * width <= SMALL_MAP
    return small and conv.groups == 1 and conv.channels * conv.filters >= (2 * ROW) ** 2


def _mix_runs(x: te.Tensor, weight: Callable, outputs: int, name: str) -> te.Tensor:
    """y of maps that are whole runs, if not whole vectors (14x14): the places of all images are one line."""
    batch, channels, height, width = shape_of(x)
    area, c = height * width, te.reduce_axis((0, channels), "c")
    runs = area // RUN

    def place(c: Any, run: Any, i: Any) -> Any:
        j = run % runs * RUN + i
        return x[run // runs, c, j // width, j % width]

    line = te.compute((channels, batch * runs, RUN), place, name=LINE)
    product = te.compute(
        (outputs, batch * area), lambda o, p: te.sum(weight(o, c) * line[c, p // RUN, p % RUN], axis=[c]), name=name
    )
    shape = (batch, outputs, height, width)
    return te.compute(shape, lambda n, o, h, v: product[o, n * area + h * width + v], name=f"{name}_map")


def _mix_taps(
    read: Callable,
    weight: Callable,
    shape: tuple[int, ...],
    taps: tuple[int, int, int],
    dtype: str,
    name: str,
    kept: bool = False,
) -> te.Tensor:
    """y [N, O, H, W]: the sum over (c, ky, kx) of weight(o, c, ky, kx) * read(n, c, y, x, ky, kx), gathered for small maps."""
    batch, outputs, height, width = shape
    area = height * width
    images, each = _side_by_side(batch, area)

    def place(c: Any, ky: Any, kx: Any, n: Any, j: Any) -> Any:
        value = read(n if images == batch else tirx.min(n, batch - 1), c, j // width, j % width, ky, kx)
        inside = [i < size for i, size, padded in ((n, batch, images), (j, area, each)) if size != padded]
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, dtype)) if inside else value

    packed = te.compute((*taps, images, each), place, name="packed")
    total = _in_layers(lambda c, ky, kx, n, j: packed[c, ky, kx, n, j], weight, (outputs, images, each), taps, name)
    return te.compute(shape, lambda n, o, y, v: total(o, n, y * width + v), name=f"{name}_map", attrs={KEPT: 1} if kept else {})


def _mix_rows(
    read: Callable,
    row: Callable,
    weight: Callable,
    shape: tuple[int, ...],
    taps: tuple[int, int, int],
    reached: int,
    name: str,
    kept: bool = False,
) -> te.Tensor:
    """``_mix_taps`` where y reads ``reached`` rows, row y + row(ky) with each tap: only what the taps of a row read is gathered.

    The same rows of all images lie side by side: another row of taps then reads whole lines further on.
    """
    batch, outputs, height, width = shape
    size = (taps[0], taps[2], reached, batch, width)
    packed = te.compute(size, lambda c, kx, r, n, v: read(n, c, r, v, kx), name=PACKED_ROWS)

    def place(c: Any, ky: Any, kx: Any, y: Any, p: Any) -> Any:
        return packed[c, kx, y + row(ky), p // width, p % width]

    total = _in_layers(place, weight, (outputs, height, batch * width), taps, name)
    return te.compute(shape, lambda n, o, y, v: total(o, y, n * width + v), name=f"{name}_map", attrs={KEPT: 1} if kept else {})


def _in_layers(
    read: Callable, weight: Callable, shape: tuple[int, int, int], taps: tuple[int, int, int], name: str
) -> Callable:
    """The sum over (c, ky, kx) of weight(o, c, ky, kx) * read(c, ky, kx, i, j) at [o, i, j]; a deep one is a sum of sums."""
    layers = _layers(taps)
    deep = taps[0] // layers
    c, ky, kx = (te.reduce_axis((0, size), tap) for size, tap in zip((deep, *taps[1:]), ("c", "ky", "kx"), strict=True))

    def product(part: Any, o: Any, i: Any, j: Any) -> Any:
        channel = part * deep + c
        return te.sum(weight(o, channel, ky, kx) * read(channel, ky, kx, i, j), axis=[c, ky, kx])

    sums = te.compute((layers, *shape), product, name=name)
    if layers == 1:
        return lambda o, i, j: sums[0, o, i, j]
    layer = te.reduce_axis((0, layers), "layer")
    total = te.compute(shape, lambda o, i, j: te.sum(sums[layer, o, i, j], axis=[layer]), name=f"{name}_layers")
    return lambda o, i, j: total[o, i, j]


def _layers(taps: tuple[int, int, int]) -> int:
    """Into how many sums a deep one is split, so that a tile's operands stay in a cache."""
    deepest = max(1, DEEPEST // (taps[1] * taps[2]))
    return next((k for k in range(1, MOST_LAYERS + 1) if taps[0] % k == 0 and taps[0] // k <= deepest), 1)


def _lined_up(gather: int, batch: int, height: int, width: int) -> bool:
    """Whether there are several rows, and a row of all images is whole vectors, so wide that tiles of rows pay (``windows``)."""
    return wide(gather) and height > 1 and batch * width % gather == 0


def _side_by_side(batch: int, area: int) -> tuple[int, int]:
    """Images, and places of each, that are whole vectors together: a few more than there are, and long runs where they cost little."""
    if batch * area <= ROW // 2:
        return batch, area
    if area < ROW:
        return next(b for b in range(batch, batch + ROW) if b * area % ROW == 0), area
    for run, most in ((4 * ROW, 0.1), (2 * ROW, 0.35)):
        each = next(e for e in range(area, area + run) if batch * e % run == 0)
        if each <= (1 + most) * area:
            return batch, each
    return batch, next(e for e in range(area, area + ROW) if batch * e % ROW == 0)


def _subsampled(x: te.Tensor, conv: _Conv) -> te.Tensor:
    """The places of x that a pointwise convolution reads."""
    rows, columns = conv.rows, conv.columns
    if rows.stride == columns.stride == 1 and (rows.size, columns.size) == (rows.out, columns.out):
        return x
    shape = (conv.batch, conv.channels, rows.out, columns.out)
    return te.compute(shape, lambda n, c, y, v: x[n, c, y * rows.stride, v * columns.stride], name="subsampled")


# --- Forward ----------------------------------------------------------------------------------------------------------------


def _padded(x: te.Tensor, conv: _Conv, width: int) -> Callable:
    """x, padded so that ``width`` outputs a row can be computed; read it as f(n, c, row, tap column, output column).

    With a stride, every residue of the columns modulo it becomes a row of its own: neighbours in an output row read neighbours.
    """
    rows, columns = conv.rows, conv.columns
    height, _ = _reached(conv)
    span = (width - 1) * columns.stride + (columns.kernel - 1) * columns.dilation + 1
    if not rows.before and not columns.before and height <= rows.size and span <= columns.size and columns.stride == 1:
        return lambda n, c, row, kx, v: x[n, c, row, v + kx * columns.dilation]
    if columns.stride == 1:
        pad = window(x, (rows.before, columns.before), (height, span))
        return lambda n, c, row, kx, v: pad[n, c, row, v + kx * columns.dilation]
    if conv.group_in == 1:
        return residues_of_columns(x, (rows, columns), (height, span), line=ROW)
    across, stride, step = -(-span // columns.stride), columns.stride, columns.dilation

    def residue(n: Any, c: Any, y: Any, r: Any, q: Any) -> Any:
        return guarded(x, n, c, y - rows.before, q * stride + r - columns.before)

    residues = te.compute((conv.batch, conv.channels, height, stride, across), residue, name="residues")
    return lambda n, c, row, kx, v: residues[n, c, row, kx * step % stride, v + kx * step // stride]


def conv2d(x: te.Tensor, w: Callable, conv: _Conv, gather: int = ROW) -> te.Tensor:
    """y = conv(x, w), for weights that are read as w(o, c, ky, kx).

    gather: bring what the taps read on small maps side by side, for vectors of so many numbers; 0: never.
    """
    if conv.pointwise:
        return _mix_channels(_subsampled(x, conv), lambda o, c: w(o, c, 0, 0), conv.filters, "conv2d", gather)
    rows, columns = conv.rows, conv.columns
    if gather and _gathers(conv, rows.out, columns.out):
        read = window(x, (rows.before, columns.before), _reached(conv))
        if rows.stride == rows.dilation == 1 < rows.kernel and _lined_up(gather, conv.batch, rows.out, columns.out):
            return _mix_rows(
                lambda n, c, r, v, kx: read(n, c, r, v * columns.stride + kx * columns.dilation),
                lambda ky: ky * rows.dilation,
                w,
                (conv.batch, conv.filters, rows.out, columns.out),
                (conv.channels, rows.kernel, columns.kernel),
                _reached(conv)[0],
                "conv2d",
            )
        return _mix_taps(
            lambda n, c, y, v, ky, kx: read(
                n, c, y * rows.stride + ky * rows.dilation, v * columns.stride + kx * columns.dilation
            ),
            w,
            (conv.batch, conv.filters, rows.out, columns.out),
            (conv.channels, rows.kernel, columns.kernel),
            x.dtype,
            "conv2d",
        )
    width = whole_vectors(columns.out)
    read = _padded(x, conv, width)
    c = te.reduce_axis((0, conv.group_in), "c")
    ky, kx = te.reduce_axis((0, rows.kernel), "ky"), te.reduce_axis((0, columns.kernel), "kx")

    def product(n: Any, g: Any, o: Any, y: Any, v: Any) -> Any:
        row = y * rows.stride + ky * rows.dilation
        return te.sum(read(n, g * conv.group_in + c, row, kx, v) * w(g * conv.group_out + o, c, ky, kx), axis=[c, ky, kx])

    y = _grouped(product, conv.batch, conv.groups, conv.group_out, (rows.out, width), "conv2d")
    return _crop(y, (conv.batch, conv.filters, rows.out, columns.out), "conv2d_rows")


def _grouped(product: Callable, batch: int, groups: int, each: int, place: tuple[int, int], name: str) -> te.Tensor:
    """A stage [batch, groups*each, *place] of product(n, g, i, y, x); the group is a loop of its own where it matters."""
    shape = (batch, groups * each, *place)
    if groups == 1:
        return te.compute(shape, lambda n, o, y, v: product(n, 0, o, y, v), name=name)
    if each == 1:
        return te.compute(shape, lambda n, g, y, v: product(n, g, 0, y, v), name=name)
    split = te.compute((batch, groups, each, *place), product, name=name)
    return te.compute(shape, lambda n, o, y, v: split[n, o // each, o % each, y, v], name=f"{name}_joined")


# --- Gradient of the input --------------------------------------------------------------------------------------------------


def conv2d_dgrad(gy: te.Tensor, w: te.Tensor, conv: _Conv, gather: int = ROW) -> te.Tensor:
    """dX, one convolution of dY for each residue of the input places modulo the stride: no tap is tried in vain."""
    if (
        conv.pointwise
        and conv.rows.stride == conv.columns.stride == 1
        and shape_of(gy)[2:] == [conv.rows.size, conv.columns.size]
    ):
        return _mix_channels(gy, lambda c, o: w[o, c, 0, 0], conv.channels, "dgrad", gather)
    rows, columns = conv.rows, conv.columns
    row_taps, column_taps = residues_of(rows), residues_of(columns)
    (top, bottom), (left, right) = reach(row_taps), reach(column_taps)
    if gather and _gathers(conv, rows.size, columns.size) and rows.stride == columns.stride == 1:
        return _dgrad_gathered(gy, w, conv, row_taps[0], column_taps[0], (rows.size, columns.size), gather)
    height, width = -(-rows.size // rows.stride), whole_vectors(-(-columns.size // columns.stride))
    pad = window(gy, (-top, -left), (height + bottom - top, width + right - left))
    if gather and _writes_out(conv):
        return _dgrad_written_out(pad, w, conv, (top, left), (height, width))
    small = (height, -(-columns.size // columns.stride))
    if gather and small[1] < ROW and _gathers(conv, *small):
        part = partial(_dgrad_gathered, gy, w, conv, place=small, gather=gather, kept=True)
    else:
        part = partial(_dgrad_part, pad, w, conv, origin=(top, left), place=(height, width))
    parts = [[part(rows=a, columns=b) if a.count and b.count else None for b in column_taps] for a in row_taps]
    shape = (conv.batch, conv.channels, rows.size, columns.size)
    if len(row_taps) == len(column_taps) == 1:
        return _crop(parts[0][0], shape, "dgrad_rows") if parts[0][0] is not None else te.compute(shape, lambda *_: zero(gy))

    def place(n: Any, c: Any, y: Any, v: Any) -> Any:
        value: Any = zero(gy)
        for a, line in enumerate(parts):
            for b, part in enumerate(line):
                if part is not None:
                    here = tirx.all(y % rows.stride == a, v % columns.stride == b)
                    value = tirx.if_then_else(here, part[n, c, y // rows.stride, v // columns.stride], value)
        return value

    return te.compute(shape, place, name="dgrad_interleaved", attrs={STRIDES: [rows.stride, columns.stride]})


def _dgrad_gathered(
    gy: te.Tensor, w: te.Tensor, conv: _Conv, rows: Taps, columns: Taps, place: tuple[int, int], gather: int, kept: bool = False
) -> te.Tensor:
    """dX at the places of one residue, on small maps."""
    (top, bottom), (left, right) = reach([rows]), reach([columns])
    tap = _taps_of_part(w, conv, rows, columns)
    reached = place[0] + bottom - top
    read = window(gy, (-top, -left), (reached, place[1] + right - left))
    shape, taps = (conv.batch, conv.channels, *place), (conv.filters, rows.count, columns.count)
    if rows.shift == 1 < rows.count and _lined_up(gather, conv.batch, *place):
        return _mix_rows(
            lambda n, o, r, v, kx: read(n, o, r, v + columns.base - left - kx * columns.shift),
            lambda ky: rows.base - top - ky * rows.shift,
            lambda c, o, ky, kx: tap(o, c, ky, kx),
            shape,
            taps,
            reached,
            "dgrad",
            kept,
        )
    return _mix_taps(
        lambda n, o, y, v, ky, kx: read(
            n, o, y + rows.base - top - ky * rows.shift, v + columns.base - left - kx * columns.shift
        ),
        lambda c, o, ky, kx: tap(o, c, ky, kx),
        shape,
        taps,
        gy.dtype,
        "dgrad",
        kept,
    )


def _writes_out(conv: _Conv) -> bool:
    """Whether the few terms of each place of dX are one formula: a depthwise convolution with a stride along its rows."""
    taps = conv.rows.kernel * conv.columns.kernel
    return conv.group_in == conv.group_out == 1 < conv.columns.stride and taps <= LARGEST_FORMULA


def _dgrad_written_out(pad: te.Tensor, w: te.Tensor, conv: _Conv, origin: tuple[int, int], place: tuple[int, int]) -> te.Tensor:
    """dX of a depthwise convolution: at each place the sum of its residue's taps, so that whole rows leave at once."""
    rows, columns = conv.rows, conv.columns

    def total(n: Any, c: Any, y: Any, v: Any, a: Taps, b: Taps) -> Any:
        row, column = y // rows.stride + a.base - origin[0], v // columns.stride + b.base - origin[1]
        terms = [
            pad[n, c, row - i * a.shift, column - j * b.shift] * w[c, 0, a.first + i * a.step, b.first + j * b.step]
            for i in range(a.count)
            for j in range(b.count)
        ]
        return sum(terms[1:], terms[0]) if terms else zero(pad)

    whole = (conv.batch, conv.channels, place[0] * rows.stride, place[1] * columns.stride)
    sums = te.compute(
        whole,
        lambda n, c, y, v: by_residues((rows, columns), (y, v), partial(total, n, c, y, v)),
        name="dgrad",
        attrs={STRIDES: [rows.stride, columns.stride]},
    )
    return _crop(sums, (conv.batch, conv.channels, rows.size, columns.size), "dgrad_rows")


def _dgrad_part(
    pad: te.Tensor, w: te.Tensor, conv: _Conv, rows: Taps, columns: Taps, origin: tuple[int, int], place: tuple[int, int]
) -> te.Tensor:
    """dX at the places of one residue."""
    tap = _taps_of_part(w, conv, rows, columns)
    o = te.reduce_axis((0, conv.group_out), "o")
    ty, tx = te.reduce_axis((0, rows.count), "ty"), te.reduce_axis((0, columns.count), "tx")

    def product(n: Any, g: Any, c: Any, y: Any, v: Any) -> Any:
        source = pad[
            n,
            g * conv.group_out + o,
            y + (rows.base - origin[0]) - ty * rows.shift,
            v + (columns.base - origin[1]) - tx * columns.shift,
        ]
        return te.sum(source * tap(g * conv.group_out + o, c, ty, tx), axis=[o, ty, tx])

    return _grouped(product, conv.batch, conv.groups, conv.group_in, place, "dgrad")


def _taps_of_part(w: te.Tensor, conv: _Conv, rows: Taps, columns: Taps) -> Callable:
    """The taps of one residue, read as f(o, c, ty, tx): of many filters a copy in the order in which they are summed up."""

    def tap(o: Any, c: Any, ty: Any, tx: Any) -> Any:
        return w[o, c, rows.first + ty * rows.step, columns.first + tx * columns.step]

    if conv.groups > 1 or conv.rows.stride == conv.columns.stride == 1:
        return tap
    shape = (conv.group_in, conv.filters, rows.count, columns.count)
    copy = te.compute(shape, lambda c, o, ty, tx: tap(o, c, ty, tx), name="taps")
    return lambda o, c, ty, tx: copy[c, o, ty, tx]


# --- Gradient of the weight -------------------------------------------------------------------------------------------------


def conv2d_wgrad(x: te.Tensor, gy: te.Tensor, conv: _Conv, gather: int = ROW) -> te.Tensor:
    """dW[o, c, ky, kx] = sum over n, y, x of dY[n, o, y, x] * X[n, c, y*stride + ky*dilation, x*stride + kx*dilation]."""
    if conv.group_in == 1:
        return _wgrad_depthwise(x, gy, conv)
    # The smaller operand is transposed, if its channels fill a vector. But a dW whose rows are the weight's is updated on its way out.
    image = conv.channels * conv.rows.size * conv.columns.size
    near = image <= (NEAR_IMAGE if conv.pointwise else NEAR_IMAGE // 4)
    smaller = conv.filters * conv.rows.out * conv.columns.out < image and not near
    if conv.groups == 1 and conv.filters >= ROW and (smaller or conv.channels < ROW):
        return _wgrad_over_filters(x, gy, conv, bool(gather))
    return _wgrad_over_channels(x, gy, conv, bool(gather))


def _channels_last(x: te.Tensor, size: tuple[int, int], before: tuple[int, int], channels: int, plain: bool) -> te.Tensor:
    """x [N, C, H, W], padded in its places and up to ``channels``, as [channels/b, N, H', W', b]: b neighbours are whole cache lines.

    plain: without a question for each number, where nothing is padded.
    """
    # With 8 filters, three of AVX-512's vectors are a tile that loads less for each multiplication than two or four are.
    block = next((b for b in (6 * ROW, 4 * ROW, 2 * ROW) if channels % b == 0 and channels > 6 * ROW), channels)
    batch, *whole = shape_of(x)
    inside = before == (0, 0) and whole[0] == channels and size[0] <= whole[1] and size[1] <= whole[2]

    def place(i: Any, n: Any, y: Any, v: Any, c: Any) -> Any:
        at = (n, i * block + c, y - before[0], v - before[1])
        return x(*at) if plain and inside else guarded(x, *at)

    return te.compute((channels // block, batch, *size, block), place, name="channels_last")


def _reached(conv: _Conv) -> tuple[int, int]:
    """How many rows and columns of the padded x are read."""
    height, width = ((a.out - 1) * a.stride + (a.kernel - 1) * a.dilation + 1 for a in (conv.rows, conv.columns))
    return height, width


def _wgrad_over_channels(x: te.Tensor, gy: te.Tensor, conv: _Conv, plain: bool) -> te.Tensor:
    """Vectors run over the input channels."""
    rows, columns, wide = conv.rows, conv.columns, conv.group_in
    if conv.groups > 1:
        return _wgrad_of_groups(x, gy, conv)
    source = _channels_last(x, _reached(conv), (rows.before, columns.before), whole_vectors(wide), plain)
    block = shape_of(source)[-1]

    def product(n: Any, y: Any, v: Any, ky: Any, kx: Any, o: Any, i: Any, c: Any) -> Any:
        row, column = y * rows.stride + ky * rows.dilation, v * columns.stride + kx * columns.dilation
        return gy[n, o, y, v] * source[i, n, row, column, c]

    taps = _summed(product, conv, (rows.kernel, columns.kernel, conv.filters, *_blocks(source)), plain)
    shape = (conv.filters, wide, rows.kernel, columns.kernel)
    return te.compute(shape, lambda o, c, ky, kx: taps[ky, kx, o, c // block, c % block], name="wgrad_taps")


def _blocks(source: te.Tensor) -> tuple[int, int]:
    """Blocks of channels, and channels in each."""
    shape = shape_of(source)
    return shape[0], shape[-1]


def _summed(product: Callable, conv: _Conv, shape: tuple[int, ...], plain: bool) -> te.Tensor:
    """The sum of product(n, y, x, *place) over images and places; large maps by parts of an image that are read from the cache.

    plain: on a processor, whose schedule adds up in place what parts of whole vectors would else need too much memory for.
    """
    high, wide = conv.rows.out, conv.columns.out
    n, v = te.reduce_axis((0, conv.batch), "n"), te.reduce_axis((0, wide), "x")
    parts = conv.batch * (count := _parts_of_image(high, wide * shape[-1]))
    many = parts * prod(shape) > LARGEST_PARTIAL
    if conv.batch * high * wide < LARGE_MAP or parts == 1 or (many and not (plain and shape[-1] % ROW == 0)):
        y = te.reduce_axis((0, high), "y")
        return te.compute(shape, lambda *at: te.sum(product(n, y, v, *at), axis=[n, y, v]), name="wgrad")
    y = te.reduce_axis((0, high // count), "y")

    def in_part(n: Any, p: Any, *at: Any) -> Any:
        return te.sum(product(n, p * (high // count) + y, v, *at), axis=[y, v])

    if many:
        return _accumulated(in_part, conv.batch, count, shape)
    partial = te.compute((parts, *shape), lambda m, *at: in_part(m // count, m % count, *at), name="wgrad")
    part = te.reduce_axis((0, parts), "part")
    return te.compute(shape, lambda *at: te.sum(partial[(part, *at)], axis=[part]), name="wgrad_parts")


def _accumulated(in_part: Callable, batch: int, parts: int, shape: tuple[int, ...]) -> te.Tensor:
    """The sum of in_part(n, part, *place) over images and their parts; those of a group of images are added one after the other."""
    groups = next((g for g in range(batch, 1, -1) if batch % g == 0 and g * prod(shape) <= LARGEST_PARTIAL), 1)
    each, attrs = batch // groups, {ACCUMULATED: 1}
    image, part, group = (te.reduce_axis((0, size), name) for size, name in ((each, "i"), (parts, "p"), (groups, "g")))
    partial = te.compute((groups, each, parts, *shape), lambda g, i, p, *at: in_part(g * each + i, p, *at), name="wgrad")

    def added(g: Any, *at: Any) -> Any:
        return te.sum(partial[(g, image, part, *at)], axis=[image, part])

    if groups == 1:
        return te.compute(shape, lambda *at: added(0, *at), name="wgrad_part", attrs=attrs)
    sums = te.compute((groups, *shape), added, name="wgrad_part", attrs=attrs)
    return te.compute(shape, lambda *at: te.sum(sums[(group, *at)], axis=[group]), name="wgrad_parts")


def _parts_of_image(high: int, row: int) -> int:
    """Into how many parts an image is cut, so that the rows of one, ``row`` numbers each, stay in a cache."""
    return next((p for p in range(1, high + 1) if high % p == 0 and high // p * row <= LARGEST_PART), high)


def _wgrad_of_groups(x: te.Tensor, gy: te.Tensor, conv: _Conv) -> te.Tensor:
    """Vectors run over the input channels of a group."""
    rows, columns, wide = conv.rows, conv.columns, conv.group_in
    size, before = _reached(conv), (rows.before, columns.before)
    source = te.compute(
        (conv.batch, *size, conv.channels),
        lambda n, y, v, c: guarded(x, n, c, y - before[0], v - before[1]),
        name="channels_last",
    )

    def product(n: Any, y: Any, v: Any, ky: Any, kx: Any, o: Any, c: Any) -> Any:
        row, column = y * rows.stride + ky * rows.dilation, v * columns.stride + kx * columns.dilation
        return gy[n, o, y, v] * source[n, row, column, o // conv.group_out * wide + c]

    taps = _summed(product, conv, (rows.kernel, columns.kernel, conv.filters, wide), False)
    shape = (conv.filters, wide, rows.kernel, columns.kernel)
    return te.compute(shape, lambda o, c, ky, kx: taps[ky, kx, o, c], name="wgrad_taps")


def _wgrad_over_filters(x: te.Tensor, gy: te.Tensor, conv: _Conv, plain: bool) -> te.Tensor:
    """Vectors run over the filters."""
    rows, columns = conv.rows, conv.columns
    pad = window(x, (rows.before, columns.before), _reached(conv))
    source = _channels_last(gy, (rows.out, columns.out), (0, 0), whole_vectors(conv.filters), plain)
    block = shape_of(source)[-1]

    def product(n: Any, y: Any, v: Any, c: Any, ky: Any, kx: Any, i: Any, o: Any) -> Any:
        row, column = y * rows.stride + ky * rows.dilation, v * columns.stride + kx * columns.dilation
        return pad[n, c, row, column] * source[i, n, y, v, o]

    taps = _summed(product, conv, (conv.channels, rows.kernel, columns.kernel, *_blocks(source)), plain)
    shape = (conv.filters, conv.channels, rows.kernel, columns.kernel)
    return te.compute(shape, lambda o, c, ky, kx: taps[c, ky, kx, o // block, o % block], name="wgrad_taps")


def _wgrad_depthwise(x: te.Tensor, gy: te.Tensor, conv: _Conv) -> te.Tensor:
    """Vectors run along the rows of dY, each lane with a sum of its own; the lanes are added at the end."""
    rows, columns = conv.rows, conv.columns
    width = whole_vectors(columns.out)
    lanes = ROW if width % ROW == 0 else width
    read = _padded(x, conv, width)
    grad = gy
    if width != columns.out:
        grad = te.compute((conv.batch, conv.filters, rows.out, width), lambda *i: guarded(gy, *i), name="pad_grad")
    n, y, v = (te.reduce_axis((0, size), name) for size, name in ((conv.batch, "n"), (rows.out, "y"), (width // lanes, "x")))

    def product(o: Any, ky: Any, kx: Any, lane: Any) -> Any:
        column = v * lanes + lane
        source = read(n, o // conv.group_out, y * rows.stride + ky * rows.dilation, kx, column)
        return te.sum(grad[n, o, y, column] * source, axis=[n, y, v])

    sums = te.compute((conv.filters, rows.kernel, columns.kernel, lanes), product, name="wgrad")
    lane = te.reduce_axis((0, lanes), "lane")
    shape = (conv.filters, 1, rows.kernel, columns.kernel)
    return te.compute(shape, lambda o, _, ky, kx: te.sum(sums[o, ky, kx, lane], axis=[lane]), name="wgrad_lanes")


# --- Running sums -----------------------------------------------------------------------------------------------------------


def running_sum(x: te.Tensor, axis: int, dtype: str, exclusive: bool) -> te.Tensor:
    """Every sum for itself: n times the work of one after the other, for devices with thousands of threads."""
    shape = shape_of(x)
    k = te.reduce_axis((0, shape[axis]), "k")

    def total(*place: Any) -> Any:
        before = k < place[axis] if exclusive else k <= place[axis]
        value = x(*place[:axis], k, *place[axis + 1 :]).astype(dtype)
        return te.sum(tirx.if_then_else(before, value, tirx.const(0, dtype)), axis=[k])

    return te.compute(shape, total, name="running_sum")


def legalize_running_sum(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    (x,), rank = call.args, len(call.args[0].ty.shape)
    axis, dtype, exclusive = int(call.attrs.axis) % rank, str(call.ty.dtype), bool(call.attrs.exclusive)
    return bb.call_te(lambda a: running_sum(a, axis, dtype, exclusive), x, primfunc_name_hint="running_sum")


# --- Registration -----------------------------------------------------------------------------------------------------------


def _legalize_conv2d(bb: relax.BlockBuilder, call: relax.Call, gather: int = ROW) -> relax.Expr:
    layouts = (call.attrs.data_layout, call.attrs.kernel_layout, call.attrs.out_layout)
    if layouts != ("NCHW", "OIHW", "NCHW"):
        return _relax_conv2d(bb, call)
    x, w = call.args
    conv = _conv(call.attrs, shape_of(x), shape_of(w), shape_of(call))
    return bb.call_te(lambda a, b: conv2d(a, lambda *at: b(*at), conv, gather), x, w, primfunc_name_hint="conv2d")


def _legalize_packed(bb: relax.BlockBuilder, call: relax.Call, gather: int = ROW) -> relax.Expr:
    x, packed = call.args
    tiles, *inner, tile = shape_of(packed)
    conv = _conv(call.attrs, shape_of(x), [tiles * tile, *inner], shape_of(call))

    def kernel(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        return conv2d(a, lambda o, c, ky, kx: b[o // tile, c, ky, kx, o % tile], conv, gather)

    return bb.call_te(kernel, x, packed, primfunc_name_hint="conv2d_packed")


def _legalize_dgrad(bb: relax.BlockBuilder, call: relax.Call, gather: int = ROW) -> relax.Expr:
    gy, w = call.args
    conv = _conv(call.attrs, shape_of(call), shape_of(w), shape_of(gy))
    return bb.call_te(lambda a, b: conv2d_dgrad(a, b, conv, gather), gy, w, primfunc_name_hint="conv2d_dgrad")


def _legalize_wgrad(bb: relax.BlockBuilder, call: relax.Call, gather: int = ROW) -> relax.Expr:
    x, gy = call.args
    conv = _conv(call.attrs, shape_of(x), shape_of(call), shape_of(gy))
    return bb.call_te(lambda a, b: conv2d_wgrad(a, b, conv, gather), x, gy, primfunc_name_hint="conv2d_wgrad")


_relax_conv2d = tvm.ir.Op.get("relax.nn.conv2d").get_attr("FLegalize")
register_legalize(PACKED_CONV, _legalize_packed)
register_legalize(DGRAD, _legalize_dgrad)
register_legalize(WGRAD, _legalize_wgrad)
tvm.ir.register_op_attr("relax.nn.conv2d", "FLegalize", _legalize_conv2d, OVERRIDE)


def legalization(device: Device) -> dict[str, Legalization]:
    """How ``LegalizeOps`` lowers convolutions for a processor."""
    ways = {"relax.nn.conv2d": _legalize_conv2d, PACKED_CONV: _legalize_packed, DGRAD: _legalize_dgrad, WGRAD: _legalize_wgrad}
    return {name: partial(way, gather=device.lanes()) for name, way in ways.items()}


# On GPUs, threads read what taps have in common from shared memory; and TVM's running sum has the threads of a warp read what others
# may not have written yet.
FOR_GPUS: dict[str, Legalization] = {
    "relax.nn.conv2d": partial(_legalize_conv2d, gather=0),
    DGRAD: partial(_legalize_dgrad, gather=0),
    WGRAD: partial(_legalize_wgrad, gather=0),
    "relax.cumsum": legalize_running_sum,
}
