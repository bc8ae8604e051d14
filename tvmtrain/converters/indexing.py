"""Operators that read and write by position: x[i, :, j], x[a:b] = y, pooling over windows of unequal size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx
from tvm import relax
from tvm.ir.expr import Constant
from tvm.relax import op as R

from tvmtrain.converters.base import Converter, pair, place_of, shape
from tvmtrain.errors import UnsupportedOperatorError


class Indexing(Converter):
    """All reading by index tensors ends in one ``take`` of whole rows, whose gradient is a sum into rows."""

    def convert_index__Tensor(self, node: fx.Node) -> relax.Expr:
        """x[i, :, j]: the indexed axes become one, from which rows are taken."""
        x, indices = self._args(node)
        axes, others, row = self._places(node, x, indices)
        dims, found = shape(x), shape(row)
        rows, flat = self._rows(x, axes, others), self.emit(R.reshape(row, [math.prod(found)]))
        taken = self.emit(R.take(rows, flat, axis=0)) if _known(indices) else self._take_rows(rows, flat)
        taken = self.emit(R.reshape(taken, [*found, *(dims[a] for a in others)]))
        return self._permuted(taken, _result_order(axes, len(found), len(others)))

    def convert_index_put__default(self, node: fx.Node) -> relax.Expr:
        """x with x[i, :, j] = values, or += values, each in its place."""
        x, indices, values, accumulate = self._args(node)
        axes, others, row = self._places(node, x, indices)
        dims, found = shape(x), shape(row)
        order = _result_order(axes, len(found), len(others))
        written = [*found, *(dims[a] for a in others)]
        values = self.emit(R.broadcast_to(self._tensor(values, x.ty.dtype), [written[a] for a in order]))
        width = math.prod(dims[a] for a in others)
        values = self.emit(R.reshape(self._permuted(values, _inverse(order)), [math.prod(found), width]))
        rows = self.emit(R.reshape(self._rows(x, axes, others), [math.prod(dims[a] for a in axes), width]))
        flat = self.emit(R.reshape(row, [math.prod(found)]))
        if not _known(indices):
            inside, flat = self._checked(flat, shape(rows)[0])
            values = self._or_nan(inside, values)
        number = self.emit(R.broadcast_to(self.emit(R.expand_dims(flat, 1)), [math.prod(found), width]))
        rows = self.emit(R.scatter_elements(rows, number, values, 0, "add" if accumulate else "update"))
        rows = self.emit(R.reshape(rows, [dims[a] for a in axes + others]))
        return self._permuted(rows, _inverse(axes + others))

    def _places(self, node: fx.Node, x: relax.Expr, indices: list) -> tuple[list[int], list[int], relax.Expr]:
        """(indexed axes, other axes, row numbers) of x[indices]."""
        dims, axes = shape(x), [a for a, index in enumerate(indices) if index is not None]
        if any(str(indices[a].ty.dtype) == "bool" for a in axes):
            raise UnsupportedOperatorError(f"{place_of(node)}: a mask as index gives a shape that depends on the data")
        others = [a for a in range(len(dims)) if a not in axes]
        return axes, others, self._row_numbers([indices[a] for a in axes], [dims[a] for a in axes])

    def _rows(self, x: relax.Expr, axes: list[int], others: list[int]) -> relax.Expr:
        """x with its ``axes`` first and as one."""
        dims = shape(x)
        moved = self._permuted(x, axes + others)
        return self.emit(R.reshape(moved, [math.prod(dims[a] for a in axes), *(dims[a] for a in others)]))

    def _permuted(self, x: relax.Expr, order: list[int]) -> relax.Expr:
        return x if order == sorted(order) else self.emit(R.permute_dims(x, order))

    def _take_rows(self, table: relax.Expr, index: relax.Expr) -> relax.Expr:
        """Rows of ``table`` for ``index`` [N] from the data: a number out of range reads no memory, and gives NaN, which stops the step."""
        inside, index = self._checked(index, shape(table)[0])
        return self._or_nan(inside, self.emit(R.take(table, index, axis=0)))

    def _checked(self, index: relax.Expr, size: int) -> tuple[relax.Expr, relax.Expr]:
        """(whether 0 <= index < size, the index or else 0)."""
        dtype = index.ty.dtype
        above, below = R.greater_equal(index, relax.const(0, dtype)), R.less(index, relax.const(size, dtype))
        inside = self.emit(R.logical_and(self.emit(above), self.emit(below)))
        return inside, self.emit(R.where(inside, index, relax.const(0, dtype)))

    def _or_nan(self, inside: relax.Expr, rows: relax.Expr) -> relax.Expr:
        if not str(rows.ty.dtype).startswith("float"):
            return rows
        column = self.emit(R.reshape(inside, [shape(rows)[0]] + [1] * (len(shape(rows)) - 1)))
        return self.emit(R.where(column, rows, relax.const(np.nan, rows.ty.dtype)))

    def _row_numbers(self, indices: list[relax.Expr], sizes: list[int]) -> relax.Expr:
        """One number for the indices of several axes, broadcast against each other; negative ones count from the end."""
        total: relax.Expr | None = None
        for i, (index, size) in enumerate(zip(indices, sizes, strict=True)):
            index = self._tensor(index, "int64")
            wrapped = self.emit(R.add(index, relax.const(size, "int64")))
            index = self.emit(R.where(self.emit(R.less(index, relax.const(0, "int64"))), wrapped, index))
            part = self.emit(R.multiply(index, relax.const(math.prod(sizes[i + 1 :]), "int64")))
            total = part if total is None else self.emit(R.add(total, part))
        return total

    def convert_slice_scatter__default(self, node: fx.Node) -> relax.Expr:
        x, source, dim, begin, end, step = self._args(node)
        dim %= len(shape(x))
        size = shape(x)[dim]
        begin, end, step = slice(begin, end, step).indices(size)
        if step != 1:
            raise UnsupportedOperatorError(f"{place_of(node)}: writing to every {step}th element is not supported")
        head, tail = self._slice_of(x, dim, 0, begin), self._slice_of(x, dim, begin + shape(source)[dim], size)
        return self.emit(R.concat([part for part in (head, source, tail) if shape(part)[dim]], dim))

    def convert_adaptive_max_pool2d__default(self, node: fx.Node) -> Any:
        """(values, None): the maximum along each axis in turn finds the first of ties, as PyTorch does."""
        x, size = self._args(node)
        height, width = shape(x)[-2:]
        high, wide = pair(size)
        if height % high == 0 and width % wide == 0 and len(shape(x)) == 4:
            window = (height // high, width // wide)
            return (self.emit(R.nn.max_pool2d(x, pool_size=window, strides=window)), None)
        return (self._window_max(self._window_max(x, -1, wide), -2, high), None)

    def _window_max(self, x: relax.Expr, axis: int, count: int) -> relax.Expr:
        """The maximum over each of ``count`` windows [i*n/count, (i+1)*n/count) of an axis, rounded outwards."""
        axis %= len(shape(x))
        n = shape(x)[axis]
        begins = [i * n // count for i in range(count)]
        ends = [-(-(i + 1) * n // count) for i in range(count)]
        longest = max(e - b for b, e in zip(begins, ends, strict=True))
        # Short windows repeat their last place: a tie that comes later changes nothing.
        places = np.array([[min(b + k, e - 1) for k in range(longest)] for b, e in zip(begins, ends, strict=True)])
        taken = self.emit(R.take(x, relax.const(places.reshape(-1), "int64"), axis=axis))
        windows = self.emit(R.reshape(taken, [*shape(x)[:axis], count, longest, *shape(x)[axis + 1 :]]))
        return self._first_extreme(windows, axis + 1, False, R.argmax)[0]


def _known(indices: list) -> bool:
    """Whether all index tensors are constants, which PyTorch has checked."""
    return all(index is None or isinstance(index, Constant) for index in indices)


def _result_order(axes: list[int], found: int, others: int) -> list[int]:
    """How the axes of [indices, other axes] stand in the result: where the indexed ones were, if they were neighbours, else first."""
    before = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    kept = range(found, found + others)
    return [*kept[:before], *range(found), *kept[before:]]


def _inverse(order: list[int]) -> list[int]:
    return [order.index(a) for a in range(len(order))]
