"""A compiled training step on disk: a folder with native code, weights and a manifest that says what each input and output is.

Of the state that is not the model's (optimizer, random numbers), what is zero at the start is not stored: the manifest names it.

Everything is checked before it is used: the format, every file's size and sha256, names, shapes and dtypes. Everything is
written so that a kill or a full disk at any moment leaves what was there before or what was to come, and nothing in between.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as tensor_file

from tvmtrain import features
from tvmtrain.costs import EntryMemory, Kernel, LayerCost, Memory, Timeline
from tvmtrain.errors import ArtifactError, CheckpointError, DeviceError, StorageError

if TYPE_CHECKING:
    from tvmtrain.runtime import TrainStep

FORMAT = 5
CHECKPOINT_FORMAT = 1
MANIFEST = "manifest.json"
LIBRARY = "lib.so"
PARAMETERS = "parameters.safetensors"
PLAN = "plan.toml"

MODEL_ROLES = ("parameter", "buffer")
STATE_ROLES = (*MODEL_ROLES, "optimizer", "random")
ROLES = ("input", "target", "rate", "channels", "loss", "output", "gradient", "prepared", *STATE_ROLES)
PREPARE = "prepare"  # the entry that makes what other entries take as "prepared", from parameters and buffers alone
SELECTS = ("first", "magnitude", "random", "rotate")
LOSSES = ("cross_entropy", "mse", "bce_with_logits", "custom")
REQUIRED_ENTRIES = ("train_step", "predict", "loss")
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an entry: what it means (``role``, one of ``ROLES``), its name, shape and NumPy dtype."""

    role: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> tuple[str, str]:
        """What identifies a tensor across entries: a parameter and its gradient share a name, not a role."""
        return (self.role, self.name)


@dataclass(frozen=True)
class Entry:
    """A compiled function: its arguments and the fields of the tuple that it returns, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class LossSpec:
    """The loss (one of ``LOSSES``); ``classes`` and ``ignore_index`` bound the labels of ``cross_entropy``, else None."""

    name: str
    classes: int | None = None
    ignore_index: int | None = None


@dataclass(frozen=True)
class Selection:
    """A layer of which a step trains ``count`` of the ``channels`` input channels of ``weight``.

    ``select``, one of ``SELECTS``, says which; ``seed`` is where "random" begins. They come in as ("channels", ``weight``), [count] int32.
    """

    layer: str
    weight: str
    channels: int
    count: int
    select: str
    seed: int = 0

    @property
    def fixed(self) -> bool:
        """Whether every step trains the same channels, so that optimizer state exists for them alone."""
        return self.select in ("first", "magnitude")


@dataclass(frozen=True)
class Manifest:
    """What a compiled step is. Raises ``ArtifactError`` where its parts contradict each other.

    ``aliases`` maps tied names to the one name under which their state is kept; ``trained`` names the parameters that a step
    changes; ``lr`` is the rate when a call gives none; ``batch`` is the number of samples of a training step; ``unread`` is
    state that no entry takes and ``state_dict`` still owes; ``selections`` are the layers of which a step trains a share.
    ``device`` is what the code was compiled for, as ``Device.from_dict`` reads it; ``features`` are the names (``tvmtrain.features``)
    of what a processor must have to run it; ``plan`` is the update plan as TOML. ``memory``, ``costs`` (by layer, in the order in which
    the model uses them) and ``kernels`` (of ``train_step``, in the order of their first calls) are what was known when the step was
    compiled.
    """

    entries: tuple[Entry, ...]
    aliases: Mapping[str, str]
    trained: tuple[str, ...]
    loss: LossSpec
    optimizer: Mapping[str, Any]
    plan: str | None
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    lr: float
    batch: int
    memory: Memory
    costs: tuple[LayerCost, ...]
    kernels: tuple[Kernel, ...]
    unread: tuple[TensorSpec, ...] = ()
    selections: tuple[Selection, ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_specs(self)
        _check_entries(self)
        _check_settings(self)
        _check_selections(self)
        _check_memory(self)

    @cached_property
    def named(self) -> Mapping[str, Entry]:
        """The entries by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def state(self) -> Mapping[str, TensorSpec]:
        """Everything that a later step needs, by name: parameters, buffers, optimizer and random state."""
        inputs = (spec for entry in self.entries for spec in entry.inputs)
        return {spec.name: spec for spec in (*inputs, *self.unread) if spec.role in STATE_ROLES}

    @cached_property
    def state_bytes(self) -> Mapping[str, int]:
        """Bytes of the state by role: they live as long as the step does."""
        total: dict[str, int] = {}
        for spec in self.state.values():
            total[spec.role] = total.get(spec.role, 0) + math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``Manifest.from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """A manifest from plain values. Raises ``ArtifactError`` naming the field that is missing or of the wrong kind."""
        fields = _Fields(data, "manifest")
        return cls(
            entries=tuple(_entry(item) for item in fields.items("entries")),
            aliases=fields.strings("aliases"),
            trained=tuple(fields.names("trained")),
            loss=_loss(fields.get("loss", dict)),
            optimizer=fields.get("optimizer", dict),
            plan=fields.optional("plan", str),
            device=fields.get("device", dict),
            versions=fields.strings("versions"),
            lr=fields.number("lr"),
            batch=fields.get("batch", int),
            memory=_memory(fields.inner("memory")),
            costs=tuple(_cost(item) for item in fields.items("costs")),
            kernels=tuple(_kernel(item) for item in fields.items("kernels")),
            unread=tuple(_spec(item) for item in fields.items("unread")),
            selections=tuple(_selection(item) for item in fields.items("selections")),
            features=tuple(fields.names("features")),
        )


