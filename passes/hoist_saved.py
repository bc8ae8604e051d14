"""What the backward needs of a forward value is made right after it, where that is smaller: a mask instead of an activation.

    y = relu(x); z = f(y, frozen); ..; gx = where(greater(y, 0), gy, 0)
    -->  y = relu(x); m = greater(y, 0); z = f(y, frozen); ..; gx = where(m, gy, 0)

A call of forward values alone that stands in the backward moves up to where its operands have just been made, if the backward reads
those for nothing else, and if its result has fewer bytes. Results of moved calls are outputs of the dataflow block: no later fusion
puts them back into the kernels that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import signature
from tvmtrain.passes.sizes import bytes_of

# Calls whose result is kept as long as their operand: the same memory in another shape.
VIEWS = ("relax.reshape", "relax.flatten", "relax.expand_dims", "relax.squeeze")


@module_pass(opt_level=0, name="HoistSaved")
@dataclass(frozen=True)
class HoistSaved:
    """Rewrites the functions that have a loss and a backward after it: ``train_step`` and ``gradients``."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        result = mod.clone()
        for name in mod.get_global_vars():
            if name.name_hint in ("train_step", "gradients"):
                result[name] = _hoisted(mod[name])
        return result


def _hoisted(function: relax.Function) -> relax.Function:
    (block,) = function.body.blocks
    saved = _Saved(list(block.bindings), function)
    moved = saved.moved()
    fresh = {saved.bindings[i].var: relax.Var(f"saved_{saved.bindings[i].var.name}", saved.bindings[i].var.ty) for i in moved}
    bindings = []
    for i in saved.order(set().union(*moved.values())):
        old = saved.bindings[i]
        bindings.append(relax.VarBinding(fresh.get(old.var, old.var), _with(old.value, fresh)))
    return signature.with_bindings(function, bindings)


class _Saved:
    """The bindings by number. Forward: what the loss depends on. Pure: what depends on forward values, and on no gradient."""

    def __init__(self, bindings: Sequence[relax.Binding], function: relax.Function) -> None:
        self.bindings = bindings
        number = {binding.var: i for i, binding in enumerate(bindings)}
        self.operands = [{number[v] for v in relax.analysis.free_vars(b.value) if v in number} for b in bindings]
        self.readers: list[set[int]] = [set() for _ in bindings]
        for i, operands in enumerate(self.operands):
            for operand in operands:
                self.readers[operand].add(i)
        ports = zip(signature.outputs(function), function.body.body.fields, strict=True)
        self.forward = self._made_of({number[value] for (role, _), value in ports if role == "loss" and value in number})
        self.returned = {number[v] for v in relax.analysis.free_vars(function.body.body) if v in number}
        self.pure: set[int] = set()
        for i, operands in enumerate(self.operands):
            if operands and i not in self.forward and operands <= self.forward | self.pure:
                self.pure.add(i)

    def _made_of(self, found: set[int]) -> set[int]:
        waiting = list(found)
        while waiting:
            new = self.operands[waiting.pop()] - found
            found |= new
            waiting.extend(new)
        return found

    def moved(self) -> dict[int, set[int]]:
        """The calls to keep the results of, each with all that moves with it (the two comparisons of a ``logical_and``)."""
        # A result that other pure calls alone read would be kept for nothing.
        tops = [i for i in sorted(self.pure - self.returned) if self.readers[i] - self.pure]
        groups = {i: self._made_of({i}) - self.forward for i in tops}
        chosen: dict[int, set[int]] = {}
        for i in tops:
            # A mask and gathered channels of one activation: only together do they let it die.
            family = {k: groups[k] for k in tops if self._sources(groups[k]) & self._sources(groups[i])}
            chosen |= family if self._smaller(family) else {i: groups[i]} if self._smaller({i: groups[i]}) else {}
        return chosen

    def _sources(self, group: set[int]) -> set[int]:
        return {operand for i in group for operand in self.operands[i]} & self.forward

    def _smaller(self, family: Mapping[int, set[int]]) -> bool:
        """Whether all that the family reads of the forward dies earlier if it moves, and has more bytes than its results."""
        moving = set().union(*family.values())
        sources = self._sources(moving)
        dying = all(s not in self.returned and self._later(s) <= moving for s in sources)
        kept = sum(_bytes(self.bindings[top].var) for top in family)
        return dying and kept < sum(_bytes(self.bindings[s].var) for s in sources)

    def _later(self, source: int) -> set[int]:
        """What reads a forward value, or a view of it, in the backward."""
        views = [i for i in self.readers[source] & self.forward if self._view(i)]
        return (self.readers[source] - self.forward).union(*(self._later(view) for view in views))

    def _view(self, i: int) -> bool:
        return getattr(getattr(self.bindings[i].value, "op", None), "name", "") in VIEWS

    def order(self, moving: set[int]) -> list[int]:
        """The present order, with each moving call as soon as its operands are there."""
        done: set[int] = set()
        order: list[int] = []
        for i in range(len(self.bindings)):
            ready = [] if i in moving else [i]
            while ready:
                order += ready
                done.update(ready)
                ready = [k for k in sorted(moving - done) if self.operands[k] <= done]
        return order


def _bytes(var: relax.Var) -> int:
    return bytes_of(var.ty) if isinstance(var.ty, relax.TensorType) else 0


def _with(value: relax.Expr, fresh: Mapping[relax.Var, relax.Var]) -> relax.Expr:
    """``value`` of the fresh variables."""
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [_with(arg, fresh) for arg in value.args], value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_with(part, fresh) for part in value.fields])
    return fresh.get(value, value) if isinstance(value, relax.Var) else value
