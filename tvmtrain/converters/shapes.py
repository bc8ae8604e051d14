"""Operators that move or choose elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain.converters.base import Converter, place_of, shape, shape_of
from tvmtrain.errors import UnsupportedOperatorError


class Shapes(Converter):
    """Reshapes, slices, and reductions that pick a value."""

    def convert_amax__default(self, node: fx.Node) -> relax.Expr:
        x, dims, keepdim = self._args(node)
        return self.emit(R.max(x, list(dims) or None, keepdims=bool(keepdim)))

    def convert_amin__default(self, node: fx.Node) -> relax.Expr:
        x, dims, keepdim = self._args(node)
        return self.emit(R.min(x, list(dims) or None, keepdims=bool(keepdim)))

    def convert_max__dim(self, node: fx.Node) -> Any:
        return self._chosen(node, R.argmax)

    def convert_min__dim(self, node: fx.Node) -> Any:
        return self._chosen(node, R.argmin)

    def _chosen(self, node: fx.Node, pick: Callable) -> Any:
        x, dim, keepdim = self._args(node)
        return self._first_extreme(x, dim, bool(keepdim), pick)

    def _first_extreme(self, x: relax.Expr, dim: int, keepdim: bool, pick: Callable) -> tuple[relax.Expr, relax.Expr]:
        """(values, indices): the gradient goes to the index that was picked, also where values tie."""
        dims = shape(x)
        dim %= len(dims)
        index = self.emit(pick(x, axis=dim, keepdims=True))
        places = np.arange(dims[dim]).reshape([-1 if a == dim else 1 for a in range(len(dims))])
        mask = self.emit(R.equal(index, relax.const(places, "int64")))
        picked = self.emit(R.where(mask, x, relax.const(0, x.ty.dtype)))
        values = self.emit(R.sum(picked, [dim], keepdims=keepdim))
        return (values, index if keepdim else self.emit(R.squeeze(index, [dim])))

    def convert_linalg_vector_norm__default(self, node: fx.Node) -> relax.Expr:
        x, order, dims, keepdim = self._args(node)[:4]
        dims = list(dims) if dims is not None else None
        if order == 2:
            return self._root(self.emit(R.sum(self.emit(R.multiply(x, x)), dims, keepdims=bool(keepdim))))
        if order == 1:
            return self.emit(R.sum(self.emit(R.abs(x)), dims, keepdims=bool(keepdim)))
        raise UnsupportedOperatorError(f"{place_of(node)}: order {order} is not supported; 1 and 2 are")

    def convert_cat__default(self, node: fx.Node) -> relax.Expr:
        tensors, dim = self._args(node)
        dtype = self._convert_data_type(node.meta["val"].dtype)
        filled = [self._tensor(t, dtype) for t in tensors if shape(t) != [0]]  # PyTorch skips an empty vector
        # Relax cannot differentiate the concatenation of one.
        return self.emit(R.concat(filled, dim % len(shape_of(node)))) if len(filled) > 1 else filled[0]

    def convert_stack__default(self, node: fx.Node) -> relax.Expr:
        tensors, dim = self._args(node)
        parts = [self.emit(R.expand_dims(t, dim)) for t in tensors]
        return self.emit(R.concat(parts, dim)) if len(parts) > 1 else parts[0]

    def _reshaped(self, node: fx.Node) -> relax.Expr:
        return self.emit(R.reshape(self._expr(node.args[0]), shape_of(node)))

    convert_squeeze__default = convert_squeeze__dim = convert_squeeze__dims = _reshaped
    convert_unsqueeze__default = convert_view__default = convert_reshape__default = _reshaped
    convert__unsafe_view__default = convert_flatten__using_ints = convert_unflatten__int = _reshaped

    def convert_select__int(self, node: fx.Node) -> relax.Expr:
        x, dim, index = self._args(node)
        index %= shape(x)[dim]
        return self.emit(R.reshape(self._slice_of(x, dim, index, index + 1), shape_of(node)))

    def convert_pixel_shuffle__default(self, node: fx.Node) -> relax.Expr:
        x, r = self._args(node)
        *lead, c, h, w = shape(x)
        if len(lead) != 1:
            raise UnsupportedOperatorError(f"{place_of(node)}: pixel_shuffle of a {len(lead) + 3}-dimensional tensor")
        split = self.emit(R.reshape(x, [*lead, c // r**2, r, r, h, w]))
        return self.emit(R.reshape(self.emit(R.permute_dims(split, [0, 1, 4, 2, 5, 3])), shape_of(node)))

    def convert_roll__default(self, node: fx.Node) -> relax.Expr:
        x, shifts, dims = self._args(node)
        flat = not dims
        if flat:
            x, dims = self.emit(R.reshape(x, [math.prod(shape(x))])), [0]
        for shift, dim in zip(shifts, dims, strict=True):
            size = shape(x)[dim]
            cut = (-shift) % size
            if cut:
                head, tail = self._slice_of(x, dim, 0, cut), self._slice_of(x, dim, cut, size)
                x = self.emit(R.concat([tail, head], dim % len(shape(x))))
        return self.emit(R.reshape(x, shape_of(node))) if flat else x
