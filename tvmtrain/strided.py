"""Strided windows along the axes of an image: which taps reach a place, and what they read, padded and by residues.

Letters as in ``kernels``; a place of residue r modulo the stride s is s*q + r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm import relax, te, tirx

from tvmtrain.schedules.blocks import KEPT

# Rows are padded to multiples of this many elements: a whole AVX2 vector, two NEON ones, half an AVX-512 one.
ROW = 8


@dataclass(frozen=True)
class Axis:
    """A convolution along one spatial axis: kernel size, stride, padding before, dilation, input and output size."""

    kernel: int
    stride: int
    before: int
    dilation: int
    size: int
    out: int


@dataclass(frozen=True)
class Taps:
    """The taps that reach input places of one residue modulo the stride: kernel index first + t*step reads dY at place + base - t*shift."""

    first: int
    step: int
    base: int
    shift: int
    count: int


def shape_of(expr: relax.Expr | te.Tensor) -> list[int]:
    return [int(d) for d in (expr.shape if isinstance(expr, te.Tensor) else expr.ty.shape)]


def whole_vectors(size: int) -> int:
    """``size`` rounded up to whole vectors; short rows stay as they are."""
    return size if size < ROW // 2 + 1 else multiple(size, ROW)


def multiple(size: int, of: int) -> int:
    """``size`` rounded up."""
    return -(-size // of) * of


def zero(x: te.Tensor) -> tirx.PrimExpr:
    return tirx.const(0, x.dtype)


def guarded(x: te.Tensor, *index: tirx.PrimExpr, fill: Any = None) -> tirx.PrimExpr:
    """x at ``index``, outside of it ``fill`` or zero."""
    inside = [c for i, size in zip(index, shape_of(x), strict=True) for c in (i >= 0, i < size) if not isinstance(i, int)]
    return tirx.if_then_else(tirx.all(*inside), x(*index), zero(x) if fill is None else fill)


def window(x: te.Tensor, before: tuple[int, int], size: tuple[int, int], fill: Any = None) -> te.Tensor:
    """x with so many rows and columns of ``fill`` or zeros before it, ``size`` in all."""
    shape = (*shape_of(x)[:2], *size)
    return te.compute(shape, lambda n, c, y, v: guarded(x, n, c, y - before[0], v - before[1], fill=fill), name="pad")


def taps_of(axis: Axis, residue: int) -> Taps:
    """Input places of ``residue`` modulo the stride: which taps reach them, and from where."""
    step = axis.stride // gcd(axis.stride, axis.dilation)
    at = residue + axis.before
    hits = [k for k in range(axis.kernel) if (at - k * axis.dilation) % axis.stride == 0]
    if not hits:
        return Taps(0, step, 0, 0, 0)
    return Taps(hits[0], step, (at - hits[0] * axis.dilation) // axis.stride, step * axis.dilation // axis.stride, len(hits))


def residues_of(axis: Axis) -> list[Taps]:
    """The taps of each residue."""
    return [taps_of(axis, residue) for residue in range(axis.stride)]


def reach(taps: Sequence[Taps]) -> tuple[int, int]:
    """The lowest and the highest offset at which dY is read."""
    used = [t for t in taps if t.count]
    return min((t.base - (t.count - 1) * t.shift for t in used), default=0), max((t.base for t in used), default=0)


def residues_of_columns(
    x: te.Tensor, axes: tuple[Axis, Axis], size: tuple[int, int], fill: Any = None, line: int = 1
) -> Callable:
    """x, padded with ``fill`` or zeros so that ``size`` (rows, columns) can be read; read it as f(n, c, row, tap column, q).

    Each residue of the columns modulo their stride is a row of its own: neighbours in a row of windows read neighbours. Rows, and
    x in them, begin at multiples of ``line`` where that is simple.
    """
    columns = axes[1]
    stride, step = columns.stride, columns.dilation
    fill = zero(x) if fill is None else fill
    if columns.size % stride == 0:
        first, read = _aligned(x, axes, size, fill, line)
    else:
        first, read = 0, _after_padding(x, axes, size, fill)

    def tap(n: Any, c: Any, row: Any, kx: Any, q: Any) -> Any:
        return read[n, c, row, (kx * step + first) % stride, q + (kx * step + first) // stride]

    return tap


def _aligned(x: te.Tensor, axes: tuple[Axis, Axis], size: tuple[int, int], fill: Any, line: int) -> tuple[int, te.Tensor]:
    """How many more columns than asked for lie before, and the residues [N, C, rows, stride, q], each with the same columns of x."""
    rows, columns = axes
    stride, before = columns.stride, multiple(-(-columns.before // columns.stride), line)
    first, inside = before * stride - columns.before, columns.size // stride

    def residue(n: Any, c: Any, y: Any, r: Any, q: Any) -> Any:
        row, column = y - rows.before, q - before
        known = tirx.all(row >= 0, row < rows.size, column >= 0, column < inside)
        return tirx.if_then_else(known, x[n, c, row, column * stride + r], fill)

    shape = (*shape_of(x)[:2], size[0], stride, multiple(-(-(first + size[1]) // stride), line))
    return first, te.compute(shape, residue, name="residues", attrs={KEPT: 1})


def _after_padding(x: te.Tensor, axes: tuple[Axis, Axis], size: tuple[int, int], fill: Any) -> te.Tensor:
    """The residues [N, C, rows, stride, q] of a padded copy of x."""
    stride = axes[1].stride
    across = -(-size[1] // stride)
    pad = window(x, (axes[0].before, axes[1].before), (size[0], across * stride), fill)
    shape = (*shape_of(x)[:2], size[0], stride, across)
    return te.compute(shape, lambda n, c, y, r, q: pad[n, c, y, q * stride + r], name="residues", attrs={KEPT: 1})


def by_residues(axes: tuple[Axis, Axis], place: tuple[Any, Any], value: Callable) -> Any:
    """value(taps of the row, taps of the column) for the residues of a place (y, x)."""

    def among(axis: Axis, at: Any, chosen: Callable) -> Any:
        *others, last = residues_of(axis)
        result = chosen(last)
        for residue, taps in enumerate(others):
            result = tirx.if_then_else(at % axis.stride == residue, chosen(taps), result)
        return result

    return among(axes[0], place[0], lambda a: among(axes[1], place[1], lambda b: value(a, b)))
