"""Computes a large part of the forward strip by strip: a few rows of its result at a time, through all of its operations.

    a = relu(conv2d(x, w1)); b = conv2d(a, w2, stride=2)
    -->  a0 = relu(conv2d(rows of x, w1)); b0 = conv2d(a0, w2, stride=2); a1 = ..; b1 = ..; b = concat(b0, b1, ..)

Of a, the largest tensor, only a strip is alive; rows at the borders of strips are computed twice. This is the patch-based inference of
MCUNetV2 (Lin et al., 2021, arXiv 2110.15352) with strips for patches, for what a plan freezes: what the backward reads is not
computed in strips. The values are the same, up to rounding where a kernel adds in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, prod

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import signature
from tvmtrain.passes import rows
from tvmtrain.passes.rows import Rows, Window
from tvmtrain.sizes import bytes_of

# Into how many strips a part of the forward may be cut.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Of how many pieces between two waists a part may be made.
LONGEST = 12
# How often the work of a part may be done again to save memory.
DEAREST = 2
# What one more call of a kernel takes, in multiplications.
CALL = 20_000


@module_pass(opt_level=0, name="InStrips")
@dataclass(frozen=True)
class InStrips:
    """limit: bytes of intermediate tensors that a part of the forward may need at once, as far as its shapes allow."""

    limit: int

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        result = mod.clone()
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and signature.has_ports(function):
                result[name] = _rewritten(function, self.limit)
        return result


def _rewritten(function: relax.Function, limit: int) -> relax.Function:
    forward = Forward(function)
    parts = {part.bindings[0]: (part, count) for part, count in _chosen(forward, limit) if count > 1}
    if not parts:
        return function
    bindings: list[relax.Binding] = []
    inside: set[int] = set()
    for i, binding in enumerate(forward.bindings):
        if i in parts:
            part, count = parts[i]
            inside.update(part.bindings)
            first, last = part.bindings[0], part.bindings[-1]
            bindings += [forward.bindings[k] for k in range(first, last) if k not in inside]
            bindings += _Strips(part, count).emitted()
            done = last
        elif i not in inside and not (inside and i < done):
            bindings.append(binding)
    return signature.with_bindings(function, bindings)


# --- Where the forward can be cut -------------------------------------------------------------------------------------------


class Forward:
    """The bindings of a function, and its waists: values of the batch that are alone when they have just been made.

    ``waists``: the input, as -1, and numbers of bindings.
    """

    def __init__(self, function: relax.Function) -> None:
        (block,) = function.body.blocks
        self.bindings = list(block.bindings)
        ports = zip(signature.inputs(function), function.params, strict=True)
        inputs = [var for (role, _), var in ports if role == "input"]
        self.data = set(inputs)
        last: dict[relax.Var, float] = {}
        for i, binding in enumerate(self.bindings):
            read = relax.analysis.free_vars(binding.value)
            last |= dict.fromkeys(read, i)
            if any(var in self.data for var in read):
                self.data.add(binding.var)
        last |= dict.fromkeys(relax.analysis.free_vars(function.body.body), inf)
        self.image = inputs[0] if len(inputs) == 1 else None
        self.waists = [-1, *self._between_kernels(list(self._alone(last)))] if self.image is not None else []

    def _between_kernels(self, waists: list[int]) -> list[int]:
        """Without those whose value an elementwise operation turns into the next at once: both are one kernel's."""
        kept = []
        for i, after in zip(waists, [*waists[1:], None], strict=True):
            between = [k for k in range(i + 1, after or 0) if self.bindings[k].var in self.data]
            if after is None or between or not rows.moves_no_rows(self.bindings[after].value):
                kept.append(i)
        return kept

    def _alone(self, last: dict[relax.Var, float]) -> Iterator[int]:
        alive: dict[relax.Var, float] = {}
        for i, binding in enumerate(self.bindings):
            if binding.var in self.data:
                alive[binding.var] = last.get(binding.var, i)
            alive = {var: end for var, end in alive.items() if end > i}
            if list(alive) == [binding.var]:
                yield i

    def value(self, waist: int) -> relax.Var:
        return self.image if waist < 0 else self.bindings[waist].var

    def part(self, start: int, end: int) -> Part | None:
        """What lies between two waists; None where it is not row by row."""
        numbers = [i for i in range(start + 1, end + 1) if self.bindings[i].var in self.data]
        steps = []
        for i in numbers:
            var, call = self.bindings[i].var, self.bindings[i].value
            how = rows.window(call, self.data) if isinstance(call, relax.Call) else None
            if how is None:
                return None
            steps.append(Step(var, call, how, tuple(rows.images(call, self.data))))
        source, made = self.value(start), {step.var for step in steps}
        own = all(image in made or image.same_as(source) for step in steps for image in step.images)
        return Part(tuple(numbers), source, start >= 0, tuple(steps)) if own and steps else None


