"""Run a compiled training step: TVM's runtime and NumPy, neither PyTorch nor a compiler.

The state (parameters, buffers, optimizer, random numbers) stays in TVM's tensors between steps, on the GPU if the code is for
one: then a batch goes there, and a loss comes back. A compiled step overwrites it in place, unless the loss is NaN or infinite:
then it writes the old values again (``passes.guard_state``). Data are checked before, and an interrupt waits until the step and
its number are one.
"""

from __future__ import annotations

import ctypes
import difflib
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from tvmtrain import artifact, batches, checks, gpu_code, losses, selection
from tvmtrain.artifact import MODEL_ROLES, STATE_ROLES, Entry, Manifest, Selection, TensorSpec
from tvmtrain.errors import (
    ArtifactError,
    CheckpointError,
    DeviceError,
    InputError,
    NonFiniteLossError,
    StorageError,
    TvmtrainError,
)


@contextmanager
def _without_torch() -> Iterator[None]:
    """Hide PyTorch, if nobody has imported it, from tvm_ffi, which imports it wherever it is installed.

    Only where TVM's runtime was asked for alone: a compiling process needs tvm_ffi to know PyTorch's dtypes.
    """
    hide = os.environ.get("TVM_USE_RUNTIME_LIB") == "1" and "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules["torch"]


with _without_torch():
    import tvm
    from tvm.libinfo import package_lib_paths
    from tvm.runtime.vm import VirtualMachine
    from tvm_ffi import get_global_func
    from tvm_ffi.libinfo import load_lib_ctypes

# TVM's pool narrows the affinity of the thread that starts it, so what this process may use is asked before that.
_CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))

# Bytes: where tensors begin, as compiled code may expect.
ALIGNMENT = 64

# Which file each path was when a library was first loaded from it.
_loaded: dict[Path, tuple[int, int]] = {}

Tensors = dict[str, Any]


def load(path: str | os.PathLike[str], threads: int | None = None, cores: Sequence[int] | None = None) -> TrainStep:
    """Start the artifact in the folder ``path``.

    ``threads``: how many TVM computes with; by default as many as ``cores``, else ``TVM_NUM_THREADS``, else every physical core that
    this process may use. ``cores``: numbers of the processors they may run on, the big ones of a board for example; by default all.
    Raises ``ArtifactError`` for anything damaged, foreign or incomplete, before native code is loaded, and ``DeviceError`` where
    memory does not suffice.
    """
    stored = artifact.read(path)
    check_memory(stored.manifest, memory(), "this machine")
    device(stored.manifest)
    return TrainStep(here(load_library(stored.library), stored.manifest, threads, cores), stored.manifest, stored.state)


@dataclass(frozen=True)
class _Moment:
    """All state after so many steps; replaced in one assignment, so that an interrupt cannot leave half of a step."""

    tensors: Tensors
    steps: int


class Place(Protocol):
    """What keeps a step's tensors and runs its entries: this machine, or a board at the other end of a connection.

    ``seconds``: what the last call took there.
    """

    seconds: float

    def tensor(self, value: np.ndarray) -> Any:
        """A copy of ``value`` in the memory of what computes; its ``numpy()`` is one here."""

    def given(self, key: tuple[str, str], value: np.ndarray) -> Any:
        """As ``tensor``, for one call: it may be ``value`` itself, or the memory of what ``given`` was called with before for this key."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two tensors are known to be the same memory."""

    def call(self, entry: Entry, arguments: Sequence[Any]) -> Sequence[Any]:
        """Run ``entry`` on tensors of this place; its results are, too."""

    def marked(self) -> AbstractContextManager[list[Mark]]:
        """The two ends of each call of the virtual machine in the block, complete when it ends. Steps take longer."""


# Of a call of the virtual machine: its name (that of a kernel, or one that begins with "vm."), whether it begins, and when the
# telling began and ended, in seconds.
Mark = tuple[str, bool, float, float]


