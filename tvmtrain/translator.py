"""An exported PyTorch graph as one Relax function: the walk over its nodes.

What depends on constants alone is evaluated by PyTorch; what has a converter of ours (``converters``) is translated by it; the
rest by TVM's own importer. Every result is checked against the shape and dtype that PyTorch has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from tvm import relax
from tvm.relax import op as R

from tvmtrain.converters import Converters
from tvmtrain.converters.base import Place, place_of, unsupported
from tvmtrain.errors import UnsupportedOperatorError

# Operators that reach the translator whole; every other composite one arrives as PyTorch's own decomposition.
KEPT = (
    "adaptive_avg_pool1d.default",
    "adaptive_avg_pool2d.default",
    "adaptive_max_pool2d.default",
    "avg_pool1d.default",
    "avg_pool2d.default",
    "celu.default",
    "conv1d.default",
    "conv1d.padding",
    "conv2d.default",
    "conv2d.padding",
    "conv_transpose1d.default",
    "conv_transpose2d.input",
    "cross_entropy_loss.default",
    "dropout.default",
    "elu.default",
    "gelu.default",
    "group_norm.default",
    "hardsigmoid.default",
    "hardswish.default",
    "hardtanh.default",
    "instance_norm.default",
    "layer_norm.default",
    "leaky_relu.default",
    "linear.default",
    "log_sigmoid.default",
    "matmul.default",
    "max_pool2d.default",
    "mish.default",
    "native_dropout.default",
    "pixel_shuffle.default",
    "roll.default",
    "scaled_dot_product_attention.default",
    "selu.default",
    "silu.default",
    "softplus.default",
    "std.correction",
    "upsample_bicubic2d.vec",
    "upsample_bilinear2d.vec",
    "upsample_nearest2d.vec",
    "_upsample_bilinear2d_aa.vec",
    "var.correction",
    "var_mean.correction",
)


@torch.library.custom_op("tvmtrain::stop_gradient", mutates_args=())
def stop_gradient(x: torch.Tensor) -> torch.Tensor:
    """x, without a gradient: PyTorch's decompositions would turn ``detach`` into an alias and forget ``torch.no_grad``."""
    return x.clone()


stop_gradient.register_fake(torch.empty_like)


def mark_stops(program: ExportedProgram) -> ExportedProgram:
    """``program`` with ``stop_gradient`` for each ``detach``, and on all that leaves a ``torch.no_grad`` region."""
    stop = torch.ops.tvmtrain.stop_gradient.default
    for module in program.graph_module.modules():
        for node in list(module.graph.nodes) if isinstance(module, fx.GraphModule) else []:
            if node.target in (torch.ops.aten.detach.default, torch.ops.aten.detach_.default):
                node.target = stop
            elif node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and not node.args[0]:
                for item in list(node.users):
                    with module.graph.inserting_after(item):
                        marked = module.graph.call_function(stop, (item,))
                    marked.meta = dict(item.meta)
                    item.replace_all_uses_with(marked, delete_user_cb=lambda user, marked=marked: user is not marked)
    return program


# What only checks a tensor at run time: shapes and dtypes are known here.
CHECKS = frozenset({"_assert_tensor_metadata.default"})
# What must not be evaluated once and for all.
RANDOM = frozenset({"rand", "rand_like", "bernoulli", "native_dropout", "randn", "randn_like", "randint", "randperm"})
# BatchNorms that look at the batch.
BATCH_STATISTICS = frozenset({"_native_batch_norm_legit", "_native_batch_norm_legit_functional"})


def decompositions() -> dict[Any, Callable]:
    """PyTorch's decompositions into core operators, without the ones this file translates whole."""
    table = torch.export.default_decompositions()
    for name in KEPT:
        packet, overload = name.split(".")
        op = getattr(getattr(torch.ops.aten, packet), overload, None)
        if op is not None:
            table.pop(op, None)
    return table


@dataclass(frozen=True)
class Translation:
    """Relax results of a graph and, per binding, where it comes from."""

    outputs: tuple[relax.Expr, ...]
    places: Mapping[relax.Var, Place]
    draws: int  # how many streams of random numbers the graph uses


