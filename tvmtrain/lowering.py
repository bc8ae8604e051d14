"""From a Relax module to native code, in one visible list of steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, Sequential
from tvm.runtime import Executable
from tvm.target import Target
from tvm_ffi import get_global_func, register_global_func
from tvm_ffi.registry import remove_global_func

# Importing the kernels registers them.
from tvmtrain import cuda_compiler, filtering, gpu_code, kernels, norm_kernels, pool_kernels, registers, schedules  # noqa: F401
from tvmtrain.passes.order import OrderForMemory
from tvmtrain.passes.plan_arena import PlanArena
from tvmtrain.passes.share_workspace import ShareWorkspace, place_buffers
from tvmtrain.passes.update_in_place import UpdateInPlace
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
            relax.transform.DeadCodeElimination(),
        ]
    )
    with Target(dict(device.target)), PassContext(opt_level=3):
        return steps(mod)


def schedule(mod: tvm.IRModule, device: Device) -> tvm.IRModule:
    """The second half of ``lower``: the same kernels, scheduled for ``device``."""
    with Target(dict(device.target)), PassContext(opt_level=3):
        return schedules.apply(mod, device)


def _legalize(device: Device) -> list[tvm.ir.transform.Pass]:
    if device.gpu is None:
        return [relax.backend.DispatchSortScan(), relax.transform.LegalizeOps(norm_kernels.legalization(device))]
    return [relax.transform.LegalizeOps({**kernels.FOR_GPUS, **filtering.FOR_GPUS})]


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
    if device.gpu is None:
        return _generate(planned, device)
    gpu_code.teach_tvm()
    with _compiled_for(device.gpu):
        return _generate(planned, device)


def _generate(planned: tvm.IRModule, device: Device) -> Executable:
    # CUDA's own compiler unrolls loops; written out before it reads them, they are a hundred times its work.
    written_out = {"tirx.UnrollLoop": {"explicit_unroll": False}} if device.gpu else {}
    with PassContext(opt_level=3, config=written_out):
        target, kernel_pipeline = Target(dict(device.target)), "default" if device.gpu else registers.PIPELINE
        return tvm.compile(planned, target=target, relax_pipeline=_virtual_machine(), tir_pipeline=kernel_pipeline)


@contextmanager
def _compiled_for(arch: str) -> Iterator[None]:
    """In place of CUDA source, which TVM compiles where the code is loaded (or nowhere), the executable gets machine code."""
    hook = "tvm_callback_cuda_postproc"
    before = get_global_func(hook, allow_missing=True)
    register_global_func(hook, lambda source, _: gpu_code.to_text(cuda_compiler.compile_source(source, arch)), override=True)
    try:
        yield
    finally:
        remove_global_func(hook)
        if before is not None:
            register_global_func(hook, before)


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
