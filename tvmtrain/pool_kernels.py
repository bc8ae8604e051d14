"""Gradients of pooling as loops. Importing this module registers them.

TVM 0.27's own avg_pool2d_backward divides by the wrong counts for windows that hang over the end (ceil_mode with count_include_pad);
its max_pool2d_backward is right, but looks for the maximum of each window again for each input place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import product
from typing import Any

import tvm
from tvm import relax, te, tirx
from tvm.ir import Op
from tvm.ir.op import register_op_attr

from tvmtrain.schedules.blocks import KEPT, STRIDES
from tvmtrain.strided import Axis, Taps, by_residues, reach, residues_of, residues_of_columns, shape_of, window

# Relax registers its own kernels at level 10; ours must win.
OVERRIDE = 11
# Taps of a window that may be one formula.
LARGEST_FORMULA = 25


@dataclass(frozen=True)
class _Axis(Axis):
    """Pooling along one spatial axis: an axis with padding after it, too."""

    after: int

    @property
    def overlap(self) -> int:
        """How many windows have to be tried for one input place."""
        return self.kernel if self.dilation > 1 else -(-self.kernel // self.stride)

    def covering(self, place: Any, q: Any) -> tuple[Any, Any, Any]:
        """The q-th window that may cover an input place: its number, the place's tap in it, and whether it does cover it."""
        at = place + self.before
        if self.dilation == 1:
            out = at // self.stride - q
            tap = at - out * self.stride
            return out, tap, tirx.all(tap < self.kernel, out >= 0, out < self.out)
        start = at - q * self.dilation
        out = tirx.floordiv(start, self.stride)
        return out, q, tirx.all(tirx.floormod(start, self.stride) == 0, out >= 0, out < self.out)

    def count(self, out: Any, include_padding: bool) -> Any:
        """How many places PyTorch divides the window's sum by; what hangs over the padding never counts."""
        start = out * self.stride - self.before
        end = tirx.min(start + self.kernel, self.size + self.after)
        return end - start if include_padding else tirx.min(end, self.size) - tirx.max(start, 0)


def avg_pool2d_backward(gy: te.Tensor, rows: _Axis, columns: _Axis, include_padding: bool) -> te.Tensor:
    """dX[y, x] = sum over the windows that cover (y, x) of dY / count."""
    shape = [int(d) for d in gy.shape]

    def share(n: Any, c: Any, y: Any, x: Any) -> Any:
        return gy[n, c, y, x] / (rows.count(y, include_padding) * columns.count(x, include_padding)).astype(gy.dtype)

    shares = te.compute(shape, share, name="share")
    return _gathered(shape, rows, columns, lambda n, c, y, x, _: shares[n, c, y, x], gy.dtype, "avg_pool2d_backward")


def max_pool2d_backward(gy: te.Tensor, x: te.Tensor, rows: _Axis, columns: _Axis) -> te.Tensor:
    """dX[y, x] = sum over the windows of which (y, x) is the first maximum of dY. PyTorch gives ties to the first, too."""
    shape = [int(d) for d in gy.shape]
    taps = rows.kernel * columns.kernel

    def value(n: Any, c: Any, y: Any, v: Any, ky: Any, kx: Any) -> Any:
        row, column = (a.stride * i + a.dilation * k - a.before for a, i, k in ((rows, y, ky), (columns, v, kx)))
        inside = tirx.all(row >= 0, row < rows.size, column >= 0, column < columns.size)
        return tirx.if_then_else(inside, x[n, c, row, column], tirx.min_value(x.dtype))

    ky, kx = te.reduce_axis((0, rows.kernel), "ky"), te.reduce_axis((0, columns.kernel), "kx")
    largest = te.compute(shape, lambda n, c, y, v: te.max(value(n, c, y, v, ky, kx), axis=[ky, kx]), name="largest")
    ry, rx = te.reduce_axis((0, rows.kernel), "ry"), te.reduce_axis((0, columns.kernel), "rx")

    def tap(n: Any, c: Any, y: Any, v: Any) -> Any:
        hit = value(n, c, y, v, ry, rx) == largest[n, c, y, v]
        number = (ry * columns.kernel + rx).astype("int32")
        return te.min(tirx.Select(hit, number, tirx.const(taps, "int32")), axis=[ry, rx])

    first = te.compute(shape, tap, name="first")

    def part(n: Any, c: Any, y: Any, v: Any, tap: Any) -> Any:
        return tirx.Select(first[n, c, y, v] == tap, gy[n, c, y, v], tirx.const(0, gy.dtype))

    return _gathered(shape, rows, columns, part, gy.dtype, "max_pool2d_backward")


