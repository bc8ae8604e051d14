"""An order of operations in which few bytes are alive at once.

    a = f(x); b = g(x); c = h(a); d = k(b)   -->   a = f(x); c = h(a); b = g(x); d = k(b)

Several orders are made, and the one with the lowest peak is taken; the one that was there wins ties, so that nothing gets worse.
Kernels, their number and their results stay as they are. Runs on lowered functions, after ``UpdateInPlace`` and ``place_buffers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import arena, signature
from tvmtrain.passes.dependences import CALL_TIR, IN_PLACE, Dependences, makes_memory
from tvmtrain.passes.share_workspace import workspace
from tvmtrain.sizes import buffer_bytes, bytes_of


@module_pass(opt_level=0, name="OrderForMemory")
@dataclass(frozen=True)
class OrderForMemory:
    """Reorders every function that is one dataflow block."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        result = mod.clone()
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and [type(b) for b in function.body.blocks] == [relax.DataflowBlock]:
                result[name] = _reordered(mod, function)
        return result


def _reordered(mod: tvm.IRModule, function: relax.Function) -> relax.Function:
    bindings = list(function.body.blocks[0].bindings)
    own = [sum(map(buffer_bytes, workspace(mod[b.value.args[0]]))) if _is_kernel(b.value) else 0 for b in bindings]
    order = best_order(_problem(bindings, function.body.body, own))
    return signature.with_bindings(function, [bindings[i] for i in order])


def _is_kernel(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and value.op in (CALL_TIR, IN_PLACE)


@dataclass(frozen=True)
class Problem:
    """Operations by number. ``before``: those that precede each; ``size``: bytes that each makes; ``reads``: whose bytes each reads.

    ``own``: bytes that each needs while it runs, and only then.
    """

    before: Sequence[set[int]]
    size: Sequence[int]
    reads: Sequence[set[int]]
    own: Sequence[int]


def _problem(bindings: Sequence[relax.Binding], returned: relax.Expr, own: Sequence[int]) -> Problem:
    """Bytes that leave the function are no part of the arena, and count nothing."""
    known = Dependences(bindings)
    number = {binding.var: i for i, binding in enumerate(bindings)}
    leaving = {var for var, _ in known.of(returned)}
    size = [bytes_of(b.var.ty) if makes_memory(b.value) and b.var not in leaving else 0 for b in bindings]
    reads: list[set[int]] = [set() for _ in bindings]
    for (var, _), readers in known.reads.items():
        for i in readers if var in number else []:
            reads[i].add(number[var])
    return Problem(known.before, size, reads, own)


def best_order(problem: Problem) -> list[int]:
    """The order with the lowest peak among the present one and those of each rule."""
    orders = [list(range(len(problem.size))), *(_listed(problem, rule) for rule in RULES)]
    return min(orders, key=lambda order: peak(problem, order))


def peak(problem: Problem, order: Sequence[int]) -> int:
    """The largest sum of bytes alive at any operation of ``order``."""
    last = dict.fromkeys(order, 0)
    for step, i in enumerate(order):
        last[i] = step
        last |= dict.fromkeys(problem.reads[i], step)
    made = [arena.Block(problem.size[i], step, last[i]) for step, i in enumerate(order)]
    return arena.lower_bound([*made, *(arena.Block(problem.own[i], step, step) for step, i in enumerate(order))])


# Which of the operations that are ready comes next, the smallest: (growth, bytes made, number in the present order).
Rule = Callable[[int, int, int], tuple[int, ...]]

RULES: tuple[Rule, ...] = (
    # What frees memory at once, then the present order: updates run as soon as their gradient exists.
    lambda growth, made, i: (min(growth, 0), i),
    lambda growth, made, i: (growth > 0, i),
    # The smallest growth first, whatever the present order.
    lambda growth, made, i: (growth, i),
    lambda growth, made, i: (growth, made, i),
    # What needs no room, then the present order.
    lambda growth, made, i: (growth > 0, made > 0, i),
)


def _listed(problem: Problem, rule: Rule) -> list[int]:
    """List scheduling: of all operations that are ready, the first by ``rule``."""
    waiting = [set(needs) for needs in problem.before]
    after: list[list[int]] = [[] for _ in waiting]
    readers: dict[int, set[int]] = {}
    for i, needs in enumerate(waiting):
        for need in needs:
            after[need].append(i)
        for source in problem.reads[i]:
            readers.setdefault(source, set()).add(i)

    def rank(i: int) -> tuple[int, ...]:
        freed = sum(problem.size[source] for source in problem.reads[i] if readers[source] == {i})
        return rule(problem.size[i] - freed, problem.size[i], i)

    ready = [i for i, needs in enumerate(waiting) if not needs]
    order = []
    while ready:
        chosen = min(ready, key=rank)
        ready.remove(chosen)
        order.append(chosen)
        for source in problem.reads[chosen]:
            readers[source].discard(chosen)
        for i in after[chosen]:
            waiting[i].discard(chosen)
            if not waiting[i]:
                ready.append(i)
    return order
