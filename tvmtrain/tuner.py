"""Tuning: which decisions of the templates make each kernel of a training step fastest on the machine at hand.

A task is a kernel with a reduction in it. In each round, the task with most to gain for the step gets some trials: decisions next to
its best ones and others at random, of which MetaSchedule's cost model (XGBoost) picks those that it thinks fastest. Each trial is
written down when it ends, and a search that was interrupted goes on where it was. At the end the best and the default decisions are
timed in turns; what is faster then, too, becomes a record (``schedules.records``).
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from tvm import tirx
from tvm.s_tir import Schedule

from tvmtrain import builder, lowering, roofline, runtime, targets, workload
from tvmtrain.artifact import Artifact
from tvmtrain.console import Console, percent
from tvmtrain.errors import DeviceError
from tvmtrain.fleet import Fleet
from tvmtrain.graph import TrainGraph
from tvmtrain.profile import random_batch
from tvmtrain.runtime import TrainStep
from tvmtrain.schedules import cpu, records
from tvmtrain.schedules.blocks import FAILURES
from tvmtrain.schedules.decisions import DEFAULT, OPTIONS, Decisions
from tvmtrain.schedules.records import Record
from tvmtrain.targets import Device
from tvmtrain.trials import Candidate, Log, Stopwatch, Task, Trial, read_log

# Trials of a task in one round, and how many candidates the cost model chooses them from.
ROUND, DRAWN = 6, 12
# Share of the step's time that a task must promise to be worth a round.
WORTH = 0.001
# A record is at least so much faster than the defaults, in so many turns.
FASTER, TURNS = 0.97, 5
# Share of the time that is left for comparing at the end.
COMPARING = 0.1
# Turns of whole steps, and steps in a turn.
STEPS, IN_A_ROW = 12, 4
SHOWN = 16


@dataclass(frozen=True)
class Settings:
    """minutes: of the whole search; trials: at most so many; threads: a kernel's (None: all cores); seed: of random decisions."""

    minutes: float = 10.0
    trials: int | None = None
    threads: int | None = None
    seed: int = 0


@dataclass
class Search:
    """What is known of a task. floor: the least microseconds of a call; equal: decisions that came to what was timed already;
    stale: trials since the best one."""

    task: Task
    floor: float
    times: dict[tuple[int, ...], float | None] = field(default_factory=dict)
    equal: set[tuple[int, ...]] = field(default_factory=set)
    forms: set[str] = field(default_factory=set)
    stale: int = 0
    error: str | None = None

    @property
    def default(self) -> float | None:
        """Microseconds with the default decisions."""
        return self.times.get(astuple(DEFAULT))

    @property
    def best(self) -> tuple[float, tuple[int, ...]] | None:
        """Microseconds and decisions."""
        return min(((us, chosen) for chosen, us in self.times.items() if us is not None), default=None)

    @property
    def failed(self) -> int:
        return sum(us is None for us in self.times.values())

    @property
    def total(self) -> float:
        """Microseconds of all calls in a step, at best."""
        return self.task.calls * self.best[0] if self.best else 0.0

    @property
    def promise(self) -> float:
        """Microseconds of a step that more trials might win; less, the longer none has won anything."""
        return max(0.0, self.total - self.task.calls * self.floor) * 0.5 ** (self.stale / (2 * ROUND))

    def note(self, trial: Trial) -> None:
        self.forms.add(trial.form)
        better = trial.us is not None and (self.best is None or trial.us < self.best[0])
        self.times[trial.decisions] = trial.us
        self.error = trial.error or self.error
        self.stale = 0 if better else self.stale + 1

    def proposals(self, rng: random.Random) -> list[Decisions]:
        """Decisions that were not tried; every second one a step or two away from the best."""
        base = self.best[1] if self.best else astuple(DEFAULT)
        found: dict[tuple[int, ...], None] = {}
        for i in range(8 * DRAWN):
            changed = rng.sample(range(len(OPTIONS)), rng.choice((1, 2)) if i % 2 else len(OPTIONS))
            drawn = tuple(rng.randrange(n) if k in changed else base[k] for k, n in enumerate(OPTIONS))
            if drawn not in self.times and drawn not in self.equal and len(found) < DRAWN:
                found.setdefault(drawn)
        return [Decisions(*drawn) for drawn in found]


