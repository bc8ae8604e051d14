"""Memory of one training step: MobileNetV2 0.35, 128 px, batch 1, float32, under several update plans, beside PyTorch.

    python benchmarks/memory.py

Compiled: the arena (all that lives shorter than a step), the largest workspace of a kernel, and what the forward keeps for the
backward. PyTorch: the most bytes that its allocator has handed out at once in a step beyond parameters and gradients of the same
trained layers, by its own profiler (``profile_memory``). Channels that the sparse plan chooses cannot be told to PyTorch, which
trains those layers whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import networks
import plans
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tvmtrain as tt
from tvmtrain.spec import UpdatePlan

SCHEME = plans.MCUNETV3["mcu_mobilenetv2"][0]


def rows(dense: tt.TrainGraph) -> Iterator[tuple[str, tt.TrainGraph]]:
    """Name and training step of each row."""
    layers = dense.layers
    yield "everything", dense.apply(UpdatePlan.full(layers))
    yield "last 4", dense.apply(UpdatePlan.last(layers, 4))
    yield "last 4, filtered 2x2", dense.apply(UpdatePlan.last(layers, 4, filter=2))
    yield f"sparse, {SCHEME.kilobytes} KB scheme", dense.apply(plans.mcunetv3(layers, SCHEME, select="random"))


def pytorch_peak(model: nn.Module, x: torch.Tensor, y: torch.Tensor, trained: set[str]) -> int:
    """Bytes: the highest sum of allocations in a forward and backward, gradients left out."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.grad = torch.zeros_like(parameter) if name in trained else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        F.cross_entropy(model(x), y).backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def main() -> None:
    model, x, y = networks.mcu_mobilenetv2(batch=1, size=128)
    dense = tt.trace(model, x, y)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 4)
    print(
        f"{'KB':26}{'kept':>9}{'masks':>9}{'arena':>9}{'workspace':>11}{'PyTorch':>9}{'ratio':>8}{'conv weights trained':>22}"
    )
    for name, graph in rows(dense):
        summary = graph.summary()
        theirs = pytorch_peak(model, x, y, set(graph.trained))
        kinds = {layer.name: layer for layer in graph.layers if layer.kind == "conv2d"}
        moved = sum(c.trained for c in summary.layers if c.name in kinds)
        biases = sum(kinds[n].weight_shape[0] for n in graph.plan.layers if n in kinds)
        figures = [summary.saved_features, summary.saved_masks, summary.arena, summary.workspace, theirs]
        kept, masks, arena, workspace, peak = (f"{value / 1024:,.0f}" for value in figures)
        ratio, share = f"{summary.arena / theirs:.2f}", f"{(moved - biases) / weights:.1%}"
        print(f"{name:26}{kept:>9}{masks:>9}{arena:>9}{workspace:>11}{peak:>9}{ratio:>8}{share:>22}", flush=True)


if __name__ == "__main__":
    main()
