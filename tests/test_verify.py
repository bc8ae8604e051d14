"""`verify`: what agrees passes, and what does not is found and placed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tvm import relax
from tvm.ir import Op
from tvm.relax.op.base import register_gradient

import tvmtrain as tt
from tvmtrain import SGD, AdamW, LayerUpdate, UpdatePlan, cli, verify
from tvmtrain.translator import Translator


class Network(nn.Module):
    """Everything that can depart: running statistics, random numbers, a tie of two layers' order and their names' order."""

    def __init__(self) -> None:
        super().__init__()
        self.z_first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU6()
        self.drop = nn.Dropout(0.25)
        self.middle = nn.Linear(16, 8)
        self.tanh = nn.Tanh()
        self.a_last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.act(self.norm(self.z_first(x))))
        if self.training:  # stochastic depth
            x = x * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.5))
        return self.a_last(self.tanh(self.middle(x.flatten(1))))


def network() -> tuple[nn.Module, torch.Tensor]:
    return Network(), torch.randn(5, 1, 4, 4)


def check(**options) -> verify.Report:
    torch.manual_seed(0)
    model, x = network()
    return verify.verify(model, x, torch.tensor([0, 1, 2, 1, 0]), steps=4, **options)


@pytest.mark.parametrize("optimizer", [SGD(lr=0.05, momentum=0.9, clip_norm=0.5), AdamW(lr=1e-3)], ids=["sgd", "adamw"])
def test_a_right_step_passes_with_the_same_random_numbers(optimizer):
    report = check(optimizer=optimizer, seed=5)
    assert report.passed, report.message
    assert (report.direction, report.first_layer) == (None, None)
    assert {c.kind for c in report.comparisons} == {"output", "loss", "gradient", "statistic", "parameter"}
    assert len(report.worst("gradient")) == 8
    assert max(c.relative for c in report.comparisons if c.kind == "loss") < 1e-5
    assert json.loads(json.dumps(report.to_dict()))["passed"]


def test_a_plan_is_compared_with_frozen_layers():
    report = check(plan=UpdatePlan({"a_last": LayerUpdate()}))
    assert report.passed
    assert {c.name for c in report.worst("gradient")} == {"a_last.weight", "a_last.bias"}


@pytest.fixture
def broken_tanh_gradient():
    """The gradient of tanh without its factor, and a way back."""
    original = Op.get("relax.tanh").get_attr("FPrimalGradient")
    register_gradient("relax.tanh", lambda y, call, gy, builder: [gy], level=100)
    yield
    register_gradient("relax.tanh", lambda *arguments: original(*arguments), level=101)


def test_a_wrong_gradient_rule_is_placed(broken_tanh_gradient, tmp_path, monkeypatch, capsys):
    report = check()
    assert not report.passed
    assert report.direction == "backward"
    # The last layer comes after the wrong rule; the layer that feeds it is the first that the backward reaches.
    assert (report.first_layer, report.nearest_loss) == ("z_first", "middle")
    assert {c.layer for c in report.comparisons if c.kind == "gradient" and not c.ok} == {"z_first", "norm", "middle"}

    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["verify", "test_verify:network", "--steps", "2"]) == 1
    out = capsys.readouterr().out
    assert "departs from PyTorch in the backward pass, in 3 of 4 layers: from z_first to middle" in out
    assert out.index("worst gradients") < out.index("middle.weight")


def test_a_wrong_forward_is_placed(monkeypatch):
    convert = Translator.convert_hardtanh__default

    def doubled(self, node):
        return self.emit(relax.op.multiply(convert(self, node), relax.const(2.0, "float32")))

    monkeypatch.setattr(Translator, "convert_hardtanh__default", doubled)
    report = check()
    assert (report.passed, report.direction, report.first_layer) == (False, "forward", "act")
    assert "the first layer whose output departs: act" in report.message


def test_a_wrong_update_is_told_from_a_wrong_gradient(monkeypatch):
    right = verify._torch_optimizer
    monkeypatch.setattr(verify, "_torch_optimizer", lambda spec, parameters: right(SGD(lr=spec.lr / 2), parameters))
    report = check()
    assert (report.passed, report.direction, report.first_layer) == (False, "update", "z_first")


def test_the_model_is_left_as_it_was():
    model, x = network()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verify.verify(model, x, torch.tensor([0, 1, 2, 1, 0]), steps=1)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_command_prints_its_verdict(capsys):
    words = ["verify", "test_verify:network", "--steps", "3", "--optimizer", "adam", "--clip-norm", "1"]
    assert cli.main([*words, "--json"]) == 0
    out, messages = capsys.readouterr()
    assert json.loads(out)["steps"] == 3
    assert "agrees with PyTorch" in messages
    assert "worst gradients" in messages


def test_nan_departs():

    bad = verify.compare("loss", "l", "", np.array(np.nan), np.array(1.0), np.array(1.0), 1e-3)
    assert (bad.ok, bad.relative) == (False, float("inf"))


class SamePadded(nn.Module):
    """Three convolutions, two with TensorFlow's padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2, groups=8)
        self.last, self.classifier = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.first, self.depthwise):
            x = F.relu(conv(F.pad(x, (0, 1, 0, 1))))
        return self.classifier(self.last(x).mean((2, 3)))


def test_filtered_gradients_are_compared_with_the_papers_equations():
    plan = tt.UpdatePlan(
        {
            "first": tt.LayerUpdate(filter=2, scaling="paper"),
            "depthwise": tt.LayerUpdate(filter=2),
            "last": tt.LayerUpdate(weight=0.5, filter=2, select="random"),
        }
    )
    model, x, y = SamePadded(), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    assert verify.verify(model, x, y, plan=plan, steps=3).passed
