"""Which binding of a block has to come before which: what is read has been made, and what is overwritten has been read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from tvm import relax
from tvm.ir import Op

CALL_TIR = Op.get("relax.call_tir")
IN_PLACE = Op.get("relax.call_tir_inplace")

# A tensor in memory: the variable that stands for it first, and whether its value is the one after being overwritten.
Memory = tuple[relax.Var, bool]


@dataclass
class Dependences:
    """``before``: for each binding, by number, the bindings that precede it; ``after``: those that it precedes.

    ``memory``: what each variable may be, or look at.

    A tensor is overwritten at most once, by a ``call_tir_inplace``.
    """

    bindings: Sequence[relax.Binding]
    before: list[set[int]] = field(default_factory=list)
    after: list[set[int]] = field(default_factory=list)
    memory: dict[relax.Var, frozenset[Memory]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = {binding.var: i for i, binding in enumerate(self.bindings)}
        self.before = [set() for _ in self.bindings]
        self.after = [set() for _ in self.bindings]
        self.reads: dict[Memory, list[int]] = {}
        written: dict[relax.Var, int] = {}
        # Each variable is made before it is read in any order of a well-formed block.
        for i, binding in enumerate(self.bindings):
            self.delay(i, {number[v] for v in relax.analysis.free_vars(binding.value) if v in number})
            for memory in self._read(binding.value):
                self.reads.setdefault(memory, []).append(i)
            self.memory[binding.var] = self._made(binding)
            if overwritten(binding.value) is not None:
                written |= {var: i for var, _ in self.memory[binding.var]}
        for var, writer in written.items():
            self.delay(writer, set(self.reads.get((var, False), [])) - {writer})

    def delay(self, binding: int, others: set[int]) -> None:
        """Let a binding wait for others, too."""
        self.before[binding] |= others
        for other in others:
            self.after[other].add(binding)

    def reaches(self, start: int) -> set[int]:
        """The bindings that come after ``start`` in every order."""
        found: set[int] = set()
        waiting = [start]
        while waiting:
            new = self.after[waiting.pop()] - found
            found |= new
            waiting.extend(new)
        return found

    def of(self, value: relax.Expr) -> frozenset[Memory]:
        """The memory behind an expression; that of a parameter is the parameter."""
        return frozenset().union(*(self.memory.get(v, frozenset({(v, False)})) for v in relax.analysis.free_vars(value)))

    def _read(self, value: relax.Expr) -> frozenset[Memory]:
        # A view reads nothing: its readers do.
        return self.of(value) if makes_memory(value) or overwritten(value) is not None else frozenset()

    def _made(self, binding: relax.Binding) -> frozenset[Memory]:
        target = overwritten(binding.value)
        if target is not None:
            return frozenset((var, True) for var, _ in self.of(target))
        return frozenset({(binding.var, False)}) if makes_memory(binding.value) else self.of(binding.value)


def makes_memory(value: relax.Expr) -> bool:
    """Whether the value is a new tensor; all else may be a view of its arguments."""
    return isinstance(value, relax.Call) and value.op == CALL_TIR


def overwritten(value: relax.Expr) -> relax.Expr | None:
    """The argument that a kernel overwrites; passes here make kernels that overwrite one."""
    if not isinstance(value, relax.Call) or value.op != IN_PLACE:
        return None
    return value.args[1].fields[int(value.attrs.inplace_indices[0])]


def ordered(before: Sequence[set[int]], key: Callable[[int], int] = lambda i: i) -> list[int] | None:
    """An order that respects ``before`` and else goes by ``key``; None if there is none."""
    waiting = [set(needs) for needs in before]
    readers: list[list[int]] = [[] for _ in before]
    for i, needs in enumerate(before):
        for need in needs:
            readers[need].append(i)
    ready: list[tuple[int, int]] = []
    for i, needs in enumerate(waiting):
        if not needs:
            heappush(ready, (key(i), i))
    order = []
    while ready:
        _, i = heappop(ready)
        order.append(i)
        for reader in readers[i]:
            waiting[reader].discard(i)
            if not waiting[reader]:
                heappush(ready, (key(reader), reader))
    return order if len(order) == len(before) else None
