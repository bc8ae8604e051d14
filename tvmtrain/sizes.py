"""Shapes and bytes of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import tvm
from tvm import relax, tirx


def shape_of(expr: relax.Expr) -> list[int]:
    """The shape of a tensor, in numbers."""
    return [int(d) for d in expr.ty.shape]


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor; TVM keeps a bool in a byte."""
    return prod(shape) * max(1, tvm.DataType(dtype).bits // 8)


def bytes_of(ty: relax.Type) -> int:
    """Bytes of a tensor, or of all tensors of a tuple."""
    if isinstance(ty, relax.TupleType):
        return sum(bytes_of(part) for part in ty.fields)
    return size_of([int(d) for d in ty.shape], str(ty.dtype))


def buffer_bytes(buffer: tirx.Var) -> int:
    """Bytes of a kernel's buffer."""
    return size_of([int(d) for d in buffer.ty.shape], str(buffer.ty.dtype))
