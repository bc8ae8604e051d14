"""Normalizations as few passes over memory: statistics, two sums, and what is elementwise, which fusion makes one kernel of.

1. The forward. Recomputation, strips and fusion know elementwise operators:

    y, mean, var, rstd = batch_norm(x, gamma, beta)
    -->  mean, var, rstd = statistics(x); y = (x - mean) * rstd * gamma + beta

   With running statistics: y = (x - mean) * (gamma * rstd) + beta.

2. The backward. Where the gradient of gamma or of x reads gy and x for its sums, beta's is one of them:

    sums = gradient_sums(gy, x, mean); dbeta = sum(gy)   -->   sums = gradient_sums(gy, x, mean); dbeta = sums[0]

Runs after ``Differentiate``, which drops sums that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.passes.sides import name_of

EXPANDED = {
    operators.NORMALIZE: operators.expanded_normalize,
    operators.BATCH_NORM: operators.expanded_batch_norm,
    "relax.nn.batch_norm": operators.expanded_running_batch_norm,
}


@module_pass(opt_level=0, name="ExpandNorms")
@dataclass(frozen=True)
class ExpandNorms:
    """Rewrites every function of one dataflow block that normalizes, or has the gradients of that."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and _concerned(function):
                mod = _expanded(mod, name.name_hint)
        return mod


def _concerned(function: relax.Function) -> bool:
    wanted = {*EXPANDED, operators.GRADIENT_SUMS}
    return any(name_of(binding.value) in wanted for block in function.body.blocks for binding in block.bindings)


def _expanded(mod: tvm.IRModule, name: str) -> tvm.IRModule:
    function = mod[name]
    builder = relax.BlockBuilder(mod)
    sums: dict[relax.Var, relax.VarBinding] = {}
    expanded: dict[relax.Var, relax.Tuple] = {}
    with builder.function("expanded", list(function.params)):
        with builder.dataflow():
            for binding in function.body.blocks[0].bindings:
                value = binding.value
                if name_of(value) in EXPANDED:
                    value = expanded[binding.var] = EXPANDED[name_of(value)](builder, value)
                elif isinstance(value, relax.TupleGetItem) and value.tuple_value in expanded:
                    # The value itself: fusion would not look through the tuple, which then has no readers.
                    value = expanded[value.tuple_value].fields[value.index]
                elif name_of(value) == operators.GRADIENT_SUMS:
                    sums.setdefault(value.args[0], binding)
                elif name_of(value) == "relax.sum":
                    value = _shared(builder, value, sums)
                builder.emit_normalized(relax.VarBinding(binding.var, builder.normalize(value)))
        builder.emit_func_output(function.body.body)
    return signature.replaced(builder, "expanded", name, function)


def _shared(builder: relax.BlockBuilder, total: relax.Call, sums: dict[relax.Var, relax.VarBinding]) -> relax.Expr:
    """The sum, of those that have been made if it is among them."""
    made = sums.get(total.args[0])
    if made is None or total.attrs.axis is None:
        return total
    if [int(a) for a in total.attrs.axis] != [int(a) for a in made.value.attrs["axes"]]:
        return total
    return R.reshape(builder.emit(relax.TupleGetItem(made.var, 0)), total.ty.shape)
