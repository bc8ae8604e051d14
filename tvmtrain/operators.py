"""Relax operators of a training step that Relax itself lacks.

Each is registered from Python with a type inference and no side effects, so that Relax's own passes (normalization, dead code
elimination, fusion) treat it like any other operator. Gradient rules live in ``autodiff``, kernels in ``kernels`` and ``norm_kernels``.

Layouts are PyTorch's: activations [N, C, H, W], weights [O, I/groups, Kh, Kw].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Op
from tvm.ir import _ffi_api as _ir_ffi
from tvm.ir.op import register_op_attr
from tvm.relax import op as R
from tvm.relax.transform.legalize_ops.common import register_legalize

HARDTANH = "tvmtrain.hardtanh"
NORMALIZE = "tvmtrain.normalize"
BATCH_NORM = "tvmtrain.batch_norm"
STATISTICS = "tvmtrain.statistics"
GRADIENT_SUMS = "tvmtrain.gradient_sums"
DGRAD = "tvmtrain.conv2d_dgrad"
WGRAD = "tvmtrain.conv2d_wgrad"
PACKED_CONV = "tvmtrain.packed_conv2d"
VIEWED_CONV = "tvmtrain.viewed_conv2d"
VIEWED_LINEAR = "tvmtrain.viewed_linear"
PUT = "tvmtrain.put"
PACK_BITS = "tvmtrain.pack_bits"
UNPACK_BITS = "tvmtrain.unpack_bits"

_ARITHMETIC = ("add", "subtract", "multiply", "divide", "maximum", "minimum")
_FUNCTIONS = ("clip", "abs", "exp", "sqrt", "square", "negative", "sigmoid", "tanh", "erf")
_ACTIVATIONS = ("nn.relu", "nn.leakyrelu", "nn.gelu", "nn.gelu_tanh", "nn.silu")
# Operators of numbers that compute each number of the result from those at its place.
ELEMENTWISE = {f"relax.{name}" for name in (*_ARITHMETIC, *_FUNCTIONS, *_ACTIVATIONS)} | {HARDTANH}


def _first_type_with_shape(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
    return relax.TensorType([int(d) for d in call.attrs["shape"]], call.args[0].ty.dtype)


def _type_of_argument(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
    return call.args[0].ty


def _viewed_conv_type(call: relax.Call, ctx: relax.BlockBuilder) -> relax.TensorType:
    return ctx.normalize(plain_conv2d(call)).ty


def _viewed_linear_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
    x, w = call.args[:2]
    return relax.TensorType([*list(x.ty.shape)[:-1], w.ty.shape[0]], x.ty.dtype)


def _kept_type(call: relax.Call) -> relax.TensorType:
    x = call.args[0].ty
    axes = {int(a) for a in call.attrs["axes"]}
    return relax.TensorType([1 if a in axes else int(d) for a, d in enumerate(x.shape)], x.dtype)


def _normalize_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TupleType:
    return relax.TupleType([call.args[0].ty, *[_kept_type(call)] * 3])


def _statistics_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TupleType:
    return relax.TupleType([_kept_type(call)] * 3)


def _gradient_sums_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TupleType:
    return relax.TupleType([_kept_type(call)] * 2)


def _outside_of_rows(shape: Sequence[int]) -> int:
    """How many of the first axes count the rows of which eight are packed together: bytes then lie as the numbers of a row do.

    Rows are maps (the last two axes), if these are a multiple of eight: then a core that works on an image reads that image's bits.
    """
    possible = [lead for lead in range(1, len(shape)) if prod(shape[:lead]) % 8 == 0]
    return min(possible, key=lambda lead: abs(len(shape) - 2 - lead), default=len(shape))


def _bits_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
    shape = [int(d) for d in call.args[0].ty.shape]
    lead = _outside_of_rows(shape)
    return relax.TensorType([-(-prod(shape[:lead]) // 8), *shape[lead:]], "uint8")


def _mask_type(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
    return relax.TensorType([int(d) for d in call.attrs["shape"]], "bool")


def register(name: str, doc: str, infer: Callable[[relax.Call, relax.BlockBuilder], relax.Type]) -> None:
    """A Relax operator from Python: ``infer`` gives the type of a call; it has no side effects."""
    _ir_ffi.RegisterOp(name, doc)
    register_op_attr(name, "FInferType", infer)
    register_op_attr(name, "FPurity", True)


register(DGRAD, "gradient of conv2d with respect to its input", _first_type_with_shape)
register(WGRAD, "gradient of conv2d with respect to its weight", _first_type_with_shape)
register(PACKED_CONV, "conv2d with the weights of some filters side by side", _first_type_with_shape)
register(VIEWED_CONV, "conv2d, of whose weight a view is trained", _viewed_conv_type)
register(VIEWED_LINEAR, "x @ w^T, of whose weight a view is trained", _viewed_linear_type)
register(PUT, "a tensor with some of its slices replaced", _type_of_argument)
register(PACK_BITS, "a mask, eight numbers to a byte", _bits_type)
register(UNPACK_BITS, "the mask that was packed", _mask_type)
register(HARDTANH, "clip, without a gradient at its bounds", _type_of_argument)
register(NORMALIZE, "(x - mean) / sqrt(var + eps) with its statistics", _normalize_type)
register(BATCH_NORM, "gamma * (x - mean) / sqrt(var + eps) + beta with its statistics", _normalize_type)
register(STATISTICS, "mean, variance and 1 / sqrt(var + eps)", _statistics_type)
register(GRADIENT_SUMS, "the sums of dy and of dy * (x - mean)", _gradient_sums_type)


def dict_attrs(**fields: Any) -> tvm.ir.Attrs:
    """Attributes of an operator of ours; read them as ``call.attrs["name"]``."""
    return tvm.ir.make_node("ir.DictAttrs", **fields)


def _geometry(geometry: Mapping[str, Any] | tvm.ir.Attrs, shape: Sequence[int]) -> tvm.ir.Attrs:
    return dict_attrs(**_plain(geometry), shape=[int(d) for d in shape])


def conv2d_dgrad(forward: relax.Call, gy: relax.Expr) -> relax.Call:
    """dX of the convolution ``forward`` = ``R.nn.conv2d(x, w)``; ``gy`` is [N, O, Ho, Wo], the result has the shape of x."""
    x, w = forward.args
    return relax.Call(Op.get(DGRAD), [gy, w], _geometry(forward.attrs, x.ty.shape))


def conv2d_wgrad(forward: relax.Call, gy: relax.Expr) -> relax.Call:
    """dW of the convolution ``forward`` = ``R.nn.conv2d(x, w)``; ``gy`` is [N, O, Ho, Wo], the result has the shape of w."""
    x, w = forward.args
    return wgrad(x, gy, forward.attrs, w.ty.shape)


def transposed_conv2d(
    x: relax.Expr,
    w: relax.Expr,
    shape: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> relax.Call:
    """The transposed convolution of x [N, I, H, W] with w [I, O/groups, Kh, Kw]: the dgrad of the convolution that maps ``shape`` to x."""
    geometry = dict_attrs(
        strides=list(strides), padding=list(padding), dilation=list(dilation), groups=groups, shape=[int(d) for d in shape]
    )
    return relax.Call(Op.get(DGRAD), [x, w], geometry)


def dgrad_wgrad(dgrad: relax.Call, g: relax.Expr) -> relax.Call:
    """Gradient of a dgrad (a transposed convolution) with respect to its weight, for the gradient ``g`` of its result."""
    gy, w = dgrad.args
    return wgrad(g, gy, dgrad.attrs, w.ty.shape)


def hardtanh(x: relax.Expr, low: float, high: float) -> relax.Call:
    """PyTorch's hardtanh and ReLU6: clip(x, low, high) that, unlike torch.clamp, passes no gradient where x is at a bound."""
    return relax.Call(Op.get(HARDTANH), [x], dict_attrs(low=float(low), high=float(high)))


