"""A compiled training step beside the fastest that PyTorch has: same weights, same batch, same trained parameters.

Each contestant is a process of its own that stays alive; they take turns, and all but one sleep. PyTorch gets its best: fused
optimizer, channels last, ``torch.compile``, and an allocator that keeps what it has, which makes it up to twice as fast as its default;
on an NVIDIA GPU each of these as a CUDA graph, too (``gpu_peers`` has the terms). A contestant's time is the median of its best round;
the rival is the fastest of the others.
"""

from __future__ import annotations

import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tvmtrain import gpu_load, runtime, targets
from tvmtrain.console import Console, number, percent, size
from tvmtrain.contestant import BUILD, GPU_PEERS, GRAPH, OURS, PEERS, Built, Failed, Order, Ready, Taken, Turn
from tvmtrain.errors import BusyMachineError, DeviceError, InputError

if TYPE_CHECKING:
    from tvmtrain.jobs import Job

RATE = 1e-5  # hundreds of steps on one batch stay alike, and rounding does not grow
IDLE = 0.85
LOOK = 1.0  # seconds over which idleness is looked at
PAUSE = 0.5  # seconds after which the threads of TVM and OpenMP no longer wait by spinning
GPU_WARMUP = 0.5  # seconds in which a GPU that was idle gets back to its clock
STAT = Path("/proc/stat")
# glibc's allocator keeps what is freed, and PyTorch does not fault in its pages again in every step.
STRONGEST = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "268435456"}
# Both slow PyTorch down, or decide over its threads.
UNSET = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT")
START = "from tvmtrain import contestant; contestant.main()"


@dataclass(frozen=True)
class Settings:
    """How to measure: in each of ``rounds``, ``warmup`` steps and then ``steps`` on the clock, with ``threads`` threads.

    peers: some of ``GPU_PEERS``, or of ``PEERS`` where a processor computes; None: all of them. warm: seconds that ``warmup`` takes at
    least. tolerance: of the first two losses, relative; anyway: measure on a busy machine, too. peers_train_all: they train whatever has a
    gradient in the model, and only ours what the plan says.
    """

    rounds: int = 3
    steps: int = 30
    warmup: int = 3
    threads: int = 2
    peers: tuple[str, ...] | None = None
    tolerance: float = 1e-3
    anyway: bool = False
    peers_train_all: bool = False
    warm: float = 0.0

    def __post_init__(self) -> None:
        _check_peers(self.peers or (), GPU_PEERS)
        if min(self.rounds, self.steps, self.threads) < 1 or self.warmup < 0:
            raise InputError(f"got {self.rounds} rounds, {self.steps} steps, {self.threads} threads; want 1 or more of each")

    def on(self, device: str, gpu: bool) -> Settings:
        """With the peers that can be had there, and time for a GPU to get warm. Raises ``InputError`` for peers that cannot."""
        offered = GPU_PEERS if gpu else PEERS
        peers = offered if self.peers is None else self.peers
        _check_peers(peers, offered, f" on device {device!r}")
        return replace(self, peers=peers, warm=max(self.warm, GPU_WARMUP if gpu else 0.0))


def _check_peers(peers: Sequence[str], offered: Sequence[str], where: str = "") -> None:
    if unknown := [name for name in peers if name not in offered]:
        raise InputError(f"peers: got {', '.join(unknown)}; want some of {', '.join(offered)}{where}")
    if len(set(peers)) < len(peers):
        raise InputError(f"peers: got {', '.join(peers)}; want each once")