@dataclass(frozen=True)
class Tuned:
    """A kernel: microseconds of a call with the defaults and with ``decisions``, in turns; share: of what the machine can do."""

    kernel: str
    name: str
    calls: int
    gflop: float
    trials: int
    failed: int
    default_us: float
    us: float
    share: float | None
    decisions: tuple[int, ...]

    @property
    def gain(self) -> float:
        return self.default_us / self.us


@dataclass(frozen=True)
class Steps:
    """Milliseconds of a whole training step, untuned and tuned, in turns: medians."""

    untuned: float
    tuned: float


@dataclass(frozen=True)
class Result:
    """A search; error: of one of the trials that failed; kernels: those that take longest first.

    before, after: milliseconds of these kernels in a step, each timed alone, with the defaults and with what was found.
    steps: what it comes to; None where nothing was found or the search was interrupted. emulated: why times mean nothing.
    """

    folder: str
    device: str
    seconds: float
    trials: int
    failed: int
    error: str | None
    interrupted: bool
    before: float | None
    after: float | None
    kernels: tuple[Tuned, ...]
    steps: Steps | None
    emulated: str = ""

    def without_times(self) -> Result:
        """The same, or where processors are ``emulated`` what of it means anything: trials, and which of them failed."""
        return replace(self, before=None, after=None, kernels=()) if self.emulated else self

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def tune(
    graph: TrainGraph,
    device: str | Device,
    settings: Settings,
    out: Console,
    *,
    command: str = "",
    boards: Fleet | None = None,
) -> Result:
    """Search, and keep what was found in ``schedules.records.folder_of(device)``, for every later build.

    boards: where kernels are timed; None: here. Times of emulated ones mean nothing, and nothing of them is kept.
    An interrupt ends the search early. Raises ``DeviceError`` for a device that is not this machine, ``StorageError`` for a folder
    that cannot be written, ``RemoteError`` where all boards are gone.
    """
    device = targets.load(device) if isinstance(device, str) else device
    if boards is None:
        _check_here(device)
        threads = settings.threads or runtime.default_threads()
        runtime.use_threads(threads)
    else:
        threads = boards.threads
    records.load(device)  # what is damaged is better known before the search than after it
    started = time.monotonic()
    with out.working("finding the kernels"):
        tasks = find_tasks(graph, device)
    searches = _searches(tasks, threads, boards, out)
    emulated = boards.emulated if boards is not None else ""
    with (
        tempfile.TemporaryDirectory() as folder,
        _appended(_log_path(device, threads, Path(folder) if emulated else None)) as file,
    ):
        _remember(searches, Path(file.name))
        watch = Stopwatch(device, threads, Path(folder), boards)
        until = started + 60 * settings.minutes * (1 - COMPARING)
        finished = _search(searches, watch, Log(file), _Limits(until, settings.trials, settings.seed, bool(emulated)), out)
        kernels, compared = _compare(searches, watch, out)
    machine = str(targets.load("host").target["mcpu"]) if boards is None else ", ".join(boards.names)
    kept = "" if emulated else str(_keep(device, kernels, command, machine))
    return Result(
        folder=kept,
        device=device.name,
        seconds=time.monotonic() - started,
        trials=sum(len(s.times) for s in searches),
        failed=sum(s.failed for s in searches),
        error=next((s.error for s in searches if s.error is not None), None),
        interrupted=not (finished and compared),
        before=sum(k.calls * k.default_us for k in kernels) / 1e3,
        after=sum(k.calls * k.us for k in kernels) / 1e3,
        kernels=tuple(kernels),
        steps=_steps(graph, device, out, boards) if finished and compared and _changed(kernels) and not emulated else None,
        emulated=emulated,
    ).without_times()


def _searches(tasks: Sequence[Task], threads: int, boards: Fleet | None, out: Console) -> list[Search]:
    """What the processor can do at best is measured here, and not known of boards."""
    if boards is not None:
        return [Search(task, 0.0) for task in tasks]
    with out.working("measuring what this machine can do"):
        ceiling = roofline.measure(threads)
    return [Search(task, 1e6 * ceiling.seconds(task.flops, task.bytes)) for task in tasks]