@register_legalize(HARDTANH)
def _legalize_hardtanh(_bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    return R.clip(call.args[0], float(call.attrs["low"]), float(call.attrs["high"]))


def normalize(x: relax.Expr, axes: Sequence[int], eps: float) -> relax.Call:
    """(xhat, mean, var, rstd) of x over ``axes``: var is biased, the statistics keep the reduced axes with size 1.

    The shared core of LayerNorm, GroupNorm and InstanceNorm. Gradients flow through xhat alone.
    """
    return relax.Call(Op.get(NORMALIZE), [x], dict_attrs(axes=[int(a) for a in axes], eps=float(eps)))


def batch_norm(x: relax.Expr, gamma: relax.Expr, beta: relax.Expr, eps: float) -> relax.Call:
    """(y, mean, var, rstd) of x [N, C, ..] with gamma and beta [C]: BatchNorm in training mode; the statistics are [1, C, 1, ..].

    Gradients flow through y alone.
    """
    return relax.Call(Op.get(BATCH_NORM), [x, gamma, beta], dict_attrs(axes=others(x), eps=float(eps)))


def others(x: relax.Expr) -> list[int]:
    """All axes of x [N, C, ..] but the channels'."""
    return [a for a in range(len(x.ty.shape)) if a != 1]


def along_channels(vector: relax.Expr, x: relax.Expr) -> relax.Call:
    """A vector [C] as [1, C, 1, ..], beside x [N, C, ..]."""
    return R.reshape(vector, [1, int(x.ty.shape[1]), *[1] * (len(x.ty.shape) - 2)])


def statistics(x: relax.Expr, axes: Sequence[int], eps: float) -> relax.Call:
    """(mean, var, 1 / sqrt(var + eps)) of x over ``axes``, which stay with size 1; var is biased."""
    return relax.Call(Op.get(STATISTICS), [x], dict_attrs(axes=[int(a) for a in axes], eps=float(eps)))


def gradient_sums(gy: relax.Expr, x: relax.Expr, mean: relax.Expr | None, axes: Sequence[int]) -> relax.Call:
    """(sum of gy, sum of gy * (x - mean)) over ``axes``, which stay with size 1. mean: of that shape; None for 0."""
    args = [gy, x, *([] if mean is None else [mean])]
    return relax.Call(Op.get(GRADIENT_SUMS), args, dict_attrs(axes=[int(a) for a in axes]))


def _fields(bb: relax.BlockBuilder, parts: relax.Expr) -> list[relax.Var]:
    parts = bb.emit(parts)
    return [bb.emit(relax.TupleGetItem(parts, i)) for i in range(len(parts.ty.fields))]


@register_legalize(NORMALIZE)
def expanded_normalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """The statistics, and what is elementwise."""
    x = call.args[0]
    mean, var, rstd = _fields(bb, statistics(x, _axes(call), float(call.attrs["eps"])))
    return relax.Tuple([bb.emit(R.multiply(bb.emit(R.subtract(x, mean)), rstd)), mean, var, rstd])


@register_legalize(BATCH_NORM)
def expanded_batch_norm(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """The statistics, and what is elementwise: x - mean first, as x * scale + shift cancels where the mean is large."""
    x, gamma, beta = call.args
    mean, var, rstd = _fields(bb, statistics(x, _axes(call), float(call.attrs["eps"])))
    xhat = bb.emit(R.multiply(bb.emit(R.subtract(x, mean)), rstd))
    scaled = bb.emit(R.multiply(xhat, bb.emit(along_channels(gamma, x))))
    return relax.Tuple([bb.emit(R.add(scaled, bb.emit(along_channels(beta, x)))), mean, var, rstd])


def expanded_running_batch_norm(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """``R.nn.batch_norm`` with running statistics: (x - mean) * scale + beta, and the statistics as they are."""
    x, gamma, beta, mean, var = call.args
    rstd = bb.emit(R.rsqrt(bb.emit(R.add(var, relax.const(float(call.attrs.epsilon), var.ty.dtype)))))
    scale = bb.emit(along_channels(bb.emit(R.multiply(gamma, rstd)), x))
    centred = bb.emit(R.subtract(x, bb.emit(along_channels(mean, x))))
    y = R.add(bb.emit(R.multiply(centred, scale)), bb.emit(along_channels(beta, x)))
    return relax.Tuple([bb.emit(y), mean, var])


@register_legalize(STATISTICS)
def plain_statistics(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Two passes over x, as PyTorch does: E[x^2] - E[x]^2 cancels where the mean is large."""
    x, axes = call.args[0], _axes(call)
    mean = bb.emit(R.mean(x, axes, keepdims=True))
    centred = bb.emit(R.subtract(x, mean))
    var = bb.emit(R.mean(bb.emit(R.multiply(centred, centred)), axes, keepdims=True))
    return relax.Tuple([mean, var, bb.emit(R.rsqrt(bb.emit(R.add(var, relax.const(float(call.attrs["eps"]), x.ty.dtype)))))])


@register_legalize(GRADIENT_SUMS)
def plain_gradient_sums(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """One sum after the other."""
    gy, x, *mean = call.args
    centred = bb.emit(R.subtract(x, mean[0])) if mean else x
    sums = [bb.emit(R.sum(value, _axes(call), keepdims=True)) for value in (gy, bb.emit(R.multiply(gy, centred)))]
    return relax.Tuple(sums)


def _axes(call: relax.Call) -> list[int]:
    return [int(a) for a in call.attrs["axes"]]


def viewed_conv2d(
    x: relax.Expr,
    w: relax.Expr,
    view: relax.Var,
    channels: relax.Var | None,
    geometry: Mapping[str, Any],
    patch: tuple[int, int] | None = None,
    scaling: str = "unbiased",
) -> relax.Call:
    """conv2d(x, w), differentiated towards ``view`` instead of ``w``: what of the weight is trained, and how (``passes.views``).

    view: [O, k, Kh, Kw], or [O, k, 1, 1] where gradients are filtered; never read. channels: the k input channels of the view
    ([k] int32), None for all. geometry: strides, padding (4), dilation, groups. patch: of gradient filtering, None for exact gradients.
    """
    attrs = dict_attrs(**_plain(geometry), patch=list(patch or ()), scaling=scaling)
    return relax.Call(Op.get(VIEWED_CONV), [x, w, view, *([channels] if channels is not None else [])], attrs)


def viewed_linear(x: relax.Expr, w: relax.Expr, view: relax.Var, channels: relax.Var) -> relax.Call:
    """x [..., I] @ w^T [O, I], differentiated towards ``view`` [O, k]: the columns ``channels`` ([k] int32) of ``w``."""
    return relax.Call(Op.get(VIEWED_LINEAR), [x, w, view, channels], dict_attrs())


def wgrad(x: relax.Expr, gy: relax.Expr, geometry: Mapping[str, Any] | tvm.ir.Attrs, shape: Sequence[int]) -> relax.Call:
    """dW, of ``shape``, of a convolution with ``geometry`` for which x [N, C, H, W] and gy [N, O, Ho, Wo] are given."""
    return relax.Call(Op.get(WGRAD), [x, gy], _geometry(geometry, shape))


def outputs_of(channels: relax.Expr, each: int, bb: relax.BlockBuilder) -> relax.Expr:
    """The output channels [k * each] of the input channels [k] of a depthwise convolution with ``each`` outputs per channel."""
    if each == 1:
        return channels
    count = int(channels.ty.shape[0])
    first = bb.emit(R.reshape(R.multiply(channels, relax.const(each, "int32")), [count, 1]))
    both = bb.emit(R.add(first, relax.const(np.arange(each, dtype="int32")[None])))
    return bb.emit(R.reshape(both, [count * each]))


def chosen(
    x: relax.Expr, g: relax.Expr, channels: relax.Expr, groups: int, bb: relax.BlockBuilder
) -> tuple[relax.Expr, relax.Expr, int]:
    """(x, g, groups) of a wgrad of ``channels`` of x [N, C, ..] alone; in a depthwise convolution each has outputs of its own."""
    if groups > 1:
        g = bb.emit(R.take(g, outputs_of(channels, int(g.ty.shape[1]) // groups, bb), axis=1, mode="clip"))
        groups = int(channels.ty.shape[0])
    return bb.emit(R.take(x, channels, axis=1, mode="clip")), g, groups


def geometry_of(call: relax.Call) -> dict[str, Any]:
    """strides, padding, dilation and groups of a convolution of Relax's or of ours."""
    return _plain(call.attrs)


def _plain(geometry: Mapping[str, Any] | tvm.ir.Attrs) -> dict[str, Any]:
    lists = {key: [int(v) for v in geometry[key]] for key in ("strides", "padding", "dilation")}
    return {**lists, "groups": int(geometry["groups"])}


def packed_type(weight: relax.TensorType, tile: int) -> relax.TensorType:
    """[O, C, Kh, Kw] as [O/tile, C, Kh, Kw, tile]."""
    filters, *rest = (int(d) for d in weight.shape)
    return relax.TensorType([filters // tile, *rest, tile], weight.dtype)


def packed_conv2d(forward: relax.Call, x: relax.Expr, packed: relax.Expr) -> relax.Call:
    """The convolution ``forward`` = ``R.nn.conv2d(x, w)`` with ``packed`` [O/b, C, Kh, Kw, b] in place of w [O, C, Kh, Kw]."""
    return relax.Call(Op.get(PACKED_CONV), [x, packed], _geometry(forward.attrs, forward.ty.shape))


def plain_conv2d(viewed: relax.Call) -> relax.Call:
    """The convolution that a ``viewed_conv2d`` computes."""
    return R.nn.conv2d(viewed.args[0], viewed.args[1], **geometry_of(viewed))


def plain_linear(viewed: relax.Call) -> relax.Call:
    """The product that a ``viewed_linear`` computes."""
    return R.linear(viewed.args[0], viewed.args[1])


register_legalize(VIEWED_CONV, lambda _bb, call: plain_conv2d(call))
register_legalize(VIEWED_LINEAR, lambda _bb, call: plain_linear(call))


def put(x: relax.Expr, index: relax.Expr, values: relax.Expr, axis: int) -> relax.Call:
    """x with ``values`` in the slices ``index`` ([k] int32, no number twice) along ``axis``."""
    return relax.Call(Op.get(PUT), [x, index, values], dict_attrs(axis=axis))


@register_legalize(PUT)
def _legalize_put(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Every place of x is written from that place alone, so that the result may take the place of x."""
    axis = int(call.attrs["axis"])

    def kernel(x: te.Tensor, index: te.Tensor, values: te.Tensor) -> te.Tensor:
        j = te.reduce_axis((0, index.shape[0]), "j")
        none = tirx.const(-1, "int32")
        at = te.compute(
            (x.shape[axis],),
            lambda c: te.max(tirx.Select(index[j] == tirx.Cast(index.dtype, c), tirx.Cast("int32", j), none), axis=[j]),
            name="at",
        )

        def element(*i: tirx.Var) -> tirx.PrimExpr:
            place = at[i[axis]]
            return tirx.if_then_else(place >= 0, values(*i[:axis], tirx.max(place, 0), *i[axis + 1 :]), x(*i))

        return te.compute(x.shape, element, name="put")

    return bb.call_te(kernel, *call.args, primfunc_name_hint="put")


def pack_bits(mask: relax.Expr) -> relax.Call:
    """The numbers of a mask (bool, any shape) as bits: the same places of eight neighbouring rows are one byte, the first the lowest bit.

    A row is a map, the last two axes, or else so many of the last axes that there is a multiple of eight rows: [rows / 8, ..] uint8. Of a
    shape without such rows each number is one: [size / 8, rounded up].
    """
    return relax.Call(Op.get(PACK_BITS), [mask], dict_attrs())


def unpack_bits(bits: relax.Expr, shape: Sequence[int]) -> relax.Call:
    """The mask of ``shape`` that ``pack_bits`` made ``bits`` of."""
    return relax.Call(Op.get(UNPACK_BITS), [bits], dict_attrs(shape=list(shape)))


@register_legalize(PACK_BITS)
def _legalize_pack_bits(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    def kernel(mask: te.Tensor) -> te.Tensor:
        shape = [int(d) for d in mask.shape]
        lead = _outside_of_rows(shape)
        rows = prod(shape[:lead])

        def bit(row: tirx.PrimExpr, place: Sequence[tirx.Var]) -> tirx.PrimExpr:
            inside = tirx.const(True, "bool") if rows % 8 == 0 else row < rows
            number = tirx.Cast("uint8", mask(*_unravelled(row, shape[:lead]), *place))
            return tirx.if_then_else(inside, number, tirx.const(0, "uint8"))

        def byte(group: tirx.Var, *place: tirx.Var) -> tirx.PrimExpr:
            bits = [bit(group * 8 + k, place) << tirx.const(k, "uint8") for k in range(8)]
            return sum(bits[1:], bits[0])

        return te.compute((-(-rows // 8), *shape[lead:]), byte, name="pack_bits")

    return bb.call_te(kernel, *call.args, primfunc_name_hint="pack_bits")


@register_legalize(UNPACK_BITS)
def _legalize_unpack_bits(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    shape = [int(d) for d in call.attrs["shape"]]
    lead = _outside_of_rows(shape)

    def kernel(bits: te.Tensor) -> te.Tensor:
        def number(*index: tirx.Var) -> tirx.PrimExpr:
            row: Any = 0
            for i, size in zip(index[:lead], shape, strict=False):
                row = row * size + i
            shifted = bits(row // 8, *index[lead:]) >> tirx.Cast("uint8", row % 8)
            return (shifted & tirx.const(1, "uint8")) != tirx.const(0, "uint8")

        return te.compute(shape, number, name="unpack_bits")

    return bb.call_te(kernel, *call.args, primfunc_name_hint="unpack_bits")


def _unravelled(place: tirx.PrimExpr, shape: Sequence[int]) -> list[tirx.PrimExpr]:
    """The index in ``shape`` of a place in memory."""
    index = []
    for size in reversed(shape):
        index.append(place % size)
        place = place // size
    return index[::-1]
