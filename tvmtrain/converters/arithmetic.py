"""Arithmetic and comparisons, with PyTorch's type promotion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain.converters.base import Converter

ARITHMETIC: dict[str, Callable] = {
    "add": R.add,
    "sub": R.subtract,
    "mul": R.multiply,
    "div": R.divide,
}
FUNCTIONS: dict[str, Callable] = {"maximum": R.maximum, "minimum": R.minimum, "atan2": R.atan2}
COMPARISONS: dict[str, Callable] = {
    "eq": R.equal,
    "ne": R.not_equal,
    "lt": R.less,
    "le": R.less_equal,
    "gt": R.greater,
    "ge": R.greater_equal,
}
OVERLOADS = ("Tensor", "Scalar")


class Arithmetic(Converter):
    """Elementwise arithmetic of numbers and tensors."""

    def arithmetic_converters(self) -> dict[str, Callable[[fx.Node], Any]]:
        """Converters by operator, for the families that differ in one Relax operator alone."""
        plain = {f"{name}.{overload}": op for name, op in ARITHMETIC.items() for overload in OVERLOADS}
        plain |= {f"{name}.default": op for name, op in FUNCTIONS.items()}
        compared = {f"{name}.{overload}": op for name, op in COMPARISONS.items() for overload in OVERLOADS}
        table: dict[str, Callable[[fx.Node], Any]] = {name: partial(self._arithmetic, op) for name, op in plain.items()}
        return table | {name: partial(self._comparison, op) for name, op in compared.items()}

    def _arithmetic(self, op: Callable, node: fx.Node) -> relax.Expr:
        dtype = self._convert_data_type(node.meta["val"].dtype)
        x, y = (self._tensor(self._expr(arg), dtype) for arg in node.args[:2])
        if dtype == "bool":  # PyTorch's sums and products of truth values
            op = R.logical_and if op is R.multiply else R.logical_or
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if alpha != 1:
            y = self.emit(R.multiply(y, relax.const(alpha, dtype)))
        return self.emit(op(x, y))

    def _comparison(self, op: Callable, node: fx.Node) -> relax.Expr:
        fakes = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args[:2]]
        dtype = self._convert_data_type(torch.result_type(*fakes))
        x, y = (self._tensor(self._expr(arg), dtype) for arg in node.args[:2])
        return self.emit(op(x, y))

    def convert_cumsum__default(self, node: fx.Node) -> relax.Expr:
        x, dim = self._args(node)[:2]
        return self.emit(R.cumsum(self._tensor(x, self._convert_data_type(node.meta["val"].dtype)), dim))

    def convert_getitem(self, node: fx.Node) -> Any:
        return self._expr(node.args[0])[node.args[1]]

    def convert_where__self(self, node: fx.Node) -> relax.Expr:
        dtype = self._convert_data_type(node.meta["val"].dtype)
        mask, x, y = self._args(node)
        return self.emit(R.where(mask, self._tensor(x, dtype), self._tensor(y, dtype)))

    convert_where__ScalarSelf = convert_where__ScalarOther = convert_where__Scalar = convert_where__self

    def convert_stop_gradient__default(self, node: fx.Node) -> relax.Expr:
        return self.emit(R.grad.no_grad(self._expr(node.args[0])))

    def convert_pow__Tensor_Scalar(self, node: fx.Node) -> relax.Expr:
        x, exponent = self._args(node)
        x = self._tensor(x, self._convert_data_type(node.meta["val"].dtype))
        exact = {0.5: R.sqrt, -0.5: R.rsqrt, 1: lambda v: v, 2: lambda v: R.multiply(v, v)}
        exact[3] = lambda v: R.multiply(self.emit(R.multiply(v, v)), v)
        exact[0] = R.ones_like
        exact[-1] = lambda v: R.divide(relax.const(1, v.ty.dtype), v)
        # Relax differentiates x**y as y * x**(y-1), which is not finite at 0 for these; here each has its exact rule.
        rule = exact.get(exponent)
        return self.emit(rule(x) if rule else R.power(x, relax.const(exponent, x.ty.dtype)))
