"""From a training graph to an artifact: native code, state and a manifest."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

import numpy as np
import tvm
from tvm.ir.transform import Sequential

from tvmtrain import codegen, cuda_compiler, lowering, runtime, summarize, targets, workload
from tvmtrain.artifact import Artifact, Entry, Manifest, TensorSpec
from tvmtrain.costs import EntryMemory, Kernel, LayerCost, Memory
from tvmtrain.graph import TrainGraph
from tvmtrain.passes.pack_frozen import PackFrozen
from tvmtrain.passes.plan_arena import FIGURES
from tvmtrain.spec import optimizer_to_dict
from tvmtrain.targets import Device
from tvmtrain.timeline import timeline
from tvmtrain.uncollected import uncollected


@uncollected()
def build(graph: TrainGraph, device: str | Device = "host", *, gradients: bool = False, tuned: bool = True) -> Artifact:
    """The training step of ``graph`` compiled for ``device``: a name from ``targets/``, a ``Device``, or "host".

    gradients: also compile an entry that returns every gradient (``TrainStep.gradients``), to compare with PyTorch.
    tuned: with the schedules that ``tvmtrain tune`` found for this device, where there are any.
    Raises ``DeviceError``, before anything is compiled, where code for the device cannot be made here.
    """
    device = targets.load(device) if isinstance(device, str) else device
    linker = codegen.tools(device)
    versions = _versions(device)
    if refusal := cuda_compiler.refusal(versions.get("cuda", ""), device.cuda_toolkit):
        warnings.warn(f"{device.name}: {refusal}", RuntimeWarning, stacklevel=3)
    if device.arch == targets.architecture():
        # The compiler evaluates constants on the pool that this thread will train with, and a pool cannot grow.
        runtime.use_threads(runtime.default_threads())
    # Layers' costs are read from the gradients, compiled or not; those that are not need not be arranged.
    computed = graph.computed()
    costs = summarize.layer_costs(graph, computed)
    if not gradients:
        del computed[computed.get_global_var("gradients")]
    module = packed(graph.arranged(computed), device)
    entries = graph.entries(module)
    state = graph.state(entries)
    fused = lowering.fuse(module, device)
    planned = lowering.plan(lowering.schedule(fused, device, tuned=tuned))
    memory, kernels = _memory(planned, entries), workload.kernels(planned, fused)
    code = codegen.Code(codegen.generate(planned, device), linker)
    return Artifact(_manifest(graph, device, versions, entries, state, memory, costs, kernels), state, code)


def packed(module: tvm.IRModule, device: Device) -> tvm.IRModule:
    """The last change before ``lowering``: frozen weights in the order in which this device's kernels read them."""
    return module if device.gpu else Sequential([PackFrozen()])(module)


def _manifest(
    graph: TrainGraph,
    device: Device,
    versions: Mapping[str, str],
    entries: Sequence[Entry],
    state: Mapping[str, np.ndarray],
    memory: Memory,
    costs: tuple[LayerCost, ...],
    kernels: tuple[Kernel, ...],
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
        versions=versions,
        lr=graph.optimizer.lr,
        batch=graph.imported.batch,
        memory=memory,
        costs=costs,
        kernels=kernels,
        unread=tuple(unread),
        selections=graph.selections,
        features=codegen.features(device),
    )


def _versions(device: Device) -> dict[str, str]:
    packages = {"tvmtrain": "tvmtrain", "tvm": "apache-tvm", "torch": "torch"}
    cuda = {"cuda": cuda_compiler.find(device.gpu, device.cuda_toolkit).version} if device.gpu else {}
    return {"python": platform.python_version()} | {name: metadata.version(p) for name, p in packages.items()} | cuda


def _memory(planned: tvm.IRModule, entries: Iterable[Entry]) -> Memory:
    """What the planned functions say (``passes.plan_arena``)."""
    return Memory({entry.name: _figures(planned[entry.name]) for entry in entries}, timeline(planned))


def _figures(function: tvm.relax.Function) -> EntryMemory:
    return EntryMemory(**{figure.removeprefix("tvmtrain."): int(function.attrs[figure]) for figure in FIGURES})
