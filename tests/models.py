"""Small versions of published networks: the definitions of ``transformers`` without weights, and two by hand.

``build(name)`` gives a model whose every part is alive: PyTorch's own initial weights (the library's are so small that deep
gradients underflow), BatchNorms with random scales and the statistics of random images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

BATCH, CLASSES, WORDS = 4, 10, 50
DATA = Path(os.environ.get("TVMTRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
MCUNET = DATA / "mcunet-5fps_imagenet_deq.safetensors"


@dataclass(frozen=True)
class Example:
    """How to make a network, and what goes into it: images of ``size`` pixels, or ``size`` words."""

    make: Callable[[], nn.Module]
    size: int = 64
    words: bool = False
    dense: bool = False  # one label per output pixel


def images(kind: str, task: str = "ImageClassification", size: int = 64, dense: bool = False, **config: Any) -> Example:
    def make() -> nn.Module:
        return getattr(hf, f"{kind}For{task}")(getattr(hf, f"{kind}Config")(num_labels=CLASSES, **config))

    return Example(make, size, dense=dense)


def words(kind: str, task: str = "SequenceClassification", **config: Any) -> Example:
    def make() -> nn.Module:
        return getattr(hf, f"{kind}For{task}")(getattr(hf, f"{kind}Config")(vocab_size=WORDS, num_labels=CLASSES, **config))

    return Example(make, 12, words=True)


TRANSFORMER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


class Fire(nn.Module):
    """SqueezeNet's module: 1x1 and 3x3 convolutions side by side, concatenated."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(16, 4, 12),
        Fire(24, 4, 12),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(24, 6, 16),
        nn.Dropout(0.5),
        nn.Conv2d(32, CLASSES, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    )


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def mcunet(classes: int = CLASSES) -> nn.Module:
    """The network whose description and weights (BatchNorm folded) are in ``MCUNET``, with a new classifier."""
    from safetensors import safe_open

    with safe_open(MCUNET, "pt") as file:
        blocks = json.loads(file.metadata()["arch"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    layers = [_mcunet_block(block, tensors) for block in blocks]
    last = blocks[-1]["convs"][-1]["cout"]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))


