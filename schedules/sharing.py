"""How the cores share the loops of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from tvmtrain.schedules.decisions import Decisions
from tvmtrain.targets import Device


def cores_of(device: Device, decisions: Decisions) -> int:
    """The cores that work is shared out for: more than there are, for finer shares."""
    return device.cores * (1, 4, 16)[decisions.grain]


def shared_prefix(counts: Sequence[int], cores: int) -> int:
    """How many of the outer loops the cores share: as few as keep all of them busy to the end."""
    total = 1
    for i, count in enumerate(counts):
        total *= count
        if busy(total, cores):
            return i + 1
    return len(counts)


def busy(tasks: int, cores: int) -> bool:
    """Whether so many tasks keep all cores busy to the end."""
    return tasks >= 8 * cores or (tasks >= cores and tasks % cores == 0)


def parallel(sch: Schedule, outer: Sequence[LoopRV], shared: int, steps: int = 1) -> list[LoopRV]:
    """The outer loops after the first ``shared`` became one that the cores share; of ``steps`` in each task, the inner one of two."""
    if not shared:
        return list(outer)
    fused = sch.fuse(*outer[:shared])
    task, step = (fused, fused) if steps == 1 else sch.split(fused, factors=[None, steps])
    sch.parallel(task)
    return [step, *outer[shared:]]