@dataclass(frozen=True)
class Step:
    """One operation, and the values of the batch that it reads."""

    var: relax.Var
    call: relax.Call
    how: Window
    images: tuple[relax.Var, ...]

    @cached_property
    def row_bytes(self) -> int:
        return bytes_of(self.var.ty) // self.height

    @cached_property
    def height(self) -> int:
        return int(self.var.ty.shape[rows.ROWS])

    @cached_property
    def row_work(self) -> int:
        """Multiplications of one row."""
        if self.call.op.name != rows.CONV:
            return 0
        batch, channels, _, width = (int(d) for d in self.var.ty.shape)
        return batch * channels * width * prod(int(d) for d in list(self.call.args[1].ty.shape)[1:])


@dataclass(frozen=True)
class Part:
    """Operations from ``source``, which is in the arena if ``kept``, to the value of the last one. ``bindings``: their numbers."""

    bindings: tuple[int, ...]
    source: relax.Var
    kept: bool
    steps: tuple[Step, ...]

    @cached_property
    def source_row(self) -> int:
        return bytes_of(self.source.ty) // int(self.source.ty.shape[rows.ROWS])

    def strips(self, count: int) -> list[Rows]:
        """The rows of the result in each of about ``count`` strips."""
        height = self.steps[-1].height
        each = -(-height // count)
        return [Rows(first, min(first + each, height)) for first in range(0, height, each)]

    def needed(self, result: Rows) -> dict[relax.Var, Rows] | None:
        """The rows of each value for these rows of the result; None where one lies on padding alone."""
        found = {self.steps[-1].var: result}
        for step in reversed(self.steps):
            reads = step.how.reads(found[step.var]) if step.var in found else None
            if not reads:
                return None
            for image in step.images:
                found[image] = reads | found.get(image, reads)
        return found

    def cost(self, count: int) -> Cost | None:
        """Of this part in ``count`` strips."""
        whole = bytes_of(self.source.ty) if self.kept else 0
        result = bytes_of(self.steps[-1].var.ty)
        if count == 1:
            everything = {self.source: Rows(0, 0)} | {step.var: Rows(0, step.height) for step in self.steps}
            return Cost(self._peak(everything, whole), 0, 0)
        every = self.strips(count)
        # Those between the second and the last two are alike.
        alike = max(1, len(every) - 3)
        some = [needed for strip in every[:2] + every[2:][-2:] if (needed := self.needed(strip)) is not None]
        if len(some) < min(len(every), 4):
            return None
        works = [sum(step.row_work * len(strip[step.var]) for step in self.steps) for strip in some]
        work = sum(works) + (alike - 1) * works[min(1, len(works) - 1)]
        # A strip has its own rows of the source; the others' results wait to be joined.
        highest = max(self._peak(strip, self.source_row * len(strip[self.source])) for strip in some)
        calls = (len(every) - 1) * sum(not rows.moves_no_rows(step.call) for step in self.steps)
        again = work - self.work
        return Cost(max(whole + highest + result, 2 * result), again + calls * CALL, again)

    @cached_property
    def work(self) -> int:
        """Multiplications, each operation's rows once."""
        return sum(step.row_work * step.height for step in self.steps)

    def _peak(self, held: dict[relax.Var, Rows], source: int) -> int:
        """Bytes alive at once while one strip is computed, its part of the source included.

        An elementwise operation writes where its operand was: it becomes part of the kernel that makes that.
        """
        place = {self.source: self.source}
        size = {self.source: source}
        last: dict[relax.Var, int] = {}
        for i, step in enumerate(self.steps):
            fused = [place[v] for v in step.images if rows.moves_no_rows(step.call) and not place[v].same_as(self.source)]
            place[step.var] = fused[-1] if fused else step.var
            size.setdefault(place[step.var], step.row_bytes * len(held[step.var]))
            last |= {place[v]: i for v in (*step.images, step.var)}
        made: dict[relax.Var, int] = {self.source: 0}
        for i, step in enumerate(self.steps):
            made.setdefault(place[step.var], i)
        steps = range(len(self.steps))
        return max(sum(size[v] for v in size if made[v] <= i <= last[v]) for i in steps)


@dataclass(frozen=True, order=True)
class Cost:
    """Bytes alive at once, what strips cost in multiplications, calls of more kernels too, and those that are done again alone."""

    peak: int
    extra: int
    again: int


# --- Which parts, and how many strips ---------------------------------------------------------------------------------------


def _chosen(forward: Forward, limit: int) -> list[tuple[Part, int]]:
    """The parts and strips that stay within the limit and cost least; where none do, those that need least memory."""
    waists = forward.waists
    # For each waist: (bytes over the limit, what strips cost, the way there).
    best: list[tuple[int, float, list[tuple[Part, int]]]] = [(0, 0, [])]
    for j in range(1, len(waists)):
        options = []
        for i in range(j - 1, max(-1, j - 1 - LONGEST), -1):
            part = forward.part(waists[i], waists[j])
            if part is None:
                break
            over, extra, way = best[i]
            count, cost = _strips(part, limit)
            options.append((max(over, cost.peak - limit), extra + cost.extra, [*way, (part, count)]))
        # What is not row by row costs what it costs.
        options = options or [best[j - 1]]
        best.append(min(options, key=lambda option: (max(option[0], 0), option[1], len(option[2]))))
    return best[-1][2] if best else []


def _strips(part: Part, limit: int) -> tuple[int, Cost]:
    """The fewest strips within the limit; else those that need least and are not too dear."""
    found = []
    for count in COUNTS:
        cost = part.cost(count) if count <= part.steps[-1].height else None
        if cost is None or cost.again > DEAREST * part.work:
            break
        if cost.peak <= limit:
            return count, cost
        found.append((cost, count))
    cost, count = min(found)
    return count, cost


# --- Writing them down ------------------------------------------------------------------------------------------------------


class _Strips:
    """The bindings that compute a part in strips, one strip after the other, and the join."""

    def __init__(self, part: Part, count: int) -> None:
        self.part, self.strips = part, part.strips(count)
        self.builder = relax.BlockBuilder()
        self.bindings: list[relax.Binding] = []

    def emitted(self) -> Sequence[relax.Binding]:
        results = [self._strip(k, strip) for k, strip in enumerate(self.strips)]
        joined = self.builder.normalize(R.concat(results, rows.ROWS))
        return [*self.bindings, relax.VarBinding(self.part.steps[-1].var, joined)]

    def _strip(self, k: int, strip: Rows) -> relax.Var:
        held = self.part.needed(strip)
        assert held is not None, "every count of strips was tried"
        source = self.part.source
        height = int(source.ty.shape[rows.ROWS])
        made: dict[relax.Var, relax.Expr] = {
            source: self._emit(f"{source.name}_strip{k}", rows.sliced(source, Rows(0, height), held[source]))
        }
        for step in self.part.steps:
            reads = step.how.reads(held[step.var])
            parts = {v: self._emit(f"{v.name}_rows{k}", rows.sliced(made[v], held[v], reads)) for v in step.images}
            value = rows.computed(step.call, step.how, held[step.var], parts)
            made[step.var] = self._emit(f"{step.var.name}_strip{k}", value)
        return made[self.part.steps[-1].var]

    def _emit(self, name: str, value: relax.Expr) -> relax.Var:
        if isinstance(value, relax.Var):
            return value
        value = self.builder.normalize(value)
        var = relax.DataflowVar(name, value.ty)
        self.bindings.append(relax.VarBinding(var, value))
        return var
