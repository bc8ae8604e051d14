"""What a schedule needs to know of a block: its axes, and how far a step along each moves in every buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import tvm
from tvm import sym, tirx
from tvm.s_tir import Schedule, ScheduleError
from tvm.s_tir.schedule import SBlockRV
from tvm_ffi import get_global_func

from tvmtrain.schedules.primitives import without_checks

without_checks()

# How a schedule primitive of TVM says that it does not fit (an InternalError is a RuntimeError too), and what follows from loops that
# are fewer than expected, or that have no fixed extent.
FAILURES = (ScheduleError, RuntimeError, ValueError, IndexError, TypeError)
# An annotation of blocks whose formula is another one for each residue of their last two axes: modulo what.
STRIDES = "tvmtrain.strides"
# An annotation of blocks that stay by themselves.
KEPT = "tvmtrain.kept"
# An annotation of the block with whose results a reduction ends, where another one of the same kernel reads them from a cache.
CHAINED = "tvmtrain.chained"
# An annotation of sums over parts of what another reduction makes: each is added as soon as it is there.
ACCUMULATED = "tvmtrain.accumulated"
# Calls that cost more than reading their result back from memory.
EXPENSIVE = ("exp", "log", "sqrt", "rsqrt", "pow", "tanh", "erf", "sigmoid", "sin", "cos")

realize = get_global_func("s_tir.schedule.GetSBlockRealize")


@dataclass(frozen=True)
class Access:
    """A buffer read or written: where, and the elements moved by one step of each axis of the block (None: not a fixed number)."""

    buffer: Any
    index: tuple[Any, ...]
    strides: tuple[int | None, ...]


@dataclass(frozen=True)
class Block:
    """A block whose loops are its own, one for each axis, in the same order."""

    name: str
    source: Any
    variables: tuple[Any, ...]
    extents: tuple[int, ...]
    reduced: tuple[bool, ...]
    reads: tuple[Access, ...]
    write: Access

    @property
    def reduction(self) -> bool:
        return any(self.reduced)

    @property
    def volume(self) -> int:
        return prod(self.extents)

    @property
    def spatial(self) -> tuple[int, ...]:
        return tuple(i for i, r in enumerate(self.reduced) if not r)

    @property
    def reductions(self) -> tuple[int, ...]:
        return tuple(i for i, r in enumerate(self.reduced) if r)

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (*self.reads, self.write)

    @cached_property
    def guarded(self) -> bool:
        """Whether each element is a question: a padded copy."""
        body = getattr(self.source.body, "value", None)
        return getattr(getattr(body, "op", None), "name", "").endswith("if_then_else")

    @cached_property
    def expensive(self) -> bool:
        calls = (e for e in _expressions(self.source.body) if isinstance(e, tvm.ir.Call))
        return any(getattr(call.op, "name", "").split(".")[-1] in EXPENSIVE for call in calls)

    @property
    def kept(self) -> bool:
        """Whether its results are made once, whatever they cost: they are read often, or stay in a cache."""
        return self.strides is not None or KEPT in self.source.annotations or self.chained

    @property
    def chained(self) -> bool:
        """Whether its results stay in a cache for another reduction (``schedules.chains``)."""
        return CHAINED in self.source.annotations

    @property
    def strides(self) -> tuple[int, int] | None:
        """Of the last two axes, if the formula is another one for each residue."""
        strides = self.source.annotations.get(STRIDES)
        return None if strides is None else (int(strides[0]), int(strides[1]))


def describe(sch: Schedule, block: SBlockRV) -> Block | None:
    """The block, axes in the order of its loops; None where its loops are not plainly its axes, or its extents are not numbers."""
    source = sch.get(block)
    loops = [sch.get(loop) for loop in sch.get_loops(block)]
    values = list(realize(sch, block).iter_values)
    order = [next((i for i, v in enumerate(values) if v.same_as(loop.loop_var)), -1) for loop in loops]
    # An axis of one step needs no loop.
    unbound = set(range(len(values))) - set(order)
    if -1 in order or any(not isinstance(values[i], tirx.IntImm) for i in unbound) or len(source.writes) != 1:
        return None
    axes = [source.iter_vars[i] for i in order]
    extents = [axis.dom.extent for axis in axes]
    if any(not isinstance(e, tirx.IntImm) or int(e) != int(loop.extent) for e, loop in zip(extents, loops, strict=True)):
        return None
    variables = tuple(axis.var for axis in axes)
    simplified = _Simplified(source.iter_vars)
    return Block(
        name=source.name_hint,
        source=source,
        variables=variables,
        extents=tuple(int(e) for e in extents),
        reduced=tuple(axis.iter_type == tirx.IterVar.CommReduce for axis in axes),
        reads=tuple(_access(region, variables, simplified) for region in source.reads),
        write=_access(source.writes[0], variables, simplified),
    )


class _Simplified:
    """Expressions of a block's axes, simplified: most are a number, or an axis of several steps, and need no analyzer."""

    def __init__(self, axes: Sequence[Any]) -> None:
        self.axes = axes
        self.single = [axis.var for axis in axes if isinstance(axis.dom.extent, tirx.IntImm) and int(axis.dom.extent) == 1]

    @cached_property
    def analyzer(self) -> sym.Analyzer:
        analyzer = sym.Analyzer()
        for axis in self.axes:
            analyzer.bind(axis.var, axis.dom)
        return analyzer

    def __call__(self, expression: Any) -> Any:
        plain = isinstance(expression, tirx.Var | tirx.IntImm) and not any(expression.same_as(v) for v in self.single)
        return expression if plain else self.analyzer.simplify(expression)


