"""One side of a comparison, in a process of its own: it starts a training step, and takes its turns when it is told to.

Orders come through standard input and answers go through standard output, pickled; between two turns the process sleeps. Neither
PyTorch nor the compiler is loaded where the compiled step runs.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from tvmtrain.jobs import Job

OURS, BUILD = "tvmtrain", "build"
PEERS = ("eager", "eager-cl", "compile", "compile-cl")
GRAPH = "-graph"
GPU_PEERS = (*PEERS, *(name + GRAPH for name in PEERS))
BATCH = "batch.npz"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what sets VmHWM to the present VmRSS (proc(5))

Step = Callable[[], float]


@dataclass(frozen=True)
class Memory:
    """Bytes in use ``before`` the first step, and the ``peak`` since the last ``reset``."""

    before: Callable[[], int]
    reset: Callable[[], None]
    peak: Callable[[], int]


@dataclass(frozen=True)
class Started:
    """A step that is ready; ``wait`` returns when its device has done all that it was told."""

    step: Step
    memory: Memory
    wait: Callable[[], None]


@dataclass(frozen=True)
class Order:
    """Who the process is: ``OURS`` runs the artifact in ``folder``, ``BUILD`` makes it of ``job``, a peer trains ``job`` in PyTorch.

    trained: names of the parameters that a peer trains; None: those that require a gradient.
    """

    name: str
    folder: str
    threads: int
    job: Job | None = None
    trained: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Built:
    """``trained`` parameters of the artifact, and the seconds of tracing, compiling and linking."""

    trained: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Ready:
    """The losses of the first two steps, the seconds of the first, and the bytes that it needed at most (``bench.Contestant``)."""

    losses: tuple[float, float]
    seconds: float
    peak: int


@dataclass(frozen=True)
class Turn:
    """Take so many steps to get warm, for so many ``seconds`` at least, and so many on the clock."""

    warmup: int
    steps: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Taken:
    """Milliseconds of each step, and the bytes that they needed at most (``bench.Contestant``)."""

    ms: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class Failed:
    """Why a contestant is out."""

    reason: str


def main() -> None:
    """Follow orders until there are none."""
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        _follow(orders, answers)
    except Exception as error:
        _send(answers, Failed(_reason(error)))


def _follow(orders: BinaryIO, answers: BinaryIO) -> None:
    order: Order = pickle.load(orders)
    if order.name == BUILD:
        _send(answers, build(order))
        return
    started = _start(order)
    before = started.memory.before()
    start = time.perf_counter()
    first = started.step()
    started.wait()
    seconds = time.perf_counter() - start
    _send(answers, Ready((first, started.step()), seconds, started.memory.peak() - before))
    while True:
        try:
            turn: Turn = pickle.load(orders)
        except EOFError:
            return
        _send(answers, _taken(started, turn, before))


def _start(order: Order) -> Started:
    if order.name == OURS:
        return _compiled(order)
    from tvmtrain import gpu_peers, peers, targets

    assert order.job is not None, "a peer needs a model"
    side = peers if targets.load(order.job.device).gpu is None else gpu_peers
    return side.start(order.name, order.job, order.trained, order.threads)


def build(order: Order) -> Built:
    """Compile the step into the folder, with its batch beside it."""
    from tvmtrain import builder, jobs

    assert order.job is not None, "there is nothing to build"
    prepared = jobs.prepare(order.job)
    start = time.perf_counter()
    artifact = builder.build(jobs.trace(order.job, prepared), order.job.device)
    artifact.save(order.folder)
    seconds = time.perf_counter() - start
    arrays = {f"{role}{i}": t.numpy() for role, ts in (("x", prepared.x), ("y", prepared.y)) for i, t in enumerate(ts)}
    np.savez(Path(order.folder) / BATCH, **arrays)
    return Built(artifact.manifest.trained, seconds)


def _compiled(order: Order) -> Started:
    from tvmtrain import artifact, runtime

    step = runtime.load(order.folder, order.threads)
    stored = np.load(Path(order.folder) / BATCH)
    x, y = (
        tuple(_aligned(stored[name], runtime.ALIGNMENT) for name in sorted(stored, key=_number) if name[0] == role)
        for role in "xy"
    )
    memory = PROCESS
    if artifact.on_gpu(step.manifest):
        memory = _constant(artifact.memory_needed(step.manifest) + sum(array.nbytes for array in (*x, *y)))
    return Started(lambda: step(x, y), memory, runtime.device(step.manifest).sync)


def _aligned(array: np.ndarray, alignment: int) -> np.ndarray:
    """A copy that begins at a multiple of ``alignment`` bytes, as PyTorch's tensors do: every contestant has its batch as it likes it."""
    memory = np.empty(array.nbytes + alignment, "uint8")
    start = -memory.ctypes.data % alignment
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _number(name: str) -> int:
    return int(name[1:])


def _taken(started: Started, turn: Turn, before: int) -> Taken:
    _warm(started, turn)
    started.memory.reset()
    ends = [time.perf_counter()]
    for _ in range(turn.steps):
        started.step()
        started.wait()
        ends.append(time.perf_counter())
    ms = tuple(1e3 * (end - start) for start, end in itertools.pairwise(ends))
    return Taken(ms, started.memory.peak() - before)


def _warm(started: Started, turn: Turn) -> None:
    until, taken = time.perf_counter() + turn.seconds, 0
    while taken < turn.warmup or time.perf_counter() < until:
        started.step()
        taken += 1
    started.wait()


# Memory.


def _settled() -> int:
    """Bytes of the process once the allocator has given back what is free: steps would fill it unseen."""
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    return _bytes("VmRSS")


def _reset_peak() -> None:
    CLEAR.write_text(RESET_PEAK)


def _bytes(figure: str) -> int:
    found = re.search(rf"^{figure}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


PROCESS = Memory(_settled, _reset_peak, lambda: _bytes("VmHWM"))


def _constant(size: int) -> Memory:
    """What always needs ``size`` bytes."""
    return Memory(lambda: 0, lambda: None, lambda: size)


# Answers.


def _send(answers: BinaryIO, answer: Any) -> None:
    pickle.dump(answer, answers)
    answers.flush()


def _reason(error: Exception) -> str:
    """The first lines that say something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
