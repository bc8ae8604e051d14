"""An expansion (1x1) becomes part of the depthwise convolution that alone reads its results: the wide map is never in memory as a whole.

    z = clip(conv2d(x, w) + t);  y = clip(depthwise(z, v) + u)  -->  y = chained(x, w, t, v, u)

Where no backward reads ``z`` (layers that stay as they are, evaluation, prediction), writing and reading it is most of what an inverted
residual costs: it has six times the channels of x and y. ``schedules.cpu.chain`` computes some of its channels at a time, and what
follows from them while they are in the cache. Runs before ``FusePrologues``, on kernels of TVM's groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir import Schedule

from tvmtrain import signature
from tvmtrain.schedules import SCHEDULED, merging
from tvmtrain.schedules.blocks import CHAINED, Block
from tvmtrain.schedules.cpu import chains
from tvmtrain.sizes import bytes_of
from tvmtrain.targets import Device


@module_pass(opt_level=0, name="FuseChains")
@dataclass(frozen=True)
class FuseChains:
    """For functions of one dataflow block, and maps that do not stay in a core's cache; where the two have a schedule as one."""

    device: Device

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        kernels = {g: _Kernel(f) for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc) and SCHEDULED not in f.attrs}
        fitting: dict[tuple[GlobalVar, GlobalVar], bool] = {}
        return merging.rewritten(mod, lambda f, builder: _Chaining(f, kernels, fitting, self.device, builder).done())


class _Kernel(merging.Plain):
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

    @cached_property
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
        bindings = list(self.function.body.blocks[0].bindings)
        made = {b.var: b for b in bindings if merging.is_call(b) and b.value.args[0] in self.kernels}
        values = [*(binding.value for binding in bindings), self.function.body.body]
        read = Counter(var for value in values for var in relax.analysis.free_vars(value))
        kept = dict.fromkeys(bindings)
        for reader in made.values():
            operands = [v for v in relax.analysis.free_vars(reader.value) if v in made and read[v] == 1]
            maps = [v for v in operands if bytes_of(v.ty) > self.device.caches.l2]
            first = next((made[v] for v in maps if self._fit(made[v], reader)), None)
            if first is not None:
                del kept[first]
                kept[reader] = self._merged(first, reader)
        return signature.with_bindings(self.function, [merged or binding for binding, merged in kept.items()])

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
        ended = self.builder.add_func(self.kernels[first.value.args[0]].marked, merging.name_of(first))
        product = relax.Call(merging.CALL_TIR, [ended, first.value.args[1]], None, first.value.ty_args)
        return merging.merged([relax.VarBinding(first.var, product), reader], self.builder)
