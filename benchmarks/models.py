"""Models of the studies, with the real weights of a data folder (``TVMTRAIN_DATA``, else ``../shared/data``)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
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
