"""From kernels with places in memory to native code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import relax, tirx
from tvm.ir.transform import PassContext, Sequential
from tvm.runtime import Executable, Module, load_static_library
from tvm.target import Target
from tvm.target import codegen as llvm
from tvm_ffi import get_global_func, register_global_func
from tvm_ffi.registry import remove_global_func

from tvmtrain import cuda_compiler, gpu_code, registers, targets, toolchain
from tvmtrain import features as instruction_sets
from tvmtrain.targets import Device
from tvmtrain.toolchain import Toolchain

# Parts that a training step's kernels are compiled in, side by side; below FEW kernels, a linker takes longer than is won.
PARTS = 8
FEW = 64
# LLVM's third level takes longer than the second, and wins nothing where loops and vectors are written out already.
LEVEL = {"opt-level": 2}
# TVM's VM calls each kernel with the tensors it was compiled for: no code that checks each argument in each call. And LLVM finds common
# subexpressions anyway: TVM's own search for them takes its time and makes no kernel faster.
KERNELS = {"tirx.disable_assert": True, "tirx.disable_cse_tir": True}
# Passes of TVM's that leave a processor's kernels as they are, or what LLVM drops anyway: the object code is the same without them
# (tests/test_toolchain.py).
IDLE = ["tirx.RemoveNoOp"] + [
    f"s_tir.{name}"
    for name in (
        "InferFragment",
        "InjectPermutedLayout",
        "InjectSoftwarePipeline",
        "InjectVirtualThread",
        "LiftThreadBinding",
        "LowerAutoCopy",
        "LowerCrossThreadReduction",
        "LowerThreadAllreduce",
        "LowerVtcmAlloc",
        "ManifestSharedMemoryLocalStage",
        "MergeSharedMemoryAllocations",
        "ThreadSync",
        "TransformMmaBufferLayout",
        "UnifyThreadBinding",
        "VerifyVTCMLimit",
    )
]


@dataclass(frozen=True)
class Code:
    """Native code, and what links it (None: as TVM finds best, on the machine that it is for)."""

    executable: Executable
    linker: Toolchain | None

    def export_library(self, file_name: str) -> None:
        """Link the code into the shared library ``file_name``. Raises ``RuntimeError`` with the linker's words."""
        self.executable.export_library(file_name, fcompile=self.linker and self.linker.linker)

    def jit(self) -> Module:
        """The code as a module that runs in this process."""
        return self.executable.jit(fcompile=self.linker and self.linker.linker)


def tools(device: Device) -> Toolchain | None:
    """What links for ``device``; None if that is this machine and nothing is needed to run code in this process.

    Raises ``DeviceError``, naming what to install, where code for ``device`` cannot be made here.
    """
    if device.gpu is not None:
        cuda_compiler.find(device.gpu, device.cuda_toolkit)
    if device.arch == targets.architecture():
        return next(toolchain.installed(device), None)
    return toolchain.find(device)


def generate(planned: tvm.IRModule, device: Device) -> Executable:
    """Native code of what ``lowering.plan`` made."""
    if device.gpu is not None:
        gpu_code.teach_tvm()
        # CUDA's own compiler unrolls loops; written out before it reads them, they are a hundred times its work.
        written_out = {"tirx.UnrollLoop": {"explicit_unroll": False}}
        with _compiled_for(device.gpu, device.cuda_toolkit), PassContext(opt_level=3, config=written_out):
            return tvm.compile(
                planned, target=Target(dict(device.target)), relax_pipeline=_virtual_machine(), tir_pipeline="default"
            )
    with _for_processors():
        return _compile(_virtual_machine()(planned), device)


def _compile(mod: tvm.IRModule, device: Device) -> Executable:
    """For a processor. Many kernels are compiled on all cores of this machine, where it can link them."""
    target = processor(device)
    kernels = [(name, f) for name, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    if len(kernels) >= FEW and any(toolchain.installed(device)):
        functions = {name: f for name, f in mod.functions_items() if not isinstance(f, tirx.PrimFunc)}
        parts = [tvm.IRModule(dict(kernels[i::PARTS]), attrs=mod.attrs) for i in range(PARTS)]
        mod = tvm.IRModule(functions, attrs=mod.attrs).with_attr("external_mods", _side_by_side(parts, target))
    return tvm.compile(mod, target=target, relax_pipeline=None, tir_pipeline=registers.PIPELINE)


def _side_by_side(parts: Sequence[tvm.IRModule], target: Target) -> list[Module]:
    """Each part as an object file to be linked. TVM's compiler lets go of Python's lock, and LLVM's state is each part's own."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(cores()) as threads:
        paths = [str(Path(folder) / f"{i}.o") for i in range(len(parts))]
        return list(threads.map(_object, parts, [target] * len(parts), paths))


def _object(part: tvm.IRModule, target: Target, path: str) -> Module:
    compiled(part, target).write_to_file(path)
    return load_static_library(path, [name.name_hint for name in part.get_global_vars()])


def features(device: Device) -> tuple[str, ...]:
    """What the processor needs that runs this code (beside a GPU too), by the names of ``tvmtrain.features``."""
    target = device.target["host"] if device.gpu else device.target
    return instruction_sets.needed(device.arch, llvm.llvm_get_cpu_features(Target(dict(target))))


def processor(device: Device) -> Target:
    """A device without a GPU as the target that its kernels are compiled for."""
    return Target({**LEVEL, **device.target})


def compiled(kernels: tvm.IRModule, target: Target) -> Module:
    """Native code of scheduled kernels alone, for a processor."""
    with _for_processors():
        return tirx.build(kernels, target=target, pipeline=registers.PIPELINE)


def _for_processors() -> PassContext:
    """What TVM leaves out of a processor's kernels. A context is one thread's: each that compiles enters its own."""
    return PassContext(opt_level=3, config=KERNELS, disabled_pass=IDLE)


def cores() -> int:
    """What this process may compile on at a time."""
    return len(os.sched_getaffinity(0))


@contextmanager
def _compiled_for(arch: str, toolkit: str) -> Iterator[None]:
    """In place of CUDA source, which TVM compiles where the code is loaded (or nowhere), the executable gets machine code."""
    hook = "tvm_callback_cuda_postproc"
    before = get_global_func(hook, allow_missing=True)

    def machine_code(source: str, _: object) -> str:
        return gpu_code.to_text(cuda_compiler.compile_source(source, arch, toolkit))

    register_global_func(hook, machine_code, override=True)
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
            # ``b = a`` would be a call in each step; and one arena holds all tensors, so that none needs to be let go of.
            relax.transform.CanonicalizeBindings(),
            relax.transform.LowerAllocTensor(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
