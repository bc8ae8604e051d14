"""Kernels of several calls: what the passes that merge kernels (``prologues``, ``chains``) have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import tvm
from tvm import relax, tirx
from tvm.ir import Op
from tvm.s_tir import Schedule

from tvmtrain.schedules.blocks import FAILURES, Block
from tvmtrain.schedules.cpu import blocks_of

CALL_TIR = Op.get("relax.call_tir")


@dataclass(frozen=True)
class Plain:
    """A kernel without a schedule."""

    function: tirx.PrimFunc

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """None of them where they are not plain."""
        with suppress(*FAILURES):
            return blocks_of(Schedule(self.function, error_render_level="none"))
        return ()


def rewritten(mod: tvm.IRModule, rewrite: Callable[[relax.Function, relax.BlockBuilder], relax.Function]) -> tvm.IRModule:
    """``mod`` with every function of one dataflow block rewritten; kernels are added to the builder."""
    builder = relax.BlockBuilder(mod)
    for name, function in mod.functions_items():
        if isinstance(function, relax.Function) and len(function.body.blocks) == 1:
            builder.update_func(builder.get().get_global_var(name.name_hint), rewrite(function, builder))
    return builder.get()


def is_call(binding: relax.Binding) -> bool:
    """Whether a binding calls a kernel."""
    return isinstance(binding.value, relax.Call) and binding.value.op == CALL_TIR


def merged(bindings: Sequence[relax.Binding], builder: relax.BlockBuilder) -> relax.VarBinding:
    """The last of some calls, with all of them as one kernel, of tensors and constants, that ``FuseTIR`` makes."""
    made = {binding.var for binding in bindings}
    read = list(dict.fromkeys(a for b in bindings for a in b.value.args[1].fields if a not in made))
    kernel = builder.add_func(_kernel(bindings, read), "_".join(name_of(b) for b in bindings))
    return relax.VarBinding(bindings[-1].var, relax.Call(kernel, read))


def name_of(binding: relax.Binding) -> str:
    """The name of the kernel that is called."""
    return str(binding.value.args[0].name_hint).removeprefix("fused_")


def _kernel(bindings: Sequence[relax.Binding], read: Sequence[relax.Expr]) -> relax.Function:
    parameters = {value: relax.Var(f"operand{i}", value.ty) for i, value in enumerate(read)}
    made: list[relax.Binding] = []
    for binding in bindings:
        kernel, operands = binding.value.args
        arguments = relax.Tuple([parameters[a] for a in operands.fields])
        var = relax.Var("result", binding.var.ty) if binding is bindings[-1] else relax.DataflowVar("front", binding.var.ty)
        made.append(relax.VarBinding(var, relax.Call(CALL_TIR, [kernel, arguments], None, binding.value.ty_args)))
        parameters[binding.var] = var
    body = relax.SeqExpr([relax.DataflowBlock(made)], made[-1].var)
    return relax.Function([parameters[value] for value in read], body, made[-1].var.ty, True).with_attr("Primitive", True)
