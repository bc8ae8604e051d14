"""What an artifact is, and what there is to compile for; nothing native is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tvmtrain import artifact, console, drawing, roofline, targets
from tvmtrain.artifact import Entry, Manifest, Selection, TensorSpec
from tvmtrain.costs import EntryMemory, LayerCost, Memory
from tvmtrain.errors import DeviceError, TvmtrainError
from tvmtrain.targets import Device


@dataclass(frozen=True)
class LayerState:
    """Parameters and buffers of one module, by their names in it; a step changes ``trained`` and leaves ``frozen`` alone.

    ``parameters`` counts numbers, not tensors.
    """

    name: str
    shapes: dict[str, str]
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Description:
    """An artifact for people and for JSON. ``files`` and ``state`` (by role) are in bytes; ``costs`` are a training step's, by layer.

    ``trained`` counts all numbers of a partly trained weight; ``selections`` says which share of it a step trains.
    """

    folder: str
    device: dict[str, Any]
    runs_here: bool
    versions: dict[str, str]
    batch: int
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    lr: float
    plan: str | None
    entries: dict[str, dict[str, list[str]]]
    layers: tuple[LayerState, ...]
    parameters: int
    trained: int
    selections: tuple[Selection, ...]
    tied: dict[str, str]
    state: dict[str, int]
    memory: Memory
    costs: tuple[LayerCost, ...]
    files: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe(folder: str | Path) -> Description:
    """What lies in ``folder``, for whatever machine it was compiled. Raises ``ArtifactError`` for damaged files."""
    stored = artifact.read(folder, foreign=True)
    manifest = stored.manifest
    counts = {name: int(np.prod(spec.shape)) for name, spec in manifest.state.items() if spec.role == "parameter"}
    return Description(
        folder=str(folder),
        device=dict(manifest.device),
        runs_here=runs_here(manifest),
        versions=dict(manifest.versions),
        batch=manifest.batch,
        loss=asdict(manifest.loss),
        optimizer=dict(manifest.optimizer),
        lr=manifest.lr,
        plan=manifest.plan,
        entries={entry.name: _entry(entry) for entry in manifest.entries},
        layers=tuple(_layers(manifest)),
        parameters=sum(counts.values()),
        trained=sum(counts[name] for name in manifest.trained),
        selections=manifest.selections,
        tied=dict(manifest.aliases),
        state=dict(manifest.state_bytes),
        memory=manifest.memory,
        costs=manifest.costs,
        files={path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()},
    )


def show(description: Description, out: console.Console) -> None:
    """Print ``description``."""
    d = description
    device = f"{d.device.get('name', '?')} ({d.device.get('arch', '?')}, {d.device.get('cores', '?')} cores)"
    optimizer = ", ".join(
        f"{key} {value}" for key, value in d.optimizer.items() if value not in (None, False, "") and key != "kind"
    )
    loss = ", ".join(f"{key} {value}" for key, value in d.loss.items() if value is not None and key != "name")
    facts = {
        "device": device + ("" if d.runs_here else "; not this machine"),
        "made by": ", ".join(f"{name} {version}" for name, version in d.versions.items()),
        "loss": f"{d.loss['name']}" + (f" ({loss})" if loss else ""),
        "optimizer": f"{d.optimizer.get('kind', '?')} ({optimizer})",
        "batch": str(d.batch),
        "parameters": f"{d.parameters:,}, {d.trained:,} trained",
        "state": ", ".join(f"{role} {console.size(count)}" for role, count in d.state.items()),
        "files": ", ".join(f"{name} {console.size(count)}" for name, count in d.files.items()),
        "plan": "none: what requires a gradient is trained" if d.plan is None else "plan.toml",
    }
    out.line(d.folder, style="bold")
    for name, value in facts.items():
        out.line(f"  {name:<12}{value}")
    rows = [(name, "  ".join(e["inputs"]), "  ".join(e["outputs"])) for name, e in d.entries.items()]
    out.table(("entry", "takes", "returns"), rows)
    memory = ("memory of", ">arena", ">lower bound", ">saved features", ">saved masks", ">results", ">each core")
    out.table(memory, [_memory_row(name, entry) for name, entry in d.memory.entries.items()])
    out.table(("layer", ">parameters", "shapes", "trained"), [_layer_row(layer) for layer in d.layers])
    costs = ("a step of layer", "kind", ">numbers trained", ">input kept", ">backward")
    out.table(costs, [_cost_row(cost) for cost in (*_spending(d.costs), _total(d.costs))])
    if d.selections:
        shares = [
            (s.layer, str(s.count), str(s.channels), console.percent(s.count / s.channels), s.select) for s in d.selections
        ]
        out.table(("partly trained", ">channels a step", ">of", ">share", "select"), shares)


def _layer_row(layer: LayerState) -> tuple[str, ...]:
    trained = "yes" if not layer.frozen else ", ".join(layer.trained) or "frozen"
    shapes = "  ".join(f"{name} {what}" for name, what in layer.shapes.items())
    return layer.name or "(model)", f"{layer.parameters:,}", shapes, trained if layer.parameters else "-"


def _memory_row(name: str, entry: EntryMemory) -> tuple[str, ...]:
    e = entry
    figures = (e.arena, e.lower_bound, e.saved_features, e.saved_masks, e.results, e.workspace)
    return name, *(console.size(count) for count in figures)


def _spending(costs: Sequence[LayerCost]) -> list[LayerCost]:
    return [cost for cost in costs if cost.trained or cost.flops]


def _total(costs: Sequence[LayerCost]) -> LayerCost:
    trained, kept, flops = (sum(getattr(cost, name) for cost in costs) for name in ("trained", "kept", "flops"))
    return LayerCost("all", "", trained, kept, flops)


def _cost_row(cost: LayerCost) -> tuple[str, ...]:
    kept = console.size(cost.kept) if cost.kept else "-"
    return cost.name or "(model)", cost.kind, f"{cost.trained:,}", kept, console.flops(cost.flops)


def _entry(entry: Entry) -> dict[str, list[str]]:
    """Data by name, state by count."""
    return {"inputs": _ports(entry.inputs), "outputs": _ports(entry.outputs)}


def _ports(specs: Sequence[TensorSpec]) -> list[str]:
    counted: dict[str, int] = {}
    listed = []
    for spec in specs:
        if spec.role in (*artifact.STATE_ROLES, "gradient", "channels"):
            counted[spec.role] = counted.get(spec.role, 0) + 1
        else:
            listed.append(f"{spec.name} {console.shape(spec.shape)} {spec.dtype}")
    return listed + [f"{count} {role}" for role, count in counted.items()]


def _layers(manifest: Manifest) -> list[LayerState]:
    """Modules in the order of their names in the state."""
    groups: dict[str, list[TensorSpec]] = {}
    for name, spec in manifest.state.items():
        if spec.role in artifact.MODEL_ROLES:
            groups.setdefault(name.rpartition(".")[0], []).append(spec)
    return [_layer(name, specs, manifest) for name, specs in groups.items()]


def _layer(name: str, specs: Sequence[TensorSpec], manifest: Manifest) -> LayerState:
    own = {spec.name: spec.name.rpartition(".")[2] for spec in specs}
    parameters = [spec for spec in specs if spec.role == "parameter"]
    return LayerState(
        name=name,
        shapes={own[spec.name]: console.shape(spec.shape) for spec in specs},
        trained=tuple(own[spec.name] for spec in parameters if spec.name in manifest.trained),
        frozen=tuple(own[spec.name] for spec in parameters if spec.name not in manifest.trained),
        parameters=sum(int(np.prod(spec.shape)) for spec in parameters),
    )


def runs_here(manifest: Manifest) -> bool:
    """Whether this machine's processor is one that the step was compiled for, and its GPU is there."""
    try:
        artifact.check_machine(manifest)
    except TvmtrainError:
        return False
    return targets.has_gpu() if artifact.on_gpu(manifest) else True


