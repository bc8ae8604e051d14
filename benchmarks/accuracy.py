"""What the passes cost in accuracy: MobileNetV2 0.35 with ImageNet weights, fine-tuned on real images under several update plans.

    python benchmarks/accuracy.py --data flowers --epochs 10 --seeds 3 -o accuracy.json
    python benchmarks/accuracy.py --data cifar10 --epochs 3 --limit 4000 --lr 0.01
    python benchmarks/accuracy.py --rows full --lr 0.002 --momentum 0.9 -o full.json

Rows: everything trained; the last ``--layers`` convolutions and the classifier exactly, with gradient filtering in 2x2 and 4x4
patches, and with a share of their input channels, always the same ones (largest weights) or others in every step. Same layers,
images, order and rate in all of them; BatchNorm runs on its statistics. Each finished run is written to the output file at once;
runs that are there already are not repeated. Accuracy: mean and standard deviation over the seeds, on all test images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networks
import torch

import tvmtrain as tt
from tvmtrain import console, data, training
from tvmtrain.spec import Layer, UpdatePlan

FILES = {"flowers": "flowers5_96.npz", "cifar10": "cifar10.npz"}
CLASSES = {"flowers": 5, "cifar10": 10}
BATCH = 32


def plans(layers: Sequence[Layer], count: int, share: float) -> dict[str, UpdatePlan]:
    """Row -> what it trains."""
    last = UpdatePlan.last
    return {
        "full": UpdatePlan.full(layers),
        f"last {count}": last(layers, count),
        f"last {count}, filtered 2x2": last(layers, count, filter=2),
        f"last {count}, filtered 4x4": last(layers, count, filter=4),
        f"last {count}, {share:g} static": last(layers, count, weight=share, select="magnitude"),
        f"last {count}, {share:g} dynamic": last(layers, count, weight=share, select="random"),
    }


def graph(options: argparse.Namespace) -> tt.TrainGraph:
    torch.manual_seed(0)
    model = networks.MobileNetV2(0.35, CLASSES[options.data])
    weights = networks.load_file(networks.data_folder() / networks.WEIGHTS)
    model.load_state_dict(weights, strict=False)
    x, y = torch.zeros(BATCH, 3, options.pixels, options.pixels), torch.zeros(BATCH, dtype=torch.int64)
    return tt.trace(model.eval(), x, y, optimizer=tt.SGD(momentum=options.momentum, weight_decay=1e-4, clip_norm=2.0))


def train(step: tt.TrainStep, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """One run from the pre-trained weights; another seed is another order and another new classifier."""
    normal = data.Normalization((0.5,), (0.5,))
    sets = data.load(networks.data_folder() / FILES[options.data], step.manifest, normalization=normal).limited(options.limit)
    generator = torch.Generator().manual_seed(seed)
    state = step.state_dict()
    weight = torch.empty(state["classifier.weight"].shape)
    torch.nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5, generator=generator)
    step.load_state_dict(state | {"classifier.weight": weight.numpy()})
    settings = training.Settings(options.epochs, training.Rate(options.lr, "cosine"), shuffle=True, seed=seed)
    run = training.fit(step, sets.train, sets.test, settings, console.Console(sys.stderr))
    return {"accuracy": run.accuracy, "ms_per_step": run.ms_per_step}


def write(path: Path, results: Mapping[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(aside, path)


def costs(step: tt.TrainGraph) -> dict[str, int]:
    """What a step of this plan takes: operations of its backward, bytes kept for it, bytes of the arena."""
    summary = step.summary()
    return {"backward": summary.backward_flops, "kept": summary.saved_features + summary.saved_masks, "arena": summary.arena}


def table(results: Mapping[str, Any]) -> str:
    """One line a row: accuracy over the seeds, median time of a step, backward MFLOP, and MB kept and in the arena."""
    lines = [f"{'':28}{'accuracy':>18}{'ms/step':>10}{'backward':>10}{'kept':>8}{'arena':>8}"]
    for name, row in results["rows"].items():
        shares = [100 * run["accuracy"] for run in row["runs"].values()]
        spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
        milliseconds = statistics.median(run["ms_per_step"] for run in row["runs"].values())
        cost = row["costs"]
        sizes = f"{cost['backward'] / 1e6:>10,.0f}{cost['kept'] / 2**20:>8.2f}{cost['arena'] / 2**20:>8.2f}"
        lines.append(f"{name:28}{f'{statistics.mean(shares):.2f}% +- {spread:.2f}':>18}{milliseconds:>10.1f}{sizes}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=FILES, default="flowers")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--layers", type=int, default=4, help="how many of the last convolutions are trained")
    parser.add_argument("--share", type=float, default=0.25, help="of the input channels in the sparse rows")
    parser.add_argument("--pixels", type=int, default=128, help="height and width to which images are resized")
    parser.add_argument("--limit", type=int, help="training images (default: all)")
    parser.add_argument("--rows", default="", help="only rows with this in their names")
    parser.add_argument("-o", "--output", type=Path, default=Path("accuracy.json"))
    options = parser.parse_args()
    given = {key: value for key, value in vars(options).items() if key not in ("output", "rows", "seeds")}
    results: dict[str, Any] = {"options": given, "rows": {}}
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))
        if results["options"] != given:
            raise SystemExit(f"{options.output} holds runs with {results['options']}, not {given}; give another -o")
    dense = graph(options)
    chosen = {name: plan for name, plan in plans(dense.layers, options.layers, options.share).items() if options.rows in name}
    for name, plan in chosen.items():
        row = results["rows"].setdefault(name, {"costs": {}, "runs": {}})
        missing = [seed for seed in range(options.seeds) if str(seed) not in row["runs"]]
        if missing:
            applied = dense.apply(plan)
            row["costs"], artifact = costs(applied), tt.build(applied)
        for seed in missing:
            row["runs"][str(seed)] = train(artifact.load(), options, seed)
            print(f"{name}, seed {seed}: {row['runs'][str(seed)]}", flush=True)
            write(options.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
