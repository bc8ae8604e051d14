"""The two sides of a training step: what the loss is made of, and what is made of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import tvm
from tvm import relax

from tvmtrain import signature

# Calls whose result is kept as long as their operand: the same memory in another shape.
VIEWS = ("relax.reshape", "relax.flatten", "relax.expand_dims", "relax.squeeze")


class Sides:
    """The bindings of a function of one dataflow block with a loss and a backward after it, by number.

    forward: what the loss depends on. pure: what depends on forward values, and on no gradient. returned: what the function returns.
    operands, readers: the bindings that each reads, and that read it.
    """

    def __init__(self, function: relax.Function) -> None:
        (block,) = function.body.blocks
        self.bindings: Sequence[relax.Binding] = list(block.bindings)
        number = {binding.var: i for i, binding in enumerate(self.bindings)}
        self.operands = [{number[v] for v in relax.analysis.free_vars(b.value) if v in number} for b in self.bindings]
        self.readers: list[set[int]] = [set() for _ in self.bindings]
        for i, operands in enumerate(self.operands):
            for operand in operands:
                self.readers[operand].add(i)
        ports = zip(signature.outputs(function), function.body.body.fields, strict=True)
        self.forward = self.made_of({number[value] for (role, _), value in ports if role == "loss" and value in number})
        self.returned = {number[v] for v in relax.analysis.free_vars(function.body.body) if v in number}
        self.pure: set[int] = set()
        for i, operands in enumerate(self.operands):
            if operands and i not in self.forward and operands <= self.forward | self.pure:
                self.pure.add(i)

    def made_of(self, numbers: Iterable[int]) -> set[int]:
        """These bindings and all that they depend on."""
        found = set(numbers)
        waiting = list(found)
        while waiting:
            new = self.operands[waiting.pop()] - found
            found |= new
            waiting.extend(new)
        return found

    def later(self, source: int) -> set[int]:
        """What reads a forward value, or a view of it, in the backward."""
        views = [i for i in self.readers[source] & self.forward if self.is_view(i)]
        return (self.readers[source] - self.forward).union(*(self.later(view) for view in views))

    def is_view(self, i: int) -> bool:
        return name_of(self.bindings[i].value) in VIEWS


def with_backward(mod: tvm.IRModule, rewrite: Callable[[relax.Function], relax.Function]) -> tvm.IRModule:
    """``mod`` with the functions rewritten that have a loss and a backward after it: ``train_step`` and ``gradients``."""
    result = mod.clone()
    for name in mod.get_global_vars():
        if name.name_hint in ("train_step", "gradients"):
            result[name] = rewrite(mod[name])
    return result


def name_of(value: relax.Expr) -> str:
    """The name of the operator that a binding calls; nothing for other values."""
    return str(getattr(getattr(value, "op", None), "name", ""))


def substituted(value: relax.Expr, fresh: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """``value`` of the fresh variables."""
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [substituted(arg, fresh) for arg in value.args], value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substituted(part, fresh) for part in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(substituted(value.tuple_value, fresh), value.index)
    return fresh.get(value, value) if isinstance(value, relax.Var) else value
