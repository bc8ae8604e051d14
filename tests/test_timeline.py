"""Live bytes over a training step: what the planned function needs, told apart by kind, and drawn."""

from __future__ import annotations

import functools
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn
from tvm import relax
from tvm.ir import GlobalVar
from tvm.ir.transform import Sequential

import tvmtrain as tt
from tvmtrain import drawing, lowering, targets
from tvmtrain.costs import EntryMemory, Timeline
from tvmtrain.errors import InputError, MissingPackageError
from tvmtrain.timeline import timeline

BATCH = 3


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    return model, torch.randn(BATCH, 3, 8, 8), torch.tensor([0, 1, 4])


PLANS = {
    "dense": None,
    "sparse": tt.UpdatePlan({"3": tt.LayerUpdate(0.5), "5": tt.LayerUpdate(0.5, select="random"), "9": tt.LayerUpdate()}),
    "filtered": tt.UpdatePlan({"0": tt.LayerUpdate(filter=2, bias=False), "5": tt.LayerUpdate(filter=2)}),
}
OPTIMIZERS = {"sgd": tt.SGD(), "momentum": tt.SGD(momentum=0.9), "clipped": tt.SGD(clip_norm=1.0), "adam": tt.Adam()}


@functools.cache
def graph(plan: str, optimizer: str) -> tt.TrainGraph:
    traced = tt.trace(*network(), optimizer=OPTIMIZERS[optimizer])
    return traced if PLANS[plan] is None else traced.apply(PLANS[plan])


@functools.cache
def drawn(plan: str, optimizer: str) -> Timeline:
    return timeline(lowering.plan(lowering.lower(graph(plan, optimizer).module(), targets.load("host"))))


def kernel(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, GlobalVar)


def nbytes(ty: relax.TensorType) -> int:
    return torch.Size([int(d) for d in ty.shape]).numel() * getattr(torch, str(ty.dtype)).itemsize


def simulated(function: relax.Function) -> list[int]:
    """Bytes alive while each kernel runs, of a function without an arena: by walking it once back and once forward."""
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    made = {b.var for b in bindings if "alloc_tensor" in str(getattr(b.value, "op", ""))}
    looks_at = {var: {var} for var in made}

    def seen(expr: relax.Expr) -> set[relax.Var]:
        return set().union(*(looks_at.get(var, set()) for var in relax.analysis.free_vars(expr)))

    for binding in bindings:
        if binding.var not in made and not kernel(binding.value):
            looks_at[binding.var] = seen(binding.value)
    wanted: set[relax.Var] = set()
    later = []
    for binding in reversed(bindings):
        later.append(set(wanted))
        wanted |= seen(binding.value)
    alive: set[relax.Var] = set()
    series = []
    for binding, needed in zip(bindings, reversed(later), strict=True):
        if kernel(binding.value):
            alive |= seen(binding.value)
            series.append(sum(nbytes(var.ty) for var in alive - seen(function.body.body)))
        alive &= needed
    return series


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", PLANS)
def test_live_bytes_are_those_of_a_simulation(plan, optimizer, monkeypatch):
    line = drawn(plan, optimizer)
    monkeypatch.setattr(lowering, "PlanArena", lambda: Sequential([]))
    bare = lowering.plan(lowering.lower(graph(plan, optimizer).module(), targets.load("host")))["train_step"]
    assert list(line.arena) == simulated(bare)


def test_the_loss_parts_the_step():
    """What a dense step keeps is what PyTorch keeps: the input of each layer but the first, and of BatchNorm; a bit of ReLU's."""
    line = drawn("dense", "sgd")
    conv = BATCH * 8 * 64 * 4
    # BatchNorm's input, of which that of the next convolution is made again, and that of the one behind it; of the last maps, the
    # pooled ones, and small things.
    assert 2 * conv <= line.features[line.loss] <= 2 * conv + 1024
    # The last ReLU6, a bit for each number; whether the labels are among the classes.
    assert BATCH * 6 * 64 // 8 <= line.masks[line.loss] <= BATCH * 6 * 64 // 8 + 64
    assert line.features[0] + line.masks[0] <= conv
    assert line.results[-1] == 4 + BATCH * 5 * 4
    assert max(line.gradients[: line.loss + 1]) == 0