class Executable(Protocol):
    """What ``tvm.compile`` returns, as far as an artifact needs it."""

    def export_library(self, file_name: str) -> Any:
        """Link the code into the shared library ``file_name``."""

    def jit(self) -> Any:
        """The code as a module that runs in this process."""


@dataclass(frozen=True)
class Artifact:
    """A compiled step that has not been started: manifest, initial state by name, native code."""

    manifest: Manifest
    state: Mapping[str, np.ndarray]
    executable: Executable

    def __post_init__(self) -> None:
        _check_state(self.state, self.manifest.state, ArtifactError, "state")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact into ``folder`` (made if needed; other files there are left alone) and return it.

        An artifact that is already there is replaced as a whole or not at all. Raises ``StorageError`` for a folder that cannot
        be written or a full disk, ``DeviceError`` where the code cannot be linked.
        """
        zeros = _zero_names(self.manifest, self.state)
        stored = {name: value for name, value in self.state.items() if name not in zeros}
        files = {LIBRARY: _link(self.executable), PARAMETERS: _tensor_bytes(stored)}
        if self.manifest.plan is not None:
            files[PLAN] = self.manifest.plan.encode()
        _write_folder(Path(folder), files | {MANIFEST: _manifest_bytes(self.manifest, files, zeros)})
        return Path(folder)

    def load(self) -> TrainStep:
        """Start the step in this process, without a folder. Raises ``ArtifactError`` if it was compiled for another machine."""
        check_machine(self.manifest)
        from tvmtrain import runtime

        with without_scope_log():
            module = self.executable.jit()
        return runtime.TrainStep(runtime.here(module, self.manifest), self.manifest, self.state)


@dataclass(frozen=True)
class Stored:
    """The checked contents of a folder; ``library`` is the path of the native code, not yet loaded."""

    manifest: Manifest
    state: Mapping[str, np.ndarray]
    library: Path


def read(folder: str | os.PathLike[str], *, foreign: bool = False) -> Stored:
    """Read and check the artifact in ``folder``; no native code is loaded.

    Raises ``ArtifactError`` naming file and reason: missing, truncated or changed files, another format, tensors that do not
    fit the manifest, a processor other than this one (``foreign=True`` lets those pass, to look at them).
    """
    folder = Path(folder)
    manifest, files, zeros = _read_manifest(folder / MANIFEST)
    if not foreign:
        check_machine(manifest)
    places = {name: _locate(folder, name, files[name]) for name in files}
    state = _parse_tensors(_read_bytes(places[PARAMETERS]), ArtifactError, PARAMETERS)
    stored = {name: spec for name, spec in manifest.state.items() if name not in zeros}
    _check_state(state, stored, ArtifactError, PARAMETERS)
    return Stored(manifest, state | {name: _zeros(manifest.state[name]) for name in zeros}, places[LIBRARY])


def contents(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The checked files of an artifact by their names, also those that a killed ``save`` left under another. Raises ``ArtifactError``."""
    folder = Path(folder)
    _, files, _ = _read_manifest(folder / MANIFEST)
    places = {name: _locate(folder, name, file) for name, file in files.items()}
    return {name: _read_bytes(place) for name, place in {MANIFEST: folder / MANIFEST, **places}.items()}


