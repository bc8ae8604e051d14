"""Pooling and interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain.converters.base import Converter, four, one, pair, shape, shape_of

_TORCH = {"float32": torch.float32, "float64": torch.float64}


class Sampling(Converter):
    """What is linear and separable is a product with constant matrices, which differentiates exactly."""

    def convert_adaptive_avg_pool2d__default(self, node: fx.Node) -> relax.Expr:
        x, size = self._args(node)
        height, width = shape(x)[-2:]
        if all(s == 1 for s in size):
            return self.emit(R.mean(x, [-2, -1], keepdims=True))
        rows = F.adaptive_avg_pool2d(torch.eye(height, dtype=torch.float64)[None], (size[0], height))[0]
        columns = F.adaptive_avg_pool2d(torch.eye(width, dtype=torch.float64)[None], (size[1], width))[0]
        return self._separable(x, rows, columns)

    def convert_adaptive_avg_pool1d__default(self, node: fx.Node) -> relax.Expr:
        x, size = self._args(node)
        matrix = F.adaptive_avg_pool2d(torch.eye(shape(x)[-1], dtype=torch.float64)[None], (one(size), shape(x)[-1]))[0]
        return self.emit(R.matmul(x, _matrix(matrix.T, x)))

    def convert_upsample_bilinear2d__vec(self, node: fx.Node) -> relax.Expr:
        return self._interpolate(node, node.target)

    def convert_upsample_bicubic2d__vec(self, node: fx.Node) -> relax.Expr:
        return self._interpolate(node, node.target)

    def convert__upsample_bilinear2d_aa__vec(self, node: fx.Node) -> relax.Expr:
        return self._interpolate(node, node.target)

    def convert_upsample_nearest2d__vec(self, node: fx.Node) -> relax.Expr:
        return self._interpolate(node, node.target)

    def _interpolate(self, node: fx.Node, op: Callable) -> relax.Expr:
        """Interpolation is linear and separable: PyTorch's own operator on an identity gives the matrix of each axis."""
        x, size, *options, factors = self._args(node)
        out = shape_of(node)[-2:]
        matrices = []
        for axis, (n, m) in enumerate(zip(shape(x)[-2:], out, strict=True)):
            scale = None if factors is None else [factors[axis], 1.0]
            identity = torch.eye(n, dtype=_TORCH[str(x.ty.dtype)])[None, None]
            matrices.append(op(identity, [m, n] if size is not None else None, *options, scale)[0, 0])
        return self._separable(x, *matrices)

    def _separable(self, x: relax.Expr, rows: torch.Tensor, columns: torch.Tensor) -> relax.Expr:
        """rows @ x @ columns^T over the last two axes."""
        wide = self.emit(R.matmul(x, _matrix(columns.T, x)))
        return self.emit(R.matmul(_matrix(rows, x), wide))

    def convert_avg_pool1d__default(self, node: fx.Node) -> relax.Expr:
        x, kernel, stride, padding, ceil_mode, include_pad = self._args(node)
        dims = shape(x)
        x4 = self.emit(R.reshape(x, [*dims[:-1], 1, dims[-1]]))
        y = R.nn.avg_pool2d(
            x4,
            pool_size=(1, one(kernel)),
            strides=(1, one(stride or kernel)),
            padding=(0, one(padding), 0, one(padding)),
            ceil_mode=bool(ceil_mode),
            count_include_pad=bool(include_pad),
        )
        return self.emit(R.reshape(self.emit(y), shape_of(node)))

    def convert_avg_pool2d__default(self, node: fx.Node) -> relax.Expr:
        x, kernel, stride, padding, ceil_mode, include_pad, divisor = self._args(node)
        if divisor is not None:
            # Whole windows, zeros included: then every window has the same area, and the divisor can replace it.
            before, steps, area = pair(padding), pair(stride or kernel), math.prod(pair(kernel))
            spans = [(n - 1) * s + k for n, s, k in zip(shape_of(node)[-2:], steps, pair(kernel), strict=True)]
            sizes = zip(before, spans, shape(x)[-2:], strict=True)
            widths = [0, 0] * (len(shape(x)) - 2) + [w for b, span, n in sizes for w in (b, max(span - n - b, 0))]
            pooled = self._avg_pool(self.emit(R.nn.pad(x, widths)), kernel, stride, 0, False, True)
            return self.emit(R.multiply(pooled, relax.const(area / divisor, x.ty.dtype)))
        return self._avg_pool(x, kernel, stride, padding, ceil_mode, include_pad)

    def _avg_pool(
        self, x: relax.Expr, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include_pad: bool
    ) -> relax.Expr:
        return self.emit(
            R.nn.avg_pool2d(
                x,
                pool_size=pair(kernel),
                strides=pair(stride or kernel),
                padding=four(padding),
                ceil_mode=bool(ceil_mode),
                count_include_pad=bool(include_pad),
            )
        )

    def convert_max_pool2d__default(self, node: fx.Node) -> relax.Expr:
        x, kernel, stride, padding, dilation, ceil_mode = self._args(node)
        return self.emit(
            R.nn.max_pool2d(
                x,
                pool_size=pair(kernel),
                strides=pair(stride or kernel),
                padding=four(padding),
                dilation=pair(dilation),
                ceil_mode=bool(ceil_mode),
            )
        )


def _matrix(values: torch.Tensor, like: relax.Expr) -> relax.Constant:
    # TVM makes single precision of a double constant that is not told its dtype.
    return relax.const(values.double().contiguous().numpy(), like.ty.dtype)