@dataclass(frozen=True)
class Spread:
    """Milliseconds of a step: the median, the 10th and the 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ms: Sequence[float]) -> Spread:
        ordered = sorted(ms)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
        return cls(statistics.median(ordered), low, high)


@dataclass(frozen=True)
class Contestant:
    """What was measured of one; ``failed`` says why it is out, and then nothing else is known.

    best: of its best round; overall: of all rounds. losses: of its first two steps; same: whether they are those of the others.
    seconds: of compiling before the first step, or of the first step itself where it compiles; None where nothing is compiled.
    first, steady: in that step and in the timed ones, bytes by which the process was at most larger than before its first step; or of
    all tensors on the GPU, parameters too: as PyTorch counts them, and in ours as the manifest does, with the batch.
    """

    name: str
    failed: str | None = None
    best: Spread | None = None
    overall: Spread | None = None
    losses: tuple[float, float] | None = None
    same: bool = False
    seconds: float | None = None
    first: int = 0
    steady: int = 0


@dataclass(frozen=True)
class Machine:
    """Where it was measured; idle: the share of all processors that nobody used, before and after, with all contestants asleep.

    gpu: None where a processor computed; else with the share of time in which nobody used it, None where nothing tells.
    """

    processor: str
    cpus: int
    load: float
    idle_before: float | None
    idle_after: float | None = None
    gpu: str | None = None
    gpu_idle_before: float | None = None
    gpu_idle_after: float | None = None

    @property
    def busy(self) -> bool:
        """Whether others used it."""
        shares = (self.idle_before, self.idle_after, self.gpu_idle_before, self.gpu_idle_after)
        return any(idle is not None and idle < IDLE for idle in shares)

    def afterwards(self) -> Machine:
        """With what it is like now."""
        idle = idle_share()
        return replace(self, idle_after=idle, gpu_idle_after=None if self.gpu is None else gpu_load.idle_share())


@dataclass(frozen=True)
class Result:
    """A comparison; ``rival``: the fastest of the others; ``ratio``: its time over ours, above 1 where ours is faster.

    ``quiet``: whether the machine had nothing else to do; figures of one that had are no record.
    """

    model: str
    settings: Settings
    contestants: tuple[Contestant, ...]
    machine: Machine
    rival: str | None = None
    ratio: float | None = None
    quiet: bool = True

    @property
    def sound(self) -> bool:
        """Whether ours ran and another one with it, and all that ran computed the same."""
        ran = [c for c in self.contestants if c.failed is None]
        return any(c.name == OURS for c in ran) and len(ran) > 1 and all(c.same for c in ran)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"sound": self.sound}


def bench(job: Job, settings: Settings, out: Console) -> Result:
    """Measure ``job`` beside its peers; who fails is told in the result.

    Raises ``BusyMachineError``, ``DeviceError`` for a GPU that is not here, ``InputError`` for peers that its device does not have.
    """
    on_gpu = targets.load(job.device).gpu is not None
    settings = settings.on(job.device, on_gpu)
    machine = look_at(settings, _gpu(job.device, settings) if on_gpu else None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as alive:
        started, failed = _start_all(job, settings, Path(folder), alive, out)
        turns = _rounds(started, settings, out)
        for process in started:
            if isinstance(process.said, Failed):
                failed[process.name] = process.said.reason
        time.sleep(PAUSE)
        machine = machine.afterwards()
        found = [_contestant(p, turns[p.name]) for p in started if p.name not in failed]
    found += [Contestant(name, reason) for name, reason in failed.items()]
    return _result(job, settings, _compared(found, settings), machine)


def look_at(settings: Settings, gpu: str | None = None) -> Machine:
    """This machine before it begins. Raises ``BusyMachineError`` where others use it or its ``gpu``, unless ``settings.anyway``."""
    idle = idle_share()
    gpu_idle = None if gpu is None else gpu_load.idle_share()
    machine = Machine(_processor(), os.cpu_count() or 1, os.getloadavg()[0], idle, gpu=gpu, gpu_idle_before=gpu_idle)
    if machine.busy and not settings.anyway:
        also = "" if gpu_idle is None else f" and its {gpu} {percent(gpu_idle)}"
        raise BusyMachineError(
            f"this machine is {percent(idle)} idle{also} (load average {machine.load:.2f}, {machine.cpus} processors), wanted "
            f"{percent(IDLE)}: what else runs would be measured, too; wait for it to end, or add --anyway for figures that are no record"
        )
    return machine


def _gpu(device: str, settings: Settings) -> str:
    """The name of this machine's GPU. Raises ``DeviceError`` where TVM, or PyTorch if it takes part, cannot use one."""
    try:
        found = runtime.gpu()
    except DeviceError as error:
        raise DeviceError(f"device {device!r} is a GPU, and {error}; a step on a board is timed with --rpc") from error
    if settings.peers:
        from tvmtrain import gpu_peers

        gpu_peers.check(device)
    return str(found.device_name)