def _access(region: Any, variables: Sequence[Any], simplified: _Simplified) -> Access:
    buffer = buffer_of(region)
    index = tuple(simplified(r.min) for r in region.region)
    return Access(buffer, index, _strides(tuple(buffer.shape), index, variables, simplified))


def _strides(
    shape: Sequence[Any], index: Sequence[Any], variables: Sequence[Any], simplified: _Simplified
) -> tuple[int | None, ...]:
    if all(isinstance(i, tirx.Var | tirx.IntImm) for i in index) and all(isinstance(d, tirx.IntImm) for d in shape):
        # Most are: no expression of theirs needs to be made and looked through.
        steps = [prod(int(d) for d in shape[at + 1 :]) for at in range(len(shape))]
        return tuple(sum(step for i, step in zip(index, steps, strict=True) if i.same_as(v)) for v in variables)
    place: Any = tirx.const(0, "int64")
    for dimension, i in zip(shape, index, strict=True):
        place = place * dimension + i
    place = simplified(place)
    return tuple(_stride(place, v) for v in variables)


def buffer_of(region: Any) -> Any:
    """The buffer of a region that a block reads or writes."""
    return region.buffer if hasattr(region, "buffer") else region.source


def _stride(place: Any, variable: Any) -> int | None:
    linear = sym.detect_linear_equation(place, [variable])
    return int(linear[0]) if len(linear) and isinstance(linear[0], tirx.IntImm) else None


def uses(access: Access, variable: Any) -> bool:
    """Whether the place of an access depends on a variable."""
    return any(uses_variable(index, variable) for index in access.index)


def uses_variable(expression: Any, variable: Any) -> bool:
    return any(e.same_as(variable) for e in _expressions(expression) if isinstance(e, tvm.runtime.Object))


def merged(access: Access, extents: Sequence[int]) -> int:
    """How many of the last axes are one contiguous run in the buffer, or leave the place unchanged."""
    count = 0
    expected = 1
    still = None
    for stride, extent in zip(reversed(access.strides), reversed(extents), strict=True):
        if extent > 1:
            if stride not in (0, expected) or (still is not None and still != (stride == 0)):
                break
            still = stride == 0
            expected *= extent
        count += 1
    return count


def _expressions(node: Any) -> Iterator[Any]:
    """Every expression of a block's body: there is no visitor of TIR in TVM's Python."""
    yield node
    for name in ("value", "a", "b", "condition", "true_value", "false_value", "args", "body", "seq"):
        child = getattr(node, name, None)
        if isinstance(child, tvm.ir.Array | list | tuple):
            for each in child:
                yield from _expressions(each)
        elif isinstance(child, tvm.runtime.Object) and child is not None:
            yield from _expressions(child)
