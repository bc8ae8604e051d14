"""Attention, embeddings and losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain.converters.base import Converter, place_of, shape, shape_of
from tvmtrain.errors import UnsupportedOperatorError


class AttentionAndLosses(Converter):
    """Attention, embeddings and losses."""

    def convert_scaled_dot_product_attention__default(self, node: fx.Node) -> relax.Expr:
        q, k, v, mask, dropout, is_causal, scale, grouped = (*self._args(node), False)[:8]
        if grouped:  # each key and value serves several neighbouring queries
            times = shape(q)[-3] // shape(k)[-3]
            k, v = (self.emit(R.repeat(t, times, len(shape(t)) - 3)) for t in (k, v))
        scale = 1.0 / math.sqrt(shape(q)[-1]) if scale is None else scale
        rank = len(shape(k))
        kt = self.emit(R.permute_dims(k, [*range(rank - 2), rank - 1, rank - 2]))
        scores = self.emit(R.multiply(self.emit(R.matmul(q, kt)), relax.const(scale, q.ty.dtype)))
        if is_causal:
            mask = relax.const(np.tril(np.ones(shape(scores)[-2:], dtype=bool)))
        weights = self._masked_softmax(self._masked(scores, mask)) if mask is not None else self.emit(R.nn.softmax(scores, -1))
        return self.emit(R.matmul(self._drop(weights, dropout), v))

    def _masked_softmax(self, scores: relax.Expr) -> relax.Expr:
        """Softmax over the last axis that is 0, as is its gradient, in rows where every score is -inf."""
        infinite, lowest = (relax.const(value, scores.ty.dtype) for value in (-np.inf, np.finfo("float32").min))
        closed = self.emit(R.equal(scores, infinite))
        weights = self.emit(R.nn.softmax(self.emit(R.where(closed, lowest, scores)), -1))
        return self.emit(R.where(closed, relax.const(0.0, scores.ty.dtype), weights))

    def _masked(self, scores: relax.Expr, mask: relax.Expr) -> relax.Expr:
        if str(mask.ty.dtype) != "bool":
            return self.emit(R.add(scores, mask))
        return self.emit(R.where(mask, scores, relax.const(-np.inf, scores.ty.dtype)))

    def convert_cross_entropy_loss__default(self, node: fx.Node) -> relax.Expr:
        logits, target, weight, reduction, ignore_index, smoothing = self._args(node)
        axis = 1 if len(shape(logits)) > 1 else 0
        logp = self.emit(R.nn.log_softmax(logits, axis))
        if target.ty.dtype == logits.ty.dtype:
            return self._soft_cross_entropy(logp, target, weight, reduction, smoothing)
        plain = self._nll(logp, target, weight, reduction, ignore_index, axis, None)
        if not smoothing:
            return plain
        spread = self._nll(logp, target, weight, reduction, ignore_index, axis, shape(logits)[axis])
        kept = self.emit(R.multiply(plain, relax.const(1.0 - smoothing, logits.ty.dtype)))
        return self.emit(R.add(kept, self.emit(R.multiply(spread, relax.const(float(smoothing), logits.ty.dtype)))))

    def _soft_cross_entropy(
        self, logp: relax.Expr, target: relax.Expr, weight: Any, reduction: int, smoothing: float
    ) -> relax.Expr:
        """-sum over classes of w * t * logp for targets t that are probabilities; the mean is over the samples, unweighted."""
        dims, dtype = shape(logp), logp.ty.dtype
        axis = 1 if len(dims) > 1 else 0
        if smoothing:
            kept = self.emit(R.multiply(target, relax.const(1.0 - smoothing, dtype)))
            target = self.emit(R.add(kept, relax.const(smoothing / dims[axis], dtype)))
        if weight is not None:
            target = self.emit(
                R.multiply(target, self.emit(R.reshape(weight, [-1 if a == axis else 1 for a in range(len(dims))])))
            )
        losses = self.emit(R.negative(self.emit(R.sum(self.emit(R.multiply(target, logp)), [axis]))))
        if reduction == 0:
            return losses
        total = self.emit(R.sum(losses))
        return total if reduction == 2 else self.emit(R.divide(total, relax.const(float(math.prod(dims) // dims[axis]), dtype)))

    def convert_nll_loss_forward__default(self, node: fx.Node) -> Any:
        logp, target, weight, reduction, ignore_index = self._args(node)
        return (self._nll(logp, target, weight, reduction, ignore_index, 1 if len(shape(logp)) > 1 else 0, None), None)

    convert_nll_loss2d_forward__default = convert_nll_loss_forward__default

    def _nll(
        self, logp: relax.Expr, target: relax.Expr, weight: Any, reduction: int, ignore: int, axis: int, spread: int | None
    ) -> relax.Expr:
        """-w[t] * logp[t] of each target t, or, with ``spread`` classes, -sum(w * logp) / spread (label smoothing).

        Selections by comparison with the class numbers: no gather, so that the gradient is no scatter.
        """
        dtype = logp.ty.dtype
        zero, one = relax.const(0.0, dtype), relax.const(1.0, dtype)
        classes = np.arange(shape(logp)[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape(logp)))])
        labels = self.emit(R.expand_dims(target, axis))
        hit = self.emit(R.equal(labels, relax.const(classes, target.ty.dtype)))
        valid = self.emit(R.not_equal(target, relax.const(ignore, target.ty.dtype)))
        per_class = one if weight is None else self.emit(R.reshape(weight, classes.shape))
        own = self.emit(R.sum(self.emit(R.where(hit, per_class, zero)), [axis]))
        own = self.emit(R.where(valid, own, zero))  # the weight of each sample: 0 where it is ignored
        if spread:
            each = self.emit(
                R.sum(self.emit(R.multiply(logp, self.emit(R.divide(per_class, relax.const(float(spread), dtype))))), [axis])
            )
            losses = self.emit(R.where(valid, each, zero))
        else:
            each = self.emit(R.sum(self.emit(R.where(hit, logp, zero)), [axis]))
            losses = self.emit(R.multiply(each, own))
        losses = self.emit(R.negative(losses))
        if reduction == 0:
            return losses
        total = self.emit(R.sum(losses))
        return total if reduction == 2 else self.emit(R.divide(total, self.emit(R.sum(own))))

    def convert_embedding__default(self, node: fx.Node) -> relax.Expr:
        table, index, padding, by_frequency = self._args(node)[:4]
        if by_frequency:
            raise UnsupportedOperatorError(f"{place_of(node)}: scale_grad_by_freq=True is not supported")
        flat = self.emit(R.reshape(index, [math.prod(shape(index))]))
        rows = self._take_rows(table, flat)
        if padding >= 0:  # PyTorch gives the padding row no gradient
            is_padding = self.emit(R.equal(self.emit(R.expand_dims(flat, 1)), relax.const(padding, index.ty.dtype)))
            rows = self.emit(R.where(is_padding, self.emit(R.grad.no_grad(rows)), rows))
        return self.emit(R.reshape(rows, shape_of(node)))
