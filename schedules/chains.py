"""A convolution becomes part of the depthwise one that alone reads its results, and both of the projection: no wide map is in memory.

    z = clip(conv2d(x, w) + t);  y = clip(depthwise(z, v) + u)  -->  y = chained(x, w, t, v, u)
    p = conv2d(y, q) + s                                       -->  p = chained(x, w, t, v, u, q, s)

Where no backward reads ``z`` (layers that stay as they are, evaluation, prediction), writing and reading it is most of what an inverted
residual costs: it has six times the channels of x and p. ``schedules.cpu.chain`` computes some channels of an expansion (1x1) at a
time, and what follows from them while they are in the cache; where a band of all channels of ``y`` stays there, too,
``schedules.bottleneck`` goes on to the projection, and ``z`` may be of any convolution. Runs before ``FusePrologues``, on kernels of
TVM's groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

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

# Which axes a product over channels (1x1) sums up, and one over channels and taps.
PRODUCT, WINDOW = (False, False, False, True), (False,) * 4 + (True,) * 3


@module_pass(opt_level=0, name="FuseChains")
@dataclass(frozen=True)
class FuseChains:
    """For functions of one dataflow block, and maps that do not stay in a core's cache; where the kernels have a schedule as one."""

    device: Device

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        kernels = {g: _Kernel(f) for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc) and SCHEDULED not in f.attrs}
        fitting: dict[tuple[GlobalVar, ...], bool] = {}
        return merging.rewritten(mod, lambda f, builder: _Chaining(f, kernels, fitting, self.device, builder).done())


class _Kernel(merging.Plain):
    @cached_property
    def sums(self) -> list[Block]:
        return [block for block in self.blocks if block.reduction]

    @property
    def is_product(self) -> bool:
        """Whether its one reduction is [images, filters, places] over channels, and elementwise work follows."""
        return self._sums_up(PRODUCT)

    @property
    def is_convolution(self) -> bool:
        """Whether its one reduction is four axes (a map's) over channels, more than one, and taps, and elementwise work follows."""
        return self._sums_up(WINDOW) and self.sums[0].extents[4] > 1

    @property
    def is_depthwise(self) -> bool:
        """Whether its one reduction is [images, channels, rows, columns] over the taps of one channel."""
        return [block.reduced for block in self.sums] == [WINDOW] and self.sums[0].extents[4] == 1

    @cached_property
    def marked(self) -> tirx.PrimFunc:
        """The same with its last block marked: its results stay in a cache."""
        sch = Schedule(self.function, error_render_level="none")
        sch.annotate(sch.get_sblock(self.blocks[-1].name), CHAINED, 1)
        return sch.mod["main"]

    def _sums_up(self, reduced: Sequence[bool]) -> bool:
        if [block.reduced for block in self.sums] != [reduced]:
            return False
        (sums,), last = self.sums, self.blocks[-1]
        return not last.reduction and last.volume == prod(sums.extents[axis] for axis in sums.spatial)


@dataclass(frozen=True)
class _Chaining:
    """One function: which calls are computed within others. fitting: rows of kernels, and whether they have a schedule as one."""

    function: relax.Function
    kernels: Mapping[GlobalVar, _Kernel]
    fitting: dict[tuple[GlobalVar, ...], bool]
    device: Device
    builder: relax.BlockBuilder

    def done(self) -> relax.Function:
        bindings = list(self.function.body.blocks[0].bindings)
        kept = dict.fromkeys(bindings)
        for calls in self._candidates(bindings):
            if all(kept.get(call, call) is None for call in calls) and self._fit(calls):
                *inside, last = calls
                for call in inside:
                    del kept[call]
                kept[last] = self._merged(calls)
        return signature.with_bindings(self.function, [merged or binding for binding, merged in kept.items()])

    def _candidates(self, bindings: Sequence[relax.Binding]) -> Iterator[tuple[relax.Binding, ...]]:
        """Calls of which each alone reads the one before, from maps that stay in no cache: three, then two."""
        made = {b.var: b for b in bindings if merging.is_call(b) and b.value.args[0] in self.kernels}
        values = [*(binding.value for binding in bindings), self.function.body.body]
        read = Counter(var for value in values for var in relax.analysis.free_vars(value))
        large = {v: b for v, b in made.items() if read[v] == 1 and bytes_of(v.ty) > self.device.caches.l2}
        pairs = [(large[v], b) for b in made.values() for v in relax.analysis.free_vars(b.value) if v in large]
        yield from ((first, reader, last) for reader, last in pairs for first, other in pairs if other is reader)
        yield from pairs

    def _fit(self, calls: Sequence[relax.Binding]) -> bool:
        row = tuple(call.value.args[0] for call in calls)
        if row not in self.fitting:
            first, reader, *projection = (self.kernels[kernel] for kernel in row)
            produced = first.is_product or (bool(projection) and first.is_convolution)
            likely = produced and reader.is_depthwise and all(kernel.is_product for kernel in projection)
            self.fitting[row] = likely and self._scheduled(calls)
        return self.fitting[row]

    def _scheduled(self, calls: Sequence[relax.Binding]) -> bool:
        """Whether they are one schedule with the default decisions."""
        functions = {b.value.args[0]: self.kernels[b.value.args[0]].function for b in calls}
        trial = replace(self, builder=relax.BlockBuilder(tvm.IRModule(functions)))
        call = trial._merged(calls).value
        operands = [relax.Var(f"operand{i}", operand.ty) for i, operand in enumerate(call.args)]
        with trial.builder.function("main", operands):
            with trial.builder.dataflow():
                result = trial.builder.emit_output(relax.Call(call.op, operands))
            trial.builder.emit_func_output(result)
        fused = relax.transform.FuseTIR()(trial.builder.get())
        return any(chains(f, self.device) for f in fused.functions.values() if isinstance(f, tirx.PrimFunc))

    def _merged(self, calls: Sequence[relax.Binding]) -> relax.Binding:
        """A call of all kernels as one."""
        *inside, last = calls
        return merging.merged([*(self._ended(call) for call in inside), last], self.builder)

    def _ended(self, call: relax.Binding) -> relax.Binding:
        """The call with its results marked."""
        kernel = self.builder.add_func(self.kernels[call.value.args[0]].marked, merging.name_of(call))
        return relax.VarBinding(call.var, relax.Call(merging.CALL_TIR, [kernel, call.value.args[1]], None, call.value.ty_args))