def _mcunet_block(block: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    parts: list[nn.Module] = []
    for c in block["convs"]:
        conv = nn.Conv2d(c["cin"], c["cout"], c["k"], c["stride"], c["k"] // 2, groups=c["groups"])
        conv.load_state_dict({kind: tensors[f"{c['key']}.{kind}"] for kind in ("weight", "bias")})
        parts += [conv, nn.ReLU6()] if c["relu6"] else [conv]
    body = nn.Sequential(*parts)
    return Residual(body) if block["residual"] else body


EXAMPLES: dict[str, Example] = {
    "mobilenet_v1": images("MobileNetV1", depth_multiplier=0.25, classifier_dropout_prob=0.2),
    "mobilenet_v2": images("MobileNetV2", depth_multiplier=0.35, classifier_dropout_prob=0.2),
    "resnet": images("ResNet", hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 2, 2], embedding_size=8, layer_type="basic"),
    "vit": images("ViT", image_size=32, size=32, patch_size=8, hidden_dropout_prob=0.1, **TRANSFORMER),
    "segformer": images(
        "Segformer", "SemanticSegmentation", dense=True, num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16, **STAGES
    ),
    "deeplab": images(
        "MobileNetV2", "SemanticSegmentation", size=65, dense=True, depth_multiplier=0.35, classifier_dropout_prob=0.2
    ),
    "squeezenet": Example(squeezenet, 48),
    "mcunet": Example(mcunet, 64),
}

# Beyond what is promised: what else of the library was found to train.
LIBRARY: dict[str, Example] = {
    "efficientnet": images("EfficientNet", width_coefficient=0.5, depth_coefficient=0.3, hidden_dim=640),
    "convnext": images("ConvNext", **STAGES),
    "convnext_v2": images("ConvNextV2", **STAGES),
    "regnet": images("RegNet", groups_width=8, embedding_size=8, **STAGES),
    "mobilevit": images("MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 40], image_size=64),
    "mobilevit_v2": images("MobileViTV2", width_multiplier=0.25, image_size=64),
    "resnet_bottleneck": images("ResNet", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], embedding_size=8),
    "swin": images("Swin", image_size=64, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4),
    "swin_v2": images("Swinv2", image_size=64, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4),
    "poolformer": images("PoolFormer", **STAGES),
    "levit": images(
        "Levit", hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[16, 16, 16], image_size=64
    ),
    "dinov2": images("Dinov2", size=56, image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "deit": images("DeiT", image_size=64, **TRANSFORMER),
    "beit": images("Beit", image_size=64, **TRANSFORMER),
    "pvt": images("Pvt", image_size=64, num_attention_heads=[1, 2, 3, 4], **STAGES),
    "pvt_v2": images("PvtV2", image_size=64, num_attention_heads=[1, 2, 4, 4], **STAGES),
    "bit": images("Bit", hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], embedding_size=32, num_groups=8),
    "cvt": images("Cvt", embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3], cls_token=[False, False, True]),
    "swiftformer": images("SwiftFormer", depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32]),
    "focalnet": images("FocalNet", image_size=64, embed_dim=8, **STAGES),
    "dpt": images(
        "DPT",
        "SemanticSegmentation",
        image_size=64,
        dense=True,
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        **TRANSFORMER | {"num_hidden_layers": 4},
    ),
    "upernet": images("ResNet", depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], embedding_size=8, layer_type="basic"),
    "distilbert": words("DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=16),
    "bert": words("Bert", max_position_embeddings=16, **TRANSFORMER),
    "roberta": words("Roberta", max_position_embeddings=20, **TRANSFORMER),
    "albert": words("Albert", embedding_size=16, max_position_embeddings=16, **TRANSFORMER),
    "electra": words("Electra", embedding_size=16, max_position_embeddings=16, **TRANSFORMER),
    "mobilebert": words("MobileBert", embedding_size=16, intra_bottleneck_size=16, max_position_embeddings=16, **TRANSFORMER),
    "squeezebert": words("SqueezeBert", embedding_size=32, max_position_embeddings=16, **TRANSFORMER),
    "gpt2": words("GPT2", "SequenceClassification", n_positions=16, n_embd=32, n_layer=2, n_head=2, pad_token_id=0),
    "llama": words("Llama", max_position_embeddings=16, pad_token_id=0, **TRANSFORMER),
    "opt": words("OPT", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=16, pad_token_id=0, **TRANSFORMER),
}

# The sizes that people train.
FULL: dict[str, Example] = {
    "mobilenet_v2_1.0": images("MobileNetV2", size=96),
    "mobilenet_v1_1.0": images("MobileNetV1", size=96),
    "resnet18": images("ResNet", size=96, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"),
    "vit_tiny": images(
        "ViT", size=96, image_size=96, hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768
    ),
    "segformer_b0": images("Segformer", "SemanticSegmentation", size=96, dense=True),
    "deeplab_v3": images("MobileNetV2", "SemanticSegmentation", size=97, dense=True),
    "mcunet": Example(mcunet, 128),
}


def build(example: Example, training: bool) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(model, x, y) with random data and labels; the same for the same seed."""
    torch.manual_seed(0)
    model = example.make()
    x = torch.randint(1, WORDS, (BATCH, example.size)) if example.words else torch.randn(BATCH, 3, example.size, example.size)
    if not isinstance(model, nn.Sequential):
        _enliven(model)
    _settle(model, x)
    with torch.no_grad():
        result = model.eval()(x)
    output = result if isinstance(result, torch.Tensor) else result.logits
    y = torch.randint(0, CLASSES, (BATCH, *(output.shape[2:] if example.dense else ())))
    return model.train(training), x, y


def _enliven(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def _settle(model: nn.Module, x: torch.Tensor) -> None:
    """Running statistics of the activations that the model really has."""
    batchnorms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in batchnorms]
    for batchnorm in batchnorms:
        batchnorm.momentum = 0.5
    with torch.no_grad():
        for _ in range(4):
            model.train()(x)
    for batchnorm, momentum in zip(batchnorms, momenta, strict=True):
        batchnorm.momentum = momentum
