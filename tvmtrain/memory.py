"""What a training step needs of memory, before it is compiled to native code: the same plan that ``build`` carries out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from tvmtrain import builder, targets
from tvmtrain.graph import TrainGraph
from tvmtrain.passes import plan_arena
from tvmtrain.targets import Device


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    saved_features, saved_masks: what lies in the arena while the loss is made and is read after it. arena: one storage for every
    intermediate tensor; lower_bound: the most of them alive at once. workspace: the most that one kernel allocates beside the arena.
    parameters (with buffers) and optimizer_state live as long as the step does.
    """

    saved_features: int
    saved_masks: int
    arena: int
    lower_bound: int
    workspace: int
    parameters: int
    optimizer_state: int

    def to_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self, against: Memory | None = None) -> str:
        """A line for each figure, in KiB; with ``against``, the figure before and the share that is left."""
        return "\n".join(_line(field.name, getattr(self, field.name), against) for field in fields(self))


def _line(name: str, value: int, against: Memory | None) -> str:
    line = f"{name.replace('_', ' '):16} {value / 1024:12,.1f} KiB"
    if against is None:
        return line
    before = getattr(against, name)
    return f"{line}  of {before / 1024:12,.1f} KiB" + (f"  {value / before:6.1%}" if before else "")


def measure(graph: TrainGraph, device: str | Device = "host") -> Memory:
    """The memory of the step of ``graph`` on ``device``, whose kernels decide what is fused: lowered and planned, not compiled."""
    device = targets.load(device) if isinstance(device, str) else device
    module = graph.module()
    entries = graph.entries(module)
    state = builder.state_bytes(entries, graph.state(entries), set(graph.parameters))
    attrs = builder.plan(builder.lower(module, device))["train_step"].attrs
    planned = {figure.removeprefix("tvmtrain."): int(attrs[figure]) for figure in plan_arena.FIGURES}
    del planned["results"]
    parameters = state.get("parameter", 0) + state.get("buffer", 0)
    return Memory(**planned, parameters=parameters, optimizer_state=state.get("optimizer", 0))