class Translator(Converters):
    """Translates one exported graph inside a dataflow block that is already open in ``builder``."""

    def __init__(self, builder: relax.BlockBuilder, random: relax.Expr | None = None, inference: bool = False) -> None:
        """``inference``: BatchNorm with running statistics and no Dropout, whatever mode the graph was exported in."""
        super().__init__()
        self.inference = inference
        self.block_builder = builder
        self.random = random
        self.draws = 0
        self.refused: list[str] = []
        self.values: dict[fx.Node, Any] = {}  # nodes that depend on constants alone, evaluated by PyTorch
        self.convert_map.update(self._own_converters())

    # ---- the walk over the graph ----

    def translate(self, program: ExportedProgram, inputs: Mapping[str, relax.Expr | torch.Tensor]) -> Translation:
        """``inputs`` maps each placeholder's name to a Relax variable, or to a tensor that is a constant of the graph."""
        self._refuse_unknown(program, inputs)
        places: dict[relax.Var, Place] = {}
        outputs: tuple[Any, ...] = ()
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self._bind(node, inputs.get(node.name))
            elif node.op == "get_attr":
                self._bind(node, getattr(program.graph_module, node.target))
            elif node.op == "call_function":
                self._call(node, places)
            elif node.op == "output":
                outputs = tuple(self._expr(value) for value in node.args[0])
        if self.refused:
            raise UnsupportedOperatorError("\n".join(dict.fromkeys(self.refused)))
        return Translation(outputs, places, self.draws)

    def _refuse_unknown(self, program: ExportedProgram, inputs: Mapping[str, Any]) -> None:
        constant: set[fx.Node] = set()
        for node in program.graph.nodes:
            if self._is_constant(node, inputs, constant):
                constant.add(node)
        missing = [
            place_of(node)
            for node in program.graph.nodes
            if node.op == "call_function" and node.target.__name__ not in self.convert_map and node not in constant
        ]
        if missing:
            raise unsupported("imported", missing)

    @staticmethod
    def _is_constant(node: fx.Node, inputs: Mapping[str, Any], constant: set[fx.Node]) -> bool:
        """Whether PyTorch will have evaluated the node: nothing it depends on is known only at run time."""
        if node.op == "placeholder":
            return isinstance(inputs.get(node.name), torch.Tensor)
        if node.op != "call_function":
            return node.op == "get_attr"
        return node.target.__name__.split(".")[0] not in RANDOM and all(used in constant for used in node.all_input_nodes)

    def _bind(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.values[node] = value.detach()
        elif value is not None:
            self.env[node] = value

    def _call(self, node: fx.Node, places: dict[relax.Var, Place]) -> None:
        if node.target.__name__ in CHECKS:
            return
        if self._folds(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
            self.values[node] = node.target(*args, **kwargs)
            return
        for used in node.all_input_nodes:
            if used not in self.env:
                self.env[used] = self._expr(used)
        try:
            self.env[node] = self._fit(node, self.convert_map[node.target.__name__](node))
        except Exception as error:  # TVM's importer raises whatever it stumbles over
            told = isinstance(error, UnsupportedOperatorError)
            self.refused.append(str(error) if told else f"{place_of(node)} could not be translated: {error}")
            if any(not _is_static(value) for value in pytree.tree_leaves(node.meta.get("val"))):
                raise UnsupportedOperatorError("\n".join(dict.fromkeys(self.refused))) from error
            # Zeros of its shape in its place: the rest of the model may hold more to refuse.
            self.env[node] = pytree.tree_map(self._zeros_of, node.meta.get("val"))
        self._record(self.env[node], place_of(node), places)

    def _zeros_of(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return self.emit(R.zeros([int(d) for d in value.shape], self._convert_data_type(value.dtype)))

    def _record(self, result: Any, place: Place, places: dict[relax.Var, Place]) -> None:
        """Note ``place`` for every binding that led to ``result`` and has no place yet."""
        pending = [result]
        while pending:
            expr = pending.pop()
            if isinstance(expr, (list, tuple)):
                pending.extend(expr)
            elif isinstance(expr, relax.Var) and expr not in places:
                value = self.block_builder.lookup_binding(expr)
                if value is not None:
                    places[expr] = place
                    pending.append(value)
            elif isinstance(expr, relax.Call):
                pending.extend(expr.args)
            elif isinstance(expr, relax.Tuple):
                pending.extend(expr.fields)
            elif isinstance(expr, relax.TupleGetItem):
                pending.append(expr.tuple_value)

    def _folds(self, node: fx.Node) -> bool:
        if node.target.__name__.split(".")[0] in RANDOM:
            return False
        return all(used in self.values for used in node.all_input_nodes)

    def _fit(self, node: fx.Node, result: Any) -> Any:
        """The result with the shape and dtype that PyTorch has; the importer's slips in type promotion end here."""
        meta = node.meta.get("val")
        if not isinstance(meta, torch.Tensor) or not isinstance(result, relax.Expr):
            return result
        if not isinstance(result, relax.Var):
            result = self.block_builder.emit(result)
        want = tuple(int(d) for d in meta.shape)
        got = tuple(int(d) for d in result.ty.shape)
        if want != got:
            raise UnsupportedOperatorError(f"{place_of(node)} was translated to shape {got}; PyTorch has {want}")
        dtype = self._convert_data_type(meta.dtype)
        return result if str(result.ty.dtype) == dtype else self.emit(R.astype(result, dtype))

    # ---- the table ----

    def _own_converters(self) -> dict[str, Callable[[fx.Node], Any]]:
        named = {_target(name): getattr(self, name) for name in dir(self) if name.startswith("convert_")}
        return {**self.arithmetic_converters(), **named}


def _is_static(value: Any) -> bool:
    """Whether its shape is numbers alone; that of ``x[mask]`` depends on the data."""
    return not isinstance(value, torch.Tensor) or all(isinstance(size, int) for size in value.shape)


def _target(method: str) -> str:
    """``convert_gelu__default`` translates ``gelu.default``; a name without an overload is Python's own function."""
    name, _, overload = method.removeprefix("convert_").partition("__")
    return f"{name}.{overload}" if overload else name
