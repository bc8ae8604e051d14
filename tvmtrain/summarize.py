"""``TrainGraph.summary``: the figures of ``report``, and what the step allocates once it is compiled for a device."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
import tvm

from tvmtrain import lowering, report, signature, targets
from tvmtrain.artifact import MODEL_ROLES
from tvmtrain.costs import LayerCost
from tvmtrain.passes.plan_arena import ARENA, LOWER_BOUND, SAVED_FEATURES, SAVED_MASKS, WORKSPACE
from tvmtrain.targets import Device

if TYPE_CHECKING:
    from tvmtrain.graph import TrainGraph


# Attributes of a planned function (``passes.plan_arena``).
PLANNED = (SAVED_FEATURES, SAVED_MASKS, ARENA, LOWER_BOUND, WORKSPACE)


def summarize(graph: TrainGraph, device: str | Device) -> report.Summary:
    """Every figure of one training step."""
    device = targets.load(device) if isinstance(device, str) else device
    module = graph.module(gradients=True)
    adjoint = module["gradients"]
    entries = graph.entries(module)
    forward, backward = report.flops(adjoint)
    # With the kernels that it calls by name, as those of random numbers.
    functions = {var: function for var, function in module.functions_items() if not isinstance(function, tvm.relax.Function)}
    alone = tvm.IRModule({**functions, module.get_global_var("train_step"): module["train_step"]})
    attrs = lowering.plan(lowering.lower(alone, device))["train_step"].attrs
    features, masks, arena, bound, workspace = (int(attrs[name]) for name in PLANNED)
    state = graph.state_bytes(entries)
    return report.Summary(
        forward_flops=forward,
        backward_flops=backward,
        saved_features=features,
        saved_masks=masks,
        arena=arena,
        lower_bound=bound,
        workspace=workspace,
        parameters=sum(state.get(role, 0) for role in MODEL_ROLES),
        optimizer_state=state.get("optimizer", 0),
        layers=layer_costs(graph, module),
    )


def layer_costs(graph: TrainGraph, module: tvm.IRModule) -> tuple[LayerCost, ...]:
    """What each layer trains, keeps and spends, from the entry ``gradients`` of ``module``."""
    adjoint = module["gradients"]
    names = {parameter: layer.name for layer in graph.layers for parameter in layer.parameters}
    costs = report.layer_costs(adjoint, names)
    gradients = signature.entry("gradients", adjoint).outputs
    trained = {layer.name: 0 for layer in graph.layers}
    for spec in gradients:
        if spec.role == "gradient":
            trained[names[spec.name]] += _moved(spec.shape, graph.imported.state[spec.name])
    return tuple(
        LayerCost(layer.name, layer.kind, trained[layer.name], *costs.get(layer.name, (0, 0))) for layer in graph.layers
    )


def _moved(gradient: tuple[int, ...], value: np.ndarray) -> int:
    """How many numbers a gradient moves: one that is the same for all taps of a kernel moves all of them."""
    taps = prod(size for size, own in zip(value.shape[2:], gradient[2:], strict=True) if own == 1)
    return prod(gradient) * taps
