"""Training some channels of a layer: gradients and updates beside PyTorch, the choice of channels, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from parity import RELATIVE, departures, quick_device
from safetensors.numpy import load_file
from torch import nn
from tvm import relax

import tvmtrain as tt
from tvmtrain import artifact, cli, lowering, selection, signature, spec, verify
from tvmtrain.artifact import Manifest, Selection
from tvmtrain.errors import ArtifactError, CheckpointError, InputError, NonFiniteLossError, PlanError
from tvmtrain.spec import Optimizer

quick = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Gradients.


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution, a depthwise one behind it and a linear layer over the channels, [N, C] or [N, T, C]."""

    size: tuple[int, int]
    channels: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    dilation: int
    multiplier: int
    share: float
    tokens: bool

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Layers(self)


class Layers(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        c, wide = case.channels, case.channels * case.multiplier
        self.front = nn.Conv2d(2, c, 1)
        self.conv = nn.Conv2d(c, c, case.kernel, case.stride, case.padding, case.dilation)
        self.depthwise = nn.Conv2d(c, wide, case.kernel, case.stride, case.padding, case.dilation, groups=c)
        self.linear = nn.Linear(wide, 3)
        self.tokens = case.tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.tanh(self.conv(torch.tanh(self.front(x))))).flatten(2)
        return self.linear(x.transpose(1, 2) if self.tokens else x.mean(2))


cases = st.builds(
    Case,
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    channels=st.integers(2, 7),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    multiplier=st.integers(1, 2),
    share=st.sampled_from((0.2, 0.5, 0.8)),
    tokens=st.booleans(),
)
PARTLY = ("conv", "depthwise", "linear")


@settings(quick, max_examples=4)
@given(cases, st.randoms(use_true_random=False))
def test_gradients_are_pytorchs_dense_ones_at_the_chosen_channels(case: Case, random: Any) -> None:
    compare_gradients(case, random)


@pytest.mark.slow
@settings(quick, max_examples=40)
@given(cases, st.randoms(use_true_random=False))
def test_gradients_of_many_shapes(case: Case, random: Any) -> None:
    compare_gradients(case, random)


def compare_gradients(case: Case, random: Any) -> None:
    model, x = case.model(), torch.randn(2, 2, *case.size)
    try:
        y = torch.randn_like(model(x))
    except RuntimeError:  # the kernel is larger than its input
        assume(False)
    plan = {name: tt.LayerUpdate(case.share, select="random") for name in PARTLY} | {"front": tt.LayerUpdate()}
    graph = tt.trace(model, x, y, loss="mse").apply(tt.UpdatePlan(plan))
    named = {s.layer: random.sample(range(s.channels), s.count) for s in graph.selections}
    gradients = gradients_of(graph, model, x, y, named)
    F.mse_loss(model(x), y).backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for name, each, axis in (("conv", 1, 1), ("depthwise", case.multiplier, 0), ("linear", 1, 1)):
        at = [c * each + m for c in named[name] for m in range(each)]
        expected[f"{name}.weight"] = expected[f"{name}.weight"].take(at, axis)
    assert set(gradients) == set(expected)
    assert not departures(gradients, expected)


def gradients_of(
    graph: tt.TrainGraph, model: nn.Module, x: torch.Tensor, y: torch.Tensor, named: dict
) -> dict[str, np.ndarray]:
    """The entry ``gradients``, compiled alone: a third of the time of a whole step."""
    function = graph.module(gradients=True)["gradients"]
    machine = relax.VirtualMachine(lowering.compile_module(tvm.IRModule({"gradients": function}), quick_device()), tvm.cpu())
    given = {("input", "x"): x, ("target", "y"): y} | {("parameter", name): p.detach() for name, p in model.named_parameters()}
    given |= {("channels", f"{name}.weight"): torch.tensor(indices, dtype=torch.int32) for name, indices in named.items()}
    results = machine["gradients"](*[tvm.runtime.tensor(given[port].numpy()) for port in signature.inputs(function)])
    return {
        name: value.numpy()
        for (role, name), value in zip(signature.outputs(function), results, strict=True)
        if role == "gradient"
    }