def idle_share() -> float | None:
    """The share of all processors' time that was idle, over ``LOOK`` seconds from now; None where the system does not tell."""
    try:
        before = _ticks()
        time.sleep(LOOK)
        after = _ticks()
    except (OSError, ValueError, IndexError):
        return None
    spent = [end - start for start, end in zip(before, after, strict=True)]
    # user, nice, system, idle, waiting for disks, interrupts, soft interrupts, stolen by other machines; guests are in user.
    total = sum(spent[:8])
    return (spent[3] + spent[4]) / total if total else None


def _ticks() -> list[int]:
    return [int(word) for word in STAT.read_text().split("\n")[0].split()[1:]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "?"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


# Processes.


class _Process:
    """A contestant's process; ``said`` is its last answer."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment
        )
        self.ready: Ready | None = None
        self.seconds: float | None = None
        self.said: Any = None

    def ask(self, message: Any) -> Any:
        """Its answer, or ``Failed`` with the end of what it printed if it has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
            self.said = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.PickleError, AttributeError, ImportError):
            self.said = Failed(self._last_words())
        return self.said

    def _last_words(self) -> str:
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            # It lives, but what it said is no answer.
            self.process.kill()
            code = self.process.wait()
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process ended with {code}: {' '.join(lines[-2:])}"[:300]

    def close(self) -> None:
        """Let it end, or end it."""
        try:
            for stream in (self.process.stdin, self.process.stdout):
                # One that died has left an order unread.
                with suppress(OSError):
                    if stream is not None:
                        stream.close()
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.process.kill()
            self.process.wait()
            self.log.close()


@contextmanager
def running(order: Order, environment: dict[str, str]) -> Iterator[_Process]:
    """The process that has got ``order`` and answered it."""
    process = _Process(order.name, environment)
    try:
        process.ask(order)
        yield process
    finally:
        process.close()


def _start_all(
    job: Job, settings: Settings, folder: Path, alive: ExitStack, out: Console
) -> tuple[list[_Process], dict[str, str]]:
    """Those that have taken two steps, in their order, and why the others have not."""
    started: list[_Process] = []
    failed: dict[str, str] = {}
    peers = settings.peers or ()
    built = _build(job, settings, folder, out)
    if isinstance(built, Failed):
        failed[OURS] = built.reason
        if job.plan is not None:
            # What the plan trains is known from the compiled step alone.
            return started, failed | dict.fromkeys(peers, "the step that they are compared with was not built")
    trained = built.trained if isinstance(built, Built) and not settings.peers_train_all else None
    for name in peers if OURS in failed else (OURS, *peers):
        order = Order(name, str(folder / "out"), settings.threads, None if name == OURS else job, trained)
        with out.working(f"starting {name}"):
            process = alive.enter_context(running(order, environment(name, settings.threads, folder)))
        if isinstance(process.said, Ready):
            process.ready = process.said
            process.seconds = _compiling(name, built, process.said)
            started.append(process)
        else:
            failed[name] = process.said.reason
        time.sleep(PAUSE)
    return started, failed


def _build(job: Job, settings: Settings, folder: Path, out: Console) -> Built | Failed:
    """Compile in a process that ends: what it leaves in memory is no part of a step."""
    order = Order(BUILD, str(folder / "out"), settings.threads, job)
    with out.working(f"compiling {job.model}"), running(order, environment(BUILD, settings.threads, folder)) as process:
        return process.said


def _compiling(name: str, built: Built | Failed, ready: Ready) -> float | None:
    if name == OURS:
        return built.seconds if isinstance(built, Built) else None
    return ready.seconds if name.startswith("compile") or name.endswith(GRAPH) else None


def environment(name: str, threads: int, folder: Path) -> dict[str, str]:
    """In which a contestant runs; ``folder`` is where it may keep what it compiles."""
    own = {key: value for key, value in os.environ.items() if key not in UNSET}
    if name == BUILD:
        return own | {"TVM_NUM_THREADS": str(threads)}
    if name == OURS:
        return own | {"TVM_NUM_THREADS": str(threads), "TVM_USE_RUNTIME_LIB": "1"}
    # A cache of its own: what it compiles is compiled now.
    return own | STRONGEST | {"TORCHINDUCTOR_CACHE_DIR": str(folder / name)}


