"""A channel's scale leaves the gradient for the weights: they are fewer.

    gc = gy * s; gx = conv2d_dgrad(gc, w); gw = conv2d_wgrad(x, gc)
    -->  gx = conv2d_dgrad(gy, w * s); gw = conv2d_wgrad(x, gy) * s

With running statistics BatchNorm's gradient is its scale alone, a pass over the map for each convolution. Both gradients of a
convolution are linear in each channel of gy; the scale of the weight's gradient rides in the kernel that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.passes.sides import Sides, name_of, with_backward
from tvmtrain.sizes import bytes_of, shape_of

# A map is worth it that has so many times the bytes of its scaled weights, which are read and written.
WORTH = 2


@module_pass(opt_level=0, name="ScaleWeights")
@dataclass(frozen=True)
class ScaleWeights:
    """Rewrites the functions that have a loss and a backward after it: ``train_step`` and ``gradients``."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        return with_backward(mod, _scaled)


def _scaled(function: relax.Function) -> relax.Function:
    sides = Sides(function)
    moving = {i: parts for i in range(len(sides.bindings)) if (parts := _moving(sides, i)) is not None}
    builder = relax.BlockBuilder()
    scales: dict[relax.Var, tuple[relax.Expr, relax.Expr]] = {}
    bindings: list[relax.Binding] = []
    for i, binding in enumerate(sides.bindings):
        read = [scales[arg] for arg in getattr(binding.value, "args", ()) if isinstance(arg, relax.Var) and arg in scales]
        if i in moving:
            scales[binding.var] = moving[i]
        elif read:
            bindings += _rewritten(builder, binding, *read[0])
        else:
            bindings.append(binding)
    return signature.with_bindings(function, bindings) if moving else function


def _moving(sides: Sides, i: int) -> tuple[relax.Expr, relax.Expr] | None:
    """A map and its channels' scale, if their product is made in the backward for gradients of convolutions alone, of few weights."""
    parts = _parts(sides.bindings[i].value)
    readers = [sides.bindings[k] for k in sides.readers[i]]
    if parts is None or i in sides.forward | sides.returned or not readers:
        return None
    gradients = all(_is_gradient(reader.value, sides.bindings[i].var) for reader in readers)
    weights = sum(bytes_of(r.value.args[1].ty) for r in readers if name_of(r.value) == operators.DGRAD)
    return parts if gradients and weights * WORTH <= bytes_of(parts[0].ty) else None


def _is_gradient(call: relax.Call, gy: relax.Var) -> bool:
    """Whether a call is one of a convolution's two gradients, of ``gy`` as its gradient and nothing else."""
    place = {operators.DGRAD: 0, operators.WGRAD: 1}.get(name_of(call))
    return place is not None and [arg.same_as(gy) for arg in call.args] == [k == place for k in range(len(call.args))]


def _parts(value: relax.Expr) -> tuple[relax.Expr, relax.Expr] | None:
    """A map of channels, and the scale of each, [1, C, 1, 1], of which a binding is the product."""
    if name_of(value) != "relax.multiply":
        return None
    for gy, scale in (value.args, reversed(value.args)):
        shape = shape_of(value)
        if len(shape) == 4 and shape_of(gy) == shape and shape_of(scale) == [1, shape[1], 1, 1]:
            return gy, scale
    return None


def _rewritten(builder: relax.BlockBuilder, old: relax.VarBinding, gy: relax.Expr, scale: relax.Expr) -> list[relax.VarBinding]:
    """One gradient with the scale at the weights, [O, 1, 1, 1]."""
    call, name = old.value, old.var.name
    made: list[relax.VarBinding] = []

    def bind(value: relax.Expr, var: relax.Var | None = None) -> relax.Var:
        value = builder.normalize(value)
        made.append(relax.VarBinding(relax.DataflowVar(f"{name}_scaled", value.ty) if var is None else var, value))
        return made[-1].var

    filters = bind(R.reshape(scale, (shape_of(scale)[1], 1, 1, 1)))
    if name_of(call) == operators.DGRAD:
        weight = bind(R.multiply(call.args[1], filters))
        bind(relax.Call(call.op, [gy, weight], call.attrs, call.ty_args), old.var)
    else:
        gradient = bind(relax.Call(call.op, [call.args[0], gy], call.attrs, call.ty_args))
        bind(R.multiply(gradient, filters), old.var)
    return made
