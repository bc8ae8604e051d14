"""One ONNX node and its values, as the operators in ``operators`` see them.

A value is either *static* (a NumPy array: constants, shapes, and whatever is computed from these) or a ``torch.Tensor`` that is
traced. Keeping the two apart by type is what gives ``torch.export`` plain static sizes: a shape never becomes a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from tvmtrain.errors import ModelError, UnsupportedOperatorError

# A tensor, a NumPy array (static), a list of these (a sequence), or None (an operand that is left out).
Value: TypeAlias = Any


@dataclass(frozen=True)
class Node:
    """A node of the graph with its attributes decoded.

    ``version`` is the operator set's version, which decides between the old and new forms of an operator. ``training`` says
    whether this pass draws dropout masks and batch statistics here.
    """

    proto: onnx.NodeProto
    place: str
    version: int
    attributes: Mapping[str, Any]
    training: bool = False

    @property
    def operator(self) -> str:
        return operator_name(self.proto)

    @property
    def inputs(self) -> Sequence[str]:
        return self.proto.input

    @property
    def outputs(self) -> Sequence[str]:
        return self.proto.output

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute ``name``, or ``default`` where the node does not have it."""
        return self.attributes.get(name, default)

    def unsupported(self, what: str) -> UnsupportedOperatorError:
        """The error for a form of this operator that is not implemented."""
        return UnsupportedOperatorError(f"ONNX node {self.place}: {what} is not supported")

    def ints(self, value: Value, role: str) -> list[int]:
        """A static operand as integers; raises ModelError where it depends on the values of the input."""
        if not isinstance(value, np.ndarray):
            raise ModelError(
                f"ONNX node {self.place}: its {role} depends on the values of the model's inputs or of its weights, "
                "but shapes are static in a compiled step; export the model with constant shapes"
            )
        return [int(v) for v in value.reshape(-1)]

    def number(self, value: Value, default: float) -> float:
        """A static operand with one element as a Python number; ``default`` where the operand is absent."""
        if value is None:
            return default
        if not isinstance(value, np.ndarray) or value.size != 1:
            raise ModelError(f"ONNX node {self.place}: a constant with one element is needed here, not a computed value")
        return value.item()


def operator_name(proto: onnx.NodeProto) -> str:
    """``Conv`` for ONNX's own operators, ``domain::Name`` for those of others."""
    own = proto.domain in ("", "ai.onnx")
    return proto.op_type if own else f"{proto.domain}::{proto.op_type}"


def traced(*values: Value) -> torch.Tensor:
    """The first operand that is a tensor; an operator is only called when there is one."""
    return next(value for value in values if isinstance(value, torch.Tensor))


def tensor(value: Value, like: torch.Tensor) -> torch.Tensor:
    """A static value as a tensor on the device of ``like``; a tensor as it is."""
    if isinstance(value, torch.Tensor):
        return value
    # Of the ways to make a tensor, this one exports as a constant alone; torch.tensor adds a check, a move and a detach.
    constant = torch.from_numpy(np.array(value))
    return constant if constant.device == like.device else constant.to(like.device)


def is_static(values: Sequence[Value]) -> bool:
    """Whether no value is traced (absent operands do not count)."""
    return all(value is None or isinstance(value, np.ndarray) for value in values)


def fold(node: Node, inputs: Sequence[Value]) -> tuple[Value, ...]:
    """The outputs of a node with static inputs, by ONNX's reference implementation, which has every variant of an operator."""
    evaluator = ReferenceEvaluator(node.proto, opsets={node.proto.domain: node.version})
    feeds = {name: value for name, value in zip(node.inputs, inputs, strict=False) if name}
    results = evaluator.run(None, feeds)
    return tuple(result if isinstance(result, list) else np.asarray(result) for result in results)
