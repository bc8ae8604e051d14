"""Where the time of a compiled training step goes, kernel by kernel, and how near each is to what the machine can do.

TVM's virtual machine tells when a call begins and ends, and telling takes longer than a small kernel. What lies between the end of one
call and the beginning of the next is telling alone, with the same arguments as the call's own end: it is taken off. The step's time is
that of steps which nobody watches, in turn with those that are.

A kernel's floor is the time that its operations need at the peak rate, or its arguments and results at the bandwidth of the memory,
whichever is more. Where they come from a cache, a kernel can be faster than its floor.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvmtrain import artifact, console, drawing, roofline, runtime
from tvmtrain.artifact import Manifest, TensorSpec
from tvmtrain.costs import Kernel
from tvmtrain.errors import DeviceError, InputError
from tvmtrain.roofline import Roofline
from tvmtrain.runtime import Mark

if TYPE_CHECKING:
    from tvmtrain.remote import Board

WARM_UP = 3
SHOWN = 40
FIGURES = 80  # characters that the columns beside the names take
MACHINE = "vm."  # names of the virtual machine's own calls begin so

Data = tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Call:
    """One call of the virtual machine: a kernel's name or one that begins with "vm.", and its time in microseconds."""

    name: str
    us: float


@dataclass(frozen=True)
class KernelTime:
    """All calls of one kernel in a step: their number, microseconds, operations and bytes; ``floor``: the least microseconds.

    bound: "arithmetic" or "memory", whichever makes the floor; "" for a kernel that the manifest does not know.
    """

    name: str
    calls: int
    us: float
    flops: int
    bytes: int
    floor: float
    bound: str

    @property
    def rate(self) -> float:
        """GFLOP/s."""
        return self.flops / self.us / 1e3 if self.us else 0.0

    @property
    def bandwidth(self) -> float:
        """GB/s."""
        return self.bytes / self.us / 1e3 if self.us else 0.0

    @property
    def share(self) -> float | None:
        """Of the roofline: 1 is as fast as the machine can be."""
        return self.floor / self.us if self.us and self.bound else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = {"gflops_per_second": self.rate, "gbytes_per_second": self.bandwidth, "share_of_roofline": self.share}
        return asdict(self) | derived


@dataclass(frozen=True)
class Profile:
    """A training step by its kernels, those that take longest first; all times in microseconds, medians of ``repeat`` steps.

    step: with checking and copying the batch (not on a board); machine: the virtual machine's own calls; calls: one step, in order.
    """

    folder: str
    threads: int
    repeat: int
    step: float
    kernels: tuple[KernelTime, ...]
    machine: float
    calls: tuple[Call, ...]
    roofline: Roofline | None

    @property
    def inside(self) -> float:
        """All kernels together."""
        return sum(kernel.us for kernel in self.kernels)

    @property
    def outside(self) -> float:
        """The step without its kernels: the virtual machine, Python, the batch."""
        return self.step - self.inside

    def share_of_peak(self, bound: str) -> float | None:
        """Of all kernels with this bound together, each by its time: 1 is as fast as the machine can be; None without any."""
        chosen = [kernel for kernel in self.kernels if kernel.bound == bound]
        total = sum(kernel.us for kernel in chosen)
        return sum(kernel.floor for kernel in chosen) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        means = {bound: self.share_of_peak(bound) for bound in ("arithmetic", "memory")}
        derived = {"in_kernels": self.inside, "outside_kernels": self.outside, "share_of_peak": means}
        return asdict(self) | derived | {"kernels": [kernel.to_dict() for kernel in self.kernels]}


