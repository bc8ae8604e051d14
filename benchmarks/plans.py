"""Update plans of the papers, as TOML files for the models in ``networks.py``.

    python benchmarks/plans.py -o benchmarks/plans

- Gradient filtering (Yang, Li and Marculescu, CVPR 2023, table 2): the last two and four convolutions, filtered in 2x2 patches, and
  the classifier; ResNet-18's shortcut convolution stays frozen, as in the authors' code.
- MCUNetV3 (Lin et al., NeurIPS 2022): the biases of the last n convolutions, a share of the input channels of a few, and the
  classifier, as their search found them for 49 to 148 KB. Their channels are those of the largest weights.
- Dynamic gradient sparse update (Li and Chang, ISCAS 2024) publishes no table of ratios; its plans here are MCUNetV3's, with channels
  that change from step to step, and one for its claim of about 2% of the convolution weights (``two_percent``; the ratios are ours).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import networks

import tvmtrain as tt
from tvmtrain.spec import Layer, LayerUpdate, UpdatePlan

EIGHTH, QUARTER, HALF = 1 / 8, 1 / 4, 1 / 2


@dataclass(frozen=True)
class Scheme:
    """One row of MCUNetV3's compilation/mcu_ir_gen.py: biases of the last ``biases`` convolutions, shares by convolution number."""

    kilobytes: int
    biases: int
    shares: Mapping[int, float]


def scheme(kilobytes: int, biases: int, numbers: Sequence[int], *shares: float) -> Scheme:
    return Scheme(kilobytes, biases, dict(zip(numbers, shares, strict=True)))


_MCUNET_LATE, _MOBILENET_LATE = (21, 24, 27, 30, 36, 39), (27, 30, 33, 36, 39, 42, 45, 48)
MCUNETV3: dict[str, tuple[Scheme, ...]] = {
    "mcunet": (
        scheme(49, 20, (23, 24, 27, 30, 33, 39), 0, QUARTER, HALF, HALF, 0, 0),
        scheme(74, 21, (21, 23, 24, 26, 27, 30), 1, 0, 1, 0, HALF, 1),
        scheme(99, 22, _MCUNET_LATE, 1, 1, 1, 1, EIGHTH, QUARTER),
        scheme(124, 24, (21, 24, 27, 30, 33, 39), QUARTER, 1, 1, 1, HALF, HALF),
        scheme(148, 23, _MCUNET_LATE, 1, 1, 1, 1, 1, HALF),
    ),
    "mcu_mobilenetv2": (
        scheme(49, 16, (36, 39, 40, 41, 42, 45, 48, 49), 1, 1, 0, QUARTER, EIGHTH, EIGHTH, EIGHTH, EIGHTH),
        scheme(73, 20, (32, 33, 36, 39, 41, 42, 45, 48), EIGHTH, HALF, HALF, 1, QUARTER, EIGHTH, EIGHTH, 1),
        scheme(99, 25, _MOBILENET_LATE, 1, 1, 1, 1, 1, EIGHTH, HALF, 1),
        scheme(123, 31, _MOBILENET_LATE, 1, 1, 1, 1, 1, HALF, 1, 1),
        scheme(138, 34, _MOBILENET_LATE, 1, 1, 1, 1, 1, 1, 1, 1),
    ),
}


def mcunetv3(layers: Sequence[Layer], scheme: Scheme, select: str = "magnitude") -> UpdatePlan:
    """A published scheme for a network whose convolutions have biases of their own (BatchNorm folded)."""
    convolutions = [layer.name for layer in layers if layer.kind == "conv2d"]
    late = len(convolutions) - scheme.biases
    plan = {}
    for number, name in enumerate(convolutions):
        share = scheme.shares.get(number, 0)
        if number >= late or share:
            plan[name] = LayerUpdate(share, bias=True, select=select if 0 < share < 1 else "first")
    return UpdatePlan(plan | {layer.name: LayerUpdate() for layer in layers if layer.kind == "linear"})


def two_percent(layers: Sequence[Layer], select: str = "random") -> UpdatePlan:
    """About 2% of the convolution weights of MCUNetV3's MobileNetV2 in a step: the first pointwise convolutions of the last ten
    blocks, which matter most (MCUNetV3), smaller shares in later layers (Li and Chang), the biases from there on, and the classifier.
    """
    shares = {7: 1 / 8, 8: 1 / 8, 9: 1 / 8, 10: 1 / 8, 11: 1 / 16, 12: 1 / 16, 13: 1 / 16, 14: 1 / 28, 15: 1 / 28, 16: 1 / 28}
    plan = {}
    for layer in layers:
        block, name = layer.name.split(".")[1:3] if layer.name.startswith("blocks.") else ("0", "")
        if int(block) in shares:
            share = shares[int(block)] if name == "pointwise1" else 0
            plan[layer.name] = LayerUpdate(share, bias=True, select=select if share else "first")
        elif layer.kind == "linear":
            plan[layer.name] = LayerUpdate()
    return UpdatePlan(plan)


def filtered(layers: Sequence[Layer], count: int, patch: int | None) -> UpdatePlan:
    """The last ``count`` convolutions without shortcuts, filtered (None: exact), and the classifier."""
    return UpdatePlan.last([layer for layer in layers if "downsample" not in layer.name], count, filter=patch)


def published(name: str, layers: Sequence[Layer]) -> dict[str, UpdatePlan]:
    """File name -> plan, of one of the factories in ``networks.py``."""
    plans = {f"{name}-last{count}-filtered": filtered(layers, count, 2) for count in (2, 4)}
    for row in MCUNETV3.get(name, ()):
        static = mcunetv3(layers, row)
        plans[f"{name}-mcunetv3-{row.kilobytes}kb"] = static
        shares = {n: replace(u, select="random") if 0 < u.weight < 1 else u for n, u in static.layers.items()}
        plans[f"{name}-dynamic-{row.kilobytes}kb"] = UpdatePlan(shares)
    if name == "mcu_mobilenetv2":
        plans[f"{name}-dynamic-2percent"] = two_percent(layers)
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("plans"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("mobilenetv2", "resnet18", "mcunet", "mcu_mobilenetv2"):
        graph = tt.trace(*getattr(networks, name)(batch=1))
        for file, plan in published(name, graph.layers).items():
            (options.output / f"{file}.toml").write_text(plan.to_toml(), encoding="utf-8")
            print(options.output / f"{file}.toml")


if __name__ == "__main__":
    main()
