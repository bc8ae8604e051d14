"""An .onnx file as an ``nn.Module`` whose forward is plain PyTorch calls.

Going through PyTorch, rather than from ONNX straight to Relax, gives one path for gradients, for BatchNorm in training mode and
for parameter names, and PyTorch stays the oracle that a compiled step is compared with. (onnx2torch does the same but imports
torchvision, which cannot be installed everywhere that PyTorch's CPU build can.)

What is trained
    Every initializer of floating-point numbers becomes an ``nn.Parameter`` under its ONNX name ("layer1.0.weight" is the one
    that ``get_parameter`` finds by this name). Characters other than letters, digits, "_" and "." become "_", and "_" is
    appended until a name is free; ``names`` maps ONNX's names to these. Not trained: integers, scalars (shape []), operands
    that say a shape or a bound (Clip, Pow with one element, Resize, Pad...), Constant nodes, and BatchNormalization's mean
    and variance, which become buffers. A learnable scalar cannot be told from a constant in ONNX, and stays fixed.

Training mode
    ``train()`` and ``eval()`` matter only where the file asks for training: a BatchNormalization with ``training_mode=1``
    (before version 14: with more than one output) normalizes by the batch and updates its buffers as PyTorch does (the variance
    unbiased, where ONNX's text has it biased); a Dropout whose ``training_mode`` input is true drops. All others behave as in
    inference: running statistics, no dropping. Before version 12 Dropout could not say; there it drops in a file whose
    BatchNormalization is in training form.

Exporting
    ``torch.onnx.export(model.eval(), args, path, optimize=False)`` keeps every parameter and its name; without the option it
    folds BatchNorm into the convolutions, transposes weights under new names ("val_12") and turns constants into
    initializers, which would be trained. It writes BatchNorm in inference form whatever the model's mode is, and the dropout
    of a model in training mode as random numbers, which are refused. A file that trains with batch statistics and dropout
    comes from PyTorch's older exporter: ``dynamo=False, training=torch.onnx.TrainingMode.TRAINING,
    do_constant_folding=False`` (in evaluation mode that one merges parameters that happen to be equal). A buffer of the
    PyTorch model that computes with the data (a table of frequencies) looks like a weight in ONNX: freeze it with
    ``requires_grad_(False)``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, inliner, numpy_helper
from torch import nn

from tvmtrain.errors import ModelError, UnsupportedOperatorError
from tvmtrain.onnx_model.node import Node, Value, fold, is_static, operator_name, tensor
from tvmtrain.onnx_model.operators import FOLDED, OPERATORS, SELF_FOLDING, STRUCTURE

OLDEST_OPSET = 7

# Operators that read the values of only their first operands; of the others they take the shape or type.
VALUES_READ = {"Shape": 0, "Size": 0, "CastLike": 1}


class OnnxModule(nn.Module):
    """The graph of an ONNX file; made by :func:`load`.

    ``forward`` takes the graph's inputs in their order and returns its output (a tuple of several). Shapes are those of the
    tensors it is called with: a size that the file fixes elsewhere (a Reshape to batch 1) must agree with them.
    """

    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self._graph = graph
        self._inference = [replace(node, training=False) for node in graph.nodes]
        self.names: dict[str, str] = {}
        for name, value in graph.trainable.items():
            self.names[name] = _attach(self, name, nn.Parameter(value))
        for name, value in graph.statistics.items():
            self.names[name] = _attach(self, name, value)

    def forward(self, *inputs: torch.Tensor) -> Any:
        if len(inputs) != len(self._graph.inputs):
            wanted = ", ".join(self._graph.inputs)
            raise ModelError(f"the ONNX model takes {len(self._graph.inputs)} inputs ({wanted}), got {len(inputs)}")
        values: dict[str, Value] = {"": None, **self._graph.constants}
        values.update(zip(self._graph.inputs, inputs, strict=True))
        # Looked up now, not kept from the start: torch.export and torch.func put other tensors in the parameters' places.
        values.update({name: reduce(getattr, path.split("."), self) for name, path in self.names.items()})
        for node in self._graph.nodes if self.training else self._inference:
            results = _evaluate(node, [values[name] for name in node.inputs])
            values.update(zip(node.outputs, results, strict=False))
        outputs = tuple(tensor(values[name], inputs[0]) for name in self._graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs


def load(path: str | Path) -> OnnxModule:
    """Read an ONNX file into a trainable module, in training mode like any new module; weights in external files are read too.

    Raises ModelError for a file that is missing, damaged or refused by ONNX's checker, and UnsupportedOperatorError, a kind of
    it, with all nodes whose operator is not known.
    """
    return OnnxModule(_graph(_read(Path(path))))


@dataclass(frozen=True)
class _Graph:
    """A checked graph: what is trained, what is state, what is constant, and the nodes that remain, in their order."""

    nodes: Sequence[Node]
    inputs: Sequence[str]
    outputs: Sequence[str]
    trainable: Mapping[str, torch.Tensor]
    statistics: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]


# --- reading the file ---------------------------------------------------------------------------------------


def _read(path: Path) -> onnx.ModelProto:
    """The checked model, its local functions written out."""
    if not path.is_file():
        raise ModelError(f"{path}: there is no such ONNX file")
    try:
        model = onnx.load(path)
        model = inliner.inline_local_functions(model) if model.functions else model
        _drop_identities(model.graph)
        # Before the checker, which stops at the first operator that it does not know.
        _refuse_unknown_operators(path, model)
        onnx.checker.check_model(model)
        _refuse_old_or_sparse(path, model)
    except ModelError:
        raise
    except Exception as error:  # protobuf, ONNX and the file system each have their own kinds
        raise ModelError(f"{path}: not a valid ONNX model: {error}") from error
    return model


def _refuse_unknown_operators(path: Path, model: onnx.ModelProto) -> None:
    known = OPERATORS.keys() | FOLDED
    unknown = [node for node in model.graph.node if operator_name(node) not in known]
    if unknown:
        lines = "".join(f"\n  {_place(node)}" for node in unknown)
        raise UnsupportedOperatorError(f"{path}: {len(unknown)} nodes have operators that cannot be imported:{lines}")


def _refuse_old_or_sparse(path: Path, model: onnx.ModelProto) -> None:
    version = _versions(model)[""]
    if version < OLDEST_OPSET:
        raise ModelError(
            f"{path}: operator set {version}, but {OLDEST_OPSET} is the oldest that can be read; "
            "convert it with onnx.version_converter"
        )
    if model.graph.sparse_initializer:
        raise ModelError(f"{path}: sparse initializers cannot be trained; export dense ones")


def _drop_identities(graph: onnx.GraphProto) -> None:
    """Names that stand for the same value become one, so that a shared weight, or a statistic, is found behind an Identity."""
    source: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [source.get(name, name) for name in node.input]
        if operator_name(node) == "Identity":
            source[node.output[0]] = node.input[0]
    for value in graph.output:
        value.name = source.get(value.name, value.name)
    kept = [node for node in graph.node if operator_name(node) != "Identity"]
    del graph.node[:]
    graph.node.extend(kept)


def _versions(model: onnx.ModelProto) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}


def _place(proto: onnx.NodeProto) -> str:
    """How messages name a node: unnamed ones by their first output."""
    name = proto.name or next((output for output in proto.output if output), "without a name")
    return f"{name!r} ({operator_name(proto)})"


# --- sorting initializers and nodes -------------------------------------------------------------------------


def _graph(model: onnx.ModelProto) -> _Graph:
    version = _versions(model)[""]
    arrays = {item.name: _array(item) for item in model.graph.initializer}
    nodes = [_node(proto, version) for proto in model.graph.node]
    nodes, constants = _fold_constants(nodes, _constants(nodes, arrays))
    statistics = {name: constants.pop(name) for name in _statistics(nodes) if name in constants}
    used = {name for node in nodes for name in node.inputs} | {value.name for value in model.graph.output}
    trainable = {
        name: array for name, array in arrays.items() if name in used and name not in constants.keys() | statistics.keys()
    }
    side_results = {name for node in nodes if node.operator == "BatchNormalization" for name in node.outputs[1:]}
    return _Graph(
        nodes=_with_training(nodes, constants),
        inputs=[value.name for value in model.graph.input if value.name not in arrays],
        # Updated statistics that the file returns are the buffers here.
        outputs=[value.name for value in model.graph.output if value.name not in side_results],
        trainable={name: torch.tensor(array) for name, array in trainable.items()},
        statistics={name: torch.tensor(array) for name, array in statistics.items()},
        constants={name: value for name, value in constants.items() if name in used},
    )


def _array(item: onnx.TensorProto) -> np.ndarray:
    array = numpy_helper.to_array(item)
    if array.dtype.kind not in "fiub":
        kind = onnx.TensorProto.DataType.Name(item.data_type)
        raise ModelError(f"ONNX initializer {item.name!r}: type {kind} cannot be trained; export the model in FLOAT")
    return array


def _node(proto: onnx.NodeProto, version: int) -> Node:
    attributes = {attribute.name: _attribute(attribute) for attribute in proto.attribute}
    return Node(proto=proto, place=_place(proto), version=version, attributes=attributes)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _constants(nodes: Sequence[Node], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The initializers that are not trained."""
    structure = _structure(nodes)
    exponents = {node.inputs[1] for node in nodes if node.operator == "Pow"}
    statistics = _statistics(nodes)
    return {
        name: array
        for name, array in arrays.items()
        if array.dtype.kind != "f"
        or array.ndim == 0
        or name in structure
        or name in statistics
        or (name in exponents and array.size == 1)
    }


