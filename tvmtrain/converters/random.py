"""Dropout and random numbers, from the step's own generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain import philox
from tvmtrain.converters.base import Converter, place_of, shape, shape_of
from tvmtrain.errors import UnsupportedOperatorError


class Random(Converter):
    """Every draw has a stream of its own, numbered in the order of the graph."""

    def _drawn(self, node: fx.Node) -> relax.Expr:
        if self.random is None:
            raise UnsupportedOperatorError(
                f"{place_of(node)} draws random numbers in evaluation mode too, or in the loss alone: only a training step has a "
                "state for them; draw them only while module.training is set"
            )
        return self._uniform(shape_of(node))

    def _uniform(self, dims: Sequence[int]) -> relax.Expr:
        """Numbers in [0, 1) from a stream of their own: each draw of the graph has its number, so its order does not matter."""
        stream, self.draws = self.draws, self.draws + 1
        return self.block_builder.emit_te(philox.uniform, self.random, list(dims), stream, primfunc_name_hint="philox_uniform")

    def _drop(self, x: relax.Expr, p: float) -> relax.Expr:
        if not p or self.random is None:
            return x
        if p == 1:  # PyTorch draws nothing here
            return self.emit(R.multiply(x, relax.const(0.0, x.ty.dtype)))
        keep = self.emit(R.less(self._uniform(shape(x)), relax.const(1.0 - p, "float32")))
        scaled = self.emit(R.multiply(x, relax.const(1.0 / (1.0 - p), x.ty.dtype)))
        return self.emit(R.where(keep, scaled, relax.const(0.0, x.ty.dtype)))

    def convert_native_dropout__default(self, node: fx.Node) -> Any:
        x, p, train = self._args(node)
        return (self._drop(x, p if train else 0.0), None)

    def convert_dropout__default(self, node: fx.Node) -> relax.Expr:
        x, p, train = self._args(node)
        return self._drop(x, p if train else 0.0)

    def convert_rand__default(self, node: fx.Node) -> relax.Expr:
        return self._drawn(node)

    convert_rand_like__default = convert_rand__default

    def convert_randn__default(self, node: fx.Node) -> relax.Expr:
        """Box and Muller's normal numbers from two streams."""
        first, second = self._drawn(node), self._drawn(node)
        tail = self.emit(R.log(self.emit(R.subtract(relax.const(1.0), first))))
        radius = self.emit(R.sqrt(self.emit(R.multiply(tail, relax.const(-2.0)))))
        return self.emit(R.multiply(radius, self.emit(R.cos(self.emit(R.multiply(second, relax.const(2 * math.pi)))))))

    convert_randn_like__default = convert_randn__default

    def convert_bernoulli__p(self, node: fx.Node) -> relax.Expr:
        _, p = self._args(node)[:2]
        hit = self.emit(R.less(self._drawn(node), relax.const(float(p), "float32")))
        return self.emit(R.astype(hit, "float32"))

    def convert_bernoulli__default(self, node: fx.Node) -> relax.Expr:
        p = self._args(node)[0]
        hit = self.emit(R.less(self._drawn(node), self._tensor(p, "float32")))
        return self.emit(R.astype(hit, "float32"))