@dataclass(frozen=True)
class Untimed:
    """What is left of a profile where times mean nothing, and why they do: kernels and how often a step calls them."""

    folder: str
    emulated: str
    kernels: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def profile(
    folder: str | Path,
    out: console.Console,
    *,
    repeat: int = 30,
    threads: int | None = None,
    cores: Sequence[int] | None = None,
    board: Board | None = None,
) -> Profile | Untimed:
    """The training step in ``folder`` on random data, at a learning rate of 0, here or on ``board``.

    threads, cores: as for ``runtime.load``. Raises ``ArtifactError``, and ``DeviceError`` for code of a GPU, which runs on after a
    call. On a board, times are its own, without the network; what it could do at best is not known.
    """
    step = runtime.load(folder, threads, cores) if board is None else board.load(folder, threads, cores or ())
    if artifact.on_gpu(step.manifest):
        raise DeviceError(
            f"{folder} was compiled for the GPU {step.manifest.device.get('name')!r}, and profile times processors: use nsys"
        )
    if board is not None and board.facts.emulated:
        return _untimed(step, str(folder), board.facts.emulated)
    count = threads or runtime.default_threads(cores) if board is None else board.threads
    with out.progress("profiling", repeat) as bar:
        plain, watched = _timed(step, random_batch(step.manifest), repeat, bar, there=board is not None)
    ceiling = None
    if board is None:
        with out.working("measuring what this machine can do"):
            ceiling = roofline.measure(count)
    calls = _medians(watched)
    return Profile(
        folder=str(folder),
        threads=count,
        repeat=repeat,
        step=1e6 * statistics.median(plain),
        kernels=_kernels(calls, {kernel.name: kernel for kernel in step.manifest.kernels}, ceiling),
        machine=sum(call.us for call in calls if call.name.startswith(MACHINE)),
        calls=calls,
        roofline=ceiling,
    )


def _untimed(step: runtime.TrainStep, folder: str, why: str) -> Untimed:
    with step.marked() as marks:
        step(*random_batch(step.manifest), lr=0.0)
    names = [call.name for call in calls_of(marks) if not call.name.startswith(MACHINE)]
    return Untimed(folder, why, {name: names.count(name) for name in dict.fromkeys(names)})


def random_batch(manifest: Manifest) -> Data:
    """Inputs and targets that a step can take; whole numbers are 0 and 1, which every table of embeddings and every loss has."""
    rng = np.random.default_rng(0)
    specs = manifest.named["train_step"].inputs
    x, y = (tuple(_random(rng, spec) for spec in specs if spec.role == role) for role in ("input", "target"))
    return x, y


def _random(rng: np.random.Generator, spec: TensorSpec) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    if dtype.kind != "f":
        return rng.integers(0, 2, spec.shape).astype(dtype)
    # A target may be a probability.
    values = rng.standard_normal(spec.shape) if spec.role == "input" else rng.random(spec.shape)
    return values.astype(dtype)


# Timing.


def calls_of(marks: Sequence[Mark]) -> list[Call]:
    """Calls that called no other, in order, without the time of telling; none below 0."""
    found = []
    ended = None
    for (name, before, start, end), (_, inner, stop, _) in itertools.pairwise(marks):
        if before and not inner:
            telling = start - ended if ended is not None else 0.0
            found.append(Call(name, 1e6 * (stop - end - telling)))
        ended = end
    return found


def _timed(
    step: runtime.TrainStep, data: Data, repeat: int, bar: console.Progress, *, there: bool
) -> tuple[list[float], list[list[Call]]]:
    """Seconds of steps that nobody watches, and the calls of as many that are, in turn; there: without what the network takes."""
    plain, watched = [], []
    with _no_collections():
        for _ in range(WARM_UP):
            step(*data, lr=0.0)
        for _ in range(repeat):
            start = time.perf_counter()
            step(*data, lr=0.0)
            plain.append(step.place.seconds if there else time.perf_counter() - start)
            with step.marked() as marks:
                step(*data, lr=0.0)
            watched.append(calls_of(marks))
            bar.advance(1, f"{1e3 * plain[-1]:.2f} ms")
    return plain, watched