def _rounds(started: Sequence[_Process], settings: Settings, out: Console) -> dict[str, list[Taken]]:
    """The turns of each, in alternation; one that fails takes no more."""
    turns: dict[str, list[Taken]] = {process.name: [] for process in started}
    with out.progress("measuring", settings.rounds * len(started)) as bar:
        for turn in range(settings.rounds):
            first = turn % max(1, len(started))
            for process in (*started[first:], *started[:first]):
                if isinstance(process.said, Failed):
                    continue
                time.sleep(PAUSE)
                taken = process.ask(Turn(settings.warmup, settings.steps, settings.warm))
                if isinstance(taken, Taken):
                    turns[process.name].append(taken)
                    bar.advance(1, f"{process.name} {statistics.median(taken.ms):.2f} ms")
    return turns


# Results.


def _contestant(process: _Process, turns: Sequence[Taken]) -> Contestant:
    assert process.ready is not None, "it has taken its first steps"
    spreads = [Spread.of(turn.ms) for turn in turns]
    return Contestant(
        name=process.name,
        best=min(spreads, key=lambda spread: spread.median),
        overall=Spread.of([ms for turn in turns for ms in turn.ms]),
        losses=process.ready.losses,
        seconds=process.seconds,
        first=process.ready.peak,
        steady=max(turn.peak for turn in turns),
    )


def _compared(found: Sequence[Contestant], settings: Settings) -> tuple[Contestant, ...]:
    """Each with whether its losses are those of the first peer that has some; the first alone where steps differ in what they train."""
    count = 1 if settings.peers_train_all else 2
    losses = {c.name: c.losses[:count] for c in found if c.losses is not None}
    wanted = next((these for name, these in losses.items() if name != OURS), losses.get(OURS))
    return tuple(replace(c, same=_same(losses.get(c.name), wanted, settings.tolerance)) for c in found)


def _same(losses: Sequence[float] | None, wanted: Sequence[float] | None, tolerance: float) -> bool:
    if losses is None or wanted is None:
        return False
    return all(abs(a - b) <= tolerance * max(abs(b), 1e-6) for a, b in zip(losses, wanted, strict=True))


def _result(job: Job, settings: Settings, contestants: tuple[Contestant, ...], machine: Machine) -> Result:
    times = {c.name: c.best.median for c in contestants if c.best is not None}
    peers = {name: time for name, time in times.items() if name != OURS}
    rival = min(peers, key=lambda name: peers[name]) if peers else None
    ratio = peers[rival] / times[OURS] if rival is not None and OURS in times else None
    return Result(job.model, settings, contestants, machine, rival, ratio, not machine.busy)


def show(result: Result, out: Console) -> None:
    """Print ``result``."""
    columns = ("contestant", ">ms", ">p10", ">p90", ">all rounds", ">p10", ">p90", ">first step", ">steps", ">compiling")
    ran = [c for c in result.contestants if c.failed is None]
    out.table((*columns, ">loss 1", ">loss 2", "same"), [_row(c) for c in ran])
    for c in (c for c in result.contestants if c.failed is not None):
        out.line(f"{c.name} is out: {c.failed}", style="yellow")
    s, m = result.settings, result.machine
    where, memory = m.processor, "above that before a step"
    if m.gpu is not None:
        where, memory = f"{m.gpu}, {m.processor}", "of all tensors on the GPU; each step takes its batch there, all in float32"
    out.line(f"best of {s.rounds} rounds of {s.steps} steps, {s.threads} threads, {where}; memory: {memory}")
    if result.ratio is not None:
        out.line(f"the fastest other, {result.rival}, takes {result.ratio:.2f} times as long as {OURS}", style="bold")
    if not result.sound:
        out.line("not all of them computed the same, or ours did not run: this compares nothing", style="red")
    if not result.quiet:
        idle = f"{percent(m.idle_before)} idle before and {percent(m.idle_after)} after"
        if m.gpu is not None:
            idle += f", its GPU {percent(m.gpu_idle_before)} and {percent(m.gpu_idle_after)}"
        out.line(f"the machine was busy ({idle}): these figures are no record", style="red")


def _row(c: Contestant) -> tuple[str, ...]:
    assert c.best is not None
    assert c.overall is not None
    assert c.losses is not None
    times = (f"{ms:.2f}" for spread in (c.best, c.overall) for ms in (spread.median, spread.low, spread.high))
    compiling = "-" if c.seconds is None else f"{c.seconds:.1f} s"
    return c.name, *times, size(c.first), size(c.steady), compiling, *map(number, c.losses), "ok" if c.same else "departs"