def test_gradients_wait_where_their_norm_is_asked_for():
    weights = sum(p.nbytes for p in network()[0].parameters())
    assert max(drawn("dense", "clipped").gradients) >= weights
    assert max(drawn("dense", "sgd").gradients) < weights
    line = drawn("sparse", "clipped")
    # Half of the weights of two layers, whole biases, and a whole linear layer.
    moved = 8 * 9 // 2 + 8 + 8 * 6 // 2 + 6 + 6 * 5 + 5
    assert moved * 4 <= max(line.gradients) < 2 * moved * 4


def test_an_artifact_keeps_it():
    made = tt.build(graph("sparse", "momentum"))
    memory, step = made.manifest.memory, made.manifest.memory.entries["train_step"]
    assert memory.timeline == drawn("sparse", "momentum")
    assert max(memory.timeline.arena) == step.lower_bound <= step.arena
    assert "gradients" not in made.manifest.named
    assert made.manifest.costs == graph("sparse", "momentum").summary().layers
    trained = {cost.name: cost.trained for cost in made.manifest.costs if cost.trained}
    assert trained == {"3": 8 * 9 // 2 + 8, "5": 8 * 6 // 2 + 6, "9": 6 * 5 + 5}
    velocity = 4 * sum(trained.values()) + 4 * 24  # the random half may be any
    assert made.manifest.state_bytes["optimizer"] == velocity
    assert made.manifest.state_bytes["parameter"] == sum(p.nbytes for p in network()[0].parameters())


# The picture.


def panel(name: str = "out") -> drawing.Panel:
    """Three kernels, the second of which makes the loss: at most 300 KB in the arena, and 40 beside it."""
    kilo = 1024
    line = Timeline(
        loss=1,
        features=(100 * kilo, 200 * kilo, 0),
        masks=(0, 50 * kilo, 50 * kilo),
        gradients=(0, 0, 30 * kilo),
        temporary=(10 * kilo, 50 * kilo, 0),
        workspace=(0, 0, 0),
        allocated=(0, 40 * kilo, 0),
        results=(0, 4, 4),
    )
    return drawing.Panel(name, EntryMemory(304 * kilo, 300 * kilo, 4, 40 * kilo, 200 * kilo, 50 * kilo), line)


def texts(svg: bytes) -> list[str]:
    return [("".join(e.itertext())).strip() for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_says_what_it_shows():
    found = texts(drawing.picture([panel("before: a"), panel("after: b")], "svg"))
    assert {"before: a", "after: b", "alive (KB)", "forward", "loss, then backward"} <= set(found)
    assert found.count("kernel of the step") == found.count("arena 304 KB") == 2
    assert found.count("train_step: peak 300 KB in the arena, 340 KB with what lies beside") == 2
    seen = [name for name, _ in drawing.KINDS.values() if name in found]
    # Four bytes of results cannot be seen, and there is no workspace.
    assert seen == [drawing.KINDS[kind][0] for kind in ("features", "masks", "gradients", "temporary", "allocated")]


def test_bands_are_as_high_as_their_bytes():
    """From the coordinates of the file: the lowest band, saved features, rises to 100 and 200 KB and falls to 0."""
    root = ElementTree.fromstring(drawing.picture([panel()], "svg"))
    band = next(e for e in root.iter() if "#0072b2" in e.get("style", "") and e.tag.endswith("path"))
    numbers = [float(word) for word in band.get("d").split() if word not in "MLz"]
    heights = sorted(set(numbers[1::2]))  # downwards
    assert len(heights) == 3
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], rel=1e-4)


def test_the_same_step_gives_the_same_file():
    assert drawing.picture([panel()], "svg") == drawing.picture([panel()], "svg")
    assert drawing.picture([panel()], "png").startswith(b"\x89PNG")
    assert drawing.picture([panel()], "pdf").startswith(b"%PDF")
    with pytest.raises(InputError, match="got the format 'bmp', wanted one of svg, png, pdf"):
        drawing.picture([panel()], "bmp")


def test_without_matplotlib_there_is_a_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib: pip install 'tvmtrain\[plot\]'"):
        drawing.picture([panel()], "svg")
