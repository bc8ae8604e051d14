"""Milliseconds of one training step on this machine's processor or NVIDIA GPU, compiled and in PyTorch at its fastest.

    python benchmarks/speed.py [--device cuda] [--rows SUBSTRING] [-o results.json]

Each row is a ``tvmtrain bench``: contestants in processes of their own, in turns; same weights, batch and trained parameters, SGD.
Filtered gradients and shares of channels cannot be told to PyTorch, which trains the same layers whole, or, where the row says so,
the whole network. Weights are random; each BatchNorm's running statistics are those of the batch, so that activations are of the
size that training leaves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import networks
import torch
from torch import nn

from tvmtrain import artifact, bench
from tvmtrain.console import Console, percent
from tvmtrain.contestant import GPU_PEERS, OURS
from tvmtrain.jobs import Job
from tvmtrain.spec import SGD, UpdatePlan

PLANS = Path(__file__).with_name("plans")
SHARE = 0.25

Example = tuple[nn.Module, torch.Tensor, torch.Tensor]


def mobilenetv2_128() -> Example:
    return calibrated(*networks.mobilenetv2(8, 128))


def mobilenetv2_224() -> Example:
    return calibrated(*networks.mobilenetv2(8, 224))


def small_mobilenetv2() -> Example:
    """MobileNetV2 0.35, 128 px, batch 1."""
    torch.manual_seed(0)
    return calibrated(networks.MobileNetV2(0.35, 10).eval(), torch.randn(1, 3, 128, 128), torch.randint(0, 10, (1,)))


def resnet18() -> Example:
    return calibrated(*networks.resnet18(8, 128))


def calibrated(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Example:
    """``model`` in evaluation mode, its running statistics those of ``x``; one batch alone is enough for the last of them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.eval(), x, y


def filtered_last4() -> UpdatePlan:
    """The last four convolutions, filtered in 2x2 patches, and the classifier."""
    return UpdatePlan.from_toml(PLANS / "mobilenetv2-last4-filtered.toml")


def sparse_last4() -> UpdatePlan:
    """``SHARE`` of the input channels of the last four convolutions, others in every step, and the classifier."""
    layers = filtered_last4().layers
    return UpdatePlan(
        {
            name: update if update.filter is None else replace(update, filter=None, weight=SHARE, select="random")
            for name, update in layers.items()
        }
    )


@dataclass(frozen=True)
class Row:
    """factory: a function of this file. training: the mode of BatchNorm. plan: what is trained; None: everything.

    rival_trains_all: PyTorch trains the whole network, whatever the plan says.
    """

    name: str
    factory: str
    training: bool = False
    plan: UpdatePlan | None = None
    rival_trains_all: bool = False


ROWS = (
    Row("MobileNetV2-1.0, 128 px, batch 8, all", "mobilenetv2_128"),
    Row("MobileNetV2-1.0, 128 px, batch 8, all, BatchNorm training", "mobilenetv2_128", training=True),
    Row("MobileNetV2-0.35, 128 px, batch 1, all", "small_mobilenetv2"),
    Row("MobileNetV2-1.0, 224 px, batch 8, last 4, filtered 2x2", "mobilenetv2_224", plan=filtered_last4()),
    Row("MobileNetV2-1.0, 224 px, batch 8, last 4, a quarter of the channels", "mobilenetv2_224", plan=sparse_last4()),
    Row("MobileNetV2-1.0, 224 px, batch 8, filtered 2x2 against all", "mobilenetv2_224", False, filtered_last4(), True),
    Row(
        "MobileNetV2-1.0, 224 px, batch 8, a quarter of the channels against all",
        "mobilenetv2_224",
        False,
        sparse_last4(),
        True,
    ),
    Row("ResNet-18, 128 px, batch 8, all", "resnet18"),
)


def chosen(text: str) -> tuple[Row, ...]:
    """The rows with ``text`` in their names."""
    return tuple(row for row in ROWS if text.lower() in row.name.lower())


@contextmanager
def job(row: Row, device: str = "host") -> Iterator[Job]:
    """What ``tvmtrain bench`` would be told; the plan is a file for as long."""
    model = f"{Path(__file__).resolve()}:{row.factory}"
    with tempfile.TemporaryDirectory() as folder:
        path = None
        if row.plan is not None:
            path = Path(folder) / "plan.toml"
            path.write_text(row.plan.to_toml(), encoding="utf-8")
        yield Job(model, optimizer=SGD(lr=bench.RATE), plan=path, training=row.training, device=device)


def show(results: dict[str, bench.Result], out: Console) -> None:
    """One line for each row."""
    ran = {c.name for result in results.values() for c in result.contestants}
    names = [name for name in (OURS, *GPU_PEERS) if name in ran]
    rows = []
    for name, result in results.items():
        times = {c.name: f"{c.best.median:.2f}" for c in result.contestants if c.best is not None}
        ratio = "-" if result.ratio is None else f"{result.ratio:.2f}"
        verdict = ("ok" if result.sound else "departs") if result.quiet else f"busy: {percent(result.machine.idle_before)} idle"
        rows.append((name, *(times.get(n, "-") for n in names), result.rival or "-", ratio, verdict))
    out.table(("ms", *(f">{name}" for name in names), "rival", ">rival / ours", "valid"), rows)


def run(rows: Iterable[Row], device: str, settings: bench.Settings, out: Console) -> dict[str, bench.Result]:
    """Row by row. Raises what ``bench.bench`` raises."""
    results = {}
    for row in rows:
        out.line(f"\n{row.name}", style="bold")
        with job(row, device) as what:
            results[row.name] = bench.bench(what, replace(settings, peers_train_all=row.rival_trains_all), out)
        bench.show(results[row.name], out)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="host", metavar="NAME", help="host, or cuda for this machine's GPU")
    parser.add_argument("--rows", default="", metavar="SUBSTRING", help="only rows with this in their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", metavar="NAMES", help="with commas between (default: all that the device has)")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine, too: the result says so")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write all results as JSON")
    options = parser.parse_args()
    if not (rows := chosen(options.rows)):
        parser.error(f"--rows: got {options.rows!r}, wanted a part of one of: {'; '.join(row.name for row in ROWS)}")
    peers = tuple(options.peers.split(",")) if options.peers else None
    settings = bench.Settings(options.rounds, options.steps, threads=options.threads, peers=peers, anyway=options.anyway)
    out = Console()
    results = run(rows, options.device, settings, out)
    show(results, out)
    if options.output is not None:
        content = {name: result.to_dict() for name, result in results.items()}
        artifact.write_file(options.output, json.dumps(content, indent=1).encode())
    return 0 if all(result.sound for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
