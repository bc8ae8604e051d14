"""Activation functions, finite and with PyTorch's gradients at every tie."""

from __future__ import annotations

from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain import operators
from tvmtrain.converters.base import Converter


class Activations(Converter):
    """Activation functions that TVM's importer lacks or whose gradients would differ."""

    def convert_hardtanh__default(self, node: fx.Node) -> relax.Expr:
        return self.emit(operators.hardtanh(*self._args(node)))

    def convert_relu6__default(self, node: fx.Node) -> relax.Expr:
        return self.emit(operators.hardtanh(self._args(node)[0], 0.0, 6.0))

    def convert_hardsigmoid__default(self, node: fx.Node) -> relax.Expr:
        x = self._args(node)[0]
        sixth = self.emit(R.divide(self.emit(R.add(x, relax.const(3.0, x.ty.dtype))), relax.const(6.0, x.ty.dtype)))
        return self._between(x, sixth, relax.const(0.0, x.ty.dtype), relax.const(1.0, x.ty.dtype))

    def convert_hardswish__default(self, node: fx.Node) -> relax.Expr:
        x = self._args(node)[0]
        inner = self.emit(R.multiply(x, self.emit(R.add(x, relax.const(3.0, x.ty.dtype)))))
        return self._between(x, self.emit(R.divide(inner, relax.const(6.0, x.ty.dtype))), relax.const(0.0, x.ty.dtype), x)

    def _between(self, x: relax.Expr, inside: relax.Expr, below: relax.Expr, above: relax.Expr) -> relax.Expr:
        """``inside`` where -3 < x < 3, else ``below`` or ``above``."""
        three = relax.const(3.0, x.ty.dtype)
        low = self.emit(R.where(self.emit(R.greater(x, relax.const(-3.0, x.ty.dtype))), inside, below))
        return self.emit(R.where(self.emit(R.less(x, three)), low, above))

    def convert_elu__default(self, node: fx.Node) -> relax.Expr:
        x, alpha, scale, input_scale = self._args(node)
        return self._elu_of(x, alpha, scale, input_scale)

    def convert_celu__default(self, node: fx.Node) -> relax.Expr:
        x, alpha = self._args(node)
        return self._elu_of(x, alpha, 1.0, 1.0 / alpha)

    def convert_selu__default(self, node: fx.Node) -> relax.Expr:
        return self._elu_of(self._args(node)[0], 1.6732632423543772, 1.0507009873554805, 1.0)

    def _elu_of(self, x: relax.Expr, alpha: float, scale: float, input_scale: float) -> relax.Expr:
        """scale * (x if x > 0 else alpha * (exp(input_scale * x) - 1)); exp never sees a positive x, so no gradient overflows."""

        def const(value: float) -> relax.Constant:
            return relax.const(float(value), x.ty.dtype)

        positive = self.emit(R.greater(x, const(0)))
        safe = self.emit(R.multiply(self.emit(R.where(positive, const(0), x)), const(input_scale)))
        negative = self.emit(R.multiply(self.emit(R.subtract(self.emit(R.exp(safe)), const(1))), const(alpha)))
        return self.emit(R.multiply(self.emit(R.where(positive, x, negative)), const(scale)))

    def convert_softplus__default(self, node: fx.Node) -> relax.Expr:
        x, beta, threshold = self._args(node)
        scaled = self.emit(R.multiply(x, relax.const(float(beta), x.ty.dtype)))
        curved = self.emit(R.divide(self._softplus_of(scaled), relax.const(float(beta), x.ty.dtype)))
        return self.emit(R.where(self.emit(R.greater(scaled, relax.const(float(threshold), x.ty.dtype))), x, curved))

    def convert_log_sigmoid__default(self, node: fx.Node) -> relax.Expr:
        return self.emit(R.negative(self._softplus_of(self.emit(R.negative(self._args(node)[0])))))

    def convert_mish__default(self, node: fx.Node) -> relax.Expr:
        x = self._args(node)[0]
        return self.emit(R.multiply(x, self.emit(R.tanh(self._softplus_of(x)))))

    def _softplus_of(self, x: relax.Expr) -> relax.Expr:
        """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), finite for every x, as is its gradient."""
        small = self.emit(R.exp(self.emit(R.negative(self.emit(R.abs(x))))))
        log1p = self.emit(R.log(self.emit(R.add(small, relax.const(1.0, x.ty.dtype)))))
        return self.emit(R.add(self.emit(R.maximum(x, relax.const(0.0, x.ty.dtype))), log1p))
