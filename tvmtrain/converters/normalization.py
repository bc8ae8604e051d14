"""BatchNorm in both modes, LayerNorm, GroupNorm, InstanceNorm, variances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain import operators
from tvmtrain.converters.base import Converter, per_channel, place_of, shape
from tvmtrain.errors import UnsupportedOperatorError


class Normalization(Converter):
    """LayerNorm, GroupNorm and InstanceNorm share ``operators.normalize``; running statistics of BatchNorm are state."""

    def _normalize(self, x: relax.Expr, axes: Sequence[int], eps: float) -> relax.Expr:
        """(x - mean) / sqrt(var + eps) over ``axes``."""
        return self.emit(relax.TupleGetItem(self.emit(operators.normalize(x, axes, eps)), 0))

    def _affine(self, xhat: relax.Expr, gamma: Any, beta: Any, dims: Sequence[int]) -> relax.Expr:
        if gamma is not None:
            xhat = self.emit(R.multiply(xhat, self.emit(R.reshape(gamma, dims))))
        if beta is not None:
            xhat = self.emit(R.add(xhat, self.emit(R.reshape(beta, dims))))
        return xhat

    def convert__native_batch_norm_legit_functional__default(self, node: fx.Node) -> Any:
        x, gamma, beta, running_mean, running_var, _training, momentum, eps = self._args(node)[:8]
        if self.inference:
            out = self._running_statistics(x, gamma, beta, running_mean, running_var, eps)
            return (out, None, None, running_mean, running_var)
        out, mean, var = self._batch_statistics(x, gamma, beta, eps)
        count = math.prod(shape(x)) // shape(x)[1]
        # PyTorch keeps the unbiased variance, though it normalizes with the biased one.
        unbiased = self.emit(R.multiply(var, relax.const(count / max(count - 1, 1), x.ty.dtype)))
        new_mean = self._blend(running_mean, mean, momentum)
        return (out, mean, var, new_mean, self._blend(running_var, unbiased, momentum))

    def convert__native_batch_norm_legit__no_stats(self, node: fx.Node) -> Any:
        x, gamma, beta, _training, _momentum, eps = self._args(node)[:6]
        return self._batch_statistics(x, gamma, beta, eps)

    def _batch_statistics(self, x: relax.Expr, gamma: Any, beta: Any, eps: float) -> tuple[relax.Expr, relax.Expr, relax.Expr]:
        """y, with the mean and the biased variance [C], which carry no gradient."""
        channels = shape(x)[1]
        parts = self.emit(operators.batch_norm(x, *self._affine_parameters(x, gamma, beta), eps))
        y, mean, var = (self.emit(relax.TupleGetItem(parts, i)) for i in range(3))
        mean, var = (self.emit(R.reshape(self.emit(R.grad.no_grad(stat)), [channels])) for stat in (mean, var))
        return y, mean, var

    def _affine_parameters(self, x: relax.Expr, gamma: Any, beta: Any) -> tuple[relax.Expr, relax.Expr]:
        """gamma and beta [C]; ones and zeros where a layer has none."""
        channels = shape(x)[1]
        gamma = gamma if gamma is not None else relax.const(np.ones(channels), x.ty.dtype)
        return gamma, beta if beta is not None else relax.const(np.zeros(channels), x.ty.dtype)

    def _blend(self, running: relax.Expr, batch: relax.Expr, momentum: float) -> relax.Expr:
        kept = self.emit(R.multiply(running, relax.const(1.0 - momentum, running.ty.dtype)))
        return self.emit(R.add(kept, self.emit(R.multiply(batch, relax.const(float(momentum), running.ty.dtype)))))

    def convert__native_batch_norm_legit_no_training__default(self, node: fx.Node) -> Any:
        x, gamma, beta, mean, var, _momentum, eps = self._args(node)[:7]
        return (self._running_statistics(x, gamma, beta, mean, var, eps), None, None)

    def _running_statistics(
        self, x: relax.Expr, gamma: Any, beta: Any, mean: relax.Expr, var: relax.Expr, eps: float
    ) -> relax.Expr:
        gamma, beta = self._affine_parameters(x, gamma, beta)
        call = R.nn.batch_norm(x, gamma, beta, mean, var, axis=1, epsilon=eps, training=False)
        return self.emit(relax.TupleGetItem(self.emit(call), 0))

    def convert_layer_norm__default(self, node: fx.Node) -> relax.Expr:
        x, normalized, gamma, beta, eps = self._args(node)[:5]
        rank = len(shape(x))
        xhat = self._normalize(x, range(rank - len(normalized), rank), eps)
        return self._affine(xhat, gamma, beta, [int(d) for d in normalized])

    def convert_group_norm__default(self, node: fx.Node) -> relax.Expr:
        x, groups, gamma, beta, eps = self._args(node)[:5]
        dims = shape(x)
        grouped = self.emit(R.reshape(x, [dims[0], groups, -1]))
        xhat = self._normalize(grouped, [2], eps)
        return self._affine(self.emit(R.reshape(xhat, dims)), gamma, beta, per_channel(dims))

    def convert_instance_norm__default(self, node: fx.Node) -> relax.Expr:
        x, gamma, beta, mean, _var, use_input_stats, _momentum, eps = self._args(node)[:8]
        if not use_input_stats or mean is not None:
            raise UnsupportedOperatorError(f"{place_of(node)}: InstanceNorm with running statistics is not supported")
        dims = shape(x)
        xhat = self._normalize(x, range(2, len(dims)), eps)
        return self._affine(xhat, gamma, beta, per_channel(dims))

    def convert_var__correction(self, node: fx.Node) -> relax.Expr:
        return self._variance(node)

    def convert_std__correction(self, node: fx.Node) -> relax.Expr:
        return self._root(self._variance(node))

    def convert_var_mean__correction(self, node: fx.Node) -> Any:
        x, dims, _, keepdim = self._args(node)
        return (self._variance(node), self.emit(R.mean(x, list(dims) if dims else None, keepdims=bool(keepdim))))

    def _variance(self, node: fx.Node) -> relax.Expr:
        x, dims, correction, keepdim = self._args(node)
        axes = list(range(len(shape(x)))) if not dims else [d % len(shape(x)) for d in dims]
        count = math.prod(shape(x)[a] for a in axes)
        centred = self.emit(R.subtract(x, self.emit(R.mean(x, axes, keepdims=True))))
        total = self.emit(R.sum(self.emit(R.multiply(centred, centred)), axes, keepdims=bool(keepdim)))
        divisor = count - (1 if correction is None else correction)
        return self.emit(R.divide(total, relax.const(float(divisor), x.ty.dtype)))