@contextmanager
def _no_collections() -> Iterator[None]:
    """Python's garbage waits."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _medians(steps: Sequence[Sequence[Call]]) -> tuple[Call, ...]:
    """Call by call over steps, which all make the same calls; below 0 are calls that take no time that can be measured."""
    sequences = {tuple(call.name for call in calls) for calls in steps}
    if len(sequences) != 1:
        raise InputError(f"got {len(sequences)} different sequences of calls in {len(steps)} steps; want one")
    return tuple(Call(same[0].name, max(0.0, statistics.median(c.us for c in same))) for same in zip(*steps, strict=True))


def _kernels(calls: Iterable[Call], known: Mapping[str, Kernel], ceiling: Roofline | None) -> tuple[KernelTime, ...]:
    times: dict[str, list[float]] = {}
    for call in calls:
        if not call.name.startswith(MACHINE):
            times.setdefault(call.name, []).append(call.us)
    kernels = [_kernel(name, own, known.get(name), ceiling) for name, own in times.items()]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.us))


def _kernel(name: str, times: Sequence[float], known: Kernel | None, ceiling: Roofline | None) -> KernelTime:
    count, total = len(times), math.fsum(times)
    if known is None:
        return KernelTime(name, count, total, 0, 0, 0.0, "")
    flops, nbytes = count * known.flops, count * known.bytes
    if ceiling is None:
        return KernelTime(name, count, total, flops, nbytes, 0.0, "")
    bound = "arithmetic" if ceiling.computes(flops, nbytes) else "memory"
    return KernelTime(name, count, total, flops, nbytes, 1e6 * ceiling.seconds(flops, nbytes), bound)


# What is shown and written.


def show(profile: Profile | Untimed, out: console.Console) -> None:
    """Print ``profile``."""
    p = profile
    if isinstance(p, Untimed):
        out.table(("kernel", ">calls"), [(_short(name), str(count)) for name, count in p.kernels.items()])
        out.line(f"emulated: no times ({p.emulated})", style="bold")
        return
    rest = p.kernels[SHOWN:]
    rows = [_row(kernel, p.step) for kernel in p.kernels[:SHOWN]]
    if rest:
        rows.append(_row(_sum(f"{len(rest)} more kernels", rest), p.step))
    rows.append(_row(_sum("all kernels", p.kernels), p.step))
    columns = ("kernel", ">calls", ">us", ">of the step", ">GFLOP/s", ">GB/s", ">of roofline", "bound by")
    out.table(columns, rows)
    step = f"a step takes {p.step:,.1f} us, {p.outside:,.1f} us of it outside kernels"
    out.line(f"{step} (the virtual machine's own calls {p.machine:,.1f} us); {p.threads} threads", style="bold")
    if (r := p.roofline) is None:
        out.line("what the board can do at best is not known")
        return
    out.line(f"this machine: {r.flops / 1e9:,.1f} GFLOP/s, {r.bandwidth / 1e9:,.1f} GB/s (by {r.source})")
    for bound, ceiling in (("arithmetic", "peak rate"), ("memory", "bandwidth")):
        out.line(f"kernels bound by {bound}: {console.percent(p.share_of_peak(bound))} of the {ceiling}")
    if any((kernel.share or 0) > 1 for kernel in p.kernels):
        out.line("more than 100%: arguments came from a cache, or a kernel reads a part of them")


def _sum(name: str, kernels: Sequence[KernelTime]) -> KernelTime:
    calls, us, flops, nbytes, floor = (sum(getattr(k, f) for k in kernels) for f in ("calls", "us", "flops", "bytes", "floor"))
    return KernelTime(name, calls, us, flops, nbytes, floor, "-" if kernels else "")


def _short(name: str) -> str:
    """The name of a kernel, which may be as long as a list of all that was fused, beside the figures of a table."""
    return console.shortened(name, max(24, shutil.get_terminal_size((120, 24)).columns - FIGURES))


def _row(k: KernelTime, step: float) -> tuple[str, ...]:
    figures = (f"{k.us:,.1f}", console.percent(k.us / step), f"{k.rate:,.2f}", f"{k.bandwidth:,.2f}", console.percent(k.share))
    return _short(k.name), str(k.calls), *figures, k.bound.strip("-")


def write_trace(profile: Profile, path: Path) -> None:
    """One step for chrome://tracing or ui.perfetto.dev: its calls one after the other, without what lies between them."""
    facts = {kernel.name: kernel for kernel in profile.kernels}
    events, now = [], 0.0
    for call in profile.calls:
        known = facts.get(call.name)
        about = {"flops": known.flops // known.calls, "bytes": known.bytes // known.calls} if known else {}
        category = "kernel" if known else "virtual machine"
        events.append(
            {"name": call.name, "cat": category, "ph": "X", "ts": now, "dur": call.us, "pid": 1, "tid": 1, "args": about}
        )
        now += call.us
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"folder": profile.folder}}
    artifact.write_file(path, json.dumps(document).encode())


def plot(profile: Profile, path: Path) -> None:
    """Draw the kernels under the roofline into ``path``. Raises as ``drawing.roofline``, and ``StorageError``."""
    if profile.roofline is None:
        raise InputError("--plot draws kernels under a roofline, and that of a board is not known; profile on the board itself")
    points = [drawing.Point(k.name, k.flops / k.bytes, k.rate, k.us) for k in profile.kernels if k.flops and k.bytes and k.us]
    r, title = (
        profile.roofline,
        f"{Path(profile.folder).resolve().name}: {profile.step / 1e3:,.2f} ms on {profile.threads} threads",
    )
    artifact.write_file(path, drawing.roofline(points, r.flops / 1e9, r.bandwidth / 1e9, title, drawing.kind_of(path)))
