"""Gradient rules that Relax lacks or gets wrong, and the pass that differentiates a training function with them.

``relax.transform.Gradient`` (TVM 0.27) has rules for 52 operators. Importing this module adds the rest of what CNNs and small
transformers need and replaces the rules that differ from PyTorch: ties (ReLU at 0, ReLU6 at 0 and 6, maximum of equals),
dilated and grouped convolutions. A rule takes (result, call, gradient of the result, builder) and returns one gradient per
argument; ``no_grad`` marks arguments that have none, numbers and shapes among them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from tvm import relax, te, tirx
from tvm.ir import Op
from tvm.relax import op as R
from tvm.relax.op.base import register_gradient

from tvmtrain import filtering, operators, signature
from tvmtrain.sizes import shape_of

Rule = Callable[[relax.Var, relax.Call, relax.Var, relax.BlockBuilder], list[relax.Expr]]

OVERRIDE = 11  # TVM registers its own rules at level 10


def has_rule(op: Op) -> bool:
    """Whether TVM or this module can differentiate an operator."""
    return op.get_attr("FPrimalGradient") is not None


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a gradient rule for operators, over TVM's own where there is one."""

    def register(function: Rule) -> Rule:
        for name in names:
            register_gradient(name, function, OVERRIDE)
        return function

    return register