def started(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, plan: dict[str, tt.LayerUpdate], optimizer: Any = None, **options: Any
) -> tt.TrainStep:
    return built(model, x, y, plan, optimizer, **options).load()


def built(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    plan: dict[str, tt.LayerUpdate],
    optimizer: Any = None,
    gradients: bool = True,
    **options: Any,
) -> tt.Artifact:
    graph = tt.trace(model, x, y, optimizer=optimizer or tt.SGD(), **options).apply(tt.UpdatePlan(plan))
    return tt.build(graph, quick_device(), gradients=gradients)


class Twice(nn.Module):
    """One linear layer used twice, on the input itself first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def test_a_layer_used_twice_has_one_gradient_with_both_parts() -> None:
    model, x, y = Twice(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    step = started(model, x, y, {"shared": tt.LayerUpdate(0.5, select="random"), "last": tt.LayerUpdate()})
    gradients = step.gradients(x, y, channels={"shared": [4, 1, 3]})
    F.cross_entropy(model(x), y).backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    expected["shared.weight"] = expected["shared.weight"][:, [4, 1, 3]]
    assert not departures(gradients, expected)


# Updates.

OPTIMIZERS: dict[str, Optimizer] = {
    "plain": tt.SGD(lr=0.2),
    "sgd": tt.SGD(lr=0.2, momentum=0.9, weight_decay=0.05, clip_norm=0.3),
    "adam": tt.Adam(lr=0.01, weight_decay=0.1, clip_norm=0.3),
    "adamw": tt.AdamW(lr=0.02, weight_decay=0.3),
}
SELECTS = {"first": "first", "depthwise": "random", "second": "magnitude", "head": "rotate"}
COUNTS = {"first": (3, 2), "depthwise": (6, 4), "second": (12, 4), "head": (5, 2)}


class Network(nn.Module):
    """Every kind of layer, each with another way to choose; a whole one in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.whole = nn.Conv2d(6, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6)
        self.second = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.whole(torch.relu(self.first(x))))
        return self.head(torch.relu(self.second(torch.relu(self.depthwise(x)))).mean((2, 3)))


def network(select: dict[str, str] | None = None) -> tuple[nn.Module, torch.Tensor, torch.Tensor, dict[str, tt.LayerUpdate]]:
    torch.manual_seed(3)
    model, x, y = Network(), 2 * torch.randn(6, 3, 7, 5), torch.tensor([0, 1, 2, 1, 0, 2])
    shares = {name: count / channels for name, (channels, count) in COUNTS.items()}
    plan = {name: tt.LayerUpdate(shares[name], select=how) for name, how in (select or SELECTS).items()}
    return model, x, y, plan | {"whole": tt.LayerUpdate()}


@functools.cache
def made(kind: str = "sgd") -> tt.Artifact:
    return built(*network(), OPTIMIZERS[kind], gradients=kind == "sgd")


@pytest.fixture
def step() -> tt.TrainStep:
    return made().load()


def chosen_of(weight: torch.Tensor, layer: str, channels: np.ndarray) -> tuple:
    """An index of the chosen channels in a weight of ``Network``."""
    if layer == "depthwise":
        return (torch.tensor([c * 2 + m for c in channels for m in range(2)]),)
    return (slice(None), torch.from_numpy(channels).long())