def _check_here(device: Device) -> None:
    host = targets.load("host")
    if device.gpu or device.arch != host.arch:
        what = f"the GPU {device.gpu}" if device.gpu else f"a processor of {device.arch}, and this one is of {host.arch}"
        raise DeviceError(
            f"tune: {device.name!r} is {what}; kernels are timed on the processor at hand: tune on the device itself"
        )
    named = str(device.target.get("mcpu", "generic"))
    if device.cores != host.cores or not (named == host.target["mcpu"] or named.startswith(("generic", "x86-64"))):
        raise DeviceError(
            f"tune: {device.name!r} has {device.cores} cores of {named}, and this machine {host.cores} of {host.target['mcpu']}; "
            "kernels are timed on the processor at hand: tune on the device itself, or for host"
        )


def find_tasks(graph: TrainGraph, device: Device) -> list[Task]:
    """The kernels of a training step for whose schedules there is something to decide, with those of equal loops as one."""
    fused = lowering.fuse(builder.packed(graph.module(), device), device)
    calls = workload.calls(fused["train_step"])
    found: dict[str, Task] = {}
    for gvar, function in fused.functions_items():
        if calls[gvar.name_hint] and isinstance(function, tirx.PrimFunc) and _tunable(function):
            key = records.key_of(function)
            count = calls[gvar.name_hint] + (found[key].calls if key in found else 0)
            found[key] = Task(key, gvar.name_hint, function, count, workload.flops(function), workload.nbytes(function))
    return list(found.values())


def _tunable(function: tirx.PrimFunc) -> bool:
    """Whether there is a reduction: what only moves numbers through memory goes one way, as fast as memory."""
    try:
        return any(block.reduction for block in cpu.blocks_of(Schedule(function, error_render_level="none")))
    except FAILURES:
        return False


# --- Searching --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    until: float
    trials: int | None
    seed: int
    untimed: bool


def _search(searches: Sequence[Search], watch: Stopwatch, log: Log, limits: _Limits, out: Console) -> bool:
    """Trials until the time is over or nothing is promising; False if a person ended it."""
    count = 0
    try:
        with out.screen() as screen:
            for candidates in _rounds(searches, watch, random.Random(limits.seed)):
                left = len(candidates) if limits.trials is None else limits.trials - count
                if left <= 0 or time.monotonic() >= limits.until:
                    break
                trials = []
                for trial in watch.time(candidates[:left]):
                    log.write(trial)
                    _note(searches, [trial])
                    trials.append(trial)
                if len({c.task.key for c in candidates}) == 1:
                    watch.learn(candidates[: len(trials)], trials)
                count += len(trials)
                screen.show(*(_counts(searches) if limits.untimed else _table(searches, limits.until)))
    except KeyboardInterrupt:
        out.line("interrupted: what was tried is kept. Comparing the best with the defaults; another interrupt leaves that out")
        return False
    return True


def _rounds(searches: Sequence[Search], watch: Stopwatch, rng: random.Random) -> Iterator[list[Candidate]]:
    """What to try next: the defaults and the records of all tasks, whose times say where to look, then some of the most promising."""
    known = records.load(watch.device)
    first = [(s, d) for s in searches for d in dict.fromkeys((DEFAULT, known.decisions(s.task.function)))]
    untimed = [(s, d) for s, d in first if astuple(d) not in s.times]
    for i in range(0, len(untimed), ROUND):
        yield [_chosen(s, c) for s, d in untimed[i : i + ROUND] for c in _new(s, [d], watch)]
    while (search := _most_promising(searches)) is not None:
        candidates = watch.likeliest(_new(search, search.proposals(rng), watch), ROUND)
        if candidates:
            yield [_chosen(search, c) for c in candidates]
        else:
            search.stale += 2 * ROUND


def _chosen(search: Search, candidate: Candidate) -> Candidate:
    search.forms.add(candidate.form)
    return candidate


def _new(search: Search, proposals: Sequence[Decisions], watch: Stopwatch) -> list[Candidate]:
    """The candidates among proposals that differ from each other and from what was timed."""
    found: dict[str, Candidate] = {}
    for proposal in proposals:
        candidate = watch.candidate(search.task, proposal)
        if candidate.form in search.forms or candidate.form in found:
            search.equal.add(astuple(proposal))
        else:
            found[candidate.form] = candidate
    return list(found.values())


def _most_promising(searches: Sequence[Search]) -> Search | None:
    """None where nothing is worth a round."""
    best = max(searches, key=lambda s: s.promise, default=None)
    return best if best is not None and best.promise > WORTH * sum(s.total for s in searches) else None


