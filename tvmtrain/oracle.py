"""Gradient filtering in PyTorch, written from the paper's equations: what ``verify`` and the tests compare compiled gradients with.

Yang, Li and Marculescu, CVPR 2023, arXiv 2301.00330, with the authors' conventions where the paper is silent (ceil padding before
the map, means over valid places, taps of dilated kernels whole patches apart). Patches are matrices of zeros and ones here, one
row for each patch, so that a sum over patches is a product with it and the broadcast back one with its transpose. Nothing here is
shared with the compiled side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A convolution and its patches; pairs are (rows, columns). ``behind``: padding at the ends, as before the map if not given."""

    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    patch: Pair = (2, 2)
    scaling: str = "unbiased"
    behind: Pair | None = None

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Left, right, top and bottom, as ``F.pad`` takes them."""
        behind = self.behind or self.padding
        return (self.padding[1], behind[1], self.padding[0], behind[0])

    def output(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    def defined(self, size: int, axis: int) -> bool:
        """Whether PyTorch's pooling, of which the authors' code consists, takes these patches along an axis, and dX covers it."""
        places = ceil(self.output(size, axis) / self.patch[axis])
        span = self.patch[axis] * self.stride[axis]
        if places * span < size:
            return False
        try:
            pooled = F.avg_pool1d(torch.zeros(1, 1, size), span, span, ceil((places * span - size) / 2))
        except RuntimeError:  # a border of more than half a patch
            return False
        apart = self.dilation[axis] > 1 and self.dilation[axis] >= self.patch[axis]
        return pooled.shape[-1] == places and not (apart and self.kernel[axis] % 2 == 0)


def members(size: int, patch: int, places: int) -> torch.Tensor:
    """[places, size]: 1 where a place belongs to a patch; the larger half of the border comes first."""
    border = ceil((places * patch - size) / 2)
    owner = (torch.arange(size) + border) // patch
    return (owner[None] == torch.arange(places)[:, None]).double()


class FilteredConv(torch.autograd.Function):
    """conv2d with filtered gradients of x and w, in double precision."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return F.conv2d(F.pad(x, geometry.pads), w, None, geometry.stride, 0, geometry.dilation, geometry.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, w = (t.double() for t in ctx.saved_tensors)
        (gy,) = gradients
        geometry: Geometry = ctx.geometry
        dx, dw = filtered_gradients(x, w, gy.double(), geometry)
        kind = ctx.saved_tensors[0].dtype
        return dx.to(kind), dw.to(kind), None


def filtered_gradients(
    x: torch.Tensor, w: torch.Tensor, gy: torch.Tensor, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dX, dW) of the shapes of x and w."""
    of_y, of_x = [], []
    for axis in (0, 1):
        places = ceil(gy.shape[2 + axis] / geometry.patch[axis])
        of_y.append(members(gy.shape[2 + axis], geometry.patch[axis], places))
        of_x.append(members(x.shape[2 + axis], geometry.patch[axis] * geometry.stride[axis], places))
    # Equation 2: the mean over each patch; x in the same patches, summed.
    mean = [m / m.sum(1, keepdim=True) for m in of_y]
    g = torch.einsum("ph,qw,nohw->nopq", *mean, gy)
    pooled = torch.einsum("ph,qw,nchw->ncpq", *of_x, x)
    if geometry.scaling == "unbiased":
        g = g / (geometry.stride[0] * geometry.stride[1])
    n, groups = len(x), geometry.groups
    g = g.reshape(n, groups, -1, *g.shape[2:])
    pooled = pooled.reshape(n, groups, -1, *pooled.shape[2:])
    # One number for all taps.
    dw = torch.einsum("ngopq,ngipq->goi", g, pooled).reshape(*w.shape[:2], 1, 1).expand(w.shape)
    dx = torch.zeros_like(pooled)
    by_group = w.reshape(groups, -1, *w.shape[1:])
    for u in range(w.shape[2]):
        for v in range(w.shape[3]):
            moved = shifted(shifted(g, -2, apart(geometry, 0, u)), -1, apart(geometry, 1, v))
            dx += torch.einsum("goi,ngopq->ngipq", by_group[..., u, v], moved)
    return torch.einsum("ph,qw,ncpq->nchw", *of_x, dx.reshape(n, -1, *dx.shape[3:])), dw.contiguous()


def apart(geometry: Geometry, axis: int, tap: int) -> int:
    """By how many patches g is moved for a tap: 0 where taps are summed."""
    dilation, patch = geometry.dilation[axis], geometry.patch[axis]
    if dilation == 1 or dilation < patch:
        return 0
    return (tap - geometry.kernel[axis] // 2) * (dilation // patch)


def shifted(g: torch.Tensor, axis: int, by: int) -> torch.Tensor:
    """g moved along an axis, zeros behind it."""
    size = g.shape[axis]
    result = torch.zeros_like(g)
    if abs(by) < size:
        result.narrow(axis, max(by, 0), size - abs(by)).copy_(g.narrow(axis, max(-by, 0), size - abs(by)))
    return result


class Filtered(nn.Module):
    """An ``nn.Conv2d`` trained by filtered gradients; the gradient of its bias is exact."""

    def __init__(self, conv: nn.Conv2d, patch: Pair, scaling: str = "unbiased") -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        kernel, stride, padding, dilation = (
            _pair(value) for value in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        )
        self.geometry = Geometry(kernel, stride, padding, dilation, conv.groups, patch, scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = FilteredConv.apply(x, self.weight, self.geometry)
        return y if self.bias is None else y + self.bias[:, None, None]


class FilteredGradients(TorchFunctionMode):
    """Within it, convolutions with these weights have filtered gradients. ``filters``: weight -> (patch, scaling).

    Zeros that are padded around an image count as the padding of the convolution that reads it.
    """

    def __init__(self, filters: Sequence[tuple[torch.Tensor, Pair, str]]) -> None:
        super().__init__()
        self.filters = {id(weight): (patch, scaling) for weight, patch, scaling in filters}
        # By id of the padded image, which is kept so that no other gets its id.
        self.padded: dict[int, tuple[torch.Tensor, torch.Tensor, Sequence[int]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad:
            result = func(*args, **kwargs)
            self._remember(result, *args, **kwargs)
            return result
        if func is torch.conv2d and id(args[1] if len(args) > 1 else kwargs["weight"]) in self.filters:
            return self._convolution(*args, **kwargs)
        return func(*args, **kwargs)

    def _remember(
        self, result: torch.Tensor, x: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> None:
        if len(pad) == 4 and mode == "constant" and not value:
            self.padded[id(result)] = (result, x, pad)

    def _convolution(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        patch, scaling = self.filters[id(weight)]
        kernel, dilation = (weight.shape[2], weight.shape[3]), _pair(dilation)
        before = behind = _padding(padding, kernel, dilation)
        if id(x) in self.padded:
            _, x, (left, right, top, bottom) = self.padded[id(x)]
            before, behind = (before[0] + top, before[1] + left), (behind[0] + bottom, behind[1] + right)
        geometry = Geometry(kernel, _pair(stride), before, dilation, groups, patch, scaling, behind)
        y = FilteredConv.apply(x, weight, geometry)
        return y if bias is None else y + bias[:, None, None]


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _padding(value: Any, kernel: Pair, dilation: Pair) -> Pair:
    if isinstance(value, str):
        same = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
        return same if value == "same" else (0, 0)
    return _pair(value)