def on_gpu(manifest: Manifest) -> bool:
    """Whether the step was compiled for an NVIDIA GPU."""
    target = manifest.device.get("target", {})
    return isinstance(target, Mapping) and target.get("kind") == "cuda"


def check_machine(
    manifest: Manifest, arch: str | None = None, has: frozenset[str] | None = None, where: str = "this machine"
) -> None:
    """Raise ``ArtifactError`` unless the processor ``where`` has all that the step was compiled for.

    arch, has: its architecture and its ``features`` (None: unknown); by default, this process's.
    """
    name = manifest.device.get("name", "?")
    if arch is None:
        arch, has = machine(), features.offered()
    command = f"tvmtrain compile MODEL{'' if where == 'this machine' else ' --device NAME'} -o FOLDER"
    wanted, here = _architecture(str(manifest.device.get("arch", "unknown"))), _architecture(arch)
    if wanted != here:
        raise ArtifactError(
            f"{LIBRARY} was compiled for {wanted} (device {name!r}) and {where} is {here}; build it for {where}: {command}"
        )
    if has is not None and (missing := [need for need in manifest.features if need not in has]):
        raise ArtifactError(
            f"{LIBRARY} was compiled for a newer processor (device {name!r}): {where}, {here}, lacks {', '.join(missing)}; "
            f"build it for {where}: {command}"
        )


def memory_needed(manifest: Manifest) -> int:
    """Bytes that a running step holds at least: state, what was made of the frozen part, and the entry that needs most beside."""
    prepared = {spec.name: spec for entry in manifest.entries for spec in entry.outputs if spec.role == "prepared"}
    made = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in prepared.values())
    most = max(entry.arena + entry.results + entry.workspace for entry in manifest.memory.entries.values())
    return sum(manifest.state_bytes.values()) + made + most


def machine() -> str:
    """The architecture that this process can load code for, such as ``x86_64`` or ``aarch64``."""
    here = _architecture(platform.machine())
    # A 32-bit Python on a 64-bit kernel (usual on older Raspberry Pi systems) loads 32-bit libraries only.
    return "armv7l" if here == "aarch64" and sys.maxsize < 2**32 else here


@contextmanager
def without_scope_log() -> Iterator[None]:
    """Drop the lines "Scope Saving:" and "Scope Loaded:" that TVM 0.27 logs for every constant; all else reaches stderr."""
    if not hasattr(os, "memfd_create"):
        yield
        return
    sys.stderr.flush()
    kept, log = os.dup(2), os.memfd_create("log")
    os.dup2(log, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.lseek(log, 0, os.SEEK_SET)
        with open(log, "rb") as lines:
            os.write(2, b"".join(line for line in lines if b": Warning: Scope " not in line))


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, np.ndarray], steps: int, version: str) -> None:
    """Write all ``state`` after ``steps`` steps to one file, atomically. Raises ``StorageError``; an old file is intact."""
    facts = {"kind": "checkpoint", "format": str(CHECKPOINT_FORMAT), "tvmtrain": version, "steps": str(steps)}
    facts["digest"] = _digest(facts, state)
    write_file(Path(path), _tensor_bytes(state, facts))