def max_pool2d_backward_by_residues(gy: te.Tensor, x: te.Tensor, rows: Axis, columns: Axis) -> te.Tensor:
    """The same, of one formula for each residue of the input places modulo the strides, without a question."""
    (top, bottom), (left, right) = reach(residues_of(rows)), reach(residues_of(columns))
    # All windows that may cover a place; the gradient is zero in those that there are not.
    high, wide = -(-rows.size // rows.stride) + bottom - top, -(-columns.size // columns.stride) + right - left
    grad = window(gy, (-top, -left), (high, wide))
    axes = [replace(axis, before=axis.before - low * axis.stride) for axis, low in ((rows, top), (columns, left))]
    first = _first_maximum(x, axes[0], axes[1], (high, wide))
    bits = str(first.dtype)

    def total(n: Any, c: Any, y: Any, v: Any, a: Taps, b: Taps) -> Any:
        row, column = y // rows.stride + a.base - top, v // columns.stride + b.base - left

        def part(i: int, j: int) -> Any:
            at = (n, c, row - i * a.shift, column - j * b.shift)
            number = _number((a.first + i * a.step, b.first + j * b.step), rows, columns)
            return tirx.reinterpret(gy.dtype, tirx.reinterpret(bits, grad[at]) & _all_bits(first[at], number, bits))

        parts = [part(i, j) for i in range(a.count) for j in range(b.count)]
        return sum(parts[1:], parts[0]) if parts else tirx.const(0, gy.dtype)

    return te.compute(
        (*shape_of(x)[:2], rows.size, columns.size),
        lambda n, c, y, v: by_residues((rows, columns), (y, v), partial(total, n, c, y, v)),
        name="max_pool2d_backward",
        attrs={STRIDES: [rows.stride, columns.stride]},
    )


def _first_maximum(x: te.Tensor, rows: Axis, columns: Axis, shape: tuple[int, int]) -> te.Tensor:
    """The number of the first maximum in each window, as wide as the elements of x."""
    high, wide = (
        (size - 1) * a.stride + (a.kernel - 1) * a.dilation + 1 for a, size in ((rows, shape[0]), (columns, shape[1]))
    )
    read = residues_of_columns(x, (rows, columns), (high, wide), tirx.min_value(x.dtype))
    bits = f"int{tvm.DataType(x.dtype).bits}"
    taps = list(product(range(rows.kernel), range(columns.kernel)))

    def first(n: Any, c: Any, y: Any, v: Any) -> Any:
        values = [read(n, c, y * rows.stride + ky * rows.dilation, kx, v) for ky, kx in taps]
        largest = tirx.Var("largest", x.dtype)
        numbers = [
            tirx.const(_number(tap, rows, columns), bits) & _all_bits(value, largest, bits)
            for tap, value in zip(taps, values, strict=True)
        ]
        return tirx.Let(largest, reduce(tirx.max, values), reduce(tirx.max, numbers))

    return te.compute((*shape_of(x)[:2], *shape), first, name="first", attrs={KEPT: 1})


def _number(tap: tuple[int, int], rows: Axis, columns: Axis) -> int:
    """Of a tap: the earlier it is, the larger, and above 0."""
    return rows.kernel * columns.kernel - tap[0] * columns.kernel - tap[1]


def _all_bits(a: Any, b: Any, bits: str) -> Any:
    """Every bit where a is b, none elsewhere: LLVM makes no vectors of choices between what is in memory."""
    return tirx.const(0, bits) - (a == b).astype(bits)


def _gathered(shape: list[int], rows: _Axis, columns: _Axis, part: Callable, dtype: str, name: str) -> te.Tensor:
    """The sum over the windows that cover each input place of part(n, c, window row, window column, tap)."""
    qy, qx = te.reduce_axis((0, rows.overlap), "qy"), te.reduce_axis((0, columns.overlap), "qx")

    def total(n: Any, c: Any, y: Any, x: Any) -> Any:
        row, row_tap, row_covers = rows.covering(y, qy)
        column, column_tap, column_covers = columns.covering(x, qx)
        tap = (row_tap * columns.kernel + column_tap).astype("int32")
        value = tirx.if_then_else(tirx.all(row_covers, column_covers), part(n, c, row, column, tap), tirx.const(0, dtype))
        return te.sum(value, axis=[qy, qx])

    return te.compute((*shape[:2], rows.size, columns.size), total, name=name)


def _axes(call: relax.Call) -> tuple[_Axis, _Axis]:
    attrs, size, out = call.attrs, call.args[1].ty.shape, call.args[0].ty.shape
    padding = [int(p) for p in attrs.padding]
    rows, columns = (
        _Axis(
            kernel=int(attrs.pool_size[i]),
            stride=int(attrs.strides[i]),
            before=padding[i],
            after=padding[i + 2],
            dilation=int(attrs.dilation[i]),
            size=int(size[2 + i]),
            out=int(out[2 + i]),
        )
        for i in (0, 1)
    )
    return rows, columns


def _legalize_max(bb: relax.BlockBuilder, call: relax.Call, written_out: bool = True) -> relax.Expr:
    if call.attrs.layout != "NCHW":
        return _relax_max(bb, call)
    rows, columns = _axes(call)

    def kernel(gy: te.Tensor, x: te.Tensor) -> te.Tensor:
        if not written_out or rows.kernel * columns.kernel > LARGEST_FORMULA:
            return max_pool2d_backward(gy, x, rows, columns)
        return max_pool2d_backward_by_residues(gy, x, rows, columns)

    return bb.call_te(kernel, *call.args, primfunc_name_hint="max_pool2d_backward")


def _legalize_avg(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    if call.attrs.layout != "NCHW" or any(int(d) != 1 for d in call.attrs.dilation):
        return _relax_avg(bb, call)
    rows, columns = _axes(call)
    include = bool(call.attrs.count_include_pad)
    return bb.call_te(
        lambda gy: avg_pool2d_backward(gy, rows, columns, include), call.args[0], primfunc_name_hint="avg_pool2d_backward"
    )


_relax_max, _relax_avg = (Op.get(f"relax.grad.{kind}_pool2d_backward").get_attr("FLegalize") for kind in ("max", "avg"))
register_op_attr("relax.grad.max_pool2d_backward", "FLegalize", _legalize_max, OVERRIDE)
register_op_attr("relax.grad.avg_pool2d_backward", "FLegalize", _legalize_avg, OVERRIDE)

# GPUs' threads ask each for itself.
FOR_GPUS = {"relax.grad.max_pool2d_backward": partial(_legalize_max, written_out=False)}
