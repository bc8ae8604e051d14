"""What a compiled step costs, in plain numbers that a manifest can hold: memory, work by layer, work by kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from tvmtrain.errors import ArtifactError


@dataclass(frozen=True)
class LayerCost:
    """trained: numbers that a step updates; kept: bytes of its input that its weight gradient keeps; flops: of its backward."""

    name: str
    kind: str
    trained: int
    kept: int
    flops: int

    def __post_init__(self) -> None:
        _check_counts(self, f"costs of layer {self.name!r}", ("trained", "kept", "flops"))


@dataclass(frozen=True)
class Kernel:
    """A kernel of a training step, under the name that the virtual machine calls it by.

    calls: how often a step calls it; flops: operations of one call as its formulas have them: rows that they pad to whole vectors
    count (7x7 maps by up to a third), what a schedule adds by padding does not;
    bytes: of its arguments and results, each once: the least that one call moves if nothing is in a cache, without its workspace.
    """

    name: str
    calls: int
    flops: int
    bytes: int

    def __post_init__(self) -> None:
        _check_counts(self, f"kernel {self.name!r}", ("flops", "bytes"))
        if self.calls < 1:
            raise ArtifactError(f"kernel {self.name!r}: {self.calls} calls; want 1 or more")


@dataclass(frozen=True)
class EntryMemory:
    """Bytes that one entry needs while it runs.

    arena: the one storage of every intermediate tensor; lower_bound: the most of them alive at once; results: what is returned in
    storage of its own; workspace: the most that one kernel allocates beside the arena, for each core;
    saved_features, saved_masks: what lies in the arena while the loss is made and is read after it.
    """

    arena: int
    lower_bound: int
    results: int
    workspace: int
    saved_features: int
    saved_masks: int

    def __post_init__(self) -> None:
        _check_counts(self, "memory of an entry", tuple(field.name for field in fields(self)))
        if not self.saved_features + self.saved_masks <= self.lower_bound <= self.arena:
            raise ArtifactError(f"memory of an entry: {asdict(self)}; want saved bytes <= lower_bound <= arena")


@dataclass(frozen=True)
class Timeline:
    """Bytes that are alive while each kernel of a training step runs, by kind; kernel number ``loss`` makes the loss.

    In the arena: ``features`` and ``masks`` are made before the loss and read after it; ``gradients`` are those of parameters, and
    what else becomes their new values; ``workspace`` is touched by one kernel alone; ``temporary`` is all else. Outside of it: what
    a kernel allocates for itself (``allocated``, as ``EntryMemory.workspace``), and ``results``.
    """

    loss: int
    features: tuple[int, ...]
    masks: tuple[int, ...]
    gradients: tuple[int, ...]
    temporary: tuple[int, ...]
    workspace: tuple[int, ...]
    allocated: tuple[int, ...]
    results: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {kind: len(series) for kind, series in self.kinds.items()}
        if len(set(lengths.values())) != 1 or not 0 <= self.loss < len(self.features):
            raise ArtifactError(
                f"timeline: series of {lengths} kernels, loss in {self.loss}; want one number, and a kernel of them"
            )
        if wrong := [kind for kind, series in self.kinds.items() if min(series) < 0]:
            raise ArtifactError(f"timeline: {', '.join(wrong)} below 0 bytes")

    @property
    def kinds(self) -> Mapping[str, tuple[int, ...]]:
        """The series by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "loss"}

    @property
    def arena(self) -> tuple[int, ...]:
        """Bytes alive in the arena, kernel by kernel."""
        inside = zip(self.features, self.masks, self.gradients, self.temporary, self.workspace, strict=True)
        return tuple(sum(kinds) for kinds in inside)


@dataclass(frozen=True)
class Memory:
    """Bytes beside the state: what each entry needs while it runs, and what is alive over a training step."""

    entries: Mapping[str, EntryMemory]
    timeline: Timeline

    def __post_init__(self) -> None:
        step = self.entries.get("train_step")
        if step is None:
            raise ArtifactError(f"memory is that of {', '.join(self.entries) or 'no entry'}; want train_step among them")
        line = self.timeline
        told = (max(line.arena), line.features[line.loss], line.masks[line.loss], max(line.allocated))
        if told != (step.lower_bound, step.saved_features, step.saved_masks, step.workspace):
            raise ArtifactError(
                f"timeline: peak, features and masks at the loss and workspace are {told}; train_step has {asdict(step)}"
            )


def _check_counts(what: object, where: str, names: tuple[str, ...]) -> None:
    if wrong := [name for name in names if getattr(what, name) < 0]:
        raise ArtifactError(f"{where}: {', '.join(wrong)} below 0")
