"""An expansion (1x1) becomes part of the depthwise convolution that alone reads its results: the wide map is never in memory as a whole.

    z = clip(conv2d(x, w) + t);  y = clip(depthwise(z, v) + u)  -->  y = chained(x, w, t, v, u)

Where no backward reads ``z`` (layers that stay as they are, evaluation, prediction), writing and reading it is most of what an inverted
residual costs: it has six times the channels of x and y. ``schedules.cpu.chain`` computes some of its channels at a time, and what
follows from them while they are in the cache. Runs before ``FusePrologues``, on kernels of TVM's groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir import Schedule

from tvmtrain.schedules import SCHEDULED
from tvmtrain.schedules.blocks import CHAINED, FAILURES, Block
from tvmtrain.schedules.cpu import blocks_of, chains
from tvmtrain.schedules.prologues import CALL_TIR, elements, kernel_name, kernel_of
from tvmtrain.targets import Device

# Bytes of an element.
FLOAT = 4


@module_pass(opt_level=0, name="FuseChains")
@dataclass(frozen=True)
class FuseChains:
    """For functions of one dataflow block, and maps that do not stay in a core's cache; where the two have a schedule as one."""

    device: Device

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        builder = relax.BlockBuilder(mod)
        kernels = {g: _Kernel(f) for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc) and SCHEDULED not in f.attrs}
        fitting: dict[tuple[GlobalVar, GlobalVar], bool] = {}
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and len(function.body.blocks) == 1:
                chained = _Chaining(function, kernels, fitting, self.device, builder).done()
                builder.update_func(builder.get().get_global_var(name.name_hint), chained)
        return builder.get()


@dataclass(frozen=True)
class _Kernel:
    function: tirx.PrimFunc

    @cached_property
    def blocks(self) -> list[Block]:
        """None of them where they are not plain."""
        with suppress(*FAILURES):
            return blocks_of(Schedule(self.function, error_render_level="none"))
        return []

    @cached_property
    def sums(self) -> list[Block]:
        return [block for block in self.blocks if block.reduction]

    @property
    def expands(self) -> bool:
        """Whether its one reduction is [images, filters, places] over channels, and elementwise work follows."""
        if [block.reduced for block in self.sums] != [(False, False, False, True)]:
            return False
        (product,), last = self.sums, self.blocks[-1]
        return not last.reduction and last.volume * product.extents[3] == product.volume

    @property
    def depthwise(self) -> bool:
        """Whether its one reduction is [images, channels, rows, columns] over the taps of one channel."""
        return [block.reduced for block in self.sums] == [(False,) * 4 + (True,) * 3] and self.sums[0].extents[4] == 1

    @property
    def marked(self) -> tirx.PrimFunc:
        """The same with its last block marked as the end of a product."""
        sch = Schedule(self.function, error_render_level="none")
        sch.annotate(sch.get_sblock(self.blocks[-1].name), CHAINED, 1)
        return sch.mod["main"]


@dataclass(frozen=True)
class _Chaining:
    """One function: which calls are computed within others. fitting: pairs of kernels, and whether they have a schedule as one."""

    function: relax.Function
    kernels: Mapping[GlobalVar, _Kernel]
    fitting: dict[tuple[GlobalVar, GlobalVar], bool]
    device: Device
    builder: relax.BlockBuilder

    def done(self) -> relax.Function:
        f = self.function
        bindings = list(f.body.blocks[0].bindings)
        made = {binding.var: binding for binding in bindings if self._kernel(binding) is not None}
        values = [*(binding.value for binding in bindings), f.body.body]
        read = Counter(var for value in values for var in relax.analysis.free_vars(value))
        kept = dict.fromkeys(bindings)
        for reader in made.values():
            maps = [v for v in relax.analysis.free_vars(reader.value) if v in made and read[v] == 1 and self._large(v)]
            first = next((made[v] for v in maps if self._fit(made[v], reader)), None)
            if first is not None:
                del kept[first]
                kept[reader] = self._merged(first, reader)
        block = relax.DataflowBlock([merged or binding for binding, merged in kept.items()])
        return relax.Function(f.params, relax.SeqExpr([block], f.body.body), f.ret_ty, f.is_pure, f.attrs)

    def _kernel(self, binding: relax.Binding) -> _Kernel | None:
        value = binding.value
        return self.kernels.get(value.args[0]) if isinstance(value, relax.Call) and value.op == CALL_TIR else None

    def _large(self, var: relax.Var) -> bool:
        return FLOAT * elements(var) > self.device.caches.l2

    def _fit(self, first: relax.Binding, reader: relax.Binding) -> bool:
        pair = first.value.args[0], reader.value.args[0]
        if pair not in self.fitting:
            likely = self.kernels[pair[1]].depthwise and self.kernels[pair[0]].expands
            self.fitting[pair] = likely and self._scheduled(first, reader)
        return self.fitting[pair]

    def _scheduled(self, first: relax.Binding, reader: relax.Binding) -> bool:
        """Whether the two are one schedule with the default decisions."""
        functions = {b.value.args[0]: self.kernels[b.value.args[0]].function for b in (first, reader)}
        trial = replace(self, builder=relax.BlockBuilder(tvm.IRModule(functions)))
        call = trial._merged(first, reader).value
        operands = [relax.Var(f"operand{i}", operand.ty) for i, operand in enumerate(call.args)]
        with trial.builder.function("main", operands):
            with trial.builder.dataflow():
                result = trial.builder.emit_output(relax.Call(call.op, operands))
            trial.builder.emit_func_output(result)
        fused = relax.transform.FuseTIR()(trial.builder.get())
        return any(chains(f, self.device) for f in fused.functions.values() if isinstance(f, tirx.PrimFunc))

    def _merged(self, first: relax.Binding, reader: relax.Binding) -> relax.Binding:
        """A call of both kernels as one."""
        ended = self.builder.add_func(self.kernels[first.value.args[0]].marked, kernel_name(first))
        call = relax.Call(CALL_TIR, [ended, first.value.args[1]], None, first.value.ty_args)
        own = [relax.VarBinding(first.var, call), reader]
        read = list(dict.fromkeys(a for b in own for a in b.value.args[1].fields if not a.same_as(first.var)))
        merged = self.builder.add_func(kernel_of(own, read), f"{kernel_name(first)}_{kernel_name(reader)}")
        return relax.VarBinding(reader.var, relax.Call(merged, read))
