"""Operations on images [N, C, H, W] of which a row needs a few rows of their operands alone, and how they compute some rows.

Convolutions, max pooling and padding read a window; elementwise operations read the row itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import relax
from tvm.relax import op as R

from tvmtrain import operators
from tvmtrain.passes.sides import name_of

ROWS = 2  # the axis

CONV, POOL, PAD = "relax.nn.conv2d", "relax.nn.max_pool2d", "relax.nn.pad"


@dataclass(frozen=True)
class Rows:
    """The rows ``first`` to ``last`` of an image, the last one left out."""

    first: int
    last: int

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __or__(self, other: Rows) -> Rows:
        return Rows(min(self.first, other.first), max(self.last, other.last))


@dataclass(frozen=True)
class Window:
    """Row y of the result reads the rows y * stride - before .. y * stride - before + span - 1 of an image of ``height`` rows."""

    stride: int
    before: int
    span: int
    height: int

    def reads(self, rows: Rows) -> Rows:
        """Those of the image that ``rows`` of the result need; none where they lie on padding alone."""
        first = rows.first * self.stride - self.before
        last = (rows.last - 1) * self.stride - self.before + self.span
        return Rows(max(first, 0), min(last, self.height))

    def padding(self, rows: Rows) -> tuple[int, int]:
        """Rows of padding above and below that ``rows`` of the result need."""
        first = rows.first * self.stride - self.before
        last = (rows.last - 1) * self.stride - self.before + self.span
        return max(0, -first), max(0, last - self.height)


def images(call: relax.Call, data: set[relax.Var]) -> list[relax.Var]:
    """The operands of a call that depend on the batch."""
    return [arg for arg in call.args if isinstance(arg, relax.Var) and arg in data]


def window(call: relax.Call, data: set[relax.Var]) -> Window | None:
    """What a row of the result reads of every operand in ``data``; None for an operation that is not row by row."""
    name, operands = name_of(call), images(call, data)
    if not operands or any(not _is_image(value.ty) for value in (call, *operands)):
        return None
    height = _height(operands[0].ty)
    if name in (CONV, POOL) and not str(getattr(call.attrs, "data_layout", "") or call.attrs.layout).startswith("NCHW"):
        return None
    if name == CONV and operands == [call.args[0]]:
        geometry = operators.geometry_of(call)
        return _window(geometry["strides"], geometry["padding"], geometry["dilation"], int(call.args[1].ty.shape[ROWS]), height)
    if name == POOL and not call.attrs.ceil_mode:
        attrs = call.attrs
        return _window(attrs.strides, attrs.padding, attrs.dilation, int(attrs.pool_size[0]), height)
    if name == PAD and str(call.attrs.pad_mode) == "constant":
        return Window(1, int(call.attrs.pad_width[2 * ROWS]), 1, height)
    whole = all(_height(operand.ty) == _height(call.ty) for operand in operands)
    others = all(_one_row(arg) for arg in call.args if arg not in operands)
    return Window(1, 0, 1, height) if name in operators.ELEMENTWISE and whole and others else None


def _window(strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int], kernel: int, height: int) -> Window:
    return Window(int(strides[0]), int(padding[0]), (kernel - 1) * int(dilation[0]) + 1, height)


def _is_image(ty: relax.Type) -> bool:
    return isinstance(ty, relax.TensorType) and len(ty.shape) == 4


def _height(ty: relax.TensorType) -> int:
    return int(ty.shape[ROWS])


def _one_row(value: relax.Expr) -> bool:
    """Whether every row of a result meets the same numbers of it."""
    shape = [int(d) for d in value.ty.shape] if isinstance(value.ty, relax.TensorType) else []
    return len(shape) < 2 or shape[-2] == 1


def moves_no_rows(call: relax.Call) -> bool:
    """Whether a call is elementwise, so that it is fused into the kernel that makes its operand."""
    return name_of(call) in operators.ELEMENTWISE


def computed(call: relax.Call, how: Window, rows: Rows, parts: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """``rows`` of the result, from just the rows that ``how`` reads of each operand: ``parts``."""
    args = [parts.get(arg, arg) if isinstance(arg, relax.Var) else arg for arg in call.args]
    top, bottom = how.padding(rows)
    if call.op.name == CONV:
        geometry = operators.geometry_of(call)
        _, left, _, right = geometry["padding"]
        return R.nn.conv2d(args[0], args[1], **geometry | {"padding": [top, left, bottom, right]})
    if call.op.name == POOL:
        pool = call.attrs
        _, left, _, right = (int(v) for v in pool.padding)
        sizes = ([int(v) for v in field] for field in (pool.pool_size, pool.strides))
        return R.nn.max_pool2d(args[0], *sizes, [top, left, bottom, right], [int(v) for v in pool.dilation])
    if call.op.name == PAD:
        width = [int(v) for v in call.attrs.pad_width]
        width[2 * ROWS : 2 * ROWS + 2] = top, bottom
        return R.nn.pad(args[0], width, "constant", float(call.attrs.pad_value))
    return relax.Call(call.op, args, call.attrs, call.ty_args)


def sliced(value: relax.Expr, held: Rows, wanted: Rows) -> relax.Expr:
    """``wanted`` rows of a tensor that holds the rows ``held``."""
    if held == wanted:
        return value
    return R.strided_slice(value, [ROWS], [wanted.first - held.first], [wanted.last - held.first])