class ByHand:
    """Rules of torch.optim on slices: what a step does not choose keeps its value and its state."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.o, self.t = model, optimizer, 0
        self.state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}

    def step(self, x: torch.Tensor, y: torch.Tensor, channels: dict[str, np.ndarray]) -> float:
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.t += 1
        parts = {}
        for name, p in self.model.named_parameters():
            layer, _, kind = name.rpartition(".")
            sliced = kind == "weight" and layer in channels
            parts[name] = chosen_of(p, layer, channels[layer]) if sliced else (slice(None),)
        gradients = {name: p.grad[parts[name]] for name, p in self.model.named_parameters()}
        if self.o.clip_norm is not None:
            norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
            gradients = {name: g * min(1.0, self.o.clip_norm / (float(norm) + 1e-6)) for name, g in gradients.items()}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                where = parts[name]
                first, second = (s[where] for s in self.state[name])
                p[where], first, second = self._moved(p[where], gradients[name], first, second)
                self.state[name][0][where], self.state[name][1][where] = first, second
        return loss.item()

    def _moved(self, p: torch.Tensor, g: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple:
        o = self.o
        if isinstance(o, tt.AdamW):
            p = p * (1 - o.lr * o.weight_decay)
        else:
            g = g + o.weight_decay * p
        if isinstance(o, tt.SGD):
            first = o.momentum * first + g
            return p - o.lr * first, first, second
        first, second = o.betas[0] * first + (1 - o.betas[0]) * g, o.betas[1] * second + (1 - o.betas[1]) * g * g
        mean, square = first / (1 - o.betas[0] ** self.t), second / (1 - o.betas[1] ** self.t)
        return p - o.lr * mean / (square.sqrt() + o.eps), first, second


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_torchs_rules_on_slices_and_leave_the_rest_alone(kind: str) -> None:
    model, x, y, _ = network()
    reference, step = ByHand(model, OPTIMIZERS[kind]), made(kind).load()
    for i in range(8):
        channels, before = step.channels, step.state_dict()
        batch = x.roll(i, 0), y
        assert step(*batch) == pytest.approx(reference.step(*batch, channels), rel=RELATIVE)
        after = step.state_dict()
        for layer in SELECTS:
            weight = torch.from_numpy(before[f"{layer}.weight"].copy())
            now = torch.from_numpy(after[f"{layer}.weight"])
            where = chosen_of(weight, layer, channels[layer])
            assert (weight[where] != now[where]).any()
            weight[where] = now[where]
            assert weight.numpy().tobytes() == after[f"{layer}.weight"].tobytes()
    wrong = departures(step.state_dict(), {name: p.detach().numpy() for name, p in model.named_parameters()})
    assert not wrong, wrong


def test_state_exists_for_what_is_trained(step: tt.TrainStep) -> None:
    prefix = "optimizer:momentum:"
    state = {name.removeprefix(prefix): tensor.shape for name, tensor in step.manifest.state.items() if name.startswith(prefix)}
    assert state["first.weight"] == (6, 2, 3, 3)
    assert state["second.weight"] == (5, 4, 1, 1)
    assert state["depthwise.weight"] == (12, 1, 3, 3)
    assert state["head.weight"] == (3, 5)


# What the module does.


def module(plan: dict[str, tt.LayerUpdate]) -> relax.Function:
    model, x, y, _ = network()
    return tt.trace(model, x, y, optimizer=tt.SGD(momentum=0.9)).apply(tt.UpdatePlan(plan)).module()["train_step"]


def calls(function: relax.Function, name: str) -> list[relax.Call]:
    values = [binding.value for binding in function.body.blocks[0].bindings]
    return [value for value in values if isinstance(value, relax.Call) and value.op.name == name]


def shape(value: relax.Expr) -> list[int]:
    return [int(d) for d in value.ty.shape]


def users(function: relax.Function, var: relax.Var) -> list[str]:
    bindings = function.body.blocks[0].bindings
    return [b.value.op.name for b in bindings if var in relax.analysis.free_vars(b.value)]


def test_weight_gradients_are_made_from_the_gathered_channels_alone() -> None:
    function = module(network()[3])
    made = {tuple(shape(call)): tuple(shape(call.args[0])) for call in calls(function, "tvmtrain.conv2d_wgrad")}
    assert made == {
        (6, 2, 3, 3): (6, 2, 7, 5),
        (6, 6, 1, 1): (6, 6, 7, 5),
        (8, 1, 3, 3): (6, 4, 7, 5),
        (5, 4, 1, 1): (6, 4, 4, 3),
    }


def test_channels_are_gathered_where_they_are_made() -> None:
    bindings = module(network()[3]).body.blocks[0].bindings
    place = {binding.var: i for i, binding in enumerate(bindings)}
    layers = [i for i, b in enumerate(bindings) if isinstance(b.value, relax.Call) and b.value.op.name == "relax.nn.conv2d"]
    gathers = [b for b in bindings if isinstance(b.value, relax.Call) and b.value.op.name == "relax.take"]
    early = [place[b.var] for b in gathers if place[b.var] < place[bindings[layers[-1]].var]]
    # Of the input, before the first layer; of the depthwise layer's and the last convolution's input, right behind each.
    assert len(early) == 3
    assert early[0] == 0
    assert [place[bindings[i].value.args[0]] for i in early[1:]] == [i - 1 for i in early[1:]]


def test_a_bias_alone_has_no_weight_gradient_and_keeps_no_input() -> None:
    function = module(
        {"first": tt.LayerUpdate(), "whole": tt.LayerUpdate(0), "depthwise": tt.LayerUpdate(0), "second": tt.LayerUpdate(0)}
    )
    assert [shape(call) for call in calls(function, "tvmtrain.conv2d_wgrad")] == [[6, 3, 3, 3]]
    # Of its input, a bias-only layer's backward reads nothing; a ReLU before it still has its mask to make.
    assert sorted(users(function, inputs_of(function)["whole.weight"])) == ["relax.greater", "relax.nn.conv2d"]
    whole = module({"first": tt.LayerUpdate(), "whole": tt.LayerUpdate()})
    assert set(users(whole, inputs_of(whole)["whole.weight"])) == {"relax.nn.conv2d", "relax.greater", "tvmtrain.conv2d_wgrad"}
    alone = module({"whole": tt.LayerUpdate(0)})
    assert not calls(alone, "tvmtrain.conv2d_wgrad")
    assert not calls(alone, "relax.take")
    assert users(alone, inputs_of(alone)["whole.weight"]) == ["relax.nn.conv2d"]


def inputs_of(function: relax.Function) -> dict[str, relax.Expr]:
    """Name of its weight -> input of each convolution."""
    names = {var: name for name, var in signature.parameters(function).items()}
    return {names[call.args[1]]: call.args[0] for call in calls(function, "relax.nn.conv2d")}


class Kernel(nn.Module):
    """A linear layer whose weight has another name, as in networks of a foreign exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.kernel)


