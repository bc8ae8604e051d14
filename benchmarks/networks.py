"""Models of the studies, with the real weights of a data folder (``TVMTRAIN_DATA``, else ``../shared/data``)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
WEIGHTS = "mobilenetv2_0.35_imagenet_notop_float.safetensors"
EPSILON = 1e-3  # Keras's BatchNorm; some channels of these weights have a variance of 4e-36


def data_folder() -> Path:
    """Where the real data and weights lie."""
    return Path(os.environ.get("TVMTRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


class SamePadded(nn.Conv2d):
    """A 3x3 convolution of stride 2 with TensorFlow's SAME padding of even sizes: one pixel, at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, None, self.stride, 0, 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride == 2:
        return SamePadded(inputs, outputs, kernel, 2, 0, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False)


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs, eps=EPSILON), nn.ReLU6())


class InvertedResidual(nn.Module):
    """expand 1x1, depthwise 3x3, project 1x1 (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_unit(inputs, hidden, 1)] if expansion != 1 else []
        project = [_conv(hidden, outputs, 1), nn.BatchNorm2d(outputs, eps=EPSILON)]
        self.conv = nn.Sequential(*expand, _unit(hidden, hidden, 3, stride, hidden), *project)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _channels(base: int, width: float) -> int:
    """Multiples of 8, never more than 10% below (the MobileNet rule)."""
    wanted = base * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class MobileNetV2(nn.Module):
    """MobileNetV2 with torchvision's names and TensorFlow's padding."""

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = _channels(32, width)
        features: list[nn.Module] = [_unit(3, channels, 3, 2)]
        for expansion, base, repeats, stride in BLOCKS:
            for i in range(repeats):
                outputs = _channels(base, width)
                features.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expansion))
                channels = outputs
        last = _channels(1280, max(width, 1.0))
        self.features = nn.Sequential(*features, _unit(channels, last, 1))
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


def cifar10(batch: int = 32, size: int = 96) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """MobileNetV2 0.35 with ImageNet weights and a new classifier of ten classes, with an example batch."""
    torch.manual_seed(0)
    model = MobileNetV2(0.35, 10)
    model.load_state_dict(load_file(data_folder() / WEIGHTS), strict=False)
    return model.train(), torch.zeros(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)


def mobilenetv2(batch: int = 8, size: int = 128) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """MobileNetV2 1.0 with random weights and its BatchNorms on running statistics."""
    torch.manual_seed(0)
    return MobileNetV2(1.0, 10).eval(), torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))


class McuBlock(nn.Module):
    """The convolutions of one block, each with its bias and, where the description says so, a ReLU6; their names are the file's."""

    def __init__(self, block: dict) -> None:
        super().__init__()
        self.residual = bool(block.get("residual"))
        self.clipped = {c["key"].rpartition(".")[2]: bool(c["relu6"]) for c in block["convs"]}
        for c in block["convs"]:
            padding = c["k"] // 2
            convolution = nn.Conv2d(c["cin"], c["cout"], c["k"], c["stride"], padding, groups=c["groups"])
            self.add_module(c["key"].rpartition(".")[2], convolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for name, clipped in self.clipped.items():
            y = getattr(self, name)(y)
            y = F.relu6(y) if clipped else y
        return x + y if self.residual else y


class McuNetwork(nn.Module):
    """A network of MCUNetV3's model zoo (BatchNorm folded, 128 px), described and weighted by ``file``, with a new classifier."""

    def __init__(self, file: str, classes: int = 10) -> None:
        super().__init__()
        with safe_open(data_folder() / file, "pt") as stored:
            blocks = json.loads(stored.metadata()["arch"])
            weights = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - no mapping
        self.first = McuBlock(blocks[0]).first
        self.blocks = nn.Sequential(*map(McuBlock, blocks[1:]))
        self.classifier = nn.Linear(blocks[-1]["convs"][-1]["cout"], classes)
        self.load_state_dict(weights | {f"classifier.{name}": p for name, p in self.classifier.named_parameters()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(F.relu6(self.first(x))).mean([2, 3]))


def mcunet(batch: int = 1, size: int = 128) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """MCUNet (5 frames per second) with ImageNet weights."""
    return _with_batch(McuNetwork("mcunet-5fps_imagenet_deq.safetensors"), batch, size)


def mcu_mobilenetv2(batch: int = 1, size: int = 128) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """MCUNetV3's MobileNetV2 0.35 with ImageNet weights."""
    return _with_batch(McuNetwork("mbv2-w0.35_imagenet_deq.safetensors"), batch, size)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.downsample = None if same else nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18 with torchvision's names."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            blocks = BasicBlock(widths[i - 1], widths[i], 1 if i == 1 else 2), BasicBlock(widths[i], widths[i], 1)
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean([2, 3]))


def resnet18(batch: int = 1, size: int = 224) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """ResNet-18 with random weights and its BatchNorms on running statistics."""
    torch.manual_seed(0)
    return _with_batch(ResNet18(10).eval(), batch, size)


def _with_batch(model: nn.Module, batch: int, size: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return model, torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
