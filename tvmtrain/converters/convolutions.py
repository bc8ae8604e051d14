"""Convolutions and transposed convolutions in one and two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from tvm import relax
from tvm.relax import op as R

from tvmtrain import operators
from tvmtrain.converters.base import Converter, four, one, pair, per_channel, shape, shape_of, string_padding


class Convolutions(Converter):
    """Every convolution becomes a two-dimensional one, NCHW and OIHW."""

    def convert_conv2d__default(self, node: fx.Node) -> relax.Expr:
        x, w, bias, stride, padding, dilation, groups = self._args(node)
        return self._conv(x, w, bias, stride, four(padding), dilation, groups)

    def convert_conv2d__padding(self, node: fx.Node) -> relax.Expr:
        x, w, bias, stride, padding, dilation, groups = self._args(node)
        pads = string_padding(padding, shape(w)[2:], pair(dilation))
        return self._conv(x, w, bias, stride, pads, dilation, groups)

    def convert_conv1d__default(self, node: fx.Node) -> relax.Expr:
        x, w, bias, stride, padding, dilation, groups = self._args(node)
        return self._conv1d_of(x, w, bias, stride, one(padding), dilation, groups)

    def convert_conv1d__padding(self, node: fx.Node) -> relax.Expr:
        x, w, bias, stride, padding, dilation, groups = self._args(node)
        pads = string_padding(padding, (1, shape(w)[2]), (1, one(dilation)))
        return self._conv1d_of(x, w, bias, stride, pads[1:4:2], dilation, groups)

    def _conv1d_of(
        self, x: relax.Expr, w: relax.Expr, bias: Any, stride: Any, pad: Any, dilation: Any, groups: int
    ) -> relax.Expr:
        """A one-dimensional convolution is a two-dimensional one of height 1."""
        left, right = (pad, pad) if isinstance(pad, int) else pad
        x4, w4 = (self.emit(R.reshape(t, [*shape(t)[:2], 1, shape(t)[2]])) for t in (x, w))
        y = self._conv(x4, w4, bias, [1, one(stride)], (0, left, 0, right), [1, one(dilation)], groups)
        dims = shape(y)
        return self.emit(R.reshape(y, [dims[0], dims[1], dims[3]]))

    def _conv(
        self, x: relax.Expr, w: relax.Expr, bias: Any, stride: Any, padding: Sequence[int], dilation: Any, groups: int
    ) -> relax.Expr:
        if len(shape(x)) == 3:  # PyTorch takes an unbatched image
            batched = self.emit(R.reshape(x, [1, *shape(x)]))
            y = self._conv(batched, w, bias, stride, padding, dilation, groups)
            return self.emit(R.reshape(y, shape(y)[1:]))
        y = self.emit(R.nn.conv2d(x, w, strides=pair(stride), padding=tuple(padding), dilation=pair(dilation), groups=groups))
        return self._add_bias(y, bias)

    def _add_bias(self, y: relax.Expr, bias: Any) -> relax.Expr:
        if bias is None:
            return y
        return self.emit(R.add(y, self.emit(R.reshape(bias, per_channel(shape(y))))))

    def convert_conv_transpose2d__input(self, node: fx.Node) -> relax.Expr:
        x, w, bias, stride, padding, _output_padding, groups, dilation = self._args(node)
        return self._conv_transpose(node, x, w, bias, (pair(stride), four(padding), pair(dilation), groups))

    def convert_conv_transpose1d__default(self, node: fx.Node) -> relax.Expr:
        x, w, bias, stride, padding, _output_padding, groups, dilation = self._args(node)
        x4, w4 = (self.emit(R.reshape(t, [*shape(t)[:2], 1, shape(t)[2]])) for t in (x, w))
        geometry = ((1, one(stride)), (0, one(padding), 0, one(padding)), (1, one(dilation)), groups)
        return self.emit(R.reshape(self._conv_transpose(node, x4, w4, bias, geometry), shape_of(node)))

    def _conv_transpose(self, node: fx.Node, x: relax.Expr, w: relax.Expr, bias: Any, geometry: tuple) -> relax.Expr:
        """A transposed convolution is the dgrad of the convolution whose weight it carries ([I, O/groups, Kh, Kw])."""
        dims = shape_of(node)
        dims = dims if len(dims) == 4 else [dims[0], dims[1], 1, dims[2]]
        return self._add_bias(self.emit(operators.transposed_conv2d(x, w, dims, *geometry)), bias)
