"""ONNX operators that slide a window or resample: convolutions, pooling, Resize. Activations are [N, C, spatial...]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F

from tvmtrain.onnx_model.node import Node, Value, tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda positions: np.ceil(positions - 0.5),
    "round_prefer_ceil": lambda positions: np.floor(positions + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@dataclass(frozen=True)
class Window:
    """The windows of one node: one entry per spatial axis in each field, in elements."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """How many input elements a window spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def torch_can_pool(self) -> bool:
        """PyTorch's pooling takes one padding per axis, of at most half the window."""
        return self.begin == self.end and all(2 * p <= k for p, k in zip(self.begin, self.kernel, strict=True))


def _same_pads(node: Node, sizes: tuple[int, ...], extents: list[int], strides: list[int]) -> list[int]:
    totals = [max((-(-n // s) - 1) * s + e - n, 0) for n, e, s in zip(sizes, extents, strides, strict=True)]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return small + large if node.get("auto_pad") == "SAME_UPPER" else large + small


def _window(node: Node, x: torch.Tensor, kernel: tuple[int, ...]) -> Window:
    axes = len(kernel)
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    pads = [0] * (2 * axes)
    if node.get("auto_pad", "NOTSET") == "NOTSET":
        pads = node.get("pads", pads)
    elif node.get("auto_pad") != "VALID":
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = _same_pads(node, tuple(x.shape[2:]), extents, strides)
    return Window(tuple(kernel), tuple(strides), tuple(dilations), tuple(pads[:axes]), tuple(pads[axes:]))


def pad_spatial(x: torch.Tensor, begin: tuple[int, ...], end: tuple[int, ...], value: float = 0.0) -> torch.Tensor:
    """Pad (or, where negative, crop) the trailing axes; nothing is traced where there is nothing to do."""
    if not any((*begin, *end)):
        return x
    pairs = [amount for pair in zip(reversed(begin), reversed(end), strict=True) for amount in pair]
    return F.pad(x, pairs, value=value)


def _bias(b: Value, like: torch.Tensor) -> torch.Tensor | None:
    """The bias, or None where exporters write constant zeros for a convolution that has none."""
    if b is None or (isinstance(b, np.ndarray) and not b.any()):
        return None
    return tensor(b, like)


def conv(node: Node, x: torch.Tensor, w: Value, b: Value = None) -> torch.Tensor:
    w = tensor(w, x)
    window = _window(node, x, tuple(w.shape[2:]))
    padding = window.begin
    if window.begin != window.end:
        x, padding = pad_spatial(x, window.begin, window.end), (0,) * len(window.begin)
    return CONV[w.ndim - 2](x, w, _bias(b, x), window.strides, padding, window.dilations, node.get("group", 1))


def _transposed_pads(node: Node, x: torch.Tensor, window: Window, extra: list[int]) -> tuple[list[int], list[int]]:
    """What ConvTranspose cuts from its full result: ``output_shape`` and SAME say the result's size instead of the pads."""
    wanted = node.get("output_shape")
    upper = node.get("auto_pad") == "SAME_UPPER"
    if wanted is None and node.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        return list(window.begin), list(window.end)
    if wanted is None:
        wanted = [n * s for n, s in zip(x.shape[2:], window.strides, strict=True)]
    full = [(n - 1) * s + e + o for n, s, e, o in zip(x.shape[2:], window.strides, window.extents, extra, strict=True)]
    totals = [f - n for f, n in zip(full, wanted[-len(full) :], strict=True)]
    if min(totals) < 0:
        raise node.unsupported(f"an output_shape larger than the full result {full}")
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (small, large) if upper else (large, small)


def conv_transpose(node: Node, x: torch.Tensor, w: Value, b: Value = None) -> torch.Tensor:
    w = tensor(w, x)
    # In a transposed convolution pads are cut from the result, so SAME is resolved from the result's size below.
    window = _window(node, x, tuple(w.shape[2:]))
    extra = node.get("output_padding", [0] * len(window.kernel))
    begin, end = _transposed_pads(node, x, window, extra)
    operator, group = CONV_TRANSPOSE[w.ndim - 2], node.get("group", 1)
    if begin == end:
        return operator(x, w, _bias(b, x), window.strides, begin, extra, group, window.dilations)
    full = operator(x, w, _bias(b, x), window.strides, 0, extra, group, window.dilations)
    return pad_spatial(full, tuple(-p for p in begin), tuple(-p for p in end))


def _pooled_sizes(window: Window, sizes: tuple[int, ...], ceil: bool) -> list[int]:
    results = []
    for n, e, s, p, q in zip(sizes, window.extents, window.strides, window.begin, window.end, strict=True):
        span = n + p + q - e
        size = (-(-span // s) if ceil else span // s) + 1
        # A last window that would start behind the data is dropped.
        results.append(size - 1 if ceil and (size - 1) * s >= n + p else size)
    return results


def _pool_padded(window: Window, x: torch.Tensor, ceil: bool, value: float) -> tuple[torch.Tensor, list[int]]:
    """The input padded so that whole windows fit, and the pooled sizes."""
    sizes = _pooled_sizes(window, tuple(x.shape[2:]), ceil)
    fields = zip(sizes, window.strides, window.extents, x.shape[2:], window.begin, strict=True)
    end = tuple((size - 1) * s + e - n - p for size, s, e, n, p in fields)
    return pad_spatial(x, window.begin, end, value), sizes


def _taps(window: Window, sizes: tuple[int, ...], pooled: list[int], include_pad: bool) -> np.ndarray:
    """How many elements each window averages over, [pooled sizes]."""
    counts = []
    for n, size, k, s, p, q in zip(sizes, pooled, window.kernel, window.strides, window.begin, window.end, strict=True):
        starts = np.arange(size) * s - p
        low, high = (-p, n + q) if include_pad else (0, n)
        counts.append(np.minimum(starts + k, high) - np.maximum(starts, low))
    return reduce(np.multiply.outer, counts)


def average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    window = _window(node, x, tuple(node.get("kernel_shape")))
    ceil, include_pad = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    if set(window.dilations) != {1}:
        raise node.unsupported("a dilated AveragePool")
    operator = AVERAGE[x.ndim - 2]
    if window.torch_can_pool:
        return operator(x, window.kernel, window.strides, window.begin, ceil, include_pad)
    padded, pooled = _pool_padded(window, x, ceil, 0.0)
    taps = _taps(window, tuple(x.shape[2:]), pooled, include_pad)
    # Windows over zeros were divided by the whole window; this corrects to the elements that count.
    share = (math.prod(window.kernel) / taps).astype(np.float32)
    y = operator(padded, window.kernel, window.strides)
    return y if (share == 1).all() else y * tensor(share, x).to(x.dtype)


def max_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    window = _window(node, x, tuple(node.get("kernel_shape")))
    ceil, operator = bool(node.get("ceil_mode", 0)), MAXIMUM[x.ndim - 2]
    if window.torch_can_pool:
        return operator(x, window.kernel, window.strides, window.begin, window.dilations, ceil)
    padded, _ = _pool_padded(window, x, ceil, -math.inf)
    return operator(padded, window.kernel, window.strides, 0, window.dilations)


def global_average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def global_max_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.amax(dim=list(range(2, x.ndim)), keepdim=True)


@dataclass(frozen=True)
class Axis:
    """One resized axis: for each of ``size`` results, the fractional position in the input of ``length`` elements."""

    index: int
    length: int
    size: int
    positions: np.ndarray


def _positions(mode: str, length: int, size: int, scale: float) -> np.ndarray:
    """ONNX's ``coordinate_transformation_mode``."""
    x = np.arange(size, dtype=np.float64)
    if mode == "align_corners" or (mode == "pytorch_half_pixel" and size == 1):
        return x * (length - 1) / max(size - 1, 1)
    if mode == "asymmetric":
        return x / scale
    half_pixel = (x + 0.5) / scale - 0.5
    return half_pixel + length / 2 * (1 - size / (length * scale)) if mode == "half_pixel_symmetric" else half_pixel


def _resized_axes(node: Node, x: torch.Tensor, scales: Value, sizes: Value) -> list[Axis]:
    """The axes whose size or positions change."""
    axes = [axis % x.ndim for axis in node.get("axes", range(x.ndim))]
    if sizes is not None:
        targets = node.ints(sizes, "sizes")
        factors = [size / x.shape[axis] for size, axis in zip(targets, axes, strict=True)]
    elif isinstance(scales, np.ndarray):
        factors = [float(f) for f in scales]
        targets = [math.floor(x.shape[axis] * f) for f, axis in zip(factors, axes, strict=True)]
    else:
        raise node.unsupported("a size that depends on the input's values")
    # Before version 11 there was one transformation, today's "asymmetric".
    mode = node.get("coordinate_transformation_mode", "half_pixel") if node.version >= 11 else "asymmetric"
    if mode == "tf_crop_and_resize":
        raise node.unsupported(mode)
    changed = [(axis, x.shape[axis], size, f) for axis, size, f in zip(axes, targets, factors, strict=True) if f != 1]
    return [Axis(axis, length, size, _positions(mode, length, size, f)) for axis, length, size, f in changed]


def _nearest(node: Node, x: torch.Tensor, axes: list[Axis]) -> torch.Tensor:
    rounding = node.get("nearest_mode", "round_prefer_floor") if node.version >= 11 else "floor"
    taken = [np.clip(ROUNDINGS[rounding](axis.positions), 0, axis.length - 1).astype(np.int64) for axis in axes]
    usual = [np.arange(axis.size) * axis.length // axis.size for axis in axes]
    if _is_spatial(x, axes) and all(map(np.array_equal, taken, usual)):
        return F.interpolate(x, _sizes(x, axes), mode="nearest")
    for axis, indices in zip(axes, taken, strict=True):
        x = x.index_select(axis.index, tensor(indices, x))
    return x


def _is_spatial(x: torch.Tensor, axes: list[Axis]) -> bool:
    return x.ndim - 2 in LINEAR_MODES and all(axis.index >= 2 for axis in axes)


def _sizes(x: torch.Tensor, axes: list[Axis]) -> list[int]:
    changed = {axis.index: axis.size for axis in axes}
    return [changed.get(index, int(n)) for index, n in enumerate(x.shape)][2:]


def _torch_corners(axes: list[Axis]) -> bool | None:
    """The ``align_corners`` with which F.interpolate reads the same positions; None where neither does."""
    for corners in (False, True):
        mode = "align_corners" if corners else "half_pixel"
        usual = [_positions(mode, axis.length, axis.size, axis.size / axis.length) for axis in axes]
        if all(np.allclose(axis.positions, u, atol=1e-9) for axis, u in zip(axes, usual, strict=True)):
            return corners
    return None


def _linear(node: Node, x: torch.Tensor, axes: list[Axis]) -> torch.Tensor:
    corners = _torch_corners(axes)
    if _is_spatial(x, axes) and corners is not None:
        return F.interpolate(x, _sizes(x, axes), mode=LINEAR_MODES[x.ndim - 2], align_corners=corners)
    for axis in axes:
        positions = np.clip(axis.positions, 0, axis.length - 1)
        low = np.floor(positions).astype(np.int64)
        shape = [-1 if index == axis.index else 1 for index in range(x.ndim)]
        weight = tensor((positions - low).astype(np.float32).reshape(shape), x).to(x.dtype)
        left = x.index_select(axis.index, tensor(low, x))
        right = x.index_select(axis.index, tensor(np.minimum(low + 1, axis.length - 1), x))
        x = left + (right - left) * weight
    return x


def _cubic(node: Node, x: torch.Tensor, axes: list[Axis]) -> torch.Tensor:
    corners = _torch_corners(axes)
    plain = math.isclose(node.get("cubic_coeff_a", -0.75), -0.75) and not node.get("exclude_outside", 0)
    if x.ndim != 4 or not _is_spatial(x, axes) or corners is None or not plain:
        raise node.unsupported("this form of cubic interpolation")
    return F.interpolate(x, _sizes(x, axes), mode="bicubic", align_corners=corners)


def _resample(node: Node, x: torch.Tensor, scales: Value, sizes: Value) -> torch.Tensor:
    if node.get("antialias", 0) or node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.unsupported("antialias or keep_aspect_ratio_policy")
    axes = _resized_axes(node, x, scales, sizes)
    modes = {"nearest": _nearest, "linear": _linear, "cubic": _cubic}
    return modes[node.get("mode", "nearest")](node, x, axes) if axes else x


def resize(node: Node, x: torch.Tensor, *operands: Value) -> torch.Tensor:
    # Version 10 has (x, scales); from 11 on it is (x, roi, scales, sizes), of which exporters leave unused ones empty.
    if node.version < 11:
        return _resample(node, x, operands[0], None)
    _, scales, sizes = (*operands, None, None, None)[:3]
    empty = isinstance(scales, np.ndarray) and scales.size == 0
    return _resample(node, x, None if empty else scales, sizes)


def upsample(node: Node, x: torch.Tensor, scales: Value = None) -> torch.Tensor:
    return _resample(node, x, np.asarray(node.get("scales")) if scales is None else scales, None)
