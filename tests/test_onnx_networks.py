"""Whole networks from ONNX: the same outputs and gradients as PyTorch, and the same losses when they train compiled."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from onnx_cases import assert_same_gradients, floats, gradients, graph_model, images, load, scalar
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import tvmtrain as tt
from tvmtrain import onnx_model


class Logits(nn.Module):
    """The network of the package transformers as a function of an image alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=10)
    model = Logits(ResNetForImageClassification(config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # As after training: nothing that a default value could stand for.
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5)
            for value in (module.bias.data, module.running_mean):
                value.uniform_(-0.3, 0.3)
    return model.eval()


def test_resnet18_of_the_torch_exporter(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.onnx"
    torch.onnx.export(resnet, (torch.zeros(4, 3, 32, 32),), path, optimize=False, verbose=False)
    module = onnx_model.load(path)
    wanted, gradient = gradients(resnet)
    got, ours = gradients(module)
    torch.testing.assert_close(got, wanted)
    assert_same_gradients(ours, gradient)
    assert {name for name, _ in module.named_buffers()} == {n for n, _ in resnet.named_buffers() if "num_batches" not in n}
    x = images()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), resnet(x))


class ForeignWriter:
    """Writes a PyTorch ResNet as other exporters do: numbered names, Clip for ReLU, Gemm with the weight transposed."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {"zero": scalar(0.0)}
        self.source: dict[str, str] = {}

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        output = f"T_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def weight(self, name: str, value: torch.Tensor) -> str:
        written = f"W_{len(self.weights)}"
        self.weights[written], self.source[written] = value.detach().numpy(), name
        return written

    def convolution(self, x: str, layer: nn.Module, name: str) -> str:
        """Convolution, BatchNorm and, where the layer has one, ReLU."""
        conv, norm, side = layer.convolution, layer.normalization, layer.convolution.padding[0]
        w = self.weight(f"{name}.convolution.weight", conv.weight)
        x = self.add("Conv", [x, w], kernel_shape=conv.kernel_size, strides=conv.stride, pads=[side] * 4)
        fields = ("weight", "bias", "running_mean", "running_var")
        x = self.add("BatchNormalization", [x, *[self.weight(f"{name}.normalization.{f}", getattr(norm, f)) for f in fields]])
        return self.relu(x) if isinstance(getattr(layer, "activation", None), nn.ReLU) else x

    def relu(self, x: str) -> str:
        return self.add("Clip", [x, "zero"])

    def block(self, x: str, block: nn.Module, name: str) -> str:
        y = self.convolution(x, block.layer[0], f"{name}.layer.0")
        y = self.convolution(y, block.layer[1], f"{name}.layer.1")
        if not isinstance(block.shortcut, nn.Identity):
            x = self.convolution(x, block.shortcut, f"{name}.shortcut")
        return self.relu(self.add("Add", [y, x]))

    def network(self, model: nn.Module) -> onnx.ModelProto:
        resnet, classifier = model.model.resnet, model.model.classifier[1]
        x = self.convolution("data", resnet.embedder.embedder, "model.resnet.embedder.embedder")
        x = self.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        for i, stage in enumerate(resnet.encoder.stages):
            for j, block in enumerate(stage.layers):
                x = self.block(x, block, f"model.resnet.encoder.stages.{i}.layers.{j}")
        x = self.add("Flatten", [self.add("GlobalAveragePool", [x])])
        w = self.weight("model.classifier.1.weight", classifier.weight.T.contiguous())
        x = self.add("Gemm", [x, w, self.weight("model.classifier.1.bias", classifier.bias)])
        return graph_model(self.nodes, {"data": floats(1, 3, 32, 32)}, self.weights, [x], opset=12)


def test_resnet18_of_a_foreign_exporter(resnet: nn.Module, tmp_path: Path) -> None:
    writer = ForeignWriter()
    module = load(writer.network(resnet), tmp_path)
    wanted, gradient = gradients(resnet)
    got, ours = gradients(module)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    renamed = {writer.source[name]: value for name, value in ours.items()}
    renamed["model.classifier.1.weight"] = renamed["model.classifier.1.weight"].T
    assert_same_gradients(renamed, gradient)
    x = images()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), resnet(x), rtol=1e-4, atol=1e-5)


def assert_trains_like(path: Path, original: nn.Module) -> None:
    """Five compiled steps of the file, from losses of PyTorch's own steps on the original."""
    torch.manual_seed(2)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
    step = tt.build(tt.trace(path, x, y, optimizer=tt.SGD(lr=1e-3, momentum=0.9))).load()
    model = copy.deepcopy(original)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(5):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert step(x, y) == pytest.approx(loss.item(), abs=1e-3)


def test_resnet18_of_the_torch_exporter_trains_with_the_same_losses(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.onnx"
    torch.onnx.export(resnet, (torch.zeros(4, 3, 32, 32),), path, optimize=False, verbose=False)
    assert_trains_like(path, resnet)


def test_resnet18_of_a_foreign_exporter_trains_with_the_same_losses(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(ForeignWriter().network(resnet), path)
    assert_trains_like(path, resnet)
