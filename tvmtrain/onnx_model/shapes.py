"""ONNX operators that move elements without computing with them. Sizes, axes and indices are static unless said otherwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tvmtrain.onnx_model.node import Node, Value, is_static, tensor, traced


def shape(node: Node, x: torch.Tensor) -> np.ndarray:
    return np.array(tuple(x.shape)[node.get("start", 0) : node.get("end")], dtype=np.int64)


def size(node: Node, x: torch.Tensor) -> np.ndarray:
    return np.array(x.numel(), dtype=np.int64)


def reshape(node: Node, x: torch.Tensor, shape: Value) -> torch.Tensor:
    dims = node.ints(shape, "shape")
    if not node.get("allowzero", 0):
        dims = [x.shape[index] if dim == 0 else dim for index, dim in enumerate(dims)]
    return x.reshape(dims)


def flatten(node: Node, x: torch.Tensor) -> torch.Tensor:
    axis = node.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.permute(node.get("perm", list(reversed(range(x.ndim)))))


def squeeze(node: Node, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
    dims = node.get("axes") if axes is None else node.ints(axes, "axes")
    return x.squeeze() if dims is None else x.squeeze(tuple(dims))


def unsqueeze(node: Node, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
    dims = node.get("axes") if axes is None else node.ints(axes, "axes")
    rank = x.ndim + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


def concat(node: Node, *values: Any) -> torch.Tensor:
    like = traced(*values)
    return torch.cat([tensor(v, like) for v in values], dim=node.get("axis", 1))


def _split_sizes(node: Node, x: torch.Tensor, sizes: Value, axis: int) -> list[int]:
    given = node.get("split") if sizes is None else node.ints(sizes, "split")
    if given is not None:
        return list(given)
    # Equal parts; where they cannot be equal, the last one is smaller.
    length, parts = x.shape[axis], node.get("num_outputs", len(node.outputs))
    part = -(-length // parts)
    return [min(part, length - start) for start in range(0, part * parts, part)]


def split(node: Node, x: torch.Tensor, sizes: Value = None) -> tuple[torch.Tensor, ...]:
    axis = node.get("axis", 0)
    return x.split(_split_sizes(node, x, sizes, axis), dim=axis)


def split_to_sequence(node: Node, x: torch.Tensor, sizes: Value = None) -> list[torch.Tensor]:
    axis = node.get("axis", 0)
    parts = [1] * x.shape[axis] if sizes is None else node.ints(sizes, "split")
    whole = sizes is not None and np.ndim(sizes) == 0
    pieces = list(x.split(parts[0] if whole else parts, dim=axis))
    squeezed = sizes is None and not node.get("keepdims", 1)
    return [piece.squeeze(axis) for piece in pieces] if squeezed else pieces


def sequence_at(node: Node, sequence: list[Any], position: Value) -> Value:
    return sequence[node.ints(position, "position")[0]]


def _slice_operands(node: Node, rank: int, operands: tuple[Value, ...]) -> list[list[int]]:
    """starts, ends, axes, steps: operands since version 10, attributes before."""
    given = [None if v is None else node.ints(v, "slice") for v in operands]
    starts, ends, axes, steps = (*given, None, None, None, None)[:4]
    starts, ends = starts or node.get("starts"), ends or node.get("ends")
    axes = axes or node.get("axes", list(range(len(starts))))
    return [starts, ends, [axis % rank for axis in axes], steps or [1] * len(starts)]


def slice_(node: Node, x: torch.Tensor, *operands: Value) -> torch.Tensor:
    for start, end, axis, step in zip(*_slice_operands(node, x.ndim, operands), strict=True):
        length = x.shape[axis]
        taken = range(*slice(start, end, step).indices(length))
        if step < 0:  # PyTorch has no negative steps: mirrored positions in the mirrored axis.
            x, taken = x.flip(axis), range(length - 1 - taken.start, length - 1 - taken.stop, -step)
        if taken != range(length):
            x = x[(*[slice(None)] * axis, slice(taken.start, taken.stop, taken.step))]
    return x


def _wrapped(indices: Any, length: int) -> Any:
    """Static indices counted from the front; those of a tensor are the model's business."""
    return np.where(indices < 0, indices + length, indices) if isinstance(indices, np.ndarray) else indices


def gather(node: Node, x: Any, indices: Any) -> torch.Tensor:
    like = traced(x, indices)
    x, axis = tensor(x, like), node.get("axis", 0)
    axis %= x.ndim
    indices = _wrapped(indices, x.shape[axis])
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return x.select(axis, int(indices))
    indices = tensor(indices, like)
    if axis == 0 and x.ndim == 2:
        return F.embedding(indices.long(), x)
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


def gather_elements(node: Node, x: Any, indices: Any) -> Value:
    axis = node.get("axis", 0)
    indices = _wrapped(indices, x.shape[axis])
    if is_static([x, indices]):
        return np.take_along_axis(x, indices, axis)
    like = traced(x, indices)
    return torch.gather(tensor(x, like), axis, tensor(indices, like).long())


def expand(node: Node, x: torch.Tensor, shape: Value) -> torch.Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, node.ints(shape, "shape")))


def tile(node: Node, x: torch.Tensor, repeats: Value) -> torch.Tensor:
    return x.repeat(node.ints(repeats, "repeats"))


def _pad_pairs(node: Node, rank: int, pads: list[int], axes: Value) -> list[int]:
    """PyTorch's pads (pairs, last axis first) from ONNX's (all begins, all ends, of the named axes)."""
    named = list(range(rank)) if axes is None else [axis % rank for axis in node.ints(axes, "axes")]
    amounts = {axis: (pads[i], pads[i + len(named)]) for i, axis in enumerate(named)}
    pairs = [amounts.get(axis, (0, 0)) for axis in reversed(range(rank))]
    # Reflection and the like do not pad N and C, so these must not be mentioned.
    while pairs[-1] == (0, 0) and len(pairs) > max(1, rank - 2):
        pairs.pop()
    return [amount for pair in pairs for amount in pair]


def pad(node: Node, x: torch.Tensor, pads: Value = None, value: Value = None, axes: Value = None) -> torch.Tensor:
    amounts = node.get("pads") if pads is None else node.ints(pads, "pads")
    pairs = _pad_pairs(node, x.ndim, amounts, axes)
    if not any(pairs):
        return x
    mode = node.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, pairs, value=node.number(value, node.get("value", 0.0)))
    return F.pad(x, pairs, mode={"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


def depth_to_space(node: Node, x: torch.Tensor) -> torch.Tensor:
    block = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    split = x.reshape(n, block, block, c // block**2, h, w)
    return split.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)


def space_to_depth(node: Node, x: torch.Tensor) -> torch.Tensor:
    block = node.get("blocksize")
    n, c, h, w = x.shape
    split = x.reshape(n, c, h // block, block, w // block, block)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)


def trilu(node: Node, x: torch.Tensor, diagonal: Value = None) -> torch.Tensor:
    offset = 0 if diagonal is None else node.ints(diagonal, "diagonal")[0]
    return x.triu(offset) if node.get("upper", 1) else x.tril(offset)