def read_checkpoint(path: str | os.PathLike[str], wanted: Mapping[str, TensorSpec]) -> tuple[dict[str, np.ndarray], int]:
    """The state and number of steps in a checkpoint, which must fit ``wanted``. Raises ``CheckpointError``."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    state = _parse_tensors(data, CheckpointError, f"checkpoint {path}")
    steps = _check_facts(_facts(data), state, f"checkpoint {path}")
    try:
        _check_state(state, wanted, CheckpointError, f"checkpoint {path}")
    except CheckpointError as error:
        if not _same_model(state, wanted):
            raise
        hint = "it is of this model with another plan or optimizer: compile with the same --plan and --optimizer"
        raise CheckpointError(f"{error}; {hint} as the step that wrote it") from None
    return state, steps


def write_file(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; a kill at any moment leaves the old file or the new one. Raises ``StorageError``."""
    with _storage(path):
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it exists and is not a regular file")
        _write_all(path.parent, {path.name: data})
        os.replace(_new(path), path)
        _sync_folder(path.parent)


# Writing. New files stand beside the old ones as ".new-<name>" until the rename of the manifest, the one moment at which an
# artifact changes; the other renames follow. A reader that comes between (or after a kill) finds the new files by their sha256.


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    with _storage(folder):
        made = _make_folder(folder)
        try:
            _settle(folder)
            _write_all(folder, files)
            os.replace(_new(folder / MANIFEST), folder / MANIFEST)
        except BaseException:
            _remove(made)
            raise
        _sync_folder(folder)
        for name in set(files) - {MANIFEST}:
            os.replace(_new(folder / name), folder / name)
        if PLAN not in files:
            for path in (folder / PLAN, _new(folder / PLAN)):
                path.unlink(missing_ok=True)
        _sync_folder(folder)


def _settle(folder: Path) -> None:
    """Finish a save that was killed after its manifest was in place: its files would be overwritten by ours otherwise."""
    with suppress(ArtifactError):
        _, files, _ = _read_manifest(folder / MANIFEST)
        for name, file in files.items():
            new = _new(folder / name)
            if new.exists() and _matches(_read_bytes(new), file):
                os.replace(new, folder / name)
        _sync_folder(folder)


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write and sync the new files; on any failure none of them stays."""
    try:
        for name, data in files.items():
            with open(_new(folder / name), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(folder)
    except BaseException:
        for name in files:
            with suppress(OSError):
                _new(folder / name).unlink()
        raise


def _new(path: Path) -> Path:
    return path.with_name(f".new-{path.name}")


def _make_folder(folder: Path) -> list[Path]:
    """Make ``folder`` and its parents; the folders that were not there before, innermost first."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _storage(place: Path) -> Iterator[None]:
    """Turn what the operating system reports about ``place`` into a ``StorageError`` that says what to do."""
    hints = {
        errno.ENOSPC: "free some space or choose another place",
        errno.EDQUOT: "free some space or choose another place",
        errno.ENOENT: "make its folder first",
    }
    try:
        yield
    except OSError as error:
        hint = hints.get(error.errno or 0, "choose a place that can be written")
        raise StorageError(f"cannot write {place}: {error.strerror}; what was there before is intact; {hint}") from error


def _link(executable: Executable) -> bytes:
    """The native code as the bytes of a shared library."""
    # Linked elsewhere and then written like every other file: a linker's own message for a full disk is not one for a user.
    with _storage(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / LIBRARY
        try:
            with without_scope_log():
                executable.export_library(str(library))
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"{LIBRARY} cannot be linked: {error}; is the C++ compiler for the device installed?") from error
        return library.read_bytes()


# Reading.


