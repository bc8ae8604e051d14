"""From a Relax module to native code, in one visible list of steps."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, Sequential
from tvm.runtime import Executable
from tvm.target import Target

# Importing the kernels registers them.
from tvmtrain import filtering, kernels, pool_kernels, schedules  # noqa: F401
from tvmtrain.passes.order import OrderForMemory
from tvmtrain.passes.plan_arena import PlanArena
from tvmtrain.passes.share_workspace import ShareWorkspace, place_buffers
from tvmtrain.passes.update_in_place import UpdateInPlace
from tvmtrain.targets import Device


def lower(mod: tvm.IRModule, device: Device) -> tvm.IRModule:
    """Relax operators become scheduled loops: ``call_tir`` of PrimFuncs, fused where one reads what another has just made."""
    steps = Sequential(
        [
            relax.backend.DispatchSortScan(),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )
    with Target(dict(device.target)), PassContext(opt_level=3):
        return schedules.apply(steps(mod), device)


def plan(mod: tvm.IRModule) -> tvm.IRModule:
    """Lowered functions with every tensor's place in memory; the bytes are attributes of the functions (``passes.plan_arena``)."""
    steps = Sequential(
        [
            relax.transform.RewriteDataflowReshape(),
            UpdateInPlace(),
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
    return generate(plan(lower(mod, device)), device)


def generate(planned: tvm.IRModule, device: Device) -> Executable:
    """Native code of what ``plan`` made."""
    with PassContext(opt_level=3):
        return tvm.compile(planned, target=Target(dict(device.target)), relax_pipeline=_virtual_machine())


def _virtual_machine() -> Sequential:
    """Relax's own lowering to its virtual machine."""
    return Sequential(
        [
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