def plot(folder: Path, path: Path, against: Path | None = None) -> None:
    """Draw live bytes over the training step of the artifact in ``folder`` into ``path`` (.svg, .png, .pdf), after ``against``'s.

    Raises ``MissingPackageError`` without matplotlib, ``InputError`` for another suffix, ``ArtifactError``, ``StorageError``.
    """
    kind = drawing.kind_of(path)
    panels = [_panel(folder, "")] if against is None else [_panel(against, "before: "), _panel(folder, "after: ")]
    artifact.write_file(path, drawing.picture(panels, kind))


def _panel(folder: Path, when: str) -> drawing.Panel:
    memory = artifact.read(folder, foreign=True).manifest.memory
    return drawing.Panel(when + folder.resolve().name, memory.entries["train_step"], memory.timeline)


# Devices.


@dataclass(frozen=True)
class DeviceLine:
    """One device that there is a file for.

    ``buildable``: this machine can compile and link for it; ``missing`` says what to install where it cannot. ``memory`` is in bytes,
    ``cores`` are a GPU's multiprocessors, both 0 where unknown; ``system`` is what usually runs there, ``cuda_toolkit`` the CUDA that
    comes with it.
    """

    name: str
    description: str
    arch: str
    cores: int
    gpu: str | None
    memory: int
    system: str
    cuda_toolkit: str
    buildable: bool
    missing: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def devices() -> tuple[DeviceLine, ...]:
    """All devices in ``targets/``, those that this machine can build for first."""
    lines = [_device_line(name) for name in targets.names()]
    return tuple(sorted(lines, key=lambda line: (not line.buildable, line.name)))


def show_devices(lines: Sequence[DeviceLine], out: console.Console) -> None:
    """Print ``lines``, and under the table what is missing."""
    rows = [(d.name, d.description, d.arch, str(d.cores or "-"), d.gpu or "-", "yes" if d.buildable else "no") for d in lines]
    out.table(("name", "device", "processor", ">cores", "gpu", "built here"), rows)
    for missing in dict.fromkeys(d.missing for d in lines if d.missing):
        names = ", ".join(d.name for d in lines if d.missing == missing)
        out.line(f"for {names}: {missing}")


def _device_line(name: str) -> DeviceLine:
    if not roofline.has_compiler():
        missing = "install the compiler (pip install 'tvmtrain[compile]')"
        if name in ("host", "cuda"):
            description = "this machine" if name == "host" else "the NVIDIA GPU of this machine"
            cores = (os.cpu_count() or 1) if name == "host" else 0
            return DeviceLine(name, description, artifact.machine(), cores, None, 0, "", "", False, missing)
        return _line(targets.load(name), missing)
    device = targets.load(name)
    if name == "cuda" and not targets.has_gpu():
        description = f"no NVIDIA GPU found on this machine; builds for {device.gpu}"
        device = replace(device, description=description)
        return replace(_line(device, _missing(device)), cores=0)
    return _line(device, _missing(device))


def _line(device: Device, missing: str) -> DeviceLine:
    d = device
    facts = (d.name, d.description, d.arch, d.cores, d.gpu, d.memory, d.system, d.cuda_toolkit)
    return DeviceLine(*facts, buildable=not missing, missing=missing)


def _missing(device: Device) -> str:
    """What to install before something can be built for ``device``; "" if nothing."""
    from tvmtrain import codegen, toolchain

    try:
        return "" if codegen.tools(device) else toolchain.missing(device)
    except DeviceError as error:
        return str(error)
