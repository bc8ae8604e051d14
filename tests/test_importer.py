"""Models in every accepted form; names, ties, flags, buffers and outputs as in PyTorch; refusals that say why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

import tvmtrain as tt
from tvmtrain import exporting
from tvmtrain.errors import ModelError, NonFiniteLossError, PlanError, UnsupportedOperatorError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(F.relu(self.norm(self.conv(x))).mean([2, 3]))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def labels() -> torch.Tensor:
    return torch.tensor([0, 4, 2, 2])


def compiled(model: Any, x: Any = None, y: Any = None, **options: Any) -> tt.TrainStep:
    graph = tt.trace(model, images() if x is None else x, labels() if y is None else y, **options)
    return tt.build(graph, gradients=True).load()


def expected(model: nn.Module, loss: Callable | None = None) -> tuple[float, dict[str, np.ndarray]]:
    copied = copy.deepcopy(model)
    value = (loss or F.cross_entropy)(copied(images()), labels())
    value.backward()
    return value.item(), {n: p.grad.numpy() for n, p in copied.named_parameters() if p.grad is not None}


def assert_same(step: tt.TrainStep, model: nn.Module, **options: Any) -> None:
    loss, gradients = expected(model, **options)
    found = step.gradients(images(), labels())
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    assert step(images(), labels(), lr=0.0) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_module_program_and_file_are_the_same(training: bool, tmp_path: Path) -> None:
    model = Small().train(training)
    program = torch.export.export(model, (images(),))
    torch.export.save(program, tmp_path / "model.pt2")
    for form in (model, program, tmp_path / "model.pt2", str(tmp_path / "model.pt2")):
        step = compiled(form)
        assert_same(step, model)
        assert set(step.state_dict()) == set(model.state_dict())
        copied = copy.deepcopy(model).eval()
        copied.load_state_dict({n: torch.from_numpy(v) for n, v in step.state_dict().items()})
        np.testing.assert_allclose(step.predict(images()), copied(images()).detach().numpy(), rtol=1e-4, atol=1e-5)


class Dropping(Small):
    """Drops, whatever its mode."""

    def forward(self, x: torch.Tensor) -> Any:
        return F.dropout(super().forward(x), 0.5, training=True)


class Attending(nn.Module):
    """One token attends to itself: the same values, of which some are dropped in every mode."""

    def __init__(self, dropped: float) -> None:
        super().__init__()
        self.dropped = dropped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = x[:, None, None]
        return F.scaled_dot_product_attention(token, token, token, dropout_p=self.dropped)[:, 0, 0]


@pytest.mark.parametrize(
    ("model", "exports"),
    [
        (Small().eval(), ["the model with its loss", "the loss"]),
        (nn.Sequential(Small(), nn.Dropout(0.5)).eval(), ["the model with its loss", "the loss"]),
        (Small(), ["the model with its loss", "the model in eval mode", "the loss"]),
        (nn.Sequential(Small().eval(), nn.Dropout(0.5)), ["the model with its loss", "the model in eval mode", "the loss"]),
        (Dropping().eval(), ["the model with its loss", "the model in eval mode", "the loss"]),
        (nn.Sequential(Small(), Attending(0.0)).eval(), ["the model with its loss", "the loss"]),
        (nn.Sequential(Small(), Attending(0.5)).eval(), ["the model with its loss", "the model in eval mode", "the loss"]),
    ],
)
def test_a_step_that_computes_what_evaluation_does_is_exported_once(
    model: nn.Module, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    export = exporting._export
    monkeypatch.setattr(exporting, "_export", lambda module, args, what: made.append(what) or export(module, args, what))
    step = compiled(model)
    assert made == exports
    plain = (model[0] if isinstance(model, nn.Sequential) else Small()).eval()
    plain.load_state_dict({name.removeprefix("0."): value for name, value in model.state_dict().items()})
    np.testing.assert_allclose(step.predict(images()), plain(images()).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert step.evaluate(images(), labels()) == pytest.approx(F.cross_entropy(plain(images()), labels()).item(), rel=1e-4)


def test_a_loss_may_change_its_tensors_and_predictions_stay() -> None:
    model = nn.Sequential(Small(), nn.Dropout(0.5)).eval()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sub_(torch.eye(5)[target]).pow(2).mean()

    step = compiled(model, loss=loss)
    assert_same(step, model, loss=loss)
    np.testing.assert_allclose(step.predict(images()), model(images()).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert step.evaluate(images(), labels()) == pytest.approx(loss(model(images()), labels()).item(), rel=1e-4)


class Twice(Small):
    """Its result, its input, and its result again."""

    def forward(self, x: torch.Tensor) -> Any:
        result = super().forward(x)
        return {"first": result, "image": x, "second": result}


def test_several_outputs_of_a_model_that_evaluates() -> None:
    def loss(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output["first"] + output["second"], target) + output["image"].mean()

    model = Twice().eval()
    step = compiled(model, loss=loss)
    assert_same(step, model, loss=loss)
    first, image, second = step.predict(images())
    np.testing.assert_allclose(first, model(images())["first"].detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(image, images().numpy())
    np.testing.assert_array_equal(first, second)
    assert step.evaluate(images(), labels()) == pytest.approx(loss(model(images()), labels()).item(), rel=1e-4)


def test_trace_leaves_the_model_as_it_was() -> None:
    model = Small()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    compiled(model)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay() -> None:
    model = Small()
    model.conv.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    step = compiled(model)
    assert_same(step, model)
    before = step.state_dict()
    step(images(), labels(), lr=1.0)
    changed = {name for name, value in step.state_dict().items() if not np.array_equal(value, before[name])}
    assert {"norm.weight", "norm.bias", "head.weight"} <= changed
    assert not {"conv.weight", "head.bias"} & changed


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x).mean(1))))


def test_tied_weights_have_one_update_and_both_names() -> None:
    model = Tied()
    x, y = torch.randint(0, 11, (4, 3)), torch.tensor([1, 10, 0, 5])
    step = compiled(model, x, y, optimizer=tt.SGD(momentum=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert step(x, y, lr=0.1) == pytest.approx(loss.item(), rel=1e-5)
    state = step.state_dict()
    np.testing.assert_array_equal(state["embed.weight"], state["head.weight"])
    np.testing.assert_allclose(state["head.weight"], model.head.weight.detach().numpy(), rtol=1e-4, atol=1e-6)


class Buffers(nn.Module):
    """A buffer that changes, one that does not, and one outside of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(108, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("hidden", torch.arange(108.0) / 108, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.head(x.flatten(1) * self.hidden) * self.scale * self.seen


def test_buffers_are_state_unless_they_are_constants() -> None:
    model = Buffers()
    step = compiled(model)
    for count in (1, 2, 3):
        assert step(images(), labels(), lr=0.0) == pytest.approx(F.cross_entropy(model(images()), labels()).item(), rel=1e-5)
        assert step.state_dict()["seen"] == count
    assert set(step.state_dict()) == set(model.state_dict())
    step.load_state_dict({**step.state_dict(), "scale": np.array(0.0, "float32")})
    assert step(images(), labels(), lr=0.0) == pytest.approx(np.log(5), rel=1e-5)


class Wrapped(nn.Module):
    """A model with a submodule named as the tracer's own, whose result is what ``wrap`` makes of logits."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.model, self.wrap = Small(), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.model(x))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda out: {"logits": out, "other": out * 2}, lambda result: result["logits"]),
        (lambda out: (out, out * 2), lambda result: result[0]),
        (lambda out: [out], lambda result: result[0]),
        (lambda out: ImageClassifierOutput(logits=out), lambda result: result.logits),
    ],
    ids=["dict", "tuple", "list", "ModelOutput"],
)
def test_results_of_any_kind(wrap: Callable, unwrap: Callable) -> None:
    model = Wrapped(wrap)
    step = compiled(model)
    assert_same(step, model, loss=lambda result, y: F.cross_entropy(unwrap(result), y))
    custom = compiled(model, loss=lambda result, y: F.cross_entropy(unwrap(result), y, label_smoothing=0.1))
    assert_same(custom, model, loss=lambda result, y: F.cross_entropy(unwrap(result), y, label_smoothing=0.1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.left(a) * self.right(b)


def test_two_inputs_and_two_targets() -> None:
    model = Two()
    a, b, target, weight = torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 4), torch.rand(4, 4)

    def loss(output: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (targets[1] * (output - targets[0]) ** 2).mean()

    step = compiled(model, (a, b), (target, weight), loss=loss)
    assert step((a, b), (target, weight), lr=0.0) == pytest.approx(loss(model(a, b), (target, weight)).item(), rel=1e-5)
    np.testing.assert_allclose(step.predict((a, b)), model(a, b).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_examples_may_be_numpy_or_not_contiguous() -> None:
    model = Small()
    for x in (images().numpy(), images().transpose(2, 3)):
        assert compiled(model, x, labels().numpy())(images(), labels(), lr=0.0) == pytest.approx(expected(model)[0], rel=1e-5)


def test_parameters_that_the_model_does_not_use() -> None:
    model = Small()
    model.spare = nn.Linear(2, 2)
    step = compiled(model)
    assert set(step.state_dict()) == set(model.state_dict())
    before = step.state_dict()["spare.weight"]
    step(images(), labels(), lr=1.0)
    np.testing.assert_array_equal(step.state_dict()["spare.weight"], before)


def test_the_full_plan_is_the_dense_step_and_a_part_trains_a_part() -> None:
    model = Small().eval()
    graph = tt.trace(model, images(), labels())
    dense, full = (tt.build(g).load() for g in (graph, graph.apply(tt.UpdatePlan.full(graph.layers))))
    for step in (dense, full):
        step(images(), labels(), lr=0.1)
    for name, value in dense.state_dict().items():
        np.testing.assert_array_equal(value, full.state_dict()[name])
    part = graph.apply(tt.UpdatePlan({"head": tt.LayerUpdate(weight=0, bias=True)}))
    assert part.trained == ("head.bias",)
    assert graph.trained != part.trained
    step = tt.build(part).load()
    before = step.state_dict()
    step(images(), labels(), lr=0.1)
    assert {n for n, v in step.state_dict().items() if not np.array_equal(v, before[n])} == {"head.bias"}


def test_layers_are_in_the_order_of_use() -> None:
    layers = tt.trace(Small(), images(), labels()).layers
    assert [(layer.name, layer.kind) for layer in layers] == [("conv", "conv2d"), ("norm", "batch_norm"), ("head", "linear")]
    conv = layers[0]
    assert (conv.weight_shape, conv.input_shape, conv.output_shape) == ((4, 3, 3, 3), (4, 3, 6, 6), (4, 4, 4, 4))
    assert conv.macs == 4 * 4 * 4 * 4 * 27
    assert conv.saved_bytes == 4 * 3 * 6 * 6 * 4


def test_plans_that_do_not_fit() -> None:
    graph = tt.trace(Small(), images(), labels())
    with pytest.raises(PlanError, match="near matches: conv"):
        graph.apply(tt.UpdatePlan({"convv": tt.LayerUpdate()}))
    with pytest.raises(PlanError, match="trains nothing"):
        graph.apply(tt.UpdatePlan({}))
    with pytest.raises(PlanError, match=r"weight 'conv\.weight'.*2 patches of 2"):
        graph.apply(tt.UpdatePlan({"conv": tt.LayerUpdate(filter=2)}))


class Cumulative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Sequential(nn.Linear(3, 3))
        self.also = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cummax(self.odd(x), 1).values + torch.special.i0(self.also(x))


def test_all_unsupported_operators_are_in_one_error() -> None:
    with pytest.raises(UnsupportedOperatorError) as error:
        tt.trace(Cumulative(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert "cummax" in str(error.value)
    assert "i0" in str(error.value)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) if x.sum() > 0 else x


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((nn.Linear(3, 3).half(), X.half(), Y), {}, "float16.*model.float"),
        ((nn.Linear(3, 3).half(), X.half(), Y), {}, "float16"),
        ((nn.ReLU(), X, Y), {}, "no parameters"),
        ((nn.Linear(2, 3), X, Y), {}, "torch.export"),
        ((Branching(), X, Y), {}, "torch.export"),
        ((nn.Linear(3, 3), X, Y), {"loss": "hinge"}, "cross_entropy"),
        ((nn.Linear(3, 3), X, Y), {"loss": lambda out, y: out.sum(1)}, "scalar"),
        ((nn.Linear(3, 3), torch.zeros(()), Y), {}, "batch"),
        (("missing.pt2", X, Y), {}, "no such file"),
        ((__file__, X, Y), {}, ".pt2"),
        ((3, X, Y), {}, "nn.Module"),
    ],
)
def test_what_cannot_be_traced_says_why(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tt.trace(*arguments, **options)


def test_a_damaged_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match=r"model\.pt2"):
        tt.trace(path, X, Y)


def test_nothing_to_train() -> None:
    with pytest.raises(PlanError, match="requires_grad"):
        tt.trace(nn.Linear(3, 3).requires_grad_(False), X, Y)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x).mean(1))


@pytest.mark.parametrize("word", [7, -1, 10**9])
def test_a_word_out_of_range_stops_the_step_and_changes_nothing(word: int) -> None:
    x = torch.randint(0, 7, (4, 5))
    step = compiled(Words(), x, Y)
    before = step.state_dict()
    x[1, 2] = word
    with pytest.raises(NonFiniteLossError):
        step(x, Y)
    for name, value in step.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
