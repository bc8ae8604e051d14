"""Memory of one training step: MobileNetV2 0.35, 128 px, batch 1, float32, under several update plans, beside PyTorch.

    python benchmarks/memory.py [--time]

Compiled: what the forward keeps for the backward, the arena (all that lives shorter than a step), and what one kernel allocates
beside it for each core. Each row twice: as it is, and in strips (``TrainGraph.within``) so that it takes a tenth of PyTorch's memory;
"forward" is the work of the forward, of which strips do some again. PyTorch: the most bytes that its allocator has handed out at once
in a step beyond parameters and gradients of the same trained layers, by its own profiler (``profile_memory``). Channels that the
sparse plan chooses cannot be told to PyTorch, which trains those layers whole. ``--time`` compiles each row and adds the median
milliseconds of a step, whole and in strips in turn (about two minutes a row).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from math import prod

import networks
import plans
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tvmtrain as tt
from tvmtrain.errors import PlanError
from tvmtrain.report import Summary
from tvmtrain.spec import UpdatePlan

SCHEME = plans.MCUNETV3["mcu_mobilenetv2"][0]


def rows(dense: tt.TrainGraph) -> Iterator[tuple[str, tt.TrainGraph]]:
    """Name and training step of each row."""
    layers = dense.layers
    yield "everything", dense.apply(UpdatePlan.full(layers))
    yield "last 4", dense.apply(UpdatePlan.last(layers, 4))
    yield "last 4, filtered 2x2", dense.apply(UpdatePlan.last(layers, 4, filter=2))
    yield f"sparse, {SCHEME.kilobytes} KB scheme", dense.apply(plans.mcunetv3(layers, SCHEME, select="random"))
    yield "sparse, 2% of the weights", dense.apply(plans.two_percent(layers))


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


def tenth(graph: tt.TrainGraph, theirs: int) -> tt.TrainGraph | None:
    """``graph`` in strips, with an arena of a tenth of PyTorch's bytes; None where strips are no help."""
    try:
        return graph.within(theirs // 10)
    except PlanError as error:
        print(error)
        return None


def weights_trained(graph: tt.TrainGraph, summary: Summary) -> float:
    """The share of all convolution weights that a step trains."""
    layers = {layer.name: layer for layer in graph.layers if layer.kind == "conv2d"}
    moved = sum(cost.trained for cost in summary.layers if cost.name in layers)
    biases = sum(layer.weight_shape[0] for name, layer in layers.items() if f"{name}.bias" in graph.trained)
    return (moved - biases) / sum(prod(layer.weight_shape) for layer in layers.values())


def line(name: str, summary: Summary, theirs: int, forward: float, share: float) -> str:
    figures = (summary.saved_features, summary.saved_masks, summary.arena, summary.workspace, theirs)
    kept, masks, arena, workspace, peak = (f"{value / 1024:,.0f}" for value in figures)
    ratio = f"{summary.arena / theirs:.2f}"
    return f"{name:34}{kept:>8}{masks:>8}{arena:>8}{workspace:>11}{peak:>9}{ratio:>8}{forward:>9.2f}{share:>14.1%}"


def milliseconds(graphs: Sequence[tt.TrainGraph], x: torch.Tensor, y: torch.Tensor) -> list[str]:
    """Median time of a step of each graph, ten at a time in turn."""
    steps = [tt.build(graph).load() for graph in graphs]
    took: list[list[float]] = [[] for _ in steps]
    for _ in range(20):
        for step, times in zip(steps, took, strict=True):
            step(x, y, lr=0.0)
            for _ in range(10):
                begin = time.perf_counter()
                step(x, y, lr=0.0)
                times.append(1e3 * (time.perf_counter() - begin))
    return [f"{statistics.median(times):8.2f} ms" for times in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="also compile each row, and time its step")
    timed = parser.parse_args().time
    model, x, y = networks.mcu_mobilenetv2(batch=1, size=128)
    dense = tt.trace(model, x, y)
    print(
        f"{'KB':34}{'kept':>8}{'masks':>8}{'arena':>8}{'workspace':>11}{'PyTorch':>9}{'ratio':>8}{'forward':>9}{'conv weights':>14}"
    )
    for name, graph in rows(dense):
        whole = graph.summary()
        theirs, share = pytorch_peak(model, x, y, set(graph.trained)), weights_trained(graph, whole)
        small = tenth(graph, theirs)
        times = milliseconds([graph, *([small] if small is not None else [])], x, y) if timed else ["", ""]
        print(line(name, whole, theirs, 1.0, share) + times[0], flush=True)
        if small is not None:
            cut = small.summary()
            work = cut.forward_flops / whole.forward_flops
            print(line(f"{name}, in strips", cut, theirs, work, share) + times[1], flush=True)


if __name__ == "__main__":
    main()
