"""Trials of schedules: one kernel with some decisions of its templates, compiled and timed on this machine, and written down.

Compiling happens in threads of this process (TVM's compiler lets go of Python's lock), timing in MetaSchedule's ``LocalRunner``: one
worker that lives as long as the search, and is started anew where a kernel crashed or hung; or on boards (``tvmtrain.fleet``).
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TextIO

import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.arg_info import ArgInfo

from tvmtrain import artifact, codegen, runtime, toolchain
from tvmtrain.fleet import Fleet, Runner
from tvmtrain.schedules import cpu, decisions, records
from tvmtrain.schedules.decisions import Decisions
from tvmtrain.targets import Device

# Trials from which on the cost model is asked.
LEARNED = 64
# Seconds after which a kernel is killed; a second is a slow training step.
TIMEOUT = 10.0
# Runs on the clock: three times as many as take 8 ms.
CLOCK = ms.runner.EvaluatorConfig(number=1, repeat=3, min_repeat_ms=8)
# What MetaSchedule's database writes for a kernel that did not run, in seconds.
FAILED = 1e9


@dataclass(frozen=True)
class Task:
    """A kernel of the step: its loops before any schedule, calls in one step, operations and bytes of one call."""

    key: str
    name: str
    function: tirx.PrimFunc
    calls: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Trial:
    """us: microseconds of a call, the median of some; None where it could not be compiled or run, and ``error`` says why.

    form: of the candidate, equal for schedules that came out equal.
    """

    kernel: str
    decisions: tuple[int, ...]
    form: str
    us: float | None
    error: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A task's schedule with these decisions; ``form``: equal for schedules that came out equal."""

    task: Task
    decisions: Decisions
    measured: ms.MeasureCandidate
    form: str