def elementwise(name: str) -> Callable[[Callable], Callable]:
    """A rule for a unary operator from ``derivative(x, y)``, where y is its result."""

    def register(derivative: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Callable:
        rule(name)(lambda y, call, gy, _: [gy * derivative(call.args[0], y)])
        return derivative

    return register


def _const(value: float, like: relax.Expr) -> relax.Constant:
    return relax.const(value, like.ty.dtype)


def _masked(mask: relax.Expr, gy: relax.Expr) -> relax.Expr:
    return R.where(mask, gy, _const(0, gy))


def _numbers(values: relax.Expr) -> list[int]:
    return [int(v) for v in values]


def _rest_no_grad(call: relax.Call, *gradients: relax.Expr) -> list[relax.Expr]:
    return [*gradients, *(R.grad.no_grad(arg) for arg in call.args[len(gradients) :])]


# ---- elementwise ----


@rule("relax.nn.relu")
def _relu(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    # y > 0 exactly where x > 0: the result, which the next layer keeps anyway, is the mask.
    return [_masked(R.greater(y, _const(0, y)), gy)]


@rule(operators.HARDTANH)
def _hardtanh(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    low, high = (_const(float(call.attrs[key]), y) for key in ("low", "high"))
    return [_masked(R.logical_and(R.greater(y, low), R.less(y, high)), gy)]


@rule("relax.nn.leakyrelu")
def _leaky_relu(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    x = call.args[0]
    return [R.where(R.greater(x, _const(0, x)), gy, gy * _const(float(call.attrs.alpha), gy))]


@rule("relax.clip")
def _clip(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    """torch.clamp passes the gradient at its bounds; hardtanh, an operator of its own, does not."""
    x, low, high = call.args
    inside = R.logical_and(R.greater_equal(x, _const(float(low.value), x)), R.less_equal(x, _const(float(high.value), x)))
    return _rest_no_grad(call, _masked(inside, gy))


@rule("relax.maximum")
def _maximum(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    return _of_two(call, gy, bb, R.greater)


@rule("relax.minimum")
def _minimum(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    return _of_two(call, gy, bb, R.less)


def _of_two(call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder, wins: Callable) -> list[relax.Expr]:
    """The winner takes the gradient; equals take half each, as in PyTorch."""
    x, y = call.args
    half = R.where(R.equal(x, y), gy * _const(0.5, gy), _const(0, gy))
    return [_summed_to(bb, R.where(wins(a, b), gy, half), a) for a, b in ((x, y), (y, x))]


def _summed_to(bb: relax.BlockBuilder, gradient: relax.Expr, target: relax.Expr) -> relax.Expr:
    """The gradient summed over the axes along which ``target`` was broadcast."""
    gradient = bb.normalize(gradient)
    return gradient if shape_of(gradient) == shape_of(target) else R.collapse_sum_to(gradient, target.ty.shape)


@elementwise("relax.abs")
def _abs(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return R.sign(x)


@elementwise("relax.rsqrt")
def _rsqrt(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return _const(-0.5, y) * y * y * y


@elementwise("relax.square")
def _square(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return _const(2, x) * x


@elementwise("relax.erf")
def _erf(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return _const(2 / math.sqrt(math.pi), x) * R.exp(R.negative(x * x))


@elementwise("relax.tan")
def _tan(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return _const(1, y) + y * y


@elementwise("relax.sinh")
def _sinh(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return R.cosh(x)


@elementwise("relax.cosh")
def _cosh(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return R.sinh(x)


@elementwise("relax.atan")
def _atan(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return _const(1, x) / (_const(1, x) + x * x)


@elementwise("relax.asin")
def _asin(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return R.rsqrt(_const(1, x) - x * x)


@elementwise("relax.acos")
def _acos(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    return R.negative(R.rsqrt(_const(1, x) - x * x))


@elementwise("relax.nn.gelu")
def _gelu(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    """Phi(x) + x * phi(x)."""
    cdf = _const(0.5, x) * (_const(1, x) + R.erf(x * _const(math.sqrt(0.5), x)))
    pdf = R.exp(_const(-0.5, x) * x * x) * _const(1 / math.sqrt(2 * math.pi), x)
    return cdf + x * pdf


@elementwise("relax.nn.gelu_tanh")
def _gelu_tanh(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    """y = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    scale = math.sqrt(2 / math.pi)
    t = R.tanh(_const(scale, x) * (x + _const(0.044715, x) * x * x * x))
    inner = _const(scale, x) * (_const(1, x) + _const(3 * 0.044715, x) * x * x)
    return _const(0.5, x) * (_const(1, x) + t + x * (_const(1, x) - t * t) * inner)


def _no_gradient(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return [R.grad.no_grad(arg) for arg in call.args]


rule("relax.floor", "relax.ceil", "relax.round", "relax.sign", "relax.trunc", "relax.argmax", "relax.argmin")(_no_gradient)
rule("relax.grad.no_grad")(_no_gradient)
rule("relax.isnan", "relax.isinf", "relax.isfinite")(_no_gradient)
rule("relax.logical_and", "relax.logical_or", "relax.logical_not", "relax.one_hot", "relax.floor_divide")(_no_gradient)
rule("relax.bitwise_and", "relax.bitwise_or", "relax.bitwise_xor", "relax.bitwise_not")(_no_gradient)


@rule("relax.astype")
def _astype(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    """Numbers that have been whole or true in between have no gradient; TVM's rule casts theirs back."""
    source = call.args[0].ty.dtype
    if not all(str(dtype).startswith(("float", "bfloat")) for dtype in (source, y.ty.dtype)):
        return [R.grad.no_grad(call.args[0])]
    return [R.astype(gy, source)]


@rule("relax.where")
def _where(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """TVM's rule forgets that the two values may have been broadcast."""
    mask, a, b = call.args
    taken = _summed_to(bb, R.where(mask, gy, _const(0, gy)), a)
    return [R.grad.no_grad(mask), taken, _summed_to(bb, R.where(mask, _const(0, gy), gy), b)]


@rule("relax.atan2")
def _atan2(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    a, b = call.args
    scaled = gy / (a * a + b * b)
    return [_summed_to(bb, scaled * b, a), _summed_to(bb, R.negative(scaled * a), b)]


# ---- shapes ----


@rule("relax.expand_dims", "relax.squeeze", "relax.flatten")
def _reshaped(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return _rest_no_grad(call, R.reshape(gy, call.args[0].ty.shape))


@rule("relax.strided_slice")
def _strided_slice(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """The gradient put back where it was cut out, zeros elsewhere."""
    shape = shape_of(call.args[0])
    axes, begin, _end = (_numbers(arg) for arg in call.args[1:4])
    steps = _numbers(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    first, step = [0] * len(shape), [1] * len(shape)
    for axis, b, s in zip(axes, begin, steps, strict=True):
        axis %= len(shape)
        step[axis] = s
        first[axis] = min(max(b + shape[axis] if b < 0 else b, 0), shape[axis])
    put = functools.partial(_put_back, shape=shape, first=first, step=step)
    return _rest_no_grad(call, bb.call_te(put, gy, primfunc_name_hint="slice_backward"))


def _put_back(gy: te.Tensor, shape: Sequence[int], first: Sequence[int], step: Sequence[int]) -> te.Tensor:
    def element(*index: tirx.Var) -> tirx.PrimExpr:
        offsets = [i - b for i, b in zip(index, first, strict=True)]
        inside = [tirx.all(o >= 0, o // s < n, o % s == 0) for o, s, n in zip(offsets, step, gy.shape, strict=True)]
        value = gy(*(o // s for o, s in zip(offsets, step, strict=True)))
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, gy.dtype))

    return te.compute(tuple(shape), element, name="slice_backward")


@rule("relax.nn.pad")
def _pad(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    widths = [int(w) for w in call.attrs.pad_width]
    if str(call.attrs.pad_mode) != "constant":
        raise NotImplementedError(f"gradient of padding mode {call.attrs.pad_mode}")
    shape = shape_of(call.args[0])
    before = widths[0::2]
    # A negative width crops: what was cropped gets zeros back.
    axes = list(range(len(shape)))
    cut = R.strided_slice(
        gy,
        axes,
        [max(b, 0) for b in before],
        [max(b, 0) + n + min(b, 0) + min(a, 0) for b, a, n in zip(before, widths[1::2], shape, strict=True)],
    )
    if all(w >= 0 for w in widths):
        return _rest_no_grad(call, cut)
    back = [max(-w, 0) for w in widths]
    return _rest_no_grad(call, R.nn.pad(cut, back))


@rule("relax.flip")
def _flip(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return [R.flip(gy, call.attrs.axis)]


@rule("relax.tile")
def _tile(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    shape = shape_of(call.args[0])
    full = [1] * (len(shape_of(y)) - len(shape)) + shape
    split = [part for n, total in zip(full, shape_of(y), strict=True) for part in (total // n, n)]
    summed = R.sum(R.reshape(gy, split), list(range(0, len(split), 2)))
    return _rest_no_grad(call, R.reshape(summed, shape))


@rule("relax.repeat")
def _repeat(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    shape, times = shape_of(call.args[0]), int(call.attrs.repeats)
    axis = int(call.attrs.axis) % len(shape)
    split = [*shape[: axis + 1], times, *shape[axis + 1 :]]
    return _rest_no_grad(call, R.sum(R.reshape(gy, split), [axis + 1]))


@rule("relax.tril")
def _tril(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return _rest_no_grad(call, R.tril(gy, call.args[1]))


@rule("relax.triu")
def _triu(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return _rest_no_grad(call, R.triu(gy, call.args[1]))


@rule("relax.gather_elements")
def _gather_elements(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    x, index = call.args
    zeros = R.zeros(x.ty.shape, x.ty.dtype)
    return [R.scatter_elements(zeros, index, gy, int(call.attrs.axis), "add"), R.grad.no_grad(index)]


@rule("relax.scatter_elements")
def _scatter_elements(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    """x[index] += values, or = values: what is overwritten has no gradient."""
    index, axis, kind = call.args[1], int(call.attrs.axis), str(call.attrs.reduction)
    if kind not in ("add", "update"):
        raise NotImplementedError(f"gradient of scattering by {kind}")
    kept = gy if kind == "add" else R.scatter_elements(gy, index, R.zeros(call.args[2].ty.shape, gy.ty.dtype), axis)
    return [kept, R.grad.no_grad(index), R.gather_elements(gy, index, axis)]


@rule("relax.take")
def _take(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    """TVM's take_backward wants one axis of indices."""
    x, index = call.args
    axis = int(call.attrs.axis) % len(shape_of(x)) if call.attrs.axis is not None else None
    if axis is None:
        raise NotImplementedError("gradient of take without an axis")
    count = math.prod(shape_of(index))
    flat_gy = R.reshape(gy, [*shape_of(x)[:axis], count, *shape_of(x)[axis + 1 :]])
    return [R.grad.take_backward(flat_gy, x, R.reshape(index, [count]), axis), R.grad.no_grad(index)]


# ---- reductions ----


def _kept(call: relax.Call) -> list[int]:
    """The shape of a reduction's result with the reduced axes kept."""
    shape = shape_of(call.args[0])
    axes = range(len(shape)) if call.attrs.axis is None else [int(a) % len(shape) for a in call.attrs.axis]
    return [1 if a in set(axes) else d for a, d in enumerate(shape)]


@rule("relax.sum")
def _sum(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return [R.broadcast_to(R.reshape(gy, _kept(call)), call.args[0].ty.shape)]


@rule("relax.mean")
def _mean(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    kept = _kept(call)
    count = math.prod(shape_of(call.args[0])) // math.prod(kept)
    return [R.broadcast_to(R.reshape(gy / _const(count, gy), kept), call.args[0].ty.shape)]


@rule("relax.max", "relax.min")
def _extreme(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    """Shared evenly among ties, as torch.amax does."""
    x, kept = call.args[0], _kept(call)
    hit = R.equal(x, R.reshape(y, kept))
    count = R.sum(R.astype(hit, x.ty.dtype), call.attrs.axis, keepdims=True)
    share = R.broadcast_to(R.reshape(gy, kept) / count, x.ty.shape)
    return [R.where(hit, share, _const(0, x))]


# ---- linear algebra ----


@rule("relax.matmul")
def _matmul(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """dA = G B^T, dB = A^T G. Where B is one matrix for many, dB is one product over all rows, not a sum of many."""
    a, b = call.args
    rank_a, rank_b = len(shape_of(a)), len(shape_of(b))
    if rank_a == 1 or rank_b == 1:
        return _matmul_with_vector(call, gy)
    da = R.matmul(gy, _swap(b))
    if rank_b == 2 and rank_a > 2:
        rows = math.prod(shape_of(a)[:-1])
        flat_a, flat_g = R.reshape(a, [rows, shape_of(a)[-1]]), R.reshape(gy, [rows, shape_of(b)[-1]])
        db = R.matmul(_swap(bb.normalize(flat_a)), flat_g)
    else:
        db = R.matmul(_swap(a), gy)
    return [_summed_to(bb, da, a), _summed_to(bb, db, b)]


def _swap(x: relax.Expr) -> relax.Expr:
    rank = len(shape_of(x))
    return R.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2])


def _matmul_with_vector(call: relax.Call, gy: relax.Var) -> list[relax.Expr]:
    """A vector is a row on the left and a column on the right; other axes of the other operand count many products."""
    a, b = call.args
    if len(shape_of(a)) == len(shape_of(b)) == 1:
        return [gy * b, gy * a]
    if len(shape_of(b)) == 1:
        column = R.expand_dims(gy, -1)
        return [column * b, R.sum(column * a, list(range(len(shape_of(a)) - 1)))]
    others = list(range(len(shape_of(b)) - 2))
    row = R.expand_dims(gy, -2)
    return [R.sum(row * b, [*others, len(shape_of(b)) - 1]), R.expand_dims(a, 1) * row]


# ---- neural networks ----


@rule("relax.nn.conv2d")
def _conv2d(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return [operators.conv2d_dgrad(call, gy), operators.conv2d_wgrad(call, gy)]


@rule(operators.VIEWED_CONV)
def _viewed_conv2d(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """dX is exact; dW is that of the view's channels of x alone (Li and Chang, 2024; Lin et al., 2022, section 3.2).

    With patches, both are those of ``filtering``.
    """
    x, _, view, *channels = call.args
    if len(call.attrs["patch"]):
        dx, dview = filtering.gradients(call, gy, bb)
        return _rest_no_grad(call, dx, R.grad.no_grad(call.args[1]), dview)
    plain = operators.plain_conv2d(call)
    dx, groups = operators.conv2d_dgrad(plain, gy), int(call.attrs["groups"])
    kept, g, groups = operators.chosen(x, gy, channels[0], groups, bb) if channels else (x, gy, groups)
    dview = operators.wgrad(kept, g, {**operators.geometry_of(call), "groups": groups}, shape_of(view))
    return _rest_no_grad(call, dx, R.grad.no_grad(call.args[1]), dview)


@rule(operators.VIEWED_LINEAR)
def _viewed_linear(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """dX is exact; dW is that of the view's columns: G^T @ x[..., channels]."""
    x, w, _, channels = call.args
    rows, width = math.prod(shape_of(x)[:-1]), shape_of(channels)[0]
    kept = R.reshape(bb.emit(R.take(x, channels, axis=len(shape_of(x)) - 1, mode="clip")), [rows, width])
    dview = R.matmul(_swap(bb.normalize(R.reshape(gy, [rows, shape_of(gy)[-1]]))), kept)
    return _rest_no_grad(call, R.matmul(gy, w), R.grad.no_grad(w), dview)


@rule(operators.DGRAD)
def _dgrad(y: relax.Var, call: relax.Call, g: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    """A transposed convolution is a dgrad: its own gradients are the convolution and the wgrad."""
    attrs = call.attrs
    forward = R.nn.conv2d(
        g,
        call.args[1],
        strides=_numbers(attrs["strides"]),
        padding=_numbers(attrs["padding"]),
        dilation=_numbers(attrs["dilation"]),
        groups=int(attrs["groups"]),
    )
    return [forward, operators.dgrad_wgrad(call, g)]


@rule(operators.NORMALIZE)
def _normalize(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) over the normalized axes (Ioffe and Szegedy, 2015, section 3)."""
    axes = _numbers(call.attrs["axes"])
    g, xhat, rstd = (bb.emit(relax.TupleGetItem(t, i)) for t, i in ((gy, 0), (y, 0), (y, 3)))
    total, along = _gradient_sums(bb, g, xhat, None, axes)
    share = _const(1 / _count(xhat, total), xhat)
    return [rstd * (g - share * total - xhat * (share * along))]


@rule(operators.BATCH_NORM)
def _batch_norm(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """dx = gamma * rstd * (g - mean(g) - (x - mean) * rstd^2 * mean(g * (x - mean))); gamma's gradient is of the same sums.

    beta's gradient is a sum of its own here: where beta alone is trained, x is not kept. Where it is, ``passes.expand_norms`` finds it.
    """
    x, gamma, _beta = call.args
    g, mean, rstd = (bb.emit(relax.TupleGetItem(t, i)) for t, i in ((gy, 0), (y, 1), (y, 3)))
    total, along = _gradient_sums(bb, g, x, mean, operators.others(x))
    share = _const(1 / _count(x, total), x)
    slope = rstd * rstd * (share * along)
    dx = (g - share * total - (x - mean) * slope) * (operators.along_channels(gamma, x) * rstd)
    return [dx, R.reshape(along * rstd, gamma.ty.shape), R.sum(g, operators.others(x))]


@rule("relax.nn.batch_norm")
def _running_batch_norm(y: relax.Var, call: relax.Call, gy: relax.Var, bb: relax.BlockBuilder) -> list[relax.Expr]:
    """BatchNorm with running statistics: an affine map per channel (axis 1)."""
    x, gamma, _beta, mean, var = call.args
    g = bb.emit(relax.TupleGetItem(gy, 0))
    rstd = bb.emit(R.rsqrt(var + _const(float(call.attrs.epsilon), var)))
    centre = bb.emit(operators.along_channels(mean, x))
    _, along = _gradient_sums(bb, g, x, centre, operators.others(x))
    dx = g * operators.along_channels(gamma * rstd, x)
    return _rest_no_grad(call, dx, R.reshape(along, gamma.ty.shape) * rstd, R.sum(g, operators.others(x)))


def _gradient_sums(
    bb: relax.BlockBuilder, g: relax.Expr, x: relax.Expr, mean: relax.Expr | None, axes: Sequence[int]
) -> tuple[relax.Expr, relax.Expr]:
    sums = bb.emit(operators.gradient_sums(g, x, mean, axes))
    return bb.emit(relax.TupleGetItem(sums, 0)), bb.emit(relax.TupleGetItem(sums, 1))


def _count(x: relax.Expr, total: relax.Expr) -> int:
    """How many numbers of x each of the sums is made of."""
    return math.prod(shape_of(x)) // math.prod(shape_of(total))


@rule("relax.nn.log_softmax")
def _log_softmax(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return [gy - R.sum(gy, [int(call.attrs.axis)], keepdims=True) * R.exp(y)]


@rule("relax.nn.softmax")
def _softmax(y: relax.Var, call: relax.Call, gy: relax.Var, _: relax.BlockBuilder) -> list[relax.Expr]:
    return [(gy - R.sum(gy * y, [int(call.attrs.axis)], keepdims=True)) * y]


def reaching(forward: relax.Function) -> set[str]:
    """Names of the parameters from which a differentiable path leads to the loss; PyTorch gives the others no gradient."""
    needed = _needed(forward)
    return {name for name, var in signature.parameters(forward).items() if var in needed}


def without_rule(forward: relax.Function, trained: set[str]) -> list[relax.Var]:
    """Bindings on a path from a parameter in ``trained`` to the loss whose operator cannot be differentiated."""
    variables = signature.parameters(forward)
    tracked, needed = {variables[name] for name in trained}, _needed(forward)
    missing = []
    for binding in forward.body.blocks[0].bindings:
        value = binding.value
        if _passes(binding) and any(used in tracked for used in relax.analysis.free_vars(value)):
            tracked.add(binding.var)
            if binding.var in needed and isinstance(value, relax.Call) and not _differentiable(value):
                missing.append(binding.var)
    return missing


def _needed(forward: relax.Function) -> set[relax.Var]:
    """All variables that the loss depends on through differentiable bindings."""
    needed = {forward.body.body.fields[0]}
    for binding in reversed(forward.body.blocks[0].bindings):
        if binding.var in needed and _passes(binding):
            needed |= set(relax.analysis.free_vars(binding.value))
    return needed


def _passes(binding: relax.VarBinding) -> bool:
    """Whether a gradient could pass: not through a stop, nor through what is no real number."""
    ty = binding.var.ty
    return not stops(binding.value) and (not isinstance(ty, relax.TensorType) or str(ty.dtype).startswith("float"))


def stops(value: relax.Expr) -> bool:
    """Whether no gradient passes this binding."""
    return isinstance(value, relax.Call) and value.op == Op.get("relax.grad.no_grad")


def _differentiable(call: relax.Call) -> bool:
    return isinstance(call.op, Op) and (stops(call) or has_rule(call.op))