def _note(searches: Sequence[Search], trials: Sequence[Trial]) -> None:
    by_kernel = {search.task.key: search for search in searches}
    for trial in trials:
        if trial.kernel in by_kernel:
            by_kernel[trial.kernel].note(trial)


def _table(searches: Sequence[Search], until: float) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """A title, and the tasks that take longest."""
    ordered = sorted(searches, key=lambda s: -s.total)
    columns = ("task", ">calls", ">GFLOP", ">trials", ">default us", ">best us", ">gain", ">of peak")
    rows = [
        (s.task.name[:48], str(s.task.calls), f"{s.task.flops / 1e9:.3f}", str(len(s.times)), *_times(s, s.best[0]))
        for s in ordered[:SHOWN]
        if s.best
    ]
    tried, failed = sum(len(s.times) for s in searches), sum(s.failed for s in searches)
    left = max(0.0, until - time.monotonic())
    now = sum(s.total for s in searches) / 1e3
    title = f"{tried} trials, {failed} failed; {now:.2f} ms in {len(searches)} kernels; {left / 60:.1f} min left"
    return title, columns, rows


def _counts(searches: Sequence[Search]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """The same where times mean nothing."""
    rows: list[tuple[str, ...]] = [(s.task.name[:48], str(len(s.times)), str(s.failed)) for s in searches if s.times]
    return f"{sum(len(s.times) for s in searches)} trials; emulated: no times", ("task", ">trials", ">failed"), rows[:SHOWN]


def _times(search: Search, us: float) -> tuple[str, ...]:
    default = search.default
    gain = (f"{default:.0f}", f"{us:.0f}", f"{default / us:.2f}") if default else ("failed", f"{us:.0f}", "-")
    return (*gain, percent(search.floor / us if search.floor else None))


# --- What is kept -----------------------------------------------------------------------------------------------------------


def _log_path(device: Device, threads: int, folder: Path | None = None) -> Path:
    """Of the trials under the present conditions (in ``folder``, if they are not to be kept); those under others would mislead."""
    return (folder or records.folder_of(device)) / f"trials-{records.fingerprint(device)}-{threads}.jsonl"


def _remember(searches: Sequence[Search], path: Path) -> None:
    """What an earlier search timed; what failed may have failed for a reason of that day, and is tried again."""
    _note(searches, [trial for trial in read_log(path) if trial.us is not None])
    for search in searches:
        search.stale = 0


def _appended(path: Path) -> TextIO:
    with records.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")


def _compare(searches: Sequence[Search], watch: Stopwatch, out: Console) -> tuple[list[Tuned], bool]:
    """The best and the default decisions of each task in turns: the fastest of many trials was lucky, too.

    Also whether it came to its end, and no interrupt did.
    """
    kernels: list[Tuned] = []
    finished = False
    with suppress(KeyboardInterrupt), out.progress("comparing with the defaults", len(searches)) as bar:
        for search in searches:
            if search.default is not None and (found := _compared(search, watch)) is not None:
                kernels.append(_tuned(search, *found))
            bar.advance(1, search.task.name)
        finished = True
    return sorted(kernels, key=lambda k: -k.calls * k.us), finished


def _compared(search: Search, watch: Stopwatch) -> tuple[float, float, Decisions] | None:
    """Microseconds with the defaults and with the decisions that are to be kept, and these; None where neither could be timed."""
    assert search.default is not None
    assert search.best is not None
    best, chosen = search.best
    unchanged = search.default, search.default, DEFAULT
    if best >= FASTER * search.default:
        return unchanged
    pair = [watch.candidate(search.task, d) for d in (DEFAULT, Decisions(*chosen))]
    if pair[0].form == pair[1].form:
        return unchanged
    built = watch.compile(pair)
    turns = [[watch.run(c, b).us for c, b in zip(pair, built, strict=True)] for _ in range(TURNS)]
    ran = [(before, after) for before, after in turns if before is not None and after is not None]
    if not ran:
        return None
    before, after = (statistics.median(times) for times in zip(*ran, strict=True))
    return (before, after, Decisions(*chosen)) if after < FASTER * before else (before, before, DEFAULT)


def _steps(graph: TrainGraph, device: Device, out: Console, boards: Fleet | None) -> Steps:
    """The step with the records and without, in one process."""
    with out.working("compiling the step, tuned and untuned"):
        artifacts = [builder.build(graph, device, tuned=tuned) for tuned in (False, True)]
    steps = _started(artifacts, boards)
    x, y = random_batch(artifacts[0].manifest)
    times: tuple[list[float], list[float]] = ([], [])
    with out.progress("comparing the steps", STEPS) as bar:
        for _ in range(STEPS):
            for step, found in zip(steps, times, strict=True):
                found += _timed(step, x, y, there=boards is not None)
            bar.advance(1, f"{times[1][-1]:.2f} ms")
    untuned, tuned = (statistics.median(found) for found in times)
    return Steps(untuned, tuned)


def _started(artifacts: Sequence[Artifact], boards: Fleet | None) -> list[TrainStep]:
    if boards is None:
        return [artifact.load() for artifact in artifacts]
    board = boards.connect()
    with tempfile.TemporaryDirectory() as folder:
        return [board.load(made.save(Path(folder) / str(i)), boards.threads) for i, made in enumerate(artifacts)]


def _timed(step: TrainStep, x: Any, y: Any, *, there: bool) -> list[float]:
    """Milliseconds of the later ones of some steps in a row: the first finds the other's data in the caches.

    there: by the board's clock, without the network.
    """
    found = []
    for _ in range(IN_A_ROW):
        start = time.perf_counter()
        step(x, y, lr=0.0)
        found.append(1e3 * (step.place.seconds if there else time.perf_counter() - start))
    return found[1:]


def _tuned(search: Search, before: float, after: float, chosen: Decisions) -> Tuned:
    task = search.task
    return Tuned(
        kernel=task.key,
        name=task.name,
        calls=task.calls,
        gflop=task.flops / 1e9,
        trials=len(search.times),
        failed=search.failed,
        default_us=before,
        us=after,
        share=search.floor / after if search.floor else None,
        decisions=astuple(chosen),
    )


def _keep(device: Device, kernels: Sequence[Tuned], command: str, machine: str) -> Path:
    """Write the records: these kernels' in place of earlier ones, other kernels' as they were."""
    kept = dict(records.load(device).by_kernel)
    for k in kernels:
        kept.pop(k.kernel, None)
        if Decisions(*k.decisions) != DEFAULT:
            kept[k.kernel] = Record(k.kernel, k.name, Decisions(*k.decisions), k.us, k.default_us, k.trials)
    trials = sum(record.trials for record in kept.values())
    about = {
        "command": command,
        "machine": machine,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "kernels": len(kept),
        "trials": trials,
    }
    return records.save(device, kept.values(), about)


def _changed(kernels: Sequence[Tuned]) -> int:
    """How many have other decisions than the defaults."""
    return sum(k.decisions != astuple(DEFAULT) for k in kernels)


def show(result: Result, out: Console) -> None:
    """The kernels that take longest, and what tuning gained."""
    if result.emulated:
        out.line(f"{result.trials} trials, {result.failed} failed")
        if result.error is not None:
            out.line(f"one that failed: {result.error.strip().splitlines()[-1]}", "yellow")
        out.line(f"emulated: no times, and no records ({result.emulated})", "bold")
        return
    columns = ("kernel", ">calls", ">GFLOP", ">trials", ">default us", ">tuned us", ">gain", ">of peak")
    rows = [
        (
            k.name[:60],
            str(k.calls),
            f"{k.gflop:.3f}",
            str(k.trials),
            f"{k.default_us:.0f}",
            f"{k.us:.0f}",
            f"{k.gain:.2f}",
            percent(k.share),
        )
        for k in result.kernels[:SHOWN]
    ]
    out.table(columns, rows)
    changed = _changed(result.kernels)
    out.line(f"{result.trials} trials, {result.failed} failed, {result.seconds / 60:.1f} min")
    if result.error is not None:
        out.line(f"one that failed: {result.error.strip().splitlines()[-1]}", "yellow")
    if result.kernels and result.before is not None and result.after is not None:
        gain = f"{result.before:.2f} -> {result.after:.2f} ms a step, {result.before / result.after:.2f}x"
        out.line(f"{changed} of {len(result.kernels)} kernels have a record; together {gain}", "bold")
    if result.steps is not None:
        before, after = result.steps.untuned, result.steps.tuned
        out.line(f"a whole step, in turns: {before:.2f} ms untuned, {after:.2f} ms tuned, {before / after:.2f}x", "bold")
    out.line(f"records: {result.folder}; every build for {result.device} uses them")
