"""Mark where the backward ends: no gradient flows to what depends on no trained parameter.

    y = f(frozen, x); z = g(y, w)   -->   y = f(frozen, x); y1 = no_grad(y); z = g(y1, w)

Autodiff then never differentiates the frozen front, integer arithmetic or mask computations: their operators need no gradient
rule, and their inputs are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import autodiff, signature


@module_pass(opt_level=0, name="StopGradients")
@dataclass(frozen=True)
class StopGradients:
    """trained: names of the parameters of ``forward`` that gradients flow to."""

    trained: tuple[str, ...]

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        forward = mod["forward"]
        variables = signature.differentiable(forward)
        tracked = {variables[name] for name in self.trained}
        builder = relax.BlockBuilder(mod)
        stops: dict[relax.Var, relax.Var] = {}
        with builder.function("forward_stopped", list(forward.params)):
            with builder.dataflow():
                for binding in forward.body.blocks[0].bindings:
                    value = binding.value
                    if not autodiff.stops(value) and any(used in tracked for used in relax.analysis.free_vars(value)):
                        tracked.add(binding.var)
                        value = builder.normalize(_stopped(builder, value, tracked, stops))
                    builder.emit_normalized(relax.VarBinding(binding.var, value))
            builder.emit_func_output(forward.body.body)
        return signature.replaced(builder, "forward_stopped", "forward", forward)


def _stopped(builder: relax.BlockBuilder, value: relax.Expr, tracked: set, stops: dict) -> relax.Expr:
    """``value`` with each untracked tensor variable among its arguments behind a ``no_grad``."""
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_stopped(builder, field, tracked, stops) for field in value.fields])
    if isinstance(value, relax.Call):
        arguments = [_stopped(builder, argument, tracked, stops) for argument in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args)
    if not isinstance(value, relax.Var) or value in tracked or not isinstance(value.ty, relax.TensorType):
        return value
    if value not in stops:
        stops[value] = builder.emit(R.grad.no_grad(value))
    return stops[value]
