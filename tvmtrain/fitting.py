"""The strips with which the arena of a step stays within a number of bytes (``passes.in_strips``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import tvm
from tvm import relax
from tvm_ffi import structural_equal

from tvmtrain import lowering, targets
from tvmtrain.errors import PlanError
from tvmtrain.passes.plan_arena import ARENA
from tvmtrain.targets import Device

if TYPE_CHECKING:
    from tvmtrain.graph import TrainGraph

# The entries with a forward in them.
ENTRIES = ("train_step", "predict")
# How often strips are chosen anew, from a lower limit, because kernels need more than their tensors.
TRIES = 5


def within(graph: TrainGraph, arena: int, device: str | Device) -> TrainGraph:
    """``graph`` in strips such that no arena of ``ENTRIES`` takes more than ``arena`` bytes. Raises PlanError where none was found."""
    device = targets.load(device) if isinstance(device, str) else device
    limit: int | None = None
    before = None
    found: list[tuple[int, str]] = []
    for _ in range(TRIES):
        fitted = replace(graph, strips=limit)
        module = _often(fitted.module())
        if before is None or not structural_equal(module, before):
            most, entry = max((size, name) for name, size in _arenas(module, device).items())
            if most <= arena:
                return fitted
            found.append((most, entry))
        before, limit = module, arena if limit is None else limit * 3 // 4
    most, entry = min(found)
    raise PlanError(
        f"arena: {entry!r} takes {most:,} bytes at the least that was found for {device.name}, wanted at most {arena:,}. "
        "Strips make smaller only what a plan freezes and what is computed row by row; train fewer or later layers, a smaller share of "
        "them, or smaller batches"
    )


def _often(module: tvm.IRModule) -> tvm.IRModule:
    """``ENTRIES``, with the kernels that they call by name, as those of random numbers."""
    functions = {
        gvar: f for gvar, f in module.functions_items() if not isinstance(f, relax.Function) or gvar.name_hint in ENTRIES
    }
    return tvm.IRModule(functions)


def _arenas(module: tvm.IRModule, device: Device) -> dict[str, int]:
    planned = lowering.plan(lowering.lower(module, device))
    return {name: int(planned[name].attrs[ARENA]) for name in ENTRIES}
