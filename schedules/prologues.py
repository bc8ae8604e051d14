"""Elementwise kernels become part of the kernels that read their results, which then read what these were made from.

    z = clip(c * s + t);  y = conv2d(z, w);  ..  -->  y = clip_conv2d(c, s, t, w);  ..

A BatchNorm and an activation between two convolutions stand by themselves where the backward reads ``c``, too: a pass over memory that
costs more than its arithmetic. In the kernels that read ``z`` it costs nothing that counts: they copy what they read anyway, or
compute from it elementwise. Runs between two ``FuseTIR``: the first makes kernels of TVM's groups, the second those of this pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import signature
from tvmtrain.schedules import SCHEDULED, merging
from tvmtrain.schedules.tiles import vector_axis

# TVM's class of operations that compute each place from the same place of a tensor, or of one that is repeated: OpPatternKind.
ELEMENTWISE = 1
# A tensor is small beside one of so many times its elements: statistics and parameters of channels.
SMALL = 8
# Elements of a result below which a kernel of its own costs nothing that counts.
FEWEST = 1024


@module_pass(opt_level=0, name="FusePrologues")
class FusePrologues:
    """For functions of one dataflow block; kernels that are scheduled already stay as they are."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        patterns = relax.transform.AnnotateTIROpPattern()(mod)
        prim_functions = {g: f for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
        kernels = {g: _Kernel(f, int(patterns[g.name_hint].attrs["op_pattern"])) for g, f in prim_functions.items()}
        return merging.rewritten(mod, lambda function, builder: _Merging(function, kernels).done(builder))


@dataclass(frozen=True)
class _Kernel(merging.Plain):
    """A kernel, and TVM's class of what it computes."""

    pattern: int

    @property
    def elementwise(self) -> bool:
        return self.pattern <= ELEMENTWISE and bool(self.blocks) and not any(b.expensive for b in self.blocks)

    def reading(self, position: int) -> int | None:
        """Passes over memory for making what it reads as argument ``position``: 0 where that is made on the way, None where it cannot be.

        A product that reads its values one at a time, for a vector of results each, needs them in memory or in a cache.
        """
        if SCHEDULED in self.function.attrs or not self.blocks:
            return None
        buffer = self.function.params[position]
        for block in self.blocks:
            axis = vector_axis(block)
            own = [r for r in block.reads if block.reduction and r.buffer.same_as(buffer)]
            if any(axis is None or r.strides[axis] == 0 for r in own):
                return 2
        return 0


class _Merging:
    """One function: which bindings are computed within the kernels of others."""

    def __init__(self, function: relax.Function, kernels: Mapping[GlobalVar, _Kernel]) -> None:
        self.function, self.kernels = function, kernels
        self.bindings = list(function.body.blocks[0].bindings)
        self.number = {binding.var: i for i, binding in enumerate(self.bindings)}
        # The bindings that are computed in front of each kernel's own.
        self.group: dict[int, list[int]] = {}
        self.gone: set[int] = set()
        self.readers: dict[int, list[int]] = {i: [] for i in range(len(self.bindings))}
        for i, binding in enumerate(self.bindings):
            for var in relax.analysis.free_vars(binding.value):
                if var in self.number:
                    self.readers[self.number[var]].append(i)
        self.returned = {self.number[v] for v in relax.analysis.free_vars(function.body.body) if v in self.number}

    def done(self, builder: relax.BlockBuilder) -> relax.Function:
        """The function with calls of merged kernels."""
        for i in range(len(self.bindings)):
            if self._pays(i):
                self._merge(i)
        kept = [self._rewritten(i, builder) for i in range(len(self.bindings)) if i not in self.gone]
        return signature.with_bindings(self.function, kept)

    def _kernel(self, i: int) -> _Kernel | None:
        binding = self.bindings[i]
        return self.kernels[binding.value.args[0]] if merging.is_call(binding) else None

    def _pays(self, i: int) -> bool:
        """Whether fewer large tensors are read and written when all readers of a result make it themselves."""
        kernel, readers = self._kernel(i), self.readers[i]
        if (
            kernel is None
            or not readers
            or i in self.returned
            or _elements(self.bindings[i].var) < FEWEST
            or not kernel.elementwise
        ):
            return False
        costs = [cost for reader in readers if (cost := self._reading(reader, self.bindings[i].var)) is not None]
        large = len(self._large(i))
        return len(costs) == len(readers) and 0 < sum(large + cost for cost in costs) < large + 1 + len(readers)

    def _large(self, i: int) -> set[relax.Var]:
        """The tensors of its result's size that a binding reads, with what is computed in front of it."""
        own = [*self.group.get(i, []), i]
        made = {self.bindings[k].var for k in own}
        size = _elements(self.bindings[i].var)
        read = {v for k in own for v in relax.analysis.free_vars(self.bindings[k].value)} - made
        return {v for v in read if not isinstance(v, GlobalVar) and _elements(v) * SMALL > size}

    def _reading(self, reader: int, var: relax.Var) -> int | None:
        kernel = self._kernel(reader)
        if kernel is None:
            return None
        places = [k for k, arg in enumerate(self.bindings[reader].value.args[1].fields) if arg.same_as(var)]
        costs = [cost for k in places if (cost := kernel.reading(k)) is not None]
        return max(costs) if costs and len(costs) == len(places) else None

    def _merge(self, i: int) -> None:
        for reader in self.readers[i]:
            before = self.group.setdefault(reader, [])
            before += [k for k in (*self.group.get(i, []), i) if k not in before]
        self.gone.add(i)

    def _rewritten(self, i: int, builder: relax.BlockBuilder) -> relax.Binding:
        binding = self.bindings[i]
        if i not in self.group:
            return binding
        return merging.merged([*(self.bindings[k] for k in self.group[i]), binding], builder)


def _elements(var: relax.Var) -> int:
    shape = getattr(var.ty, "shape", None)
    return prod(int(d) for d in shape) if shape is not None else 0