class Stopwatch:
    """Compiles candidates into ``folder`` and times them on ``threads`` threads; holds the worker and the cost model."""

    def __init__(self, device: Device, threads: int, folder: Path, boards: Fleet | None = None) -> None:
        self.device, self.folder, self.target = device, folder, codegen.processor(device)
        self.runner: _Here | Runner = _Here(threads) if boards is None else Runner(boards, CLOCK)
        self.link = _linker(device)
        self.at_once = 1 if boards is None else 2 * len(boards.names)
        # More threads would spin for each other while kernels are compiled.
        self.model = ms.cost_model.XGBModel(num_warmup_samples=LEARNED, early_stopping_rounds=10, num_tuning_cores=1)
        self.contexts: dict[str, ms.TuneContext] = {}
        self.pending: list[tuple[Sequence[Candidate], Sequence[Trial]]] = []
        self.learned = 0

    def candidate(self, task: Task, chosen: Decisions) -> Candidate:
        sch = Schedule(self._context(task).mod, error_render_level="none")
        sch = self._space(sch, astuple(chosen))
        arguments = ArgInfo.from_prim_func(task.function)
        return Candidate(task, chosen, ms.MeasureCandidate(sch, arguments), records.key_of(sch.mod["main"]))

    def likeliest(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """Those of one task that the cost model thinks fastest; the first ones until it has seen enough."""
        if self.learned < LEARNED or len(candidates) <= count:
            return list(candidates[:count])
        scores = self.model.predict(self._context(candidates[0].task), [c.measured for c in candidates])
        ranked = sorted(range(len(candidates)), key=lambda i: -float(scores[i]))
        return [candidates[i] for i in ranked[:count]]

    def time(self, candidates: Sequence[Candidate]) -> Iterator[Trial]:
        """One trial for each, in the same order."""
        pairs = list(zip(candidates, self.compile(candidates), strict=True))
        for i in range(0, len(pairs), self.at_once):
            yield from self.run_all(pairs[i : i + self.at_once])

    def learn(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> None:
        """Tell the cost model how some candidates of one task compare; it thinks about them when there are many."""
        self.pending.append((candidates, trials))
        waiting = sum(len(some) for some, _ in self.pending)
        if waiting >= max(LEARNED, self.learned // 4):
            self.learned += sum(self._teach(some, theirs) for some, theirs in self.pending)
            self.pending.clear()

    def _teach(self, candidates: Sequence[Candidate], trials: Sequence[Trial]) -> int:
        """How many of them there was something to learn from."""
        ran = [(c.measured, t.us) for c, t in zip(candidates, trials, strict=True) if t.us is not None]
        if len(ran) > 1:
            results = [ms.runner.RunnerResult([us / 1e6], None) for _, us in ran]
            self.model.update(self._context(candidates[0].task), [measured for measured, _ in ran], results)
        return len(ran)

    def compile(self, candidates: Sequence[Candidate]) -> list[Path | str]:
        """For each the path of its library, or why there is none."""
        with ThreadPoolExecutor(codegen.cores()) as threads:
            return list(threads.map(self._compiled, candidates))

    def _compiled(self, candidate: Candidate) -> Path | str:
        path = self.folder / f"{candidate.task.key}-{candidate.form}.so"
        try:
            codegen.compiled(candidate.measured.sch.mod, self.target).export_library(str(path), fcompile=self.link)
        except Exception as error:  # whatever a schedule can do to a compiler: the trial failed, and the search goes on
            return f"{type(error).__name__}: {error}"
        return path

    def run(self, candidate: Candidate, built: Path | str) -> Trial:
        """Time a compiled candidate once."""
        return self.run_all([(candidate, built)])[0]

    def run_all(self, pairs: Sequence[tuple[Candidate, Path | str]]) -> list[Trial]:
        """Time compiled candidates, on boards side by side."""
        inputs = [ms.runner.RunnerInput(str(b), "cpu", c.measured.args_info) for c, b in pairs if not isinstance(b, str)]
        results = iter(self.runner.run(inputs) if inputs else ())
        return [_failed(c, b) if isinstance(b, str) else _trial(c, next(results)) for c, b in pairs]

    def _context(self, task: Task) -> ms.TuneContext:
        """MetaSchedule's view of a task: its space is what the templates make of it, with decisions drawn."""
        if task.key not in self.contexts:
            space = ms.space_generator.ScheduleFn(self._space, sch_rules=[], postprocs=[], mutator_probs={})
            mod = tvm.IRModule({"main": task.function.with_attr("global_symbol", "main")})
            with _without_intrinsics():
                context = ms.TuneContext(mod, target=self.target, space_generator=space, task_name=task.name, num_threads=1)
            self.contexts[task.key] = context
        return self.contexts[task.key]

    def _space(self, sch: Schedule, chosen: tuple[int, ...] | None = None) -> Schedule:
        """One schedule of the space: with decisions that are ``chosen``, or at random as MetaSchedule calls it."""
        return cpu.decided(sch, self.device, decisions.sample(sch, chosen))


def _failed(candidate: Candidate, why: str) -> Trial:
    return Trial(candidate.task.key, astuple(candidate.decisions), candidate.form, None, why)


def _trial(candidate: Candidate, result: ms.runner.RunnerResult) -> Trial:
    if result.error_msg is not None:
        return _failed(candidate, str(result.error_msg))
    seconds = statistics.median(map(float, result.run_secs))
    if not 0 < seconds < FAILED:
        return _failed(candidate, f"run_secs: {seconds}")
    return Trial(candidate.task.key, astuple(candidate.decisions), candidate.form, 1e6 * seconds)


class _Here:
    """This machine, one candidate after the other."""

    def __init__(self, threads: int) -> None:
        begin = partial(_begin, threads)
        self.runner = ms.runner.LocalRunner(timeout_sec=TIMEOUT, evaluator_config=CLOCK, initializer=begin)

    def run(self, inputs: Sequence[ms.runner.RunnerInput]) -> list[ms.runner.RunnerResult]:
        """A result for each."""
        return [future.result() for future in self.runner.run(list(inputs))]


def _begin(threads: int) -> None:
    """In the worker, when it starts: an interrupt on the terminal is for the search, which lets the worker end its trial."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    runtime.use_threads(threads)


@contextmanager
def _without_intrinsics() -> Iterator[None]:
    """TuneContext (TVM 0.27) imports all of TVM's tensor intrinsics: minutes of parsing where torch is loaded, for none of use here.

    Its parser asks ``inspect`` for the source of every frame of the stack, and that goes through all loaded modules each time.
    """
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


def _linker(device: Device) -> Callable[..., None] | None:
    """The linker for a device, called by itself and not through the C++ compiler, TVM's way, which takes longer than a kernel."""
    own = device.arch == artifact.machine()
    program = shutil.which("ld" if own else f"{device.triple}-ld")
    if program is None and not own:
        return toolchain.find(device).linker

    def link(library: str, objects: Sequence[str], **_: object) -> None:
        subprocess.run([str(program), "-shared", "-o", library, *objects], check=True, capture_output=True)

    return link if program else None


class Log:
    """Every trial, a line each, written when it ends."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        # A kill may have cut the last line short: the next one is its own.
        self.file.write("\n")

    def write(self, trial: Trial) -> None:
        self.file.write(f"{json.dumps(asdict(trial))}\n")
        self.file.flush()


def read_log(path: Path) -> Iterator[Trial]:
    """The trials in a file, if there is one; a line that is no trial (cut short by a kill) is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            trial = Trial(**json.loads(line))
            sound = decisions.valid(trial.decisions) and (
                trial.us is None or (type(trial.us) is float and 0 < trial.us < math.inf)
            )
        except (ValueError, TypeError, OverflowError):
            continue
        if sound and isinstance(trial.kernel, str) and isinstance(trial.form, str):
            yield replace(trial, decisions=tuple(trial.decisions))
