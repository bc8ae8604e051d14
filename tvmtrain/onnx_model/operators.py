"""The ONNX operators that can be imported: one table from operator to a small function of PyTorch calls.

A function takes the node and its operands and returns the first output (or a tuple of outputs). Operands are tensors or, where
static, NumPy arrays; nodes whose operands are all static never arrive here (see ``node.fold``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto

from tvmtrain.onnx_model import shapes, windows
from tvmtrain.onnx_model.node import Node, Value, is_static, tensor, traced

Operator: TypeAlias = Callable[..., Any]

TORCH_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}

# Operands that must be static: they say shapes or are attributes in other versions of ONNX. The positions count from zero.
STRUCTURE: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Dropout": (1, 2),
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
    **{f"Reduce{name}": (1,) for name in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")},
}

# --- elementwise --------------------------------------------------------------------------------------------


def _operand(value: Any, other: torch.Tensor) -> Any:
    """A static operand as the simplest thing that gives the same result: a Python number where all its elements are equal."""
    if isinstance(value, torch.Tensor):
        return value
    uniform = value.size and (value == value.flat[0]).all()
    grows = torch.broadcast_shapes(value.shape, other.shape) != other.shape
    return tensor(value, other) if grows or not uniform else value.flat[0].item()


def _pair(a: Any, b: Any) -> tuple[Any, Any]:
    return (_operand(a, b), b) if isinstance(b, torch.Tensor) else (a, _operand(b, a))


def _unary(function: Operator) -> Operator:
    return lambda node, x: function(x)


def _binary(function: Operator) -> Operator:
    return lambda node, a, b: function(*_pair(a, b))


def _variadic(function: Operator) -> Operator:
    """An operator of any number of operands, as a chain of calls with two tensors."""

    def apply(node: Node, *values: Any) -> torch.Tensor:
        like = traced(*values)
        return reduce(function, [tensor(v, like) for v in values])

    return apply


def _divide(node: Node, a: Any, b: Any) -> torch.Tensor:
    like = traced(a, b)
    if like.is_floating_point():
        return _binary(operator.truediv)(node, a, b)
    return torch.div(tensor(a, like), tensor(b, like), rounding_mode="trunc")


def _modulo(node: Node, a: Any, b: Any) -> torch.Tensor:
    return _variadic(torch.fmod if node.get("fmod", 0) else torch.remainder)(node, a, b)


def _where(node: Node, condition: Any, a: Any, b: Any) -> torch.Tensor:
    like = traced(condition, a, b)
    chosen = (tensor(a, like), tensor(b, like)) if is_static([a, b]) else _pair(a, b)
    return torch.where(tensor(condition, like), *chosen)


def _clip(node: Node, x: torch.Tensor, low: Value = None, high: Value = None) -> torch.Tensor:
    """ReLU and ReLU6 are recognised: at a bound their gradient is zero, a clamp's is one."""
    smallest = node.number(low, node.get("min", -math.inf))
    largest = node.number(high, node.get("max", math.inf))
    if smallest == 0 and largest == 6:
        return F.relu6(x)
    # Versions 6 to 10 write "no bound" as the largest float32.
    bounds = [None if abs(bound) > 3.4e38 else bound for bound in (smallest, largest)]
    return F.relu(x) if bounds == [0, None] else x.clamp(*bounds) if bounds != [None, None] else x


def _leaky_relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


def _prelu(node: Node, x: torch.Tensor, slope: Any) -> torch.Tensor:
    slope = tensor(slope, x)
    per_channel = x.ndim > 1 and slope.shape == (x.shape[1], *([1] * (x.ndim - 2)))
    if slope.numel() == 1 or per_channel:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x > 0, x, x * slope)


def _elu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.elu(x, node.get("alpha", 1.0))


def _celu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.celu(x, node.get("alpha", 1.0))


def _selu(node: Node, x: torch.Tensor) -> torch.Tensor:
    if "alpha" not in node.attributes and "gamma" not in node.attributes:
        return F.selu(x)
    return node.get("gamma", 1.0507009873554805) * F.elu(x, node.get("alpha", 1.6732632423543772))