def _statistics(nodes: Iterable[Node]) -> dict[str, None]:
    """Means and variances in the order of the file."""
    return {name: None for node in nodes if node.operator == "BatchNormalization" for name in node.inputs[3:5]}


def _structure(nodes: Sequence[Node]) -> set[str]:
    """All values that an operand which must be static is computed from."""
    structure: set[str] = set()
    for node in reversed(nodes):
        if structure.intersection(node.outputs):
            structure.update(node.inputs[: VALUES_READ.get(node.operator)])
        structure.update(node.inputs[i] for i in STRUCTURE.get(node.operator, ()) if i < len(node.inputs))
    return structure


def _fold_constants(nodes: Sequence[Node], constants: dict[str, Any]) -> tuple[list[Node], dict[str, Any]]:
    """Evaluate once what needs no input of the model."""
    known: dict[str, Any] = {"": None, **constants}
    kept = []
    for node in nodes:
        if all(name in known for name in node.inputs):
            known.update(zip(node.outputs, _evaluate(node, [known[name] for name in node.inputs]), strict=False))
        else:
            kept.append(node)
    return kept, known


def _with_training(nodes: Sequence[Node], constants: Mapping[str, Any]) -> list[Node]:
    """The nodes with their ``training`` decided, for a module in training mode."""
    trained_file = any(_by_batch(node) for node in nodes)
    return [replace(node, training=_by_batch(node) or _drops(node, constants, trained_file)) for node in nodes]


