"""Small ONNX files, and how their gradients are compared with PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tvmtrain import onnx_model

OPSET = 21


RANDOM = np.random.default_rng(0)


def floats(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return RANDOM.uniform(low, high, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, dtype=np.float32)


def graph_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray],
    initializers: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    opset: int = OPSET,
) -> onnx.ModelProto:
    def info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        list(nodes),
        "test",
        [info(name, array) for name, array in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def load(model: onnx.ModelProto, folder: Path) -> nn.Module:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return onnx_model.load(path)


def images() -> torch.Tensor:
    return torch.tensor(floats(4, 3, 32, 32))


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of a fixed batch, and the gradient of the cross entropy for every parameter."""
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([1, 3, 9, 0])
    logits = model(x)
    named = dict(model.named_parameters())
    return logits, dict(zip(named, torch.autograd.grad(F.cross_entropy(logits, y), named.values()), strict=True))


def assert_same_gradients(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name