class Here:
    """This machine's processor or GPU, ``device``, and the code in ``module``."""

    def __init__(self, module: Any, device: Any, threads: int, cores: Sequence[int] | None = None) -> None:
        self._threads, self._cores, self._device = threads, cores, device
        self._configured = threading.local()
        self._use_threads()
        self._machine = VirtualMachine(module, device)
        self._functions: dict[str, Any] = {}
        self._given: dict[tuple[tuple[str, str], tuple[int, ...], np.dtype[Any]], Any] = {}
        self.seconds = 0.0

    def tensor(self, value: np.ndarray) -> Any:
        """As in ``Place``."""
        return tvm.runtime.tensor(value, self._device)

    def given(self, key: tuple[str, str], value: np.ndarray) -> Any:
        """As in ``Place``. On a processor, an array that begins where compiled code expects it, as PyTorch's do, is read as it lies."""
        if self._device.type != "cpu":
            return self.tensor(value)
        value = np.asarray(value, order="C")
        if value.ctypes.data % ALIGNMENT == 0 and value.flags.writeable:  # DLPack hands out no others
            return tvm.runtime.from_dlpack(value)
        kind = key, value.shape, value.dtype
        if kind not in self._given:
            self._given[kind] = self.tensor(value)
        ctypes.memmove(self._given[kind].data_ptr(), value.ctypes.data, value.nbytes)
        return self._given[kind]

    def same(self, one: Any, other: Any) -> bool:
        """As in ``Place``."""
        return bool(one.data_ptr() == other.data_ptr())

    def call(self, entry: Entry, arguments: Sequence[Any]) -> Sequence[Any]:
        """As in ``Place``."""
        function, start = self.function(entry.name), time.perf_counter()
        results = function(*arguments)
        self.seconds = time.perf_counter() - start
        return results

    def function(self, name: str) -> Any:
        """The compiled function ``name``. Raises ``AttributeError`` where there is none."""
        self._use_threads()
        if name not in self._functions:
            self._functions[name] = self._machine[name]
        return self._functions[name]

    @contextmanager
    def watched(self, watch: Callable[..., int]) -> Iterator[None]:
        """As ``TrainStep.watched``."""
        self._machine.set_instrument(watch)
        try:
            yield
        finally:
            self._machine.set_instrument(None)

    @contextmanager
    def marked(self) -> Iterator[list[Mark]]:
        """As in ``Place``."""
        marks: list[Mark] = []

        def note(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
            start = time.perf_counter()
            marks.append((name, bool(before), start, time.perf_counter()))
            return 0

        with self.watched(note):
            yield marks

    def _use_threads(self) -> None:
        """Each thread of Python that calls TVM has a pool of its own, to be configured before its first use."""
        if not hasattr(self._configured, "done"):
            use_threads(self._threads, self._cores)
            self._configured.done = True


@dataclass(frozen=True)
class _Call:
    """What calls of one entry have in common while the state is in the same ``tensors``: one step passes hundreds.

    places: the number of each argument, which is None where it is not state; results: the numbers of those to look at, once known.
    """

    tensors: Tensors
    arguments: tuple[Any, ...]
    places: Mapping[tuple[str, str], int]
    results: tuple[int, ...] | None

    @classmethod
    def of(cls, entry: Entry, tensors: Tensors, results: tuple[int, ...] | None) -> _Call:
        places = {spec.key: i for i, spec in enumerate(entry.inputs)}
        return cls(tensors, tuple(tensors.get(spec.name) for spec in entry.inputs), places, results)


class TrainStep:
    """A running training step: call it with data, and its parameters have moved.

    Data are NumPy arrays or anything with DLPack on the CPU (PyTorch tensors too): one array, or a tuple or list of them where
    the model has several. What begins at a multiple of 64 bytes, as PyTorch's tensors do, is read where it lies: it must not change
    during a call. Errors about data are ``InputError`` and change nothing. Threads that share a step need a lock.
    """

    def __init__(self, place: Place, manifest: Manifest, state: Mapping[str, np.ndarray]) -> None:
        self.manifest = manifest
        self.place = place
        chosen = selection.seeds(manifest.selections) | selection.largest(manifest.selections, state)
        self._moment = self._prepared({name: self._tensor(value) for name, value in {**state, **chosen}.items()}, 0)
        self._outputs: list[Any] = []
        self._calls: dict[str, _Call] = {}

    @property
    def steps(self) -> int:
        """How many training steps have been taken; saved and restored."""
        return self._moment.steps

    @property
    def channels(self) -> dict[str, np.ndarray]:
        """Layer name -> the channels ([count] int32) that the next step trains, of each layer of which it trains a share."""
        selections, tensors = self.manifest.selections, self._moment.tensors
        state = {name: tensors[name].numpy() for name in selection.specs(selections)}
        return {chosen.layer: selection.channels(chosen, self.steps, state) for chosen in selections}

    @property
    def outputs(self) -> tuple[np.ndarray, ...]:
        """The model's outputs in the last training step, before its update; empty before the first."""
        return tuple(tensor.numpy() for tensor in self._outputs)

    def __call__(self, x: Any, y: Any, lr: float | None = None, channels: Mapping[str, Any] | None = None) -> float:
        """One training step on one batch of the compiled size; returns the loss before the update.

        ``lr`` is this step's learning rate, by default the optimizer's. ``channels``, layer name -> indices, names what this step
        trains of partly trained layers; other layers, and later steps, have their own (``self.channels``) as ever. Raises
        ``InputError`` for data that do not fit and ``NonFiniteLossError`` for a NaN or infinite loss; both leave the state as it was.
        """
        entry = self.manifest.named["train_step"]
        given = self._batch(entry, x, y) | self._chosen(channels, update=True)
        given |= {
            spec.key: self.place.given(spec.key, _rate(self.manifest.lr if lr is None else lr, spec))
            for spec in entry.inputs
            if spec.role == "rate"
        }
        with _uninterrupted():
            results = self._run(entry, given)
            loss = next(float(value.numpy()) for spec, value in results if spec.role == "loss")
            if math.isfinite(loss):
                new = {spec.name: value for spec, value in results if spec.role in STATE_ROLES}
                self._outputs = [self._own(value, given) for spec, value in results if spec.role == "output"]
                self._moment = _Moment(self._moment.tensors | new if new else self._moment.tensors, self.steps + 1)
                return loss
        raise NonFiniteLossError(
            f"the loss of step {self.steps + 1} is {loss}; the state is that of step {self.steps}. "
            "Lower the learning rate, set clip_norm, or look at this batch"
        )

    def predict(self, x: Any) -> Any:
        """The model's output in evaluation mode for any number N >= 1 of samples; a tuple if the model has several outputs."""
        entry = self.manifest.named["predict"]
        arrays = self._samples(entry, x)
        specs = [spec for spec in entry.outputs if spec.role == "output"]
        parts = [self._predict(piece, size) for piece, size in self._pieces(arrays)]
        outputs = tuple(batches.join([part[spec.key] for part in parts], spec, self.manifest.batch) for spec in specs)
        return outputs[0] if len(outputs) == 1 else outputs

    def evaluate(self, x: Any, y: Any) -> losses.Evaluation:
        """The mean loss over all N >= 1 samples in evaluation mode, exact for any N, as a float with accuracy and count.

        A loss of the user's own is compiled for whole batches: then N has to be a multiple of the batch (else ``InputError``),
        and the result is the mean of the batches' losses.
        """
        arrays = self._samples(self.manifest.named["predict"], x) | self._samples(self.manifest.named["loss"], y, role="target")
        count = self._count(arrays)
        custom = self.manifest.loss.name == "custom"
        if custom and count % self.manifest.batch:
            raise InputError(
                f"got {count} samples, and the loss, one of your own, was compiled for {self.manifest.batch} at a time; "
                f"evaluate a multiple of {self.manifest.batch} samples, or compute the loss from predict(x)"
            )
        tally = self._custom_loss if custom else self._built_in_loss
        total = sum((tally(piece, size) for piece, size in self._pieces(arrays)), losses.Tally())
        loss = total.loss / total.weight if total.weight else math.nan
        return losses.Evaluation(loss, total.right / total.labels if total.labels else None, count)

    def gradients(self, x: Any, y: Any, channels: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """The gradient of every trained parameter on one batch; the state is left alone. Only in steps built for verifying.

        A partly trained weight has the gradient of its channels alone: those of the next step, or of ``channels``.
        """
        entry = self.manifest.named.get("gradients")
        if entry is None:
            raise ArtifactError("this artifact has no gradients entry; build it for verifying to compare gradients")
        results = self._run(entry, self._batch(entry, x, y) | self._chosen(channels, update=False))
        return {spec.name: value.numpy() for spec, value in results if spec.role == "gradient"}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers under PyTorch's names, tied names included."""
        values = {name: self._moment.tensors[name].numpy() for name in self._model_names()}
        return values | {tied: values[name].copy() for tied, name in self.manifest.aliases.items() if name in values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take all parameters and buffers from NumPy arrays or DLPack tensors under PyTorch's names; optimizer state stays.

        Where a layer's channels are chosen by magnitude, they are chosen anew: a channel that stays keeps its optimizer state, and
        one that comes starts from zero.
        Raises ``InputError`` for names that are missing or unexpected, wrong shapes or dtypes, and tied names that disagree;
        then nothing has changed.
        """
        self._check_names(state)
        aliases = self.manifest.aliases
        new: dict[str, np.ndarray] = {}
        for given, value in state.items():
            name = aliases.get(given, given)
            array = _weights(value, self.manifest.state[name], given)
            if not np.array_equal(new.setdefault(name, array), array, equal_nan=array.dtype.kind == "f"):
                raise InputError(
                    f"{given!r} is tied to {name!r} in this model, and they have different values; give one of them"
                )
        tensors = {name: self._tensor(array) for name, array in (new | self._rechosen(new)).items()}
        self._go_on_from(self._prepared(self._moment.tensors | tensors, self.steps))

    def marked(self) -> AbstractContextManager[list[Mark]]:
        """The ends of each call of the virtual machine in the block: ``with step.marked() as marks: step(x, y)``.

        The list is complete when the block ends. Steps take longer.
        """
        return self.place.marked()

    def take_over(self, other: TrainStep) -> None:
        """Go on as ``other``, a step of the same artifact, where it is: on a board that came back, for example."""
        self.place, self._outputs = other.place, other._outputs
        self._go_on_from(other._moment)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all state to one file, so that ``restore`` and the steps after it give the same bits as going on from here.

        A kill at any moment leaves the old file or the new one. Raises ``StorageError`` where it cannot be written.
        """
        moment = self._moment
        names = (*self.manifest.state, *selection.specs(self.manifest.selections))
        values = {name: moment.tensors[name].numpy() for name in names}
        artifact.write_checkpoint(path, values, moment.steps, self.manifest.versions.get("tvmtrain", "unknown"))

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take all state from a file of ``save``. Raises ``CheckpointError``, and nothing has changed, if it does not fit."""
        wanted = {**self.manifest.state, **selection.specs(self.manifest.selections)}
        values, steps = artifact.read_checkpoint(path, wanted)
        for chosen in (s for s in self.manifest.selections if s.select == "magnitude"):
            try:
                selection.check(chosen, values[selection.key(chosen)])
            except InputError as error:  # a step would read and write beyond its weights
                raise CheckpointError(f"checkpoint {path}: {error}") from error
        self._go_on_from(self._prepared({name: self._tensor(value) for name, value in values.items()}, steps))

    def _go_on_from(self, moment: _Moment) -> None:
        """Other state, and nothing kept of the old: calls would hold its tensors until the next call of their entry."""
        self._moment = moment
        self._calls.clear()

    def _tensor(self, value: np.ndarray) -> Any:
        """A copy of ``value`` in the memory of what computes."""
        return self.place.tensor(value)

    def _run(self, entry: Entry, given: Mapping[tuple[str, str], Any]) -> list[tuple[TensorSpec, Any]]:
        """What ``entry`` returns, without the state that it wrote where it had read it."""
        known = self._calls.get(entry.name)
        if known is None or known.tensors is not self._moment.tensors:
            known = _Call.of(entry, self._moment.tensors, known.results if known else None)
        arguments = list(known.arguments)
        for key, tensor in given.items():
            arguments[known.places[key]] = tensor
        results = self.place.call(entry, arguments)
        if known.results is None:
            known = replace(known, results=self._elsewhere(entry, arguments, results))
        self._calls[entry.name] = known
        return [(entry.outputs[i], results[i]) for i in known.results or ()]

    def _own(self, result: Any, given: Mapping[tuple[str, str], Any]) -> Any:
        """A result to keep: a copy where a model returns what it was given."""
        return self._tensor(result.numpy()) if any(self.place.same(result, tensor) for tensor in given.values()) else result

    def _elsewhere(self, entry: Entry, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[int, ...]:
        """The numbers of the results that are not the memory of the state they replace: the same in every call of compiled code."""
        before = {spec.name: tensor for spec, tensor in zip(entry.inputs, arguments, strict=True) if spec.role in STATE_ROLES}
        return tuple(
            i
            for i, (spec, result) in enumerate(zip(entry.outputs, results, strict=True))
            if spec.role not in STATE_ROLES or spec.name not in before or not self.place.same(before[spec.name], result)
        )

    def _prepared(self, tensors: Tensors, steps: int) -> _Moment:
        """These weights with what the compiled step has of the frozen ones: folded once, here, and not in every step."""
        entry = self.manifest.named.get(artifact.PREPARE)
        if entry is None:
            return _Moment(tensors, steps)
        made = self.place.call(entry, [tensors[spec.name] for spec in entry.inputs])
        return _Moment(tensors | {spec.name: value for spec, value in zip(entry.outputs, made, strict=True)}, steps)

    def _chosen(self, named: Mapping[str, Any] | None, update: bool) -> dict[tuple[str, str], Any]:
        """Which channels of each partly trained layer: those that the user names, and this step's own for the other layers.

        update: whether the optimizer's state is going to change, which may exist for some channels alone.
        """
        own, known = self.channels, {chosen.layer: chosen for chosen in self.manifest.selections}
        self._check_layers(named or {}, known)
        for layer, value in (named or {}).items():
            chosen = known[layer]
            array = _numpy(value, TensorSpec("channels", layer, (chosen.count,), "int32"))
            bound = own[layer] if update and chosen.fixed and self._optimizer_state(chosen) else None
            own[layer] = selection.check(chosen, array, bound)
        return {("channels", known[layer].weight): self._tensor(array) for layer, array in own.items()}

    def _check_layers(self, named: Mapping[str, Any], known: Mapping[str, Selection]) -> None:
        if not isinstance(named, Mapping):
            raise InputError(f"channels is {type(named).__name__}; want layer name -> indices")
        for layer in (name for name in named if name not in known):
            whole = {name.rpartition(".")[0] for name in self._model_names()}
            what = "is trained whole, or not at all" if layer in whole else f"is not known{_near(str(layer), list(known))}"
            listed = ", ".join(list(known)[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
            raise InputError(f"channels: layer {layer!r} {what}; layers of which a share is trained: {listed or 'none'}")

    def _optimizer_state(self, chosen: Selection) -> list[str]:
        """Names of the optimizer's state of a partly trained weight."""
        return [n for n, spec in self.manifest.state.items() if spec.role == "optimizer" and n.endswith(f":{chosen.weight}")]

    def _rechosen(self, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The channels of the largest magnitudes in new ``weights``, and the optimizer's state of those channels."""
        tensors = self._moment.tensors
        new = selection.largest(self.manifest.selections, weights)
        for chosen in (s for s in self.manifest.selections if s.select == "magnitude"):
            old, now = tensors[selection.key(chosen)].numpy(), new[selection.key(chosen)]
            for name in self._optimizer_state(chosen):
                new[name] = selection.carried(chosen, weights[chosen.weight].shape, tensors[name].numpy(), old, now)
        return new

    def _batch(self, entry: Entry, x: Any, y: Any) -> dict[tuple[str, str], Any]:
        """The tensors of one batch of exactly the compiled size."""
        arrays = self._read(entry, x, "input") | self._read(entry, y, "target")
        for spec, array in arrays.values():
            if array.shape != spec.shape:
                raise InputError(batches.wrong_shape(spec, array.shape, self.manifest.batch))
            checks.check(spec, array, self.manifest.loss)
        return {key: self.place.given(key, array) for key, (_, array) in arrays.items()}

    def _samples(self, entry: Entry, value: Any, role: str = "input") -> dict[tuple[str, str], tuple[TensorSpec, np.ndarray]]:
        """The arrays of any number of samples, checked."""
        arrays = self._read(entry, value, role)
        for spec, array in arrays.values():
            free = batches.rows_per_sample(spec, self.manifest.batch) > 0
            if array.shape != spec.shape and not (free and array.ndim == len(spec.shape) and array.shape[1:] == spec.shape[1:]):
                wanted = ("N", *spec.shape[1:]) if free else spec.shape
                raise InputError(f"{spec.role} {spec.name!r} has shape {array.shape}; want ({', '.join(map(str, wanted))})")
            checks.check(spec, array, self.manifest.loss)
        return arrays

    def _read(self, entry: Entry, value: Any, role: str) -> dict[tuple[str, str], tuple[TensorSpec, np.ndarray]]:
        """Arrays of the compiled dtypes; their shapes are still to be checked."""
        specs = [spec for spec in entry.inputs if spec.role == role]
        values = _several(value, len(specs), role)
        return {spec.key: (spec, checks.cast(_numpy(item, spec), spec)) for spec, item in zip(specs, values, strict=True)}

    def _count(self, arrays: Mapping[tuple[str, str], tuple[TensorSpec, np.ndarray]]) -> int:
        """The number of samples, on which all arrays have to agree."""
        counts = {}
        for spec, array in arrays.values():
            if rows := batches.rows_per_sample(spec, self.manifest.batch):
                counts[f"{spec.role} {spec.name!r}"] = array.shape[0] / rows
        if not counts:
            return self.manifest.batch
        if len(set(counts.values())) != 1 or min(counts.values()) < 1:
            listed = ", ".join(f"{name}: {count:g}" for name, count in counts.items())
            raise InputError(f"numbers of samples are {listed}; want one number for all, and at least 1")
        return math.ceil(next(iter(counts.values())))

    def _pieces(
        self, arrays: Mapping[tuple[str, str], tuple[TensorSpec, np.ndarray]]
    ) -> Iterator[tuple[dict[Any, np.ndarray], int]]:
        """Compiled batches, the last one filled up with its last sample, each with the number of samples that count."""
        batch, count = self.manifest.batch, self._count(arrays)
        for start in range(0, count, batch):
            size = min(batch, count - start)
            yield {key: batches.piece(spec, array, start, size, batch) for key, (spec, array) in arrays.items()}, size

    def _predict(self, piece: Mapping[Any, np.ndarray], size: int) -> dict[tuple[str, str], np.ndarray]:
        """The outputs of one compiled batch, without the samples that only filled it up."""
        entry = self.manifest.named["predict"]
        inputs = {key: self._tensor(array) for key, array in piece.items() if key[0] == "input"}
        return {
            spec.key: batches.trim(value.numpy(), spec, size, self.manifest.batch) for spec, value in self._run(entry, inputs)
        }

    def _built_in_loss(self, piece: Mapping[Any, np.ndarray], size: int) -> losses.Tally:
        entry = self.manifest.named["loss"]
        output = next(spec for spec in entry.inputs if spec.role == "output")
        target = next(spec for spec in entry.inputs if spec.role == "target")
        prediction = self._predict(piece, size)[output.key]
        return losses.measure(
            self.manifest.loss, prediction, batches.trim(piece[target.key], target, size, self.manifest.batch)
        )

    def _custom_loss(self, piece: Mapping[Any, np.ndarray], size: int) -> losses.Tally:
        given = self._predict(piece, size) | {key: array for key, array in piece.items() if key[0] == "target"}
        results = self._run(self.manifest.named["loss"], {key: self._tensor(array) for key, array in given.items()})
        return losses.Tally(loss=sum(float(value.numpy()) for spec, value in results if spec.role == "loss"), weight=1)

    def _model_names(self) -> list[str]:
        return [name for name, spec in self.manifest.state.items() if spec.role in MODEL_ROLES]

    def _check_names(self, state: Mapping[str, Any]) -> None:
        """Every parameter and buffer is there under one of its names, and nothing else."""
        names, aliases = self._model_names(), self.manifest.aliases
        given = {aliases.get(name, name) for name in state}
        known = [*names, *aliases]
        unexpected = [f"{name!r}{_near(name, known)}" for name in state if aliases.get(name, name) not in names]
        missing = [repr(name) for name in names if name not in given]
        if unexpected or missing:
            raise InputError(
                f"state_dict does not fit this model: {_listed('missing', missing)}; {_listed('unexpected', unexpected)}"
            )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end: between the native code that moves the weights and the counting of it, it would lose a step.

    Python interrupts its main thread alone, and there alone may a handler be set.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


# Threads.


def default_threads(cores: Sequence[int] | None = None) -> int:
    """As many as ``cores``; without, ``TVM_NUM_THREADS`` if set, else the physical cores this process may use.

    TVM itself takes half of all logical ones.
    """
    if cores:
        return len(cores)
    asked = os.environ.get("TVM_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else physical_cores()


def physical_cores() -> int:
    """Cores that this process may run on; hyperthreads of one core count once."""
    return len({_siblings(cpu) for cpu in _CPUS})


def use_threads(count: int, cores: Sequence[int] | None = None) -> None:
    """Let TVM compute with ``count`` threads when called from this thread of Python, on ``cores`` (None: on all that there are).

    Threads are not pinned: each may run on any of these. Raises ``InputError`` for a core that this process may not use.
    """
    if absent := sorted(set(cores or ()) - set(_CPUS)):
        raise InputError(f"cores: got {', '.join(map(str, absent))}; this process may use {', '.join(map(str, _CPUS))}")
    allowed = list(cores or _CPUS)
    # -3: threads may run on all the listed processors. TVM allows as many threads as the list is long.
    places = [str(allowed[i % len(allowed)]) for i in range(max(count, len(allowed)))]
    get_global_func("runtime.config_threadpool")(-3, count, places)
    if (got := get_global_func("runtime.NumThreads")()) < count:
        warnings.warn(
            f"TVM was used in this thread before and keeps to {got} threads instead of {count}; set TVM_NUM_THREADS={count}",
            RuntimeWarning,
            stacklevel=2,
        )


def _siblings(cpu: int) -> str:
    """Names the physical core of a logical processor."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


# Memory.


@dataclass(frozen=True)
class Memory:
    """Of a machine, in bytes: all, and what new work can have; 0 where unknown."""

    total: int
    available: int


def memory(root: str = "") -> Memory:
    """This machine's, or that of the group of processes (a container) that this one is limited to.

    root: before the paths of what the system tells. ``native/src/memory.cc`` counts the same way.
    """
    told = {
        name: int(value.split()[0]) * 1024 for name, _, value in map(_pair, _lines(f"{root}/proc/meminfo")) if value.split()
    }
    total, available = told.get("MemTotal", 0), told.get("MemAvailable", 0)
    group = f"{root}/sys/fs/cgroup/memory"
    limit, used = (_number(f"{group}.{name}") for name in ("max", "current"))
    # Pages of files that nobody has used for a while are given up where memory is wanted.
    cache = next((int(line.split()[1]) for line in _lines(f"{group}.stat") if line.startswith("inactive_file ")), 0)
    if limit and (limit < total or not total):
        return Memory(limit, min(available or limit, max(1, limit - max(0, used - cache))))
    return Memory(total, available)


def check_memory(manifest: Manifest, memory: Memory, where: str) -> None:
    """Raise ``DeviceError`` for a step that needs more than can be had ``where``; on a GPU, its memory is another one."""
    needed = artifact.memory_needed(manifest)
    if memory.available and needed > memory.available and not artifact.on_gpu(manifest):
        state = sum(manifest.state_bytes.values())
        raise DeviceError(
            f"a step needs {needed / 2**20:.1f} MiB ({state / 2**20:.1f} of them parameters and optimizer state) and {where} has "
            f"{memory.available / 2**20:.1f} of {memory.total / 2**20:.1f} MiB available: end other programs, or compile with a smaller "
            "batch, a plan that trains less, or --arena SIZE"
        )


def _pair(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: str) -> int:
    """The number in a file of one; 0 where there is none ("max", or no such file)."""
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdigit() else 0


# Native code.


def load_library(path: Path) -> Any:
    """The native code at ``path``, which has been checked."""
    try:
        gpu_code.teach_tvm()
        with _own_name(path) as place, artifact.without_scope_log():
            return tvm.runtime.load_module(str(place))
    except OSError as error:
        raise StorageError(f"{path} cannot be copied to a temporary folder: {error.strerror}; set TMPDIR") from error
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be loaded by TVM {tvm.__version__}: {error}") from error


@contextmanager
def _own_name(path: Path) -> Iterator[Path]:
    """``path``, or a copy of it where a library of that path was loaded and has been replaced since.

    The system's loader takes an equal path for an equal library, and would go on with the old one.
    """
    file = path.stat()
    if _loaded.setdefault(path.resolve(), (file.st_dev, file.st_ino)) == (file.st_dev, file.st_ino):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copy(path, folder))


def device(manifest: Manifest) -> Any:
    """What computes: this machine's first NVIDIA GPU or its processor."""
    if not artifact.on_gpu(manifest):
        return tvm.cpu()
    try:
        return gpu()
    except DeviceError as error:
        name = manifest.device.get("name", "?")
        raise DeviceError(f"{artifact.LIBRARY} was compiled for an NVIDIA GPU (device {name!r}), and {error}") from error


def gpu() -> Any:
    """This machine's first NVIDIA GPU. Raises ``DeviceError`` where there is none."""
    load_gpu_runtime()
    if not (found := tvm.cuda(0)).exist:
        raise DeviceError(
            "TVM finds none here: it needs the driver (libcuda.so.1) and CUDA's runtime (libcudart.so.13) where the system's loader "
            "looks, by LD_LIBRARY_PATH for example"
        )
    return found


@cache
def load_gpu_runtime() -> None:
    """TVM's part for NVIDIA GPUs, which its runtime alone leaves out; nothing happens where it or CUDA's runtime is missing."""
    for folder in sys.path:
        # What PyPI's packages bring is not where the loader looks.
        for path in Path(folder).glob("nvidia/*/lib/libcudart.so.13"):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    with suppress(OSError, RuntimeError):
        load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", extra_lib_paths=package_lib_paths())


def here(module: Any, manifest: Manifest, threads: int | None = None, cores: Sequence[int] | None = None) -> Here:
    """This machine with the code in ``module``. Raises ``InputError`` for no threads, ``ArtifactError`` for code that does not start."""
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; want 1 or more, or None for every physical core")
    try:
        place = Here(module, device(manifest), threads or default_threads(cores), cores)
        for entry in manifest.entries:
            place.function(entry.name)
    except (RuntimeError, ValueError, AttributeError) as error:
        if isinstance(error, TvmtrainError):
            raise
        made = manifest.versions.get("tvm", "unknown")
        raise ArtifactError(f"{artifact.LIBRARY} (TVM {made}) cannot be started by TVM {tvm.__version__}: {error}") from error
    return place


# Data.


def _several(value: Any, count: int, role: str) -> Sequence[Any]:
    """The arrays that a user gave for ``count`` inputs: one as it is, several as a tuple or list."""
    if count == 1:
        wrapped = isinstance(value, (tuple, list)) and len(value) == 1 and hasattr(value[0], "shape")
        return value if wrapped else [value]
    if not isinstance(value, (tuple, list)) or len(value) != count:
        got = f"{len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
        raise InputError(f"the model has {count} of role {role!r} and got {got}; give a tuple of {count} arrays")
    return value


def _numpy(value: Any, spec: TensorSpec) -> np.ndarray:
    """``value`` as a NumPy array, without a copy where it has DLPack."""
    if isinstance(value, np.ndarray):
        return value
    try:
        return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        hint = "want a NumPy array or a tensor on the CPU (for PyTorch: x.detach().cpu())"
        raise InputError(f"{spec.role} {spec.name!r} cannot be read: {error}; {hint}") from error


def _rate(lr: float, spec: TensorSpec) -> np.ndarray:
    try:
        rate = float(lr)
    except (TypeError, ValueError) as error:
        raise InputError(f"lr is {type(lr).__name__}; want a number") from error
    with np.errstate(over="ignore"):
        rounded = np.asarray(rate, spec.dtype)
    if not np.isfinite(rounded) or rate < 0:
        raise InputError(f"lr is {rate}; want a number of 0 or more that is finite in {spec.dtype}")
    return rounded


def _weights(value: Any, spec: TensorSpec, name: str) -> np.ndarray:
    array = checks.cast(_numpy(value, spec), spec)
    if array.shape != spec.shape:
        raise InputError(f"{name!r} has shape {array.shape}; want {spec.shape}")
    return array


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    return f" (near: {', '.join(near)})" if near else ""


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what}: {', '.join(names[:5]) or 'none'}{more}"
