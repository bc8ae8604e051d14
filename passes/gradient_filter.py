"""Train a convolution by filtered gradients: both of its gradients come from patch-averaged ones.

    y = conv2d(x, w)   -->   y = viewed_conv2d(x, w, view, patch);   g = patch_mean(dy)
                             dview = wgrad(patch_sum(x), g);   dx = unpatch(dgrad(g, sum of w over its taps))

Gradient filtering (Yang, Li and Marculescu, CVPR 2023, arXiv 2301.00330); formulas and scalings stand in
``tvmtrain.filtering``. The view has one number for all taps of a kernel: [O, k, 1, 1].

Refused, with a PlanError that names the weight:

1. What is read otherwise than as the whole weight of 2-D convolutions: a linear product, a 1-D or transposed convolution, a weight
   that is computed. The paper has no equation for them, or the weight has a gradient besides.
2. A map that the patches of the output do not cover, or of which they cover more than half a patch too much on one side: as many
   patches as cover the output, each of r*stride places, must fit the input. So it is wherever the output has input/stride places,
   rounded up ("same" padding); with other padding for some sizes and patches alone.
3. An axis dilated by at least a patch, with an even kernel: it has no tap in the middle, and taps are whole patches apart there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import filtering, operators, signature
from tvmtrain.errors import PlanError
from tvmtrain.passes import views
from tvmtrain.sizes import shape_of

AXES = ("rows", "columns")


@module_pass(opt_level=0, name="GradientFilter")
@dataclass(frozen=True)
class GradientFilter:
    """patches: weight name -> (rows, columns) of a patch of the layer's output.

    scaling: "unbiased" or "paper", for all of them or by weight name (unbiased where one is not named). A weight need not be
    trained: then the gradient of its layer's input is filtered alone.
    """

    patches: Mapping[str, tuple[int, int]]
    scaling: str | Mapping[str, str] = "unbiased"

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        mod = views.rewrite(mod, self.patches, self._viewed)
        forward = mod["forward"]
        for name in self.patches:
            _check_readers(name, forward)
        return mod

    def _viewed(self, reader: views.Reader) -> relax.Call:
        if reader.kind != "conv2d":
            raise _refusal(reader.name, f"a {reader.kind} layer reads it; only convolutions are filtered")
        patch = self.patches[reader.name]
        _check_geometry(reader, patch)
        shape = [*shape_of(reader.view if reader.view is not None else reader.weight)[:2], 1, 1]
        view = reader.view
        if view is None or shape_of(view) != shape:
            view = relax.Var(f"view_{reader.name}", relax.TensorType(shape, reader.weight.ty.dtype))
        scaling = self.scaling if isinstance(self.scaling, str) else self.scaling.get(reader.name, "unbiased")
        geometry = operators.geometry_of(reader.call)
        return operators.viewed_conv2d(reader.x, reader.weight, view, reader.channels, geometry, patch, scaling)


def _check_readers(name: str, forward: relax.Function) -> None:
    """Case 1: whoever else reads the weight would lose its part of the gradient."""
    weight = signature.parameters(forward).get(name)
    if weight is None:
        raise _refusal(name, "the model has no parameter of this name")
    values = [b.value for b in forward.body.blocks[0].bindings if weight in relax.analysis.free_vars(b.value)]
    others = [v for v in values if not (isinstance(v, relax.Call) and v.op == tvm.ir.Op.get(operators.VIEWED_CONV))]
    if others or not values:
        what = f"{getattr(others[0], 'op', others[0])} reads it" if others else "no convolution reads it"
        raise _refusal(name, f"{what}; only a weight that 2-D convolutions alone read is filtered")


def _check_geometry(reader: views.Reader, patch: tuple[int, int]) -> None:
    """Cases 2 and 3."""
    geometry = operators.geometry_of(reader.call)
    result = reader.call.ty.shape
    rows, columns = geometry["strides"]
    shapes = [(int(s[2]), int(s[3])) for s in (reader.x.ty.shape, result)]
    output = filtering.of_output(shapes[1], patch)
    source = filtering.of_input(shapes[0], (rows, columns), output)
    kernel, apart = shape_of(reader.weight)[2:], filtering.steps(tuple(geometry["dilation"]), patch)
    for axis, name in enumerate(AXES):
        size, count, extent, before = source.size[axis], source.places[axis], source.shape[axis], source.before[axis]
        if size * count < extent or before > size // 2:
            raise _refusal(
                reader.name,
                f"{count} patches of {patch[axis]} cover the {output.shape[axis]} {name} of its output; {size * count} {name} of its input "
                f"belong to them, and it has {extent}; choose another patch, or padding that gives input/stride {name}",
            )
        if apart[axis] and kernel[axis] % 2 == 0:
            raise _refusal(
                reader.name,
                f"{name} are dilated by {geometry['dilation'][axis]}, at least a patch of {patch[axis]}, and the kernel has "
                f"{kernel[axis]} taps, none in the middle; choose a patch larger than the dilation",
            )


def _refusal(name: str, why: str) -> PlanError:
    return PlanError(f"gradient filter, weight {name!r}: {why}")
