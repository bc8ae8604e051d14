"""Matrix products. TVM's importer computes them in single precision whatever the operands are."""

from __future__ import annotations

from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain.converters.base import Converter


class Products(Converter):
    """Matrix products in the precision of their operands."""

    def convert_linear__default(self, node: fx.Node) -> relax.Expr:
        x, weight, *bias = self._args(node)
        y = self.emit(R.linear(x, weight))
        return self.emit(R.add(y, bias[0])) if bias and bias[0] is not None else y

    def convert_matmul__default(self, node: fx.Node) -> relax.Expr:
        a, b = self._args(node)
        return self.emit(R.matmul(a, b))

    convert_mm__default = convert_matmul__default
    convert_bmm__default = convert_matmul__default

    def convert_addmm__default(self, node: fx.Node) -> relax.Expr:
        """beta * c + alpha * a @ b."""
        c, a, b = self._args(node)[:3]
        product = self._scaled(self.emit(R.matmul(a, b)), node.kwargs.get("alpha", 1))
        beta = node.kwargs.get("beta", 1)
        return self.emit(R.add(self._scaled(c, beta), product)) if beta else product

    convert_baddbmm__default = convert_addmm__default

    def _scaled(self, x: relax.Expr, factor: float) -> relax.Expr:
        return x if factor == 1 else self.emit(R.multiply(x, relax.const(factor, x.ty.dtype)))
