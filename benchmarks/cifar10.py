"""MobileNetV2 0.35 with ImageNet weights, fine-tuned on CIFAR-10 at 96 px by ``tvmtrain run``, beside PyTorch.

    python benchmarks/cifar10.py --epochs 3

Both start from the same weights and see the same batches in the same order at the same learning rates; BatchNorm is in
training mode, everything is trained. Prints one row each: accuracy on 2,000 test images, median time of a step. PyTorch runs
twice, on all threads and on one: that it rounds differently then is enough for another accuracy, and shows how far two runs of
the same training lie apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from networks import cifar10, data_folder

from tvmtrain import artifact, data, training

MOMENTUM = 0.9


@dataclass(frozen=True)
class Result:
    """accuracy: share of the test images; milliseconds: median of a training step."""

    accuracy: float
    milliseconds: float


def tvmtrain(*arguments: object) -> dict:
    """One command of the command line, its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "tvmtrain", *map(str, arguments), "--json"], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def compiled(folder: Path, source: Path, options: argparse.Namespace) -> Result:
    """The fine-tuning by the command line alone."""
    factory = f"{Path(__file__).with_name('networks.py')}:cifar10"
    tvmtrain("compile", factory, "-o", folder, "--optimizer", "sgd", "--momentum", MOMENTUM, "--lr", options.lr)
    plan = ["--epochs", options.epochs, "--lr", options.lr, "--schedule", "cosine", "--shuffle", "--seed", options.seed]
    normal = ["--mean", 0.5, "--std", 0.5]
    outcome = tvmtrain("run", folder, "--data", source, *plan, *normal, "--limit", options.limit)
    return Result(outcome["accuracy"], outcome["ms_per_step"])


def pytorch(folder: Path, source: Path, options: argparse.Namespace, threads: int) -> Result:
    """The same in eager PyTorch."""
    torch.set_num_threads(threads)
    manifest = artifact.read(folder).manifest
    sets = data.load(source, manifest, normalization=data.Normalization((0.5,), (0.5,))).limited(options.limit)
    model, _, _ = cifar10(manifest.batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=MOMENTUM)
    rate = training.Rate(options.lr, "cosine")
    per_epoch = len(sets.train) // manifest.batch
    times = []
    for step in range(per_epoch * options.epochs):
        epoch, position = divmod(step, per_epoch)
        rows = training.order(len(sets.train), epoch, options.seed, True)[position * manifest.batch :][: manifest.batch]
        (x,), (y,) = sets.train.batch(rows)
        optimizer.param_groups[0]["lr"] = rate.at(step, per_epoch, options.epochs)
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long()).backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    return Result(_accuracy(model, sets.test), statistics.median(times))


def _accuracy(model: torch.nn.Module, test: data.Dataset) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(test), 100):
            (x,), (y,) = test.batch(np.arange(start, min(len(test), start + 100)))
            right += int((model(torch.from_numpy(x)).argmax(1).numpy() == y).sum())
    return right / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=10000, help="training images")
    parser.add_argument("-o", "--output", type=Path, help="folder for the artifact (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary) / "artifact"
        source = data_folder() / "cifar10.npz"
        rows = {"tvmtrain": compiled(folder, source, options)}
        for threads in dict.fromkeys((torch.get_num_threads(), 1)):
            rows[f"PyTorch eager, threads={threads}"] = pytorch(folder, source, options, threads)
    print(f"{'':26}{'accuracy':>10}{'ms/step':>10}")
    for name, result in rows.items():
        print(f"{name:26}{result.accuracy:>10.2%}{result.milliseconds:>10.1f}")


if __name__ == "__main__":
    main()
