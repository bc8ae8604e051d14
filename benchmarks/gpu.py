"""Milliseconds of one training step on this machine's NVIDIA GPU, compiled and in PyTorch: MobileNetV2, 128 px, SGD.

    python benchmarks/gpu.py [batch ...]

Each row trains the same layers on both sides, data copied to the GPU and the loss back in every step; the median of 50 steps after
10. PyTorch runs eagerly, in float32 and with TF32 allowed; the compiled step computes in float32. Filtered gradients have no
counterpart in PyTorch, which computes them whole. First, three steps of both are compared: ``departure`` is the largest difference
of losses.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import networks
import torch
import torch.nn.functional as F
from torch import nn

import tvmtrain as tt
from tvmtrain.spec import UpdatePlan

WARMUP, STEPS, COMPARED = 10, 50, 3
RATE = 0.01


def rows(batch: int) -> Iterator[tuple[str, tt.TrainGraph, tuple[nn.Module, torch.Tensor, torch.Tensor]]]:
    """Name, compiled training step and PyTorch's model with its data; what is frozen needs no gradient there either."""
    model, x, y = networks.mobilenetv2(batch)
    dense = tt.trace(model, x, y, optimizer=tt.SGD(lr=RATE))
    yield "everything", dense, (model, x, y)
    plan = UpdatePlan.last(dense.layers, 4, filter=2)
    last = copy.deepcopy(model)
    for name, parameter in last.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in plan.layers)
    yield "last 4, filtered 2x2", dense.apply(plan), (last, x, y)


def eager(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    """PyTorch's step on the GPU."""
    model = copy.deepcopy(model).cuda()
    rule = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step() -> float:
        rule.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x.cuda()), y.cuda())
        loss.backward()
        rule.step()
        return loss.item()

    return step


def milliseconds(step: Callable[[], float]) -> float:
    times = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARMUP:]) * 1e3


def allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this measures an NVIDIA GPU, and PyTorch finds none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'batch':>5}  {'trained':22}{'compiled':>10}{'PyTorch':>10}{'TF32':>10}{'ratio':>8}{'departure':>11}")
    for batch in [int(argument) for argument in sys.argv[1:]] or [8, 32]:
        for name, graph, (model, x, y) in rows(batch):
            step = tt.build(graph, "cuda").load()
            data = x.numpy(), y.numpy()
            allow_tf32(False)
            reference = eager(model, x, y)
            departure = max(abs(step(*data) - reference()) for _ in range(COMPARED))
            ours, exact = milliseconds(partial(step, *data)), milliseconds(reference)
            allow_tf32(True)
            rounded = milliseconds(reference)
            print(
                f"{batch:5}  {name:22}{ours:10.2f}{exact:10.2f}{rounded:10.2f}{exact / ours:8.2f}{departure:11.2g}", flush=True
            )


if __name__ == "__main__":
    main()
