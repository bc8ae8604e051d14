"""From a Relax module to scheduled kernels with places in memory, in one visible list of steps."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, Sequential
from tvm.runtime import Executable
from tvm.target import Target

# Importing the kernels registers them.
from tvmtrain import codegen, filtering, kernels, norm_kernels, pool_kernels, schedules
from tvmtrain.legalize_once import legalize_once
from tvmtrain.passes.order import OrderForMemory
from tvmtrain.passes.plan_arena import PlanArena
from tvmtrain.passes.share_workspace import ShareWorkspace, place_buffers
from tvmtrain.passes.update_in_place import UpdateInPlace
from tvmtrain.schedules.chains import FuseChains
from tvmtrain.schedules.prologues import FusePrologues
from tvmtrain.targets import Device


def lower(mod: tvm.IRModule, device: Device) -> tvm.IRModule:
    """Relax operators become scheduled loops: ``call_tir`` of PrimFuncs, fused where one reads what another has just made."""
    return schedule(fuse(mod, device), device)


def fuse(mod: tvm.IRModule, device: Device) -> tvm.IRModule:
    """The first half of ``lower``: loops as the formulas say them."""
    steps = Sequential(
        [
            *_legalize(device),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            *([] if device.gpu else [FuseChains(device), FusePrologues(), relax.transform.FuseTIR()]),
            relax.transform.DeadCodeElimination(),
        ]
    )
    with Target(dict(device.target)), PassContext(opt_level=3):
        return steps(mod)


def schedule(mod: tvm.IRModule, device: Device, *, tuned: bool = True) -> tvm.IRModule:
    """The second half of ``lower``: the same kernels, scheduled for ``device``, as its records say or untuned."""
    with Target(dict(device.target)), PassContext(opt_level=3):
        return schedules.apply(mod, device, tuned=tuned)


def _legalize(device: Device) -> list[tvm.ir.transform.Pass]:
    if device.gpu is None:
        ours = kernels.legalization(device) | norm_kernels.legalization(device)
        return [relax.backend.DispatchSortScan(), legalize_once(ours)]
    return [legalize_once({**kernels.FOR_GPUS, **pool_kernels.FOR_GPUS, **filtering.FOR_GPUS})]


def plan(mod: tvm.IRModule) -> tvm.IRModule:
    """Lowered functions with every tensor's place in memory; the bytes are attributes of the functions (``passes.plan_arena``)."""
    steps = Sequential(
        [
            relax.transform.RewriteDataflowReshape(),
            UpdateInPlace(),
            # The kernels that now have a twin in place: nobody calls them, and they would be compiled.
            relax.transform.DeadCodeElimination(),
            place_buffers(),
            OrderForMemory(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            ShareWorkspace(),
            PlanArena(),
        ]
    )
    with PassContext(opt_level=3):
        return steps(mod)


def compile_module(mod: tvm.IRModule, device: Device) -> Executable:
    """Native code of every Relax function of ``mod`` (static shapes) for ``device``."""
    return codegen.generate(plan(lower(mod, device)), device)
