"""Zeros around an image become the padding of the convolutions that read it: TensorFlow's SAME, one row and one column at the end.

    p = pad(x, rows (0, 1), columns (0, 1)); y = conv2d(p, w, stride 2, padding 0)  -->  y = conv2d(x, w, stride 2, padding (0, 0, 1, 1))

No padded image is made or kept, and gradients of such a convolution can be filtered.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.passes.sides import name_of

FUNCTIONS = ("forward", "predict")


@module_pass(opt_level=0, name="FoldPadding")
@dataclass(frozen=True)
class FoldPadding:
    """Rewrites ``forward`` and ``predict``; a pad that something else reads, too, stays for that."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        result = mod.clone()
        for name in FUNCTIONS:
            if name in mod:
                result[name] = _folded(mod[name])
        return result


def _folded(function: relax.Function) -> relax.Function:
    builder = relax.BlockBuilder()
    pads: dict[relax.Var, relax.Call] = {}
    bindings: list[relax.Binding] = []
    (block,) = function.body.blocks
    for binding in block.bindings:
        value = binding.value
        if _pads_with_zeros(value):
            pads[binding.var] = value
        if name_of(value) == "relax.nn.conv2d" and value.args[0] in pads:
            value = builder.normalize(_convolution(pads[value.args[0]], value))
        bindings.append(relax.VarBinding(binding.var, value))
    read = {var for b in bindings for var in relax.analysis.free_vars(b.value)} | set(
        relax.analysis.free_vars(function.body.body)
    )
    unread = pads.keys() - read
    return signature.with_bindings(function, [b for b in bindings if b.var not in unread]) if pads else function


def _pads_with_zeros(value: relax.Expr) -> bool:
    """Whether rows and columns alone are added, all zero."""
    if name_of(value) != "relax.nn.pad" or len(value.ty.shape) != 4:
        return False
    width = [int(v) for v in value.attrs.pad_width]
    return (
        str(value.attrs.pad_mode) == "constant" and float(value.attrs.pad_value) == 0 and not any(width[:4]) and min(width) >= 0
    )


def _convolution(pad: relax.Call, call: relax.Call) -> relax.Call:
    top, bottom, left, right = (int(v) for v in list(pad.attrs.pad_width)[4:])
    geometry = operators.geometry_of(call)
    padding = [own + more for own, more in zip(geometry["padding"], (top, left, bottom, right), strict=True)]
    return R.nn.conv2d(pad.args[0], call.args[1], **geometry | {"padding": padding})