def _by_batch(node: Node) -> bool:
    if node.operator != "BatchNormalization":
        return False
    return bool(node.get("training_mode", 0)) if node.version >= 14 else len([name for name in node.outputs if name]) > 1


def _drops(node: Node, constants: Mapping[str, Any], trained_file: bool) -> bool:
    if node.operator != "Dropout" or node.version < 12:
        return node.operator == "Dropout" and trained_file
    mode = node.inputs[2] if len(node.inputs) > 2 else ""
    if mode and mode not in constants:
        raise node.unsupported("a training_mode that is not a constant")
    return bool(node.number(constants.get(mode), 0))


# --- evaluating ---------------------------------------------------------------------------------------------


def _evaluate(node: Node, inputs: Sequence[Value]) -> Sequence[Value]:
    """The outputs of one node; static from static, traced otherwise."""
    try:
        if is_static(inputs) and node.operator not in SELF_FOLDING:
            return fold(node, inputs)
        if node.operator in FOLDED:
            raise ModelError(f"ONNX node {node.place}: its result's shape depends on values, but shapes are static here")
        result = OPERATORS[node.operator](node, *inputs)
    except ModelError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(getattr(value, "shape", ()))) for value in inputs)
        raise ModelError(f"ONNX node {node.place} with operands of shapes {shapes}: {error}") from error
    return result if isinstance(result, tuple) else (result,)


def _attach(root: nn.Module, name: str, value: torch.Tensor) -> str:
    """Register a parameter or buffer under its dotted name, made valid and unique; returns the name it got."""
    *parents, leaf = (re.sub(r"\W", "_", part, flags=re.ASCII) or "_" for part in name.split("."))
    holder, path = root, []
    for part in parents:
        while not isinstance(getattr(holder, part, None), nn.Module) and hasattr(holder, part):
            part += "_"
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
        path.append(part)
    while hasattr(holder, leaf):
        leaf += "_"
    if isinstance(value, nn.Parameter):
        holder.register_parameter(leaf, value)
    else:
        holder.register_buffer(leaf, value)
    return ".".join([*path, leaf])
