"""From a Relax module to native code, in one visible list of steps."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

import numpy as np
import tvm
from tvm import relax
from tvm.ir.transform import PassContext, Sequential
from tvm.runtime import Executable
from tvm.target import Target

# Importing the kernels registers them.
from tvmtrain import kernels, pool_kernels, runtime, schedules, targets  # noqa: F401
from tvmtrain.artifact import Artifact, Entry, Manifest, TensorSpec
from tvmtrain.graph import TrainGraph
from tvmtrain.passes.order import OrderForMemory
from tvmtrain.passes.plan_arena import FIGURES, PlanArena
from tvmtrain.passes.update_in_place import UpdateInPlace
from tvmtrain.spec import optimizer_to_dict
from tvmtrain.targets import Device


def build(graph: TrainGraph, device: str | Device = "host", *, gradients: bool = False) -> Artifact:
    """The training step of ``graph`` compiled for ``device``: a name from ``targets/``, a ``Device``, or "host".

    gradients: also compile an entry that returns every gradient (``TrainStep.gradients``), to compare with PyTorch.
    """
    device = targets.load(device) if isinstance(device, str) else device
    if device.arch == platform.machine():
        # The compiler evaluates constants on the pool that this thread will train with, and a pool cannot grow.
        runtime.use_threads(runtime.default_threads())
    module = graph.module(gradients=gradients)
    entries = graph.entries(module)
    state = graph.state(entries)
    planned = plan(lower(module, device))
    return Artifact(_manifest(graph, device, entries, state, planned), state, _compiled(planned, device))


def _manifest(
    graph: TrainGraph, device: Device, entries: Sequence[Entry], state: Mapping[str, np.ndarray], planned: tvm.IRModule
) -> Manifest:
    read = {tensor.name for entry in entries for tensor in entry.inputs}
    parameters = set(graph.parameters)
    unread = [
        TensorSpec("parameter" if name in parameters else "buffer", name, value.shape, str(value.dtype))
        for name, value in state.items()
        if name not in read
    ]
    return Manifest(
        entries=tuple(entries),
        aliases=dict(graph.imported.aliases),
        trained=graph.trained,
        loss=graph.loss,
        optimizer=optimizer_to_dict(graph.optimizer),
        plan=graph.plan.to_toml() if graph.plan is not None else None,
        device=device.to_dict(),
        versions=_versions(),
        lr=graph.optimizer.lr,
        batch=graph.imported.batch,
        memory=state_bytes(entries, state, parameters) | _planned_bytes(planned, entries),
        unread=tuple(unread),
    )


def _versions() -> dict[str, str]:
    packages = {"tvmtrain": "tvmtrain", "tvm": "apache-tvm", "torch": "torch"}
    return {"python": platform.python_version()} | {name: metadata.version(package) for name, package in packages.items()}


def state_bytes(entries: Sequence[Entry], state: Mapping[str, np.ndarray], parameters: set[str]) -> dict[str, int]:
    """Bytes of the tensors that live as long as the step does, by role."""
    roles = {tensor.name: tensor.role for entry in entries for tensor in entry.inputs}
    total: dict[str, int] = {}
    for name, value in state.items():
        role = roles.get(name, "parameter" if name in parameters else "buffer")
        total[role] = total.get(role, 0) + value.nbytes
    return total


def _planned_bytes(planned: tvm.IRModule, entries: Sequence[Entry]) -> dict[str, int]:
    """Bytes that each entry needs while it runs: "train_step arena", and so on (``passes.plan_arena``)."""
    return {
        f"{entry.name} {figure.removeprefix('tvmtrain.')}": int(planned[entry.name].attrs[figure])
        for entry in entries
        for figure in FIGURES
    }


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
            OrderForMemory(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            PlanArena(),
        ]
    )
    with PassContext(opt_level=3):
        return steps(mod)


def compile_module(mod: tvm.IRModule, device: Device) -> Executable:
    """Native code of every Relax function of ``mod`` (static shapes) for ``device``."""
    return _compiled(plan(lower(mod, device)), device)


def _compiled(planned: tvm.IRModule, device: Device) -> Executable:
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
