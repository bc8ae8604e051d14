"""An expansion (1x1) becomes part of the depthwise convolution that alone reads its results: the wide map is never in memory as a whole.

    z = clip(conv2d(x, w) + t);  y = clip(depthwise(z, v) + u)  -->  y = chained(x, w, t, v, u)

Where no backward reads ``z`` (layers that stay as they are, evaluation, prediction), writing and reading it is most of what an inverted
residual costs: it has six times the channels of x and y. ``schedules.cpu.chain`` computes some of its channels at a time, and what
follows from them while they are in the cache. Runs before ``FusePrologues``, on kernels of TVM's groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir import Schedule

from tvmtrain.schedules import SCHEDULED
from tvmtrain.schedules.blocks import CHAINED, FAILURES, Block
from tvmtrain.schedules.cpu import blocks_of
from tvmtrain.schedules.prologues import CALL_TIR, elements, kernel_name, kernel_of
from tvmtrain.targets import Device

# Bytes of an element.
FLOAT = 4


@module_pass(opt_level=0, name="FuseChains")
@dataclass(frozen=True)
class FuseChains:
    """For functions of one dataflow block, and maps that do not stay in the caches of ``device`` by themselves."""

    device: Device

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        builder = relax.BlockBuilder(mod)
        kernels = {g: f for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc) and SCHEDULED not in f.attrs}
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and len(function.body.blocks) == 1:
                builder.update_func(builder.get().get_global_var(name.name_hint), self._chained(function, kernels, builder))
        return builder.get()

    def _chained(
        self, function: relax.Function, kernels: Mapping[GlobalVar, tirx.PrimFunc], builder: relax.BlockBuilder
    ) -> relax.Function:
        bindings = list(function.body.blocks[0].bindings)
        made = {b.var: b for b in bindings if _calls(b, kernels)}
        read = [v for b in bindings for v in relax.analysis.free_vars(b.value)] + list(
            relax.analysis.free_vars(function.body.body)
        )
        kept: list[relax.Binding] = []
        gone: set[relax.Var] = set()
        for reader in bindings:
            first = next((made[v] for v in relax.analysis.free_vars(reader.value) if self._stays(v, made, read)), None)
            ended = _ended(first, reader, kernels) if first is not None and reader.var in made else None
            if first is None or ended is None:
                kept.append(reader)
                continue
            kept.append(_merged(first, reader, builder.add_func(ended, kernel_name(first)), builder))
            gone.add(first.var)
        block = relax.DataflowBlock([b for b in kept if b.var not in gone])
        f = function
        return relax.Function(f.params, relax.SeqExpr([block], f.body.body), f.ret_ty, f.is_pure, f.attrs)

    def _stays(self, var: relax.Var, made: Mapping[relax.Var, relax.Binding], read: list[relax.Var]) -> bool:
        """Whether a kernel's result is read once, and is larger than the caches of all cores."""
        once = var in made and sum(each.same_as(var) for each in read) == 1
        return once and FLOAT * elements(var) > self.device.caches.l2 * self.device.cores


def _calls(binding: relax.Binding, kernels: Mapping[GlobalVar, tirx.PrimFunc]) -> bool:
    value = binding.value
    return isinstance(value, relax.Call) and value.op == CALL_TIR and value.args[0] in kernels


def _ended(first: relax.Binding, reader: relax.Binding, kernels: Mapping[GlobalVar, tirx.PrimFunc]) -> tirx.PrimFunc | None:
    """The product ``first`` with its last block marked; None if the two are no expansion and depthwise convolution."""
    with suppress(*FAILURES):
        sch = Schedule(kernels[first.value.args[0]], error_render_level="none")
        blocks = blocks_of(sch)
        others = blocks_of(Schedule(kernels[reader.value.args[0]], error_render_level="none"))
        if _expands(blocks) and _is_depthwise(others):
            sch.annotate(sch.get_sblock(blocks[-1].name), CHAINED, 1)
            return sch.mod["main"]
    return None


def _expands(blocks: list[Block]) -> bool:
    """Whether there is one reduction, [images, filters, places] over channels, and elementwise work after it."""
    sums = [b for b in blocks if b.reduction]
    return (
        len(sums) == 1
        and sums[0].reduced == (False, False, False, True)
        and blocks[-1].volume * sums[0].extents[3] == sums[0].volume
    )


def _is_depthwise(blocks: list[Block]) -> bool:
    """Whether there is one reduction, [images, channels, rows, columns] over taps of one channel."""
    sums = [b for b in blocks if b.reduction]
    return len(sums) == 1 and sums[0].reduced == (False,) * 4 + (True,) * 3 and sums[0].extents[4] == 1


def _merged(first: relax.Binding, reader: relax.Binding, ended: GlobalVar, builder: relax.BlockBuilder) -> relax.Binding:
    call = first.value
    product = relax.VarBinding(first.var, relax.Call(CALL_TIR, [ended, call.args[1]], None, call.ty_args))
    own = [product, reader]
    read = list(dict.fromkeys(a for b in own for a in b.value.args[1].fields if not a.same_as(first.var)))
    merged = builder.add_func(kernel_of(own, read), f"{kernel_name(first)}_{kernel_name(reader)}")
    return relax.VarBinding(reader.var, relax.Call(merged, read))
