"""A training step timed on a board: what it takes there, and what a step takes from here with the network."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmtrain import builder, jobs
from tvmtrain.bench import Settings, Spread
from tvmtrain.console import Console
from tvmtrain.profile import random_batch
from tvmtrain.runtime import TrainStep

if TYPE_CHECKING:
    from tvmtrain.jobs import Job
    from tvmtrain.remote import Board


@dataclass(frozen=True)
class Result:
    """Of the best of some rounds: ``step`` by the board's clock, ``with_network`` by this machine's; None where ``emulated`` says
    why times mean nothing. losses: of the first two steps."""

    model: str
    device: str
    board: str
    threads: int
    losses: tuple[float, float]
    emulated: str
    step: Spread | None = None
    with_network: Spread | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def bench(job: Job, settings: Settings, board: Board, out: Console) -> Result:
    """Compile ``job`` for its device and time it on ``board``. Raises ``ArtifactError`` where that is another processor."""
    with out.working(f"compiling {job.model} for {job.device}"):
        artifact = builder.build(jobs.trace(job, jobs.prepare(job)), job.device)
    with tempfile.TemporaryDirectory() as folder:
        step = board.load(artifact.save(Path(folder)), settings.threads)
    x, y = random_batch(step.manifest)
    losses = step(x, y), step(x, y)
    about = Result(job.model, job.device, str(board), board.threads, losses, board.facts.emulated)
    if about.emulated:
        return about
    with out.progress("measuring", settings.rounds) as bar:
        rounds = [_round(step, x, y, settings, bar) for _ in range(settings.rounds)]
    there, here = min(rounds, key=lambda times: times[0].median)
    return Result(**vars(about) | {"step": there, "with_network": here})


def _round(step: TrainStep, x: Any, y: Any, settings: Settings, bar: Any) -> tuple[Spread, Spread]:
    there, here = [], []
    for i in range(settings.warmup + settings.steps):
        start = time.perf_counter()
        step(x, y)
        if i >= settings.warmup:
            there.append(1e3 * step.place.seconds)
            here.append(1e3 * (time.perf_counter() - start))
    bar.advance(1, f"{there[-1]:.2f} ms")
    return Spread.of(there), Spread.of(here)


def show(result: Result, out: Console) -> None:
    """Print ``result``."""
    out.line(f"{result.model} for {result.device} on board {result.board}, {result.threads} threads")
    if result.step is None or result.with_network is None:
        out.line(f"emulated: no times ({result.emulated})", style="bold")
        return
    rows = [
        (name, *(f"{ms:.2f}" for ms in (spread.median, spread.low, spread.high)))
        for name, spread in (("on the board", result.step), ("with the network", result.with_network))
    ]
    out.table(("a step", ">median ms", ">10%", ">90%"), rows)
