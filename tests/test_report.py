"""What a summary counts: the published tables, and PyTorch's own count of operations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parity import quick_device
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tvmtrain as tt
from tvmtrain.report import Summary
from tvmtrain.spec import UpdatePlan

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import networks

# Gradient filtering, table 2 (ImageNet, r = 2, batch 1): (convolutions, filtered) -> (KB, MFLOP of the backward).
PAPER = {
    "MobileNetV2": {(2, False): (245, 113.7), (2, True): (80, 39.3), (4, False): (459, 160.0), (4, True): (150, 54.0)},
    "ResNet18": {(2, False): (196, 489.0), (2, True): (64, 28.3), (4, False): (490, 1140.0), (4, True): (112, 61.5)},
}


def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    return model, torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2,))


def paper_flops(graph: tt.TrainGraph, summary: Summary) -> float:
    """The backward by the paper's rule, in MFLOP.

    It counts K*K + 1 operations per weight and place for the exact dW of a K x K convolution, where there are 2*K*K: its own
    figures for ResNet-18 follow from that rule alone. For K = 1 and for filtered gradients both rules are the same.
    """
    kinds = {layer.name: layer for layer in graph.layers}
    excess = 0
    for name, update in graph.plan.layers.items():
        layer = kinds[name]
        if layer.kind == "conv2d" and update.filter is None:
            taps = layer.weight_shape[2] * layer.weight_shape[3]
            excess += layer.macs * (2 * taps - (taps + 1)) // taps
    return (summary.backward_flops - excess) / 1e6


@pytest.mark.parametrize("name", [pytest.param("MobileNetV2", marks=pytest.mark.slow), "ResNet18"])
def test_table_of_the_gradient_filtering_paper(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = networks.MobileNetV2(1.0) if name == "MobileNetV2" else networks.ResNet18()
    dense = tt.trace(model.eval(), torch.randn(1, 3, 224, 224), torch.randint(0, 1000, (1,)))
    layers = [layer for layer in dense.layers if "downsample" not in layer.name]
    lines = [f"{name:12}{'KB':>10}{'paper':>8}{'MFLOP':>10}{'paper':>8}"]
    for (count, filtered), (kilobytes, megaflops) in PAPER[name].items():
        graph = dense.apply(UpdatePlan.last(layers, count, filter=2 if filtered else None))
        summary = graph.summary(device=quick_device())
        kept = sum(layer.kept for layer in summary.layers if layer.kind == "conv2d") / 1024
        flops = paper_flops(graph, summary)
        row = f"last {count}{', r=2' if filtered else ''}"
        lines.append(f"{row:12}{kept:>10.1f}{kilobytes:>8}{flops:>10.1f}{megaflops:>8}")
        assert int(kept) == kilobytes
        assert flops == pytest.approx(megaflops, rel=0.05)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_operations_are_those_that_pytorch_counts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    x, y = torch.randn(2, 3, 8, 8), torch.randint(0, 10, (2,))
    summary = tt.trace(model, x, y).summary(device=quick_device())
    with FlopCounterMode(display=False) as forward:
        loss = nn.functional.cross_entropy(model(x), y)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    # PyTorch counts 2 per multiply-add of a product, and no sums.
    assert summary.forward_flops == pytest.approx(forward.get_total_flops(), rel=0.1)
    assert summary.backward_flops == pytest.approx(backward.get_total_flops(), rel=0.1)


def test_what_is_kept_is_what_the_backward_reads() -> None:
    model, x, y = small()
    dense = tt.trace(model, x, y, optimizer=tt.SGD(momentum=0.9))
    full = dense.summary(device=quick_device())
    kept = {layer.name: layer.kept for layer in full.layers}
    # The first convolution's input is the step's own; the others keep float32 maps of 2 images.
    assert kept == {"0": 0, "2": 2 * 8 * 64 * 4, "4": 2 * 8 * 64 * 4, "8": 2 * 6 * 4}
    assert full.parameters == sum(p.nbytes for p in model.parameters()) == full.optimizer_state
    assert full.saved_features >= sum(kept.values())
    assert full.arena >= full.saved_features
    plan = UpdatePlan({"4": tt.LayerUpdate(0.0), "8": tt.LayerUpdate()})
    sparse = dense.apply(plan).summary(against=dense, device=quick_device())
    assert {layer.name: layer.kept for layer in sparse.layers if layer.kept} == {"8": 2 * 6 * 4}
    assert {layer.name: layer.trained for layer in sparse.layers if layer.trained} == {"4": 6, "8": 28}
    assert sparse.saved_masks == 2 * 6 * 64 + 2 * 4  # of the last ReLU, and of the labels among the classes; a byte each
    assert sparse.arena < full.arena
    assert sparse.against == full
    assert {"before", "after", "ratio"} <= set(str(sparse).split())
    assert sparse.to_dict()["against"]["arena"] == full.arena


@pytest.mark.parametrize(
    ("training", "plan"),
    [
        pytest.param(False, None, id="frozen statistics"),
        pytest.param(True, None, id="statistics of the batch"),
        pytest.param(False, UpdatePlan({"3": tt.LayerUpdate(filter=2), "6": tt.LayerUpdate(filter=2)}), id="filtered"),
        pytest.param(False, UpdatePlan({"3": tt.LayerUpdate(0.5), "11": tt.LayerUpdate()}), id="some channels"),
    ],
)
def test_costs_are_known_before_the_step_is_arranged_for_memory(training: bool, plan: UpdatePlan | None) -> None:
    convs = [nn.LazyConv2d(12, 1), nn.LazyConv2d(12, 3, padding=1), nn.LazyConv2d(20, 1)]
    layers = [module for conv in convs for module in (conv, nn.LazyBatchNorm2d(), nn.ReLU6())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))
    _, x, y = small()
    model(x)
    graph = tt.trace(model.train(training), x, y)
    if plan is not None:
        graph = graph.apply(plan)
    costs = tt.build(graph, quick_device()).manifest.costs
    assert costs == graph.summary(device=quick_device()).layers
    assert sum(layer.kept for layer in costs) > 0


def test_a_full_plan_is_the_dense_step() -> None:
    dense = tt.trace(*small())
    full = dense.apply(UpdatePlan.full(dense.layers))
    assert full.summary(device=quick_device()) == dense.summary(device=quick_device())


def test_a_step_with_random_numbers_has_a_summary() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)).train()
    summary = tt.trace(model, torch.randn(2, 6), torch.tensor([0, 3])).summary(device=quick_device())
    assert [layer.trained for layer in summary.layers] == [35, 24]


def test_shares_and_patches_shrink_what_is_kept() -> None:
    dense = tt.trace(*small())
    half = dense.apply(UpdatePlan({"2": tt.LayerUpdate(0.5), "4": tt.LayerUpdate(0.25)})).summary(device=quick_device())
    assert {layer.name: layer.kept for layer in half.layers if layer.kept} == {"2": 2 * 4 * 64 * 4, "4": 2 * 2 * 64 * 4}
    # A share of a layer is trained; all of it is there.
    assert half.parameters == sum(value.nbytes for value in dense.imported.state.values())
    patches = dense.apply(UpdatePlan({"4": tt.LayerUpdate(filter=4)})).summary(device=quick_device())
    assert {layer.name: layer.kept for layer in patches.layers if layer.kept} == {"4": 2 * 8 * 4 * 4}
