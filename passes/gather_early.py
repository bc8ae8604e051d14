"""Gather the channels that a weight gradient needs where they are made, so that they alone live until the backward.

    x = f(..); y = conv2d(x, w); ..; kept = take(x, channels); dw = wgrad(kept, dy)
    -->  x = f(..); kept = take(x, channels); y = conv2d(x, w); ..; dw = wgrad(kept, dy)

Autodiff gathers in the backward, which would keep all of x until then: a sparse update without its saving of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import signature


@module_pass(opt_level=0, name="GatherEarly")
@dataclass(frozen=True)
class GatherEarly:
    """Each ``take`` of chosen channels from data moves to where its operand is bound; those from weights and state stay."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        result = mod.clone()
        for var, function in mod.functions_items():
            if isinstance(function, relax.Function) and signature.channels(function):
                result[var] = _reordered(function)
        return result


def _reordered(function: relax.Function) -> relax.Function:
    """Parameters, then every binding with the gathers from it behind it."""
    bindings = list(function.body.blocks[0].bindings)
    early: dict[relax.Var, list[relax.VarBinding]] = {}
    for gather in _gathers(function, bindings):
        early.setdefault(gather.value.args[0], []).append(gather)
    moved = {gather.var for gathers in early.values() for gather in gathers}
    order = [gather for var in function.params for gather in early.get(var, [])]
    for binding in (b for b in bindings if b.var not in moved):
        order += [binding, *early.get(binding.var, [])]
    return signature.with_bindings(function, order)


def _gathers(function: relax.Function, bindings: list[relax.VarBinding]) -> list[relax.VarBinding]:
    channels = set(signature.channels(function).values())
    state = {var for var, port in zip(function.params, signature.inputs(function), strict=True) if port[0] != "input"}
    takes = [b for b in bindings if isinstance(b.value, relax.Call) and b.value.op == Op.get("relax.take")]
    return [b for b in takes if b.value.args[1] in channels and b.value.args[0] not in state]
