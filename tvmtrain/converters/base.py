"""What every converter uses: places in the model, arguments, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.relax import op as R
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from tvmtrain.errors import UnsupportedOperatorError


@dataclass(frozen=True)
class Place:
    """Where in the model a Relax binding comes from."""

    operator: str
    module: str

    def __str__(self) -> str:
        return f"{self.operator} in {self.module or 'the model itself'}"


def place_of(node: fx.Node) -> Place:
    """The module, with its kind, that a node of the exported graph comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = (stack[-1][0], stack[-1][1]) if stack else ("", "")
    path = path.removeprefix("L['self'].")
    module = "" if path == "model" else path.removeprefix("model.")
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    where = f"{module} ({kind.rsplit('.', 1)[-1]})" if module else ""
    return Place(node.target.__name__ if callable(node.target) else str(node.target), where)


def unsupported(verb: str, places: Sequence[Place]) -> UnsupportedOperatorError:
    """One error for all operators that cannot be ``verb``, each with its places in the model."""
    by_operator: dict[str, list[str]] = {}
    for place in places:
        where = by_operator.setdefault(place.operator, [])
        if place.module not in where:
            where.append(place.module)
    lines = [f"  {name}: {_listed([w or 'the model itself' for w in where])}" for name, where in by_operator.items()]
    advice = {
        "imported": "Replace them in the model.",
        "differentiated": "Replace them in the model, or freeze what lies before them (requires_grad=False).",
    }
    return UnsupportedOperatorError(
        f"{len(by_operator)} operator(s) of this model cannot be {verb}:\n" + "\n".join(lines) + f"\n{advice[verb]}"
    )


def _listed(places: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(places) - shown} more" if len(places) > shown else ""
    return ", ".join(places[:shown]) + more


class Converter(ExportedProgramImporter):
    """TVM's importer with PyTorch's own idea of arguments. ``convert_gelu__default`` translates the operator ``gelu.default``."""

    random: relax.Expr | None  # the random state, in a training step
    inference: bool  # BatchNorm with running statistics and no Dropout, whatever mode the graph was exported in
    draws: int  # how many streams of random numbers the graph has used
    values: dict[fx.Node, Any]  # nodes that depend on constants alone, evaluated by PyTorch

    def emit(self, expr: relax.Expr) -> relax.Var:
        return self.block_builder.emit(expr)

    def _expr(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in self.env:
                return self.env[value]
            return self._expr(self.values[value])
        if isinstance(value, torch.Tensor):
            return relax.const(value.cpu().contiguous().numpy(), self._convert_data_type(value.dtype))
        if isinstance(value, (tuple, list)):
            return [self._expr(item) for item in value]
        return value

    def _root(self, squares: relax.Expr) -> relax.Expr:
        """The root of a sum of squares, with PyTorch's gradient of norms and standard deviations at zero: zero."""
        zero, one = relax.const(0.0, squares.ty.dtype), relax.const(1.0, squares.ty.dtype)
        nothing = self.emit(R.equal(squares, zero))
        return self.emit(R.where(nothing, zero, self.emit(R.sqrt(self.emit(R.where(nothing, one, squares))))))

    def _args(self, node: fx.Node) -> list[Any]:
        """All arguments in the order of the operator's schema, defaults filled in, tensors as Relax expressions."""
        schema = node.target._schema
        given = list(node.args)
        values = [
            given[i] if i < len(given) else node.kwargs.get(arg.name, default(arg)) for i, arg in enumerate(schema.arguments)
        ]
        return [self._expr(value) if has_node(value) else value for value in values]

    def _slice_of(self, x: relax.Expr, dim: int, begin: int, end: int) -> relax.Expr:
        return self.emit(R.strided_slice(x, [dim % len(shape(x))], [begin], [end]))

    def _tensor(self, value: Any, dtype: str) -> relax.Expr:
        """A number or an expression as an expression of ``dtype``."""
        if not isinstance(value, relax.Expr):
            return relax.const(value, dtype)
        return value if str(value.ty.dtype) == dtype else self.emit(R.astype(value, dtype))


def default(argument: Any) -> Any:
    """The default of an argument in an operator's schema."""
    return argument.default_value if argument.has_default_value() else None


def has_node(value: Any) -> bool:
    """Whether an argument holds a result of another node."""
    return isinstance(value, fx.Node) or (isinstance(value, (list, tuple)) and any(has_node(v) for v in value))


def shape(expr: relax.Expr) -> list[int]:
    return [int(d) for d in expr.ty.shape]


def shape_of(node: fx.Node) -> list[int]:
    return [int(d) for d in node.meta["val"].shape]


def per_channel(dims: Sequence[int]) -> list[int]:
    """The shape of a per-channel vector beside an activation of shape ``dims``."""
    return [1, int(dims[1])] + [1] * (len(dims) - 2)


def one(value: Any) -> int:
    """PyTorch's [n] or n."""
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


def pair(value: Any) -> tuple[int, int]:
    """PyTorch's [h, w], [n] or n."""
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def four(padding: Any) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of PyTorch's symmetric padding."""
    h, w = pair(padding)
    return (h, w, h, w)


def string_padding(padding: str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
    """PyTorch's "valid" and "same"; where "same" is odd, the extra pixel is at the end."""
    if padding == "valid":
        return (0, 0, 0, 0)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
