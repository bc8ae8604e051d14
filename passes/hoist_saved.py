"""What the backward needs of a forward value is made right after it, where that is smaller: a mask instead of an activation.

    y = relu(x); z = f(y, frozen); ..; gx = where(greater(y, 0), gy, 0)
    -->  y = relu(x); m = greater(y, 0); z = f(y, frozen); ..; gx = where(m, gy, 0)

A call of forward values alone that stands in the backward moves up to where its operands have just been made, if the backward reads
those for nothing else, and if its result has fewer bytes. Results of moved calls are outputs of the dataflow block: no later fusion
puts them back into the kernels that read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import signature
from tvmtrain.passes.sides import Sides, substituted, with_backward
from tvmtrain.sizes import bytes_of


@module_pass(opt_level=0, name="HoistSaved")
@dataclass(frozen=True)
class HoistSaved:
    """Rewrites the functions that have a loss and a backward after it: ``train_step`` and ``gradients``."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        return with_backward(mod, _hoisted)


def _hoisted(function: relax.Function) -> relax.Function:
    saved = _Saved(function)
    moved = saved.moved()
    fresh = {saved.bindings[i].var: relax.Var(f"saved_{saved.bindings[i].var.name}", saved.bindings[i].var.ty) for i in moved}
    bindings = []
    for i in saved.order(set().union(*moved.values())):
        old = saved.bindings[i]
        bindings.append(relax.VarBinding(fresh.get(old.var, old.var), substituted(old.value, fresh)))
    return signature.with_bindings(function, bindings)


class _Saved(Sides):
    """What moves to the forward."""

    def moved(self) -> dict[int, set[int]]:
        """The calls to keep the results of, each with all that moves with it (the two comparisons of a ``logical_and``)."""
        # A result that other pure calls alone read would be kept for nothing.
        tops = [i for i in sorted(self.pure - self.returned) if self.readers[i] - self.pure]
        groups = {i: self.made_of({i}) - self.forward for i in tops}
        sources = {i: self._sources(group) for i, group in groups.items()}
        chosen: dict[int, set[int]] = {}
        for i in tops:
            # A mask and gathered channels of one activation: only together do they let it die.
            family = {k: groups[k] for k in tops if not sources[i].isdisjoint(sources[k])}
            chosen |= family if self._smaller(family) else {i: groups[i]} if self._smaller({i: groups[i]}) else {}
        return chosen

    def _sources(self, group: set[int]) -> set[int]:
        return {operand for i in group for operand in self.operands[i]} & self.forward

    def _smaller(self, family: Mapping[int, set[int]]) -> bool:
        """Whether all that the family reads of the forward dies earlier if it moves, and has more bytes than its results."""
        moving = set().union(*family.values())
        sources = self._sources(moving)
        dying = all(s not in self.returned and self.later(s) <= moving for s in sources)
        kept = sum(_bytes(self.bindings[top].var) for top in family)
        return dying and kept < sum(_bytes(self.bindings[s].var) for s in sources)

    def order(self, moving: set[int]) -> list[int]:
        """The present order, with each moving call as soon as its operands are there."""
        done: set[int] = set()
        order: list[int] = []
        for i in range(len(self.bindings)):
            ready = [] if i in moving else [i]
            while ready:
                order += ready
                done.update(ready)
                # Whatever moves reads some binding, so that it is ready right after the last of those.
                waiting = set().union(*(self.readers[k] for k in ready)) & moving - done
                ready = [k for k in sorted(waiting) if self.operands[k] <= done]
        return order


def _bytes(var: relax.Var) -> int:
    return bytes_of(var.ty) if isinstance(var.ty, relax.TensorType) else 0
