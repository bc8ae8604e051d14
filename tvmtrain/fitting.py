"""The strips with which the arena of a step stays within a number of bytes (``passes.in_strips``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import tvm
from tvm import relax

from tvmtrain import lowering, targets
from tvmtrain.errors import PlanError
from tvmtrain.passes.plan_arena import ARENA
from tvmtrain.targets import Device

if TYPE_CHECKING:
    from tvmtrain.graph import TrainGraph

# The entries that run again and again.
ENTRIES = ("train_step", "predict", "loss")
# How often strips are chosen anew, from a lower limit, because kernels need more than their tensors; less often where that is no help.
TRIES = 5


def within(graph: TrainGraph, arena: int, device: str | Device) -> TrainGraph:
    """``graph`` in strips such that no entry's arena takes more than ``arena`` bytes. Raises PlanError where none was found."""
    device = targets.load(device) if isinstance(device, str) else device
    limit: int | None = None
    found: list[tuple[int, str]] = []
    for _ in range(TRIES):
        fitted = replace(graph, strips=limit)
        most, entry = max((size, name) for name, size in _arenas(fitted, device).items())
        if most <= arena:
            return fitted
        if found and (most, entry) >= min(found):
            break
        found.append((most, entry))
        limit = arena if limit is None else max(1, limit - max(most - arena, limit // 8))
    most, entry = min(found)
    raise PlanError(
        f"arena: {entry!r} takes {most:,} bytes at least for {device.name}, wanted at most {arena:,}. Strips make smaller only what "
        f"a plan freezes and what is computed row by row; train fewer or later layers, a smaller share of them, or smaller batches"
    )


def _arenas(graph: TrainGraph, device: Device) -> dict[str, int]:
    module = graph.module()
    # With the kernels that they call by name, as those of random numbers.
    functions = {
        gvar: f for gvar, f in module.functions_items() if not isinstance(f, relax.Function) or gvar.name_hint in ENTRIES
    }
    planned = lowering.plan(lowering.lower(tvm.IRModule(functions), device))
    return {name: int(planned[name].attrs[ARENA]) for name in ENTRIES}
