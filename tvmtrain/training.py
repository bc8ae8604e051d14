"""The loop around a compiled step: epochs, learning rates, evaluation, checkpoints. NumPy and the runtime only.

Another program gets the same run with: the samples of epoch e in the order of ``order``, in whole batches (the rest of an epoch
is left out), and the learning rate of ``Rate.at``.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as tensor_file

from tvmtrain import artifact, batches, console
from tvmtrain.data import Dataset
from tvmtrain.errors import InputError, RemoteError
from tvmtrain.runtime import TrainStep

SCHEDULES = ("constant", "cosine", "step")
NO_TIMES = "emulated: no times"
EVALUATED_AT_ONCE = 8  # batches between two looks at Ctrl-C


@dataclass(frozen=True)
class Rate:
    """The learning rate of every step. ``warmup``: steps of a linear start; ``step_size``: epochs between two drops."""

    lr: float
    schedule: str = "constant"
    step_size: int = 1
    gamma: float = 0.1
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES or self.step_size < 1 or self.warmup < 0 or not math.isfinite(self.lr):
            raise InputError(
                f"learning rate: schedule={self.schedule!r}, lr={self.lr}, step_size={self.step_size}, warmup={self.warmup}; "
                f"want one of {', '.join(SCHEDULES)}, a finite lr, step_size >= 1 and warmup >= 0"
            )

    def at(self, step: int, per_epoch: int, epochs: int) -> float:
        """The rate of step number ``step`` (from 0) of a run of ``epochs`` times ``per_epoch`` steps.

        warm-up: lr * (step + 1) / warmup; cosine: lr * (1 + cos(pi * t)) / 2, t from 0 to 1 after the warm-up;
        step: lr * gamma ** (epoch // step_size).
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "cosine":
            share = (step - self.warmup) / max(1, per_epoch * epochs - self.warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        if self.schedule == "step":
            return self.lr * self.gamma ** (step // per_epoch // self.step_size)
        return self.lr


@dataclass(frozen=True)
class Recovery:
    """What to do where a board is lost: ``start`` it anew, so many ``times`` in a row, ``pause`` seconds apart, and take the
    last checkpoint (or begin with ``resume``, as the run did)."""

    start: Callable[[], TrainStep]
    times: int = 5
    pause: float = 10.0
    resume: Path | None = None


@dataclass(frozen=True)
class Settings:
    """How to train. ``epochs`` counts from the first step of all, before a resume too; ``save_every``: steps, 0: epochs only."""

    epochs: int
    rate: Rate
    shuffle: bool = False
    seed: int = 0
    save: Path | None = None
    save_every: int = 0
    rescue: Path | None = None  # where an interrupted run is saved if ``save`` is None
    recovery: Recovery | None = None
    timed: bool = True  # whether times mean anything: not where the processor is emulated


@dataclass(frozen=True)
class Score:
    """The mean loss over ``count`` samples, and the share of right answers (None where there are no classes)."""

    loss: float
    accuracy: float | None
    count: int


@dataclass(frozen=True)
class Epoch:
    """One epoch's steps in this run: mean loss and accuracy in training, the score after it, the median time of a step."""

    epoch: int
    steps: int
    lr: float
    loss: float
    accuracy: float | None
    ms_per_step: float | None
    evaluation: Score | None


@dataclass(frozen=True)
class Run:
    """What a run did. ``loss`` and ``accuracy`` are the last evaluation's, or without one the last epoch's in training."""

    epochs: tuple[Epoch, ...]
    steps: int  # since the first step of all
    samples: int  # trained on in this run
    ms_per_step: float | None
    loss: float | None
    accuracy: float | None
    evaluation: Score | None
    saved: str | None = None
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def order(count: int, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """Sample numbers in the order of ``epoch`` (from 0): as stored, or
    ``numpy.random.Generator(numpy.random.PCG64([seed, epoch])).permutation(count)``."""
    if not shuffle:
        return np.arange(count)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def fit(step: TrainStep, train: Dataset, test: Dataset | None, settings: Settings, out: console.Console) -> Run:
    """Train ``step`` on ``train`` from where it is (``step.steps`` says how far) to the end of ``settings.epochs``.

    Ctrl-C ends the run after the step at hand, saves it and returns what was done so far, with ``interrupted`` set. Raises
    ``RemoteError`` for a board that is lost and does not come back (``settings.recovery``); where one does, ``step`` goes on there.
    """
    fit = _Fit(step, train, test, settings, out)
    try:
        return fit.run()
    except RemoteError as error:
        error.saved = fit.saved
        raise


def evaluate(step: TrainStep, data: Dataset, out: console.Console) -> Score | None:
    """The score over all samples of ``data`` in evaluation mode; None if Ctrl-C came first."""
    with _interrupts() as stop:
        return _score(step, data, out, stop)


class _Fit:
    """One run: the arguments of ``fit``, and what it has done so far."""

    def __init__(self, step: TrainStep, train: Dataset, test: Dataset | None, settings: Settings, out: console.Console) -> None:
        self.step, self.train, self.test, self.settings, self.out = step, train, test, settings, out
        self.batch = step.manifest.batch
        self.per_epoch = batches.per_epoch(len(train), self.batch)
        self.epochs: list[Epoch] = []
        self.milliseconds: list[float] = []
        self.evaluation: Score | None = None
        self.saved: Path | None = None
        # The latest step at which the board was lost, and how often that was since then at no later one.
        self.furthest, self.fruitless = -1, 0

    def run(self) -> Run:
        if rest := batches.left_out(len(self.train), self.batch):
            self.out.line(rest)
        if self.step.steps >= self.per_epoch * self.settings.epochs:
            self.out.line(f"all {self.settings.epochs} epochs are done: {self.step.steps} steps of {self.per_epoch} per epoch")
        with _interrupts() as stop:
            while True:
                try:
                    self._rest(stop)
                    break
                except RemoteError as error:
                    self._recover(error, stop)
            if stop.is_set():
                self._save(self.settings.save or self.settings.rescue)
        return self._result(stop.is_set())

    def _rest(self, stop: threading.Event) -> None:
        """All that is still to be done."""
        while self.step.steps < self.per_epoch * self.settings.epochs and not stop.is_set():
            self._epoch(stop)
        if self.test is not None and self.evaluation is None and not stop.is_set():
            self.evaluation = _score(self.step, self.test, self.out, stop)

    def _recover(self, error: RemoteError, stop: threading.Event) -> None:
        """Go on on a board that came back, with the last checkpoint. Raises ``RemoteError`` where none did, or it is of no use."""
        how, saved, last = self.settings.recovery, self.saved, self.step.steps
        # What fails there at the same step again and again is not the connection.
        self.fruitless = 0 if last > self.furthest else self.fruitless + 1
        self.furthest = max(self.furthest, last)
        for _ in range(how.times if how is not None and self.fruitless <= how.times else 0):
            assert how is not None
            self.out.line(f"{error}; trying again in {how.pause:.0f} s", style="yellow")
            if stop.wait(how.pause):
                break
            try:
                step = how.start()
                if (checkpoint := saved or how.resume) is not None:
                    step.restore(checkpoint)
                self.step.take_over(step)
                self.out.line(f"the board is back: going on after step {step.steps}, {last - step.steps} steps are taken again")
                return
            except RemoteError as again:
                error = again
        kept = f"checkpoint {saved} is here" if saved is not None else "no checkpoint was written"
        raise RemoteError(f"{error}. The last step was {last}; {kept}") from error

    def _epoch(self, stop: threading.Event) -> None:
        number, position = divmod(self.step.steps, self.per_epoch)
        tally = _Tally(self.settings.timed)
        label = f"epoch {number + 1}/{self.settings.epochs}"
        rows = order(len(self.train), number, self.settings.seed, self.settings.shuffle)
        with self.out.progress(label, self.per_epoch, position) as bar:
            for i in range(position, self.per_epoch):
                self._step(rows[i * self.batch : (i + 1) * self.batch], tally)
                bar.advance(1, tally.note())
                if stop.is_set():
                    break
        self.milliseconds += tally.milliseconds
        self.evaluation = None
        if not stop.is_set():
            self._save(self.settings.save)
        self.epochs.append(tally.epoch(number + 1, None))
        if self.test is not None and not stop.is_set():
            self.evaluation = _score(self.step, self.test, self.out, stop)
            self.epochs[-1] = replace(self.epochs[-1], evaluation=self.evaluation)
        part = "" if tally.count == self.per_epoch else f" ({tally.count} of {self.per_epoch} steps)"
        self.out.line(_epoch_line(label + part, self.epochs[-1]))

    def _step(self, rows: np.ndarray, tally: _Tally) -> None:
        x, y = self.train.batch(rows)
        lr = self.settings.rate.at(self.step.steps, self.per_epoch, self.settings.epochs)
        start = time.perf_counter()
        loss = self.step(x, y, lr=lr)
        tally.milliseconds.append(1e3 * (time.perf_counter() - start))
        tally.add(loss, lr, _right(self.step, y[0]))
        if self.settings.save_every and self.step.steps % self.settings.save_every == 0:
            self._save(self.settings.save)

    def _save(self, path: Path | None) -> None:
        if path is not None:
            self.step.save(path)
            self.saved = path

    def _result(self, interrupted: bool) -> Run:
        last = self.evaluation or (self.epochs[-1] if self.epochs else None)
        return Run(
            epochs=tuple(self.epochs),
            steps=self.step.steps,
            samples=len(self.milliseconds) * self.batch,
            ms_per_step=statistics.median(self.milliseconds) if self.milliseconds and self.settings.timed else None,
            loss=last.loss if last else None,
            accuracy=last.accuracy if last else None,
            evaluation=self.evaluation,
            saved=str(self.saved) if self.saved else None,
            interrupted=interrupted,
        )


@dataclass
class _Tally:
    """What adds up over the steps of an epoch."""

    timed: bool = True
    loss: float = 0.0
    lr: float = 0.0
    right: int = 0
    labels: int = 0
    milliseconds: list[float] = field(default_factory=list)

    def add(self, loss: float, lr: float, right: tuple[int, int]) -> None:
        self.loss, self.lr = self.loss + loss, lr
        self.right, self.labels = self.right + right[0], self.labels + right[1]

    @property
    def count(self) -> int:
        return len(self.milliseconds)

    @property
    def accuracy(self) -> float | None:
        return self.right / self.labels if self.labels else None

    def note(self) -> str:
        recent = statistics.median(self.milliseconds[-50:]) if self.timed else None
        return f"loss {console.number(self.loss / self.count)}{_accuracy(self.accuracy)}  {_per_step(recent)}"

    def epoch(self, number: int, evaluation: Score | None) -> Epoch:
        median = statistics.median(self.milliseconds) if self.timed else None
        return Epoch(number, self.count, self.lr, self.loss / self.count, self.accuracy, median, evaluation)


def _epoch_line(label: str, epoch: Epoch) -> str:
    parts = [f"{label}  loss {console.number(epoch.loss)}{_accuracy(epoch.accuracy)}"]
    if epoch.evaluation is not None:
        parts.append(f"evaluation loss {console.number(epoch.evaluation.loss)}{_accuracy(epoch.evaluation.accuracy)}")
    return "  |  ".join([*parts, f"lr {epoch.lr:.3g}  {_per_step(epoch.ms_per_step)}"])


def _per_step(ms: float | None) -> str:
    return NO_TIMES if ms is None else f"{ms:.1f} ms/step"


def _accuracy(share: float | None) -> str:
    return "" if share is None else f"  accuracy {console.percent(share)}"


def score_line(score: Score) -> str:
    """``score`` for people."""
    return f"evaluation: loss {console.number(score.loss)}{_accuracy(score.accuracy)}  ({score.count} samples)"


def _right(step: TrainStep, labels: np.ndarray) -> tuple[int, int]:
    """(right answers, labels that count) of the last training step; (0, 0) where there are no classes."""
    loss = step.manifest.loss
    if loss.name != "cross_entropy" or labels.dtype.kind not in "iu":
        return 0, 0
    counts = labels != loss.ignore_index
    return int(((step.outputs[0].argmax(axis=1) == labels) & counts).sum()), int(counts.sum())


def _score(step: TrainStep, data: Dataset, out: console.Console, stop: threading.Event) -> Score | None:
    """Piece by piece, so that samples are never all in memory and Ctrl-C is heard."""
    batch, count = step.manifest.batch, len(data)
    if step.manifest.loss.name == "custom" and count % batch:
        # A loss of the user's own is compiled for whole batches.
        out.line(f"evaluation leaves out {count % batch} of {count} samples: this loss takes whole batches of {batch}")
        count -= count % batch
    loss = right = labels = 0.0
    with out.progress("evaluation", count) as bar:
        for start in range(0, count, batch * EVALUATED_AT_ONCE):
            rows = np.arange(start, min(count, start + batch * EVALUATED_AT_ONCE))
            x, y = data.batch(rows)
            part, weight = step.evaluate(x, y), _weight(step, y[0])
            if weight:
                loss, labels = loss + float(part) * weight, labels + weight
                right += (part.accuracy or 0.0) * weight
            bar.advance(len(rows), f"loss {console.number(loss / max(labels, 1))}")
            if stop.is_set():
                return None
    has_classes = part.accuracy is not None or right > 0
    return Score(loss / labels if labels else math.nan, right / labels if has_classes and labels else None, count)


def _weight(step: TrainStep, labels: np.ndarray) -> int:
    """How many terms of the mean loss these targets have, up to a factor that is the same for all samples."""
    spec = step.manifest.loss
    if spec.name == "cross_entropy" and labels.dtype.kind in "iu":
        return int((labels != spec.ignore_index).sum())
    return len(labels)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one interrupts at once, as everywhere."""
    stop = threading.Event()
    previous: Any = None

    def note(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    # Signals belong to the main thread: elsewhere (in a notebook's helper thread, say) its owner handles them.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def export_weights(step: TrainStep, path: Path) -> None:
    """Parameters and buffers under PyTorch's names as safetensors: ``model.load_state_dict(safetensors.torch.load_file(path))``."""
    values = {name: np.asarray(value, order="C") for name, value in step.state_dict().items()}
    artifact.write_file(path, tensor_file.save(values))