def _manifest_bytes(manifest: Manifest, files: Mapping[str, bytes], zeros: Sequence[str]) -> bytes:
    listed = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    # Through JSON once, so that the digest is that of what a reader will see (tuples become lists, keys strings).
    content = json.loads(json.dumps({"format": FORMAT, "files": listed, "zeros": zeros, **manifest.to_dict()}))
    return (json.dumps(content | {"digest": _json_digest(content)}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> tuple[Manifest, dict[str, tuple[int, str]], list[str]]:
    """The manifest, (size, sha256) of every other file, and the names of state that is zeros and has no place in them."""
    data = _read_bytes(path)
    try:
        fields = _Fields(json.loads(data), "manifest")
        _check_format(fields)
        manifest = Manifest.from_dict(fields.data)
        return manifest, _files(fields), _checked_zeros(fields, manifest)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {error}") from error


def _check_format(fields: _Fields) -> None:
    if (found := fields.get("format", int)) != FORMAT:
        version = fields.data.get("versions")
        maker = version.get("tvmtrain", "unknown") if isinstance(version, dict) else "unknown"
        raise ArtifactError(
            f"format {found}, written by tvmtrain {maker}, and this tvmtrain reads format {FORMAT}; "
            "install that version, or build the artifact again with this one"
        )
    content = {key: value for key, value in fields.data.items() if key != "digest"}
    if fields.get("digest", str) != _json_digest(content):
        raise ArtifactError(
            "its digest does not fit its content: the file is damaged or was edited; build or copy the artifact again"
        )


def _files(fields: _Fields) -> dict[str, tuple[int, str]]:
    listed = fields.get("files", dict)
    if not {LIBRARY, PARAMETERS} <= set(listed) <= {LIBRARY, PARAMETERS, PLAN}:
        raise ArtifactError(f"files are {sorted(listed)}; want {LIBRARY} and {PARAMETERS}, and {PLAN} where there is a plan")
    entries = {name: _Fields(value, f"files[{name!r}]") for name, value in listed.items()}
    return {name: (entry.get("size", int), entry.get("sha256", str)) for name, entry in entries.items()}


def _checked_zeros(fields: _Fields, manifest: Manifest) -> list[str]:
    names = fields.names("zeros")
    left_out = {name for name, spec in manifest.state.items() if spec.role not in MODEL_ROLES}
    if wrong := sorted(set(names) - left_out):
        raise ArtifactError(f"zeros: {', '.join(wrong)}: want state of the optimizer or of random numbers; all else is stored")
    if len(set(names)) != len(names):
        raise ArtifactError(f"zeros are {names}; want each once")
    return names


def _locate(folder: Path, name: str, file: tuple[int, str]) -> Path:
    """The path of the file that the manifest means: its own name, or still its new one after a kill during ``save``."""
    path, new = folder / name, _new(folder / name)
    for place in (path, new):
        if place.is_file() and _matches(_read_bytes(place), file):
            return place
    if not path.exists():
        raise ArtifactError(f"{path}: the file is missing; copy the whole folder again")
    got, (size, _) = path.stat().st_size, file
    reason = f"it has {got} bytes and the manifest says {size}" if got != size else "its sha256 is not the manifest's"
    raise ArtifactError(f"{path}: {reason}; the file is damaged or foreign; build or copy the artifact again")


def _matches(data: bytes, file: tuple[int, str]) -> bool:
    size, digest = file
    return len(data) == size and _sha256(data) == digest


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: the file is missing; is this the folder of an artifact?") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error


class _Fields:
    """A JSON object whose fields are read with their type checked."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ArtifactError(f"{where} is {type(data).__name__}; want an object")
        self.data = data
        self.where = where

    def get(self, key: str, kind: type) -> Any:
        if key not in self.data:
            raise ArtifactError(f"{self.where} lacks {key!r}")
        # Not isinstance: True is an int there, and no batch size.
        if type(self.data[key]) is not kind:
            raise ArtifactError(f"{self.where}: {key!r} is {type(self.data[key]).__name__}; want {kind.__name__}")
        return self.data[key]

    def optional(self, key: str, kind: type) -> Any:
        return None if self.data.get(key) is None else self.get(key, kind)

    def number(self, key: str) -> float:
        kind = int if type(self.data.get(key)) is int else float
        return float(self.get(key, kind))

    def items(self, key: str) -> list[_Fields]:
        return [_Fields(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(self.get(key, list))]

    def inner(self, key: str) -> _Fields:
        return _Fields(self.get(key, dict), f"{self.where}: {key}")

    def names(self, key: str, kind: type = str) -> list[Any]:
        values = self.get(key, list)
        if any(type(value) is not kind for value in values):
            raise ArtifactError(f"{self.where}: {key!r} holds {values}; want {kind.__name__} only")
        return values

    def strings(self, key: str) -> dict[str, str]:
        values = self.get(key, dict)
        if any(type(value) is not str for value in values.values()):
            raise ArtifactError(f"{self.where}: {key!r} holds {values}; want str only")
        return values


def _entry(fields: _Fields) -> Entry:
    inputs, outputs = (tuple(_spec(item) for item in fields.items(key)) for key in ("inputs", "outputs"))
    return Entry(fields.get("name", str), inputs, outputs)


def _spec(fields: _Fields) -> TensorSpec:
    role, name, dtype = (fields.get(key, str) for key in ("role", "name", "dtype"))
    return TensorSpec(role, name, tuple(fields.names("shape", int)), dtype)


def _loss(data: dict[str, Any]) -> LossSpec:
    fields = _Fields(data, "manifest: loss")
    return LossSpec(fields.get("name", str), fields.optional("classes", int), fields.optional("ignore_index", int))


def _memory(data: _Fields) -> Memory:
    entries = data.inner("entries")
    kinds, line = [field.name for field in fields(Timeline) if field.name != "loss"], data.inner("timeline")
    return Memory(
        entries={name: _entry_memory(entries.inner(name)) for name in entries.data},
        timeline=Timeline(loss=line.get("loss", int), **{kind: tuple(line.names(kind, int)) for kind in kinds}),
    )


def _entry_memory(data: _Fields) -> EntryMemory:
    return EntryMemory(**{field.name: data.get(field.name, int) for field in fields(EntryMemory)})


def _cost(data: _Fields) -> LayerCost:
    name, kind = (data.get(key, str) for key in ("name", "kind"))
    return LayerCost(name, kind, *(data.get(key, int) for key in ("trained", "kept", "flops")))


def _kernel(data: _Fields) -> Kernel:
    return Kernel(data.get("name", str), *(data.get(key, int) for key in ("calls", "flops", "bytes")))


def _selection(fields: _Fields) -> Selection:
    layer, weight, select = (fields.get(key, str) for key in ("layer", "weight", "select"))
    channels, count, seed = (fields.get(key, int) for key in ("channels", "count", "seed"))
    return Selection(layer, weight, channels, count, select, seed)


def _check_specs(manifest: Manifest) -> None:
    """Every tensor is of a known kind and means the same in all entries."""
    seen: dict[tuple[str, str], TensorSpec] = {}
    for spec in (*(s for e in manifest.entries for s in (*e.inputs, *e.outputs)), *manifest.unread):
        if spec.role not in ROLES:
            raise ArtifactError(f"tensor {spec.name!r} has the role {spec.role!r}; roles are {', '.join(ROLES)}")
        if spec.dtype not in DTYPES or min(spec.shape, default=0) < 0:
            raise ArtifactError(
                f"{spec.role} {spec.name!r} is {spec.dtype}{list(spec.shape)}; want sizes of 0 or more and one of {DTYPES}"
            )
        # State is found by its name alone, whatever its role.
        key = ("state", spec.name) if spec.role in STATE_ROLES else spec.key
        if seen.setdefault(key, spec) != spec:
            raise ArtifactError(f"{spec.name!r} is {_show(seen[key])} in one place and {_show(spec)} in another")


def _check_entries(manifest: Manifest) -> None:
    """The functions that a step needs exist, and what a training step returns as new state is state that it takes."""
    names = [entry.name for entry in manifest.entries]
    if len(set(names)) != len(names) or not set(REQUIRED_ENTRIES) <= set(names):
        raise ArtifactError(f"entries are {names}; want each once, and {', '.join(REQUIRED_ENTRIES)} among them")
    for entry in manifest.entries:
        taken = {spec.key for spec in entry.inputs}
        if new := [spec.name for spec in entry.outputs if spec.role in STATE_ROLES and spec.key not in taken]:
            raise ArtifactError(f"entry {entry.name!r} returns state that it does not take: {', '.join(new)}")
    made = {spec.key for entry in manifest.entries if entry.name == PREPARE for spec in entry.outputs}
    wanted = {spec.key for entry in manifest.entries for spec in entry.inputs if spec.role == "prepared"}
    if missing := sorted(name for _, name in wanted - made):
        raise ArtifactError(f"no entry {PREPARE!r} makes what others take as prepared: {', '.join(missing)}")
    for name, side, role in (("train_step", "inputs", "rate"), ("train_step", "outputs", "loss"), ("loss", "outputs", "loss")):
        scalars = [spec.shape for spec in getattr(manifest.named[name], side) if spec.role == role]
        if scalars != [()]:
            raise ArtifactError(
                f"entry {name!r} has {len(scalars)} {side} of role {role!r} with shapes {scalars}; want one scalar"
            )


def _check_settings(manifest: Manifest) -> None:
    """Names refer to state that exists; numbers are in their ranges."""
    for tied, name in manifest.aliases.items():
        if name not in manifest.state or tied in manifest.state:
            raise ArtifactError(f"alias {tied!r} of {name!r}: want a new name for existing state")
    if unknown := [n for n in manifest.trained if n not in manifest.state or manifest.state[n].role != "parameter"]:
        raise ArtifactError(f"trained names that are no parameters: {', '.join(unknown)}")
    if manifest.loss.name not in LOSSES:
        raise ArtifactError(f"loss {manifest.loss.name!r}; losses are {', '.join(LOSSES)}")
    numbers = any(spec.role == "target" and "int" in spec.dtype for spec in manifest.named["loss"].inputs)
    if manifest.loss.name == "cross_entropy" and numbers and manifest.loss.classes is None:
        raise ArtifactError("a cross_entropy on class numbers needs loss.classes, the bound of the labels")
    if (
        manifest.batch < 1
        or (manifest.loss.classes is not None and manifest.loss.classes < 1)
        or not math.isfinite(manifest.lr)
    ):
        raise ArtifactError(
            f"batch={manifest.batch}, classes={manifest.loss.classes}, lr={manifest.lr}: want 1 or more, and a finite rate"
        )


def _check_selections(manifest: Manifest) -> None:
    """Each selection is that of one weight, and each input of channels has its selection."""
    for chosen in manifest.selections:
        where = f"selection of layer {chosen.layer!r}"
        if chosen.select not in SELECTS or not 1 <= chosen.count <= chosen.channels:
            raise ArtifactError(
                f"{where}: {chosen.count} of {chosen.channels} channels, {chosen.select!r}; want 1 or more of them, and one of {SELECTS}"
            )
        shape = manifest.state[chosen.weight].shape if chosen.weight in manifest.trained else ()
        if len(shape) < 2 or (shape[1] != chosen.channels and (shape[1] != 1 or shape[0] % chosen.channels)):
            raise ArtifactError(f"{where}: {chosen.weight!r} is no trained weight with {chosen.channels} channels")
    for kind in ("layer", "weight"):
        named = [getattr(chosen, kind) for chosen in manifest.selections]
        if len(set(named)) != len(named):
            raise ArtifactError(f"selections are of the {kind}s {named}; want each once")
    ports = [TensorSpec("channels", chosen.weight, (chosen.count,), "int32") for chosen in manifest.selections]
    for entry in manifest.entries:
        if wrong := [spec.name for spec in entry.inputs if spec.role == "channels" and spec not in ports]:
            raise ArtifactError(f"entry {entry.name!r} takes channels of {', '.join(wrong)} that no selection gives")


def _check_memory(manifest: Manifest) -> None:
    """Memory is told of each entry, and work of each kernel once."""
    names = [kernel.name for kernel in manifest.kernels]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArtifactError(f"kernels: {', '.join(twice)} more than once; want each name once, with the number of its calls")
    if set(manifest.memory.entries) != set(manifest.named):
        raise ArtifactError(f"memory is that of {', '.join(manifest.memory.entries)}; entries are {', '.join(manifest.named)}")


# Tensors.


def _zero_names(manifest: Manifest, state: Mapping[str, np.ndarray]) -> list[str]:
    """The state that need not be stored. The model's always is: whoever opens the file finds all weights and buffers."""
    names = [name for name, spec in manifest.state.items() if spec.role not in MODEL_ROLES]
    return [name for name in names if not state[name].tobytes().strip(b"\0")]  # by their bits: -0.0 is another number


def _zeros(spec: TensorSpec) -> np.ndarray:
    """Zeros that take no memory, whatever shape a manifest tells: whether there is room for it is checked later."""
    try:
        return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)
    except (ValueError, OverflowError) as error:
        raise ArtifactError(f"zeros: {spec.name!r} is {_show(spec)}, which no array can be") from error


def _tensor_bytes(state: Mapping[str, np.ndarray], facts: dict[str, str] | None = None) -> bytes:
    return tensor_file.save({name: np.asarray(value, order="C") for name, value in state.items()}, facts)


def _parse_tensors(data: bytes, error: type[Exception], where: str) -> dict[str, np.ndarray]:
    try:
        return tensor_file.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise error(f"{where}: not a readable safetensors file ({reason}); it is truncated or damaged") from reason


def _check_state(state: Mapping[str, np.ndarray], wanted: Mapping[str, TensorSpec], error: type[Exception], where: str) -> None:
    """Raise ``error`` unless ``state`` has the names, shapes and dtypes of ``wanted``; the message names a few that differ."""
    wrong = [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is unexpected" for name in state if name not in wanted]
    for name in (n for n in wanted if n in state):
        got, spec = state[name], wanted[name]
        if got.shape != spec.shape or str(got.dtype) != spec.dtype:
            wrong.append(f"{name} is {got.dtype}{list(got.shape)}, want {spec.dtype}{list(spec.shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise error(f"{where} does not fit this model: {'; '.join(wrong[:5])}{more}")


def _same_model(state: Mapping[str, np.ndarray], wanted: Mapping[str, TensorSpec]) -> bool:
    """Whether ``state`` has all parameters and buffers of ``wanted``, and differs in what depends on how a model is trained."""
    kept = [spec for spec in wanted.values() if spec.role in MODEL_ROLES]
    fits = all(
        spec.name in state and (state[spec.name].shape, str(state[spec.name].dtype)) == (spec.shape, spec.dtype)
        for spec in kept
    )
    return fits and all(name in wanted or name.startswith(("optimizer:", "selection:", "random:")) for name in state)


def _facts(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that has been parsed, so that its header is known to be sound."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]).get("__metadata__", {})


def _check_facts(facts: dict[str, str], state: Mapping[str, np.ndarray], where: str) -> int:
    """The number of steps that the metadata tells, once it is known to be sound."""
    if facts.get("kind") != "checkpoint":
        raise CheckpointError(f"{where}: not written by TrainStep.save; weights alone are taken by load_state_dict")
    if facts.get("format") != str(CHECKPOINT_FORMAT):
        raise CheckpointError(f"{where}: format {facts.get('format')}, and this tvmtrain reads format {CHECKPOINT_FORMAT}")
    if facts.get("digest") != _digest({k: v for k, v in facts.items() if k != "digest"}, state):
        raise CheckpointError(f"{where}: its digest does not fit its content: the file is damaged")
    return int(facts["steps"])


def _digest(facts: Mapping[str, str], state: Mapping[str, np.ndarray]) -> str:
    """One sha256 over the facts and every tensor: name, dtype, shape, values."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(json.dumps([name, str(state[name].dtype), state[name].shape]).encode())
        digest.update(np.asarray(state[name], order="C").tobytes())
    return digest.hexdigest()


def _json_digest(content: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _show(spec: TensorSpec) -> str:
    return f"{spec.role} {spec.dtype}{list(spec.shape)}"


def _architecture(name: str) -> str:
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())
