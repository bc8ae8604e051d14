"""Train the chosen input channels of a weight alone: dW is made from the gathered channels of x, and they alone are kept.

    y = conv2d(x, w)   -->   y = viewed_conv2d(x, w, view, channels);   dview = wgrad(take(x, channels), dy)

Dynamic gradient sparse update (Li and Chang, ISCAS 2024, arXiv 2503.17959) and the sub-layer scheme of MCUNetV3 (Lin et al., 2022,
section 3.2). Which channels: a run-time input, ("channels", weight name), so that another choice compiles nothing. dX stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import operators
from tvmtrain.errors import PlanError
from tvmtrain.passes import views


@module_pass(opt_level=0, name="SparseUpdate")
@dataclass(frozen=True)
class SparseUpdate:
    """counts: weight name -> how many of its input channels (channels, for a depthwise convolution) are trained in a step."""

    counts: Mapping[str, int]

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        return viewed(mod, self.counts)


def viewed(mod: tvm.IRModule, counts: Mapping[str, int]) -> tvm.IRModule:
    """The pass as a function. Raises PlanError, which TVM would turn into a RuntimeError on its way out of a pass."""

    def change(reader: views.Reader) -> relax.Call:
        count, view, channels = counts[reader.name], reader.view, reader.channels
        if channels is None:
            channels = relax.Var(f"channels_{reader.name}", relax.TensorType([count], "int32"))
            view = relax.Var(f"view_{reader.name}", relax.TensorType(_shape(reader, count), reader.weight.ty.dtype))
        if reader.kind == "linear":
            return operators.viewed_linear(reader.x, reader.weight, view, channels)
        return operators.viewed_conv2d(reader.x, reader.weight, view, channels, operators.geometry_of(reader.call))

    return views.rewrite(mod, counts, change)


def _shape(reader: views.Reader, count: int) -> list[int]:
    """The view's: [O, k], [O, k, Kh, Kw], or [k * m, 1, Kh, Kw] of a depthwise convolution with m filters per channel."""
    filters, each, *kernel = (int(d) for d in reader.weight.ty.shape)
    if reader.kind == "linear":
        return [filters, count]
    groups = operators.geometry_of(reader.call)["groups"]
    channels = int(reader.x.ty.shape[1])
    if groups == 1:
        return [filters, count, *kernel]
    if groups != channels:
        raise PlanError(
            f"update plan, weight {reader.name!r}: a share of the input channels of a grouped convolution ({groups} groups of {each}) "
            "has no gradient of its own shape; use weight = 0 or 1"
        )
    return [filters // channels * count, 1, *kernel]