def test_a_weight_of_any_name_is_trained_in_part() -> None:
    graph = tt.trace(nn.Sequential(Kernel()), torch.randn(2, 8), torch.tensor([0, 2]))
    half = graph.apply(tt.UpdatePlan({"0": tt.LayerUpdate(0.5)}))
    assert [(chosen.weight, chosen.count, chosen.channels) for chosen in half.selections] == [("0.kernel", 4, 8)]


# What cannot be trained in part.


def test_a_grouped_convolution_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 2))
    graph = tt.trace(model, torch.randn(2, 4, 3, 3), torch.tensor([0, 1]))
    with pytest.raises(PlanError, match=r"'0.weight'.*grouped convolution \(2 groups of 2\)"):
        graph.apply(tt.UpdatePlan({"0": tt.LayerUpdate(0.5)}))


class Tied(nn.Module):
    """A code and back by the same weight; or its weights' size as a part of the output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.code = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = torch.tanh(self.code(x))
        if self.how == "size":
            return code * self.code.weight.abs().sum()
        if self.how == "detached":
            return code * self.code.weight.detach().abs().sum()
        return code @ self.code.weight if self.how == "back" else code @ (2 * self.code.weight.T)


@pytest.mark.parametrize(("how", "reader"), [("back", "matmul"), ("size", "abs"), ("scaled", "multiply")])
def test_a_weight_that_something_else_reads_is_refused(how: str, reader: str) -> None:
    x = torch.randn(3, 6)
    graph = tt.trace(Tied(how), x, x, loss="mse")
    with pytest.raises(PlanError, match=f"weight 'code.weight': {reader} reads it, too"):
        graph.apply(tt.UpdatePlan({"code": tt.LayerUpdate(0.5)}))


def test_a_detached_reader_is_none() -> None:
    model, x = Tied("detached"), torch.randn(3, 6)
    gradients = started(model, x, x, {"code": tt.LayerUpdate(0.5)}, loss="mse").gradients(x, x)
    F.mse_loss(model(x), x).backward()
    assert not departures(gradients, {"code.weight": model.code.weight.grad[:, :3].numpy()})


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


def test_an_embedding_tied_to_a_linear_layer_is_refused() -> None:
    x = torch.tensor([[1, 2], [3, 0]])
    graph = tt.trace(Embedded(), x, torch.randn(2, 2, 5), loss="mse")
    with pytest.raises(PlanError, match=r"'table'.*no share of channels"):
        graph.apply(tt.UpdatePlan({"table": tt.LayerUpdate(0.5)}))


# The choice.


def chosen(channels: int, count: int, select: str = "random", layer: str = "a", seed: int = 0) -> Selection:
    return Selection(layer, "a.weight", channels, count, select, seed)


def drawn(chosen: Selection, steps: range) -> list[list[int]]:
    state = selection.seeds([chosen])
    return [selection.channels(chosen, t, state).tolist() for t in steps]


shares = st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c)))


@settings(quick, max_examples=60)
@given(shares, st.sampled_from(("random", "rotate")), st.integers(-(2**63), 2**63 - 1))
def test_all_are_visited_before_any_again(share: tuple[int, int], select: str, seed: int) -> None:
    channels, count = share
    rounds = channels // math.gcd(channels, count)
    visits = np.zeros(channels, int)
    for t, window in enumerate(drawn(chosen(channels, count, select, seed=seed), range(2 * rounds))):
        assert len(set(window)) == count
        assert window == sorted(window)
        visits[window] += 1
        assert visits.max() - visits.min() <= 1
        if (t + 1) % rounds == 0:
            assert set(visits) == {(t + 1) * count // channels}


def test_random_orders_are_those_of_seed_layer_and_round() -> None:
    first = drawn(chosen(64, 16), range(8))
    assert first == drawn(chosen(64, 16), range(8))
    assert first[3:] == drawn(chosen(64, 16), range(3, 8))
    others = [drawn(chosen(64, 16, layer="b"), range(4)), drawn(chosen(64, 16, seed=1), range(4)), first[4:]]
    assert all(first[:4] != other for other in others)
    # The same on every machine, for good: checkpoints go on from here.
    assert drawn(chosen(10, 3), range(3)) == KNOWN


KNOWN = [[0, 2, 7], [1, 8, 9], [4, 5, 6]]


def test_random_orders_are_fair() -> None:
    pairs = np.zeros((8, 8), int)
    for window in drawn(chosen(8, 2), range(4000)):
        pairs[window[0], window[1]] += 1
    counts = pairs[np.triu_indices(8, 1)]
    assert counts.sum() == 4000
    assert ((counts - 4000 / 28) ** 2 / (4000 / 28)).sum() < 60  # chi-squared with 27 degrees: one in 3,000 is beyond


def test_rotation_wraps_around() -> None:
    assert drawn(chosen(5, 2, "rotate"), range(5)) == [[0, 1], [2, 3], [0, 4], [1, 2], [3, 4]]
    assert drawn(chosen(5, 2, "first"), range(2)) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("shape", "channels"), [((7, 9, 3, 3), 9), ((9, 1, 3, 3), 9), ((18, 1, 3, 3), 9), ((4, 9), 9), ((4, 1, 2, 2), 1)]
)
def test_magnitude_takes_the_largest_two_norms(shape: tuple[int, ...], channels: int) -> None:
    weight = torch.randn(shape)
    by_channel = weight.transpose(0, 1) if shape[1] == channels else weight
    norms = by_channel.reshape(channels, -1).norm(dim=1)
    count = (channels + 2) // 3
    largest = selection.largest([chosen(channels, count, "magnitude")], {"a.weight": weight.numpy()})
    assert largest["selection:a"].tolist() == sorted(norms.topk(count).indices.tolist())
    assert selection.largest([chosen(channels, count, "rotate")], {}) == {}


def test_the_ways_to_choose_are_those_of_plans() -> None:
    assert artifact.SELECTS == spec.SELECTIONS


# The running step.

X, Y = network()[1:3]


def everything(step: tt.TrainStep) -> dict[str, bytes]:
    state = {name: tensor.numpy().tobytes() for name, tensor in step._moment.tensors.items()}
    return state | {"steps": str(step.steps).encode()}


def listed(channels: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {layer: value.tolist() for layer, value in channels.items()}


def test_a_step_trains_what_it_says_and_draws_again(step: tt.TrainStep) -> None:
    other, seen = made().load(), []
    for _ in range(3):
        seen.append(step.channels)
        assert step(X, Y) == other(X, Y, channels={k: v for k, v in seen[-1].items() if k in ("depthwise", "head")})
    assert everything(step) == everything(other)
    assert sorted(np.concatenate([window["head"] for window in seen])) == [0, 0, 1, 2, 3, 4]
    assert [window["second"].tolist() for window in seen] == [seen[0]["second"].tolist()] * 3


def test_channels_of_the_users_own_are_for_one_step(step: tt.TrainStep) -> None:
    before, following = step.state_dict()["head.weight"], made().load()
    following(X, Y)
    step(X, Y, channels={"head": torch.tensor([4, 2])})
    changed = (step.state_dict()["head.weight"] != before).any(axis=0)
    assert changed.tolist() == [False, False, True, False, True]
    assert listed(step.channels) == listed(following.channels)


def test_going_on_from_a_checkpoint_gives_the_same_bits(tmp_path: Path, step: tt.TrainStep) -> None:
    step.load_state_dict({name: value[::-1].copy() for name, value in step.state_dict().items()})
    for _ in range(2):
        step(X, Y)
    step.save(tmp_path / "now")
    expected = [(listed(step.channels), step(X, Y)) for _ in range(4)]
    # An artifact with another seed and other weights goes on as the one that wrote it.
    manifest = made().manifest
    seeded = tuple(dataclasses.replace(s, seed=9) for s in manifest.selections)
    state = made().state | {"second.weight": made().state["second.weight"][:, ::-1]}
    other = dataclasses.replace(made(), manifest=dataclasses.replace(manifest, selections=seeded), state=state).load()
    assert listed(other.channels) != expected[0][0]
    other.restore(tmp_path / "now")
    assert [(listed(other.channels), other(X, Y)) for _ in range(4)] == expected
    assert everything(other) == everything(step)


@pytest.mark.parametrize("channels", [[0, 1, 2, 2**30], [-1, 0, 1, 2], [1, 1, 2, 3]])
def test_channels_of_a_forged_checkpoint_are_refused(tmp_path: Path, step: tt.TrainStep, channels: list[int]) -> None:
    """A step would read and write beyond its weights."""
    step.save(tmp_path / "good")
    state = load_file(tmp_path / "good") | {"selection:second": np.array(channels, "int32")}
    artifact.write_checkpoint(tmp_path / "bad", state, 3, "0.1.0")
    before = everything(step)
    with pytest.raises(CheckpointError, match=r"checkpoint .*bad: channels of layer 'second': got"):
        step.restore(tmp_path / "bad")
    assert everything(step) == before
    assert step.steps == 0


def test_magnitudes_are_those_of_loaded_weights_and_state_follows_its_channel(step: tt.TrainStep) -> None:
    step(X, Y)
    old = step.channels["second"].tolist()
    momentum = step._moment.tensors["optimizer:momentum:second.weight"].numpy()
    # Two of the chosen lose their size, two others win.
    state = {name: value.copy() for name, value in step.state_dict().items()}
    lost, won = old[1:3], [c for c in range(12) if c not in old][:2]
    state["second.weight"][:, lost] = 0
    state["second.weight"][:, won] = 9
    step.load_state_dict(state)
    new = step.channels["second"].tolist()
    assert new == sorted([old[0], old[3], *won])
    moved = step._moment.tensors["optimizer:momentum:second.weight"].numpy()
    for channel in new:
        expected = momentum[:, old.index(channel)] if channel in old else np.zeros_like(momentum[:, 0])
        np.testing.assert_array_equal(moved[:, new.index(channel)], expected)
    assert np.abs(momentum).min() > 0


def test_state_of_depthwise_channels_follows_them() -> None:
    values = np.arange(8.0).reshape(4, 1, 2, 1)  # two channels with two filters each
    moved = selection.carried(chosen(5, 2, "magnitude"), (10, 1, 2, 1), values, np.array([1, 3]), np.array([3, 4]))
    assert moved.reshape(2, 4).tolist() == [[4, 5, 6, 7], [0, 0, 0, 0]]


def test_a_loss_that_is_not_finite_changes_nothing(step: tt.TrainStep) -> None:
    step(X, Y)
    before, channels = everything(step), listed(step.channels)
    with pytest.raises(NonFiniteLossError):
        step(X, torch.full_like(Y, -100))
    assert everything(step) == before
    assert listed(step.channels) == channels


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"heda": [0, 1]}, r"layer 'heda' is not known \(near: head\); layers of which a share is trained: first, depthwise"),
        ({"whole": [0, 1]}, "layer 'whole' is trained whole, or not at all"),
        ({"head": [0, 1, 2]}, r"layer 'head': got shape \(3,\); want \(2,\)"),
        ({"head": 1}, r"got shape \(\); want \(2,\)"),
        ({"head": [0, 5]}, "got 5; want numbers from 0 to 4"),
        ({"head": [-1, 0]}, "got -1; want"),
        ({"head": [3, 3]}, "got 3 more than once; want different channels"),
        ({"head": [0.0, 1.0]}, "got float64; want whole numbers"),
        ({"head": np.array([True, False])}, r"got bool.*flatnonzero"),
        ({"head": [[1, 2], [3]]}, "cannot be read"),
        ({"head": np.array([2**32, 1])}, "got 4294967296"),
        ([0, 1], "channels is list; want layer name -> indices"),
        (
            {"first": [0, 2]},
            r"layer 'first': select = 'first' trains the same.*state exists for those alone: \[0, 1\].*\"rotate\"",
        ),
    ],
)
def test_channels_that_do_not_fit_change_nothing(step: tt.TrainStep, channels: Any, message: str) -> None:
    before = everything(step)
    with pytest.raises(InputError, match=message):
        step(X, Y, channels=channels)
    assert everything(step) == before


def test_fixed_channels_may_be_named_and_others_where_there_is_no_state(step: tt.TrainStep) -> None:
    other = made().load()
    assert step(X, Y, channels={"first": [1, 0]}) == other(X, Y)
    assert everything(step) == everything(other)
    # Gradients change no state, and plain SGD has none.
    assert step.gradients(X, Y, channels={"first": [2, 0]})["first.weight"].shape == (6, 2, 3, 3)
    plain = made("plain").load()
    before = plain.state_dict()["first.weight"]
    plain(X, Y, channels={"first": [2, 0]})
    assert (plain.state_dict()["first.weight"] != before).any(axis=(0, 2, 3)).tolist() == [True, False, True]


# The manifest, and the command line.


def test_a_manifest_keeps_its_selections() -> None:
    manifest = made().manifest
    assert {s.layer: (s.channels, s.count, s.select) for s in manifest.selections} == {
        layer: (*COUNTS[layer], how) for layer, how in SELECTS.items()
    }
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select": "best"}, "'best'; want"),
        ({"count": 0}, "0 of 5 channels"),
        ({"count": 6}, "6 of 5 channels"),
        ({"count": 3}, "takes channels of head.weight that no selection gives"),
        ({"channels": 4}, "no trained weight with 4 channels"),
        ({"weight": "head.wieght"}, "'head.wieght' is no trained weight"),
        ({"weight": "head.bias"}, "'head.bias' is no trained weight"),
        ({"layer": "first"}, "layers.*want each once"),
    ],
)
def test_a_contradictory_selection_is_refused(change: dict[str, Any], message: str) -> None:
    manifest = made().manifest
    *others, head = manifest.selections
    with pytest.raises(ArtifactError, match=message):
        dataclasses.replace(manifest, selections=(*others, dataclasses.replace(head, **change)))


def test_inspect_shows_the_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made().save(tmp_path / "out")
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["depthwise", "4", "6", "66.7%", "random"] in lines


def test_verify_compares_partly_trained_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    plan = tt.UpdatePlan({"0": tt.LayerUpdate(0.5, select="magnitude"), "2": tt.LayerUpdate(0.25, select="random")})
    x, y, optimizer = torch.randn(4, 6), torch.tensor([0, 1, 2, 0]), tt.AdamW(lr=0.05, clip_norm=0.3)
    check = functools.partial(verify.verify, model, x, y, optimizer=optimizer, plan=plan, steps=5)
    report = check()
    assert report.passed, report.message
    assert {c.name: c.shape for c in report.worst("gradient")}["2.weight"] == (3, 2)
    # PyTorch's own rule, which moves channels that are not chosen, is another one.
    monkeypatch.setattr(verify._Reference, "_put_back", lambda self, before: None)
    departed = check()
    assert (departed.passed, departed.direction) == (False, "update")
