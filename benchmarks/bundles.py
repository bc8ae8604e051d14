"""What a bundle of ``tvmtrain deploy`` weighs: MobileNetV2 of two widths, all trained and with the last four convolutions filtered.

    python benchmarks/bundles.py [--device raspberry-pi-4b]

10 classes, 4 images of 64x64, SGD with momentum. Weights are random, which packs as badly as trained ones. What is printed is the
table of targets/README.md, and the size of TVM's libraries in the last row's; they
come from PyPI the first time.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import networks
import torch

import tvmtrain as tt
from tvmtrain import artifact
from tvmtrain.deploy import Bundle, deploy
from tvmtrain.spec import UpdatePlan

WIDTHS = (0.35, 1.0)
COLUMNS = ("network", "plan", "`.tar.gz`", "unpacked", "of it parameters", "`.tar.gz` without them", "unpacked without them")
MB = 1e6


def rows() -> Iterator[tuple[str, str, tt.TrainGraph]]:
    """Network, plan and training step of each row."""
    for width in WIDTHS:
        torch.manual_seed(0)
        model = networks.MobileNetV2(width, 10).eval()
        x, y = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
        graph = tt.trace(model, x, y, optimizer=tt.SGD(lr=0.01, momentum=0.9))
        yield f"width {width}", "none: all is trained", graph
        plan = UpdatePlan.last(graph.layers, 4, filter=2)
        yield f"width {width}", "last 4 convolutions, filtered 2x2", graph.apply(plan)


def bundled(graph: tt.TrainGraph, device: str) -> tuple[Bundle, int, int]:
    """The bundle, and the bytes of its file of parameters, packed and unpacked."""
    with tempfile.TemporaryDirectory() as folder:
        tt.build(graph, device).save(folder)
        parameters = (Path(folder) / artifact.PARAMETERS).read_bytes()
        bundle = deploy(folder, device, Path(folder) / "bundle.tar.gz")
    return bundle, len(gzip.compress(parameters, 9)), len(parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="raspberry-pi-4b")
    device = parser.parse_args().device
    print(line(COLUMNS), line(["---"] * len(COLUMNS)).replace(" ", ""), sep="\n", flush=True)
    for network, plan, graph in rows():
        bundle, packed, parameters = bundled(graph, device)
        sizes = (bundle.packed, bundle.unpacked, parameters, bundle.packed - packed, bundle.unpacked - parameters)
        print(line((network, plan, *(f"{size / MB:.1f}" for size in sizes))), flush=True)
    libraries = sum(size for name, size in bundle.files.items() if Path(name).name.startswith("libtvm_"))
    print(f"TVM's libraries, unpacked: {libraries / MB:.1f} MB")


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
