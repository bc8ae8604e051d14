"""What more threads bring: milliseconds of one training step of ours with one thread and with several, in turns.

    python benchmarks/threads.py [--rows SUBSTRING] [--threads 1,2] [-o results.json]

Rows are those of ``benchmarks/speed.py``, without PyTorch. Each number of threads is a process of its own that sleeps while another
takes its turn; a time is the median of its best round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import speed

from tvmtrain import artifact, bench, contestant
from tvmtrain.console import Console
from tvmtrain.contestant import BUILD, OURS, Order, Taken, Turn
from tvmtrain.jobs import Job


def measure(job: Job, counts: Sequence[int], settings: bench.Settings) -> list[float]:
    """Milliseconds with each number of threads; raises RuntimeError for a process that fails."""
    with tempfile.TemporaryDirectory() as text, ExitStack() as alive:
        folder = Path(text)
        contestant.build(Order(BUILD, text, max(counts), job))
        started = [
            alive.enter_context(bench.running(Order(OURS, text, count), bench.environment(OURS, count, folder)))
            for count in counts
        ]
        rounds = [[_turn(process.ask, settings) for process in started] for _ in range(settings.rounds)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _turn(ask: Callable[[Turn], Any], settings: bench.Settings) -> float:
    time.sleep(bench.PAUSE)
    taken = ask(Turn(settings.warmup, settings.steps))
    if not isinstance(taken, Taken):
        raise RuntimeError(taken.reason)
    return statistics.median(taken.ms)


def show(results: Mapping[str, Mapping[int, float]], counts: Sequence[int], out: Console) -> None:
    """``gain``: of the last number of threads over the first."""
    rows = []
    for name, times in results.items():
        gain = times[counts[0]] / times[counts[-1]]
        rows.append((name, *(f"{times[count]:.2f}" for count in counts), f"{gain:.2f}"))
    out.table(("ms", *(f">threads: {count}" for count in counts), ">gain"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="SUBSTRING", help="rows with this in their names; otherwise the first")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine, too")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write all results as JSON")
    options = parser.parse_args()
    counts = [int(count) for count in options.threads.split(",")]
    settings = bench.Settings(options.rounds, options.steps, anyway=options.anyway)
    machine = bench.look_at(settings)
    out, results = Console(), {}
    for row in speed.ROWS[:1] if options.rows is None else speed.chosen(options.rows):
        with speed.job(row) as job, out.working(row.name):
            results[row.name] = dict(zip(counts, measure(job, counts, settings), strict=True))
    show(results, counts, out)
    if machine.busy:
        out.line("the machine was busy: these figures are no record", style="red")
    if options.output is not None:
        artifact.write_file(options.output, json.dumps(results, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