def _hard_sigmoid(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return (alpha * x + beta).clamp(0, 1)


def _gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


def _swish(node: Node, x: torch.Tensor) -> torch.Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def _softmax(function: Operator) -> Operator:
    """Softmax and LogSoftmax; before version 13 they work on the input flattened to two axes."""

    def apply(node: Node, x: torch.Tensor) -> torch.Tensor:
        if node.version >= 13:
            return function(x, dim=node.get("axis", -1))
        axis = node.get("axis", 1) % x.ndim
        return function(x, dim=-1) if axis == x.ndim - 1 else function(x.flatten(axis), dim=-1).reshape(x.shape)

    return apply


def _cast(node: Node, x: torch.Tensor) -> torch.Tensor:
    if node.get("to") not in TORCH_TYPES:
        raise node.unsupported(f"a cast to {TensorProto.DataType.Name(node.get('to'))}")
    return x.to(TORCH_TYPES[node.get("to")])


def _cast_like(node: Node, x: Any, like: Any) -> Value:
    """Stays static where x is: exporters write every constant this way, shapes and zeros of a missing bias among them."""
    if isinstance(x, np.ndarray):
        return x.astype(str(like.dtype).removeprefix("torch."))
    return x.to(tensor(like, x).dtype)


def _dropout(node: Node, x: torch.Tensor, ratio: Value = None, _mode: Value = None) -> torch.Tensor:
    share = node.number(ratio, node.get("ratio", 0.5))
    return F.dropout(x, share, training=True) if node.training else x


# --- linear algebra and normalization -----------------------------------------------------------------------


def _gemm(node: Node, a: Any, b: Any, c: Any = None) -> torch.Tensor:
    like = traced(a, b, c)
    a, b = tensor(a, like), tensor(b, like)
    a = a.t() if node.get("transA", 0) else a
    alpha, beta, transposed = node.get("alpha", 1.0), node.get("beta", 1.0), node.get("transB", 0)
    vector = c is None or (c.ndim == 1 and len(c) == b.shape[0 if transposed else 1])
    if alpha == 1 and beta == 1 and transposed and vector:
        return F.linear(a, b, None if c is None else tensor(c, like))
    product = a @ (b.t() if transposed else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (tensor(c, like) if beta == 1 else beta * tensor(c, like))


def _einsum(node: Node, *values: Any) -> torch.Tensor:
    like = traced(*values)
    return torch.einsum(node.get("equation"), *[tensor(v, like) for v in values])


def _batch_norm(node: Node, x: torch.Tensor, scale: Any, bias: Any, mean: torch.Tensor, var: torch.Tensor) -> tuple:
    """ONNX's momentum is the share of the old value that stays, PyTorch's the share of the new one that enters."""
    if not node.get("spatial", 1):
        raise node.unsupported("BatchNormalization with spatial=0")
    scale, bias = tensor(scale, x), tensor(bias, x)
    momentum, epsilon = 1 - node.get("momentum", 0.9), node.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, var, scale, bias, node.training, momentum, epsilon), mean, var


def _instance_norm(node: Node, x: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
    return F.instance_norm(x, None, None, tensor(scale, x), tensor(bias, x), True, 0.1, node.get("epsilon", 1e-5))


def _fitted(value: Any, shape: torch.Size, like: torch.Tensor) -> torch.Tensor | None:
    """ONNX broadcasts the scale and bias of a layer normalization, PyTorch wants them whole."""
    if value is None:
        return None
    return tensor(value, like) if value.shape == shape else tensor(value, like).expand(shape)


def _layer_norm(node: Node, x: torch.Tensor, scale: Any, bias: Any = None) -> torch.Tensor:
    shape = x.shape[node.get("axis", -1) % x.ndim :]
    return F.layer_norm(x, shape, _fitted(scale, shape, x), _fitted(bias, shape, x), node.get("epsilon", 1e-5))


def _rms_norm(node: Node, x: torch.Tensor, scale: Any) -> torch.Tensor:
    shape = x.shape[node.get("axis", -1) % x.ndim :]
    return F.rms_norm(x, shape, _fitted(scale, shape, x), node.get("epsilon", 1e-5))


def _group_norm(node: Node, x: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
    return F.group_norm(x, node.get("num_groups"), tensor(scale, x), tensor(bias, x), node.get("epsilon", 1e-5))


def _heads(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """[N, L, heads·D] → [N, heads, L, D]."""
    return x if count is None else x.unflatten(-1, (count, -1)).transpose(1, 2)


def _attention(node: Node, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any) -> torch.Tensor:
    if any(value is not None for value in rest) or node.get("softcap", 0.0) or node.get("qk_matmul_output_mode", 0):
        raise node.unsupported("Attention with a cache, a softcap or scores as output")
    q, k, v = _heads(q, node.get("q_num_heads")), _heads(k, node.get("kv_num_heads")), _heads(v, node.get("kv_num_heads"))
    mask = None if mask is None else tensor(mask, q)
    causal, grouped = bool(node.get("is_causal", 0)), q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=node.get("scale"), enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2) if node.get("q_num_heads") is not None else y


# --- reductions ---------------------------------------------------------------------------------------------


def _reduce(function: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Operator:
    """Reductions: the axes are an attribute in old versions, an operand in new ones; none means all."""

    def apply(node: Node, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
        dims = node.get("axes", []) if axes is None else node.ints(axes, "axes")
        if not dims and node.get("noop_with_empty_axes", 0):
            return x
        return function(x, list(dims) or list(range(x.ndim)), bool(node.get("keepdims", 1)))

    return apply


def _product(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    for dim in sorted((d % x.ndim for d in dims), reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _arg(function: Operator) -> Operator:
    def apply(node: Node, x: torch.Tensor) -> torch.Tensor:
        if node.get("select_last_index", 0):
            raise node.unsupported("select_last_index")
        return function(x, dim=node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))

    return apply


def _cumsum(node: Node, x: torch.Tensor, axis: Value) -> torch.Tensor:
    (dim,) = node.ints(axis, "axis")
    y = x.flip(dim) if node.get("reverse", 0) else x
    total = y.cumsum(dim)
    total = total - y if node.get("exclusive", 0) else total
    return total.flip(dim) if node.get("reverse", 0) else total


# --- the table ----------------------------------------------------------------------------------------------

OPERATORS: dict[str, Operator] = {
    # elementwise, one operand
    "Abs": _unary(torch.abs),
    "Ceil": _unary(torch.ceil),
    "Cos": _unary(torch.cos),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "IsNaN": _unary(torch.isnan),
    "Log": _unary(torch.log),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Reciprocal": _unary(torch.reciprocal),
    "Round": _unary(torch.round),
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Sqrt": _unary(torch.sqrt),
    "Tanh": _unary(torch.tanh),
    "Cast": _cast,
    "CastLike": _cast_like,
    # activations
    "Celu": _celu,
    "Clip": _clip,
    "Elu": _elu,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _softmax(F.log_softmax),
    "Mish": _unary(F.mish),
    "PRelu": _prelu,
    "Relu": _unary(F.relu),
    "Selu": _selu,
    "Softmax": _softmax(F.softmax),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Swish": _swish,
    "Dropout": _dropout,
    # elementwise, several operands
    "Add": _binary(operator.add),
    "And": _binary(operator.and_),
    "Div": _divide,
    "Equal": _binary(operator.eq),
    "Greater": _binary(operator.gt),
    "GreaterOrEqual": _binary(operator.ge),
    "Less": _binary(operator.lt),
    "LessOrEqual": _binary(operator.le),
    "Max": _variadic(torch.maximum),
    "Mean": lambda node, *values: _variadic(operator.add)(node, *values) / len(values),
    "Min": _variadic(torch.minimum),
    "Mod": _modulo,
    "Mul": _binary(operator.mul),
    "Or": _binary(operator.or_),
    "Pow": _binary(operator.pow),
    "Sub": _binary(operator.sub),
    "Sum": _variadic(operator.add),
    "Where": _where,
    "Xor": _binary(operator.xor),
    # linear algebra, normalization
    "Attention": _attention,
    "BatchNormalization": _batch_norm,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _variadic(torch.matmul),
    "RMSNormalization": _rms_norm,
    # windows
    "AveragePool": windows.average_pool,
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "GlobalAveragePool": windows.global_average_pool,
    "GlobalMaxPool": windows.global_max_pool,
    "MaxPool": windows.max_pool,
    "Resize": windows.resize,
    "Upsample": windows.upsample,
    # reductions
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": _cumsum,
    "ReduceL1": _reduce(lambda x, dims, keep: x.abs().sum(dims, keep)),
    # The norm's gradient is zero, not NaN, at zero.
    "ReduceL2": _reduce(lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keep)),
    "ReduceLogSum": _reduce(lambda x, dims, keep: x.sum(dims, keep).log()),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, dims, keep: x.square().sum(dims, keep)),
    # shapes
    "Concat": shapes.concat,
    "DepthToSpace": shapes.depth_to_space,
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Gather": shapes.gather,
    "GatherElements": shapes.gather_elements,
    "Pad": shapes.pad,
    "Reshape": shapes.reshape,
    "SequenceAt": shapes.sequence_at,
    "Shape": shapes.shape,
    "Size": shapes.size,
    "Slice": shapes.slice_,
    "SpaceToDepth": shapes.space_to_depth,
    "Split": shapes.split,
    "SplitToSequence": shapes.split_to_sequence,
    "Squeeze": shapes.squeeze,
    "Tile": shapes.tile,
    "Transpose": shapes.transpose,
    "Trilu": shapes.trilu,
    "Unsqueeze": shapes.unsqueeze,
}

# Operators that are evaluated when all their operands are static, and only then.
FOLDED = frozenset({"Constant", "ConstantOfShape", "GatherND", "NonZero", "OneHot", "Range"})

# Operators that are not left to ONNX's reference implementation when all operands are static: it fails for a single row.
SELF_FOLDING = frozenset({"GatherElements"})
