"""A PyTorch model, an exported program or an ONNX file as Relax functions: forward with loss, predict, loss."""

from __future__ import annotations

import contextlib
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from tvm import relax

from tvmtrain import signature
from tvmtrain.artifact import LossSpec
from tvmtrain.converters.base import Place
from tvmtrain.errors import ModelError, TvmtrainError
from tvmtrain.spec import Layer
from tvmtrain.translator import BATCH_STATISTICS, RANDOM, Translator, decompositions, mark_stops

LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
IGNORE_INDEX = -100  # PyTorch's default for cross_entropy

Loss = str | Callable[[Any, Any], torch.Tensor]
Tensors = torch.Tensor | Sequence[torch.Tensor]
RANDOM_STATE = ("random", "random:state")
# Operators that drop values where an argument says so: its place and its name.
DROPPING = {"dropout": (2, "train"), "native_dropout": (2, "train"), "scaled_dot_product_attention": (4, "dropout_p")}


@dataclass(frozen=True)
class Imported:
    """A model in Relax, and what its tensors are.

    module: the functions ``forward`` (inputs, targets, state -> loss, outputs, new state), ``predict`` and ``loss``.
    state: initial values of parameters and buffers, by PyTorch name; a tied parameter has one value and ``aliases``.
    parameters: names of all parameters. trainable: names of those whose ``requires_grad`` is set.
    places: where in the model each binding of ``forward`` comes from.
    """

    module: tvm.IRModule
    state: Mapping[str, np.ndarray]
    parameters: tuple[str, ...]
    trainable: tuple[str, ...]
    aliases: Mapping[str, str]
    layers: tuple[Layer, ...]
    loss: LossSpec
    batch: int
    places: Mapping[relax.Var, Place]


def import_model(model: Any, x: Any, y: Any, loss: Loss) -> Imported:
    """``model``: nn.Module, ExportedProgram, or a path to .pt2 or .onnx; ``x``, ``y``: example tensors or tuples of them."""
    module = as_module(model)
    xs, ys = _tensors(x, "x"), _tensors(y, "y")
    _check_parameters(module)
    programs = _export_all(module, xs, ys, loss)
    return _Import(module, programs, xs, ys, loss).result()


def as_module(model: Any) -> nn.Module:
    """Any accepted form of a model as an nn.Module; what only a file knows (its training mode) is kept."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, ExportedProgram):
        return model.module()
    path = Path(model) if isinstance(model, (str, Path)) else None
    if path is None:
        raise ModelError(f"model: got {type(model).__name__}, wanted an nn.Module, an ExportedProgram, or a .pt2 or .onnx path")
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if path.suffix == ".onnx":
        from tvmtrain import onnx_model

        return onnx_model.load(path)
    if path.suffix != ".pt2":
        raise ModelError(f"{path}: got the ending {path.suffix!r}, wanted .pt2 (torch.export.save) or .onnx")
    try:
        return torch.export.load(path).module()
    except Exception as error:
        raise ModelError(f"{path}: not a readable exported program: {error}") from error


def _tensors(values: Any, what: str) -> tuple[torch.Tensor, ...]:
    items = values if isinstance(values, (tuple, list)) else (values,)
    tensors = tuple(torch.as_tensor(item) for item in items)
    if not tensors or any(t.dim() == 0 for t in tensors):
        raise ModelError(f"{what}: wanted example tensors whose first axis is the batch")
    return tensors


def _check_parameters(module: nn.Module) -> None:
    named = list(module.named_parameters())
    for name, parameter in named:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"parameter {name}: got {parameter.dtype}, wanted torch.float32 (or float64); call model.float() before tracing"
            )
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter {name} is lazy: run the model once before tracing")
    if not named:
        raise ModelError("this model has no parameters to train")


# ---- exporting ----


class _WithLoss(nn.Module):
    """(inputs, targets) -> (loss, outputs); ``seen`` collects the structure that a custom loss sees (tracing undoes plain attributes)."""

    def __init__(self, model: nn.Module, loss: Loss, inputs: int, seen: list[pytree.TreeSpec]) -> None:
        super().__init__()
        self.model = model
        self.loss, self.inputs, self.seen = loss, inputs, seen

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(*args[: self.inputs])
        self.seen.append(pytree.tree_structure(result))
        outputs = outputs_of(result, self.loss)
        if not isinstance(self.loss, str):
            # Tensors of its own, which it may change in place.
            result = pytree.tree_map_only(torch.Tensor, torch.clone, result)
        return (apply_loss(self.loss, result, args[self.inputs :]), *outputs)


class _Outputs(nn.Module):
    """inputs -> outputs; ``seen`` as in ``_WithLoss``."""

    def __init__(self, model: nn.Module, loss: Loss, seen: list[pytree.TreeSpec]) -> None:
        super().__init__()
        self.model = model
        self.loss, self.seen = loss, seen

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(*args)
        self.seen.append(pytree.tree_structure(result))
        return outputs_of(result, self.loss)


class _LossAlone(nn.Module):
    """(outputs, targets) -> loss."""

    def __init__(self, loss: Loss, outputs: int, structure: pytree.TreeSpec) -> None:
        super().__init__()
        self.loss, self.outputs, self.structure = loss, outputs, structure

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor]:
        leaves, targets = args[: self.outputs], args[self.outputs :]
        result = leaves[0] if isinstance(self.loss, str) else pytree.tree_unflatten(list(leaves), self.structure)
        return (apply_loss(self.loss, result, targets),)


def apply_loss(loss: Loss, result: Any, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss of a model's result: a built-in one of its primary tensor, a callable's of the result as it is."""
    target = targets[0] if len(targets) == 1 else tuple(targets)
    if isinstance(loss, str):
        return LOSSES[loss](primary(result), target)
    return loss(result, target)


def primary(result: Any) -> torch.Tensor:
    """The tensor a built-in loss is about: the output itself, its ``logits``, or the first of a tuple."""
    if isinstance(result, torch.Tensor):
        return result
    logits = getattr(result, "logits", None)
    if logits is None and isinstance(result, Mapping):
        logits = result.get("logits", next(iter(result.values())))
    if logits is None and isinstance(result, (tuple, list)):
        logits = result[0]
    if not isinstance(logits, torch.Tensor):
        raise ModelError(f"the model returns {type(result).__name__}, not a tensor: pass loss=callable(output, target)")
    return logits


def outputs_of(result: Any, loss: Loss) -> tuple[torch.Tensor, ...]:
    """The tensors of a model's result that the compiled step returns."""
    if isinstance(loss, str):
        return (primary(result),)
    return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))


@dataclass(frozen=True)
class _Programs:
    """``predict``: None where it is ``forward`` without the loss."""

    forward: ExportedProgram
    predict: ExportedProgram | None
    loss: ExportedProgram

    @property
    def outputs(self) -> list[torch.Tensor]:
        return _predicted(self.forward, self.predict)


def _export_all(module: nn.Module, xs: tuple, ys: tuple, loss: Loss) -> _Programs:
    if isinstance(loss, str) and loss not in LOSSES:
        raise ModelError(f"loss: got {loss!r}, wanted one of {', '.join(LOSSES)}, or a callable (output, target) -> scalar")
    seen: list[pytree.TreeSpec] = []
    with _exportable_batchnorm(module):
        forward = _export(_WithLoss(module, loss, len(xs), seen), (*xs, *ys), "the model with its loss")
    value, *outputs = _returned(forward)
    if value.dim() != 0:
        raise ModelError(f"loss: got a tensor of shape {tuple(value.shape)}, wanted a scalar; reduce it with .mean() or .sum()")
    predict = None if _evaluates(module, forward) else _predicting(module, xs, loss, seen)
    if predict is not None and len(_returned(predict)) != len(outputs):
        raise ModelError(
            f"the model returns {len(outputs)} tensors in training mode and {len(_returned(predict))} in evaluation "
            "mode; wrap it so that both return the same, or give a built-in loss, which uses the first"
        )
    examples = tuple(torch.zeros(tuple(r.shape), dtype=r.dtype) for r in _predicted(forward, predict))
    alone = _export(_LossAlone(loss, len(examples), seen[-1]), (*examples, *ys), "the loss")
    return _Programs(forward, predict, alone)


def _predicting(module: nn.Module, xs: tuple, loss: Loss, seen: list[pytree.TreeSpec]) -> ExportedProgram:
    with evaluating(module):
        return _export(_Outputs(module, loss, seen), xs, "the model in eval mode")


def _evaluates(module: nn.Module, forward: ExportedProgram) -> bool:
    """Whether a training step computes what evaluation does: nothing is in training mode, changes a buffer or draws numbers."""
    if _is_exported(module) or any(child.training for child in module.modules()):
        return False
    changes = any(spec.kind == OutputKind.BUFFER_MUTATION for spec in forward.graph_signature.output_specs)
    return not changes and not any(_of_training(node) for node in forward.graph.nodes if node.op == "call_function")


def _of_training(node: torch.fx.Node) -> bool:
    """Whether an operator is another one in evaluation, or needs a training step's random numbers."""
    name = node.target.__name__.split(".")[0]
    if name in DROPPING:
        place, keyword = DROPPING[name]
        return bool(node.args[place] if len(node.args) > place else node.kwargs.get(keyword))
    return name.endswith("dropout") or name in RANDOM | BATCH_STATISTICS


def _returned(program: ExportedProgram) -> list[torch.Tensor]:
    """What the program returns to its caller, without new values of buffers; shapes and dtypes only."""
    specs = program.graph_signature.output_specs
    nodes = zip(program.graph.output_node().args[0], specs, strict=True)
    return [node.meta["val"] for node, spec in nodes if spec.kind == OutputKind.USER_OUTPUT]


def _predicted(forward: ExportedProgram, predict: ExportedProgram | None) -> list[torch.Tensor]:
    """What the model returns in evaluation; shapes and dtypes only."""
    return _returned(predict) if predict else _returned(forward)[1:]


def _export(module: nn.Module, args: tuple, what: str) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own pytree
            return mark_stops(torch.export.export(module, args)).run_decompositions(decompositions())
    except TvmtrainError:
        raise
    except Exception as error:
        raise ModelError(f"torch.export could not trace {what}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; each submodule's own flag afterwards as before. An exported graph has no mode to change."""
    flags = {child: child.training for child in module.modules()}
    try:
        if not _is_exported(module):
            module.eval()
        yield
    finally:
        for child, flag in flags.items():
            child.training = flag


def _is_exported(module: nn.Module) -> bool:
    return isinstance(module, torch.fx.GraphModule)


@contextlib.contextmanager
def _exportable_batchnorm(module: nn.Module) -> Iterator[None]:
    """torch.export cannot trace BatchNorm with momentum=None in training mode (it reads a counter's value): say it in tensors."""
    patched = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.momentum is None and m.training]
    try:
        for batchnorm in patched:
            if batchnorm.track_running_stats:
                batchnorm.forward = types.MethodType(_cumulative_batchnorm, batchnorm)
        yield
    finally:
        for batchnorm in patched:
            batchnorm.__dict__.pop("forward", None)


def _cumulative_batchnorm(self: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm whose running statistics are the plain average over all batches seen."""
    axes = [a for a in range(x.dim()) if a != 1]
    seen = x.detach()
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        share = 1.0 / self.num_batches_tracked.to(x.dtype)
        self.running_mean.copy_(self.running_mean * (1 - share) + seen.mean(axes) * share)
        self.running_var.copy_(self.running_var * (1 - share) + seen.var(axes) * share)
    return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


# ---- translating ----


class _Import:
    """One import: names, ties and kinds of all tensors, then the three functions."""

    def __init__(self, module: nn.Module, programs: _Programs, xs: tuple, ys: tuple, loss: Loss) -> None:
        self.module, self.programs, self.loss = module, programs, loss
        self.xs, self.ys = xs, ys
        self.builder = relax.BlockBuilder()
        self.inference_only = _is_exported(module)
        self.named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        self.canonical = _canonical_names(self.named)
        self.constants = self._constant_buffers()
        self.places: dict[relax.Var, Place] = {}

    def result(self) -> Imported:
        names = [f"x{i}" if len(self.xs) > 1 else "x" for i in range(len(self.xs))]
        targets = [f"y{i}" if len(self.ys) > 1 else "y" for i in range(len(self.ys))]
        x_ports, y_ports = [("input", n) for n in names], [("target", n) for n in targets]
        count = len(self.programs.outputs)
        outs = [("output", f"output{i}" if count > 1 else "output") for i in range(count)]
        forward = self._function("forward", self.programs.forward, x_ports + y_ports, [("loss", "loss"), *outs], True)
        predict = self.programs.predict and self._function("predict", self.programs.predict, x_ports, outs, False)
        functions = {
            "forward": forward,
            "predict": predict or _without_loss(forward, outs),
            "loss": self._function("loss", self.programs.loss, outs + y_ports, [("loss", "loss")], False),
        }
        module = self.builder.get()
        for name, function in functions.items():
            module[name] = function
        parameters = dict(self.module.named_parameters())
        state = {n: t.detach().cpu().numpy().copy() for n, t in self.named.items() if self._is_state(n)}
        return Imported(
            module,
            state,
            tuple(parameters),
            tuple(n for n, p in parameters.items() if p.requires_grad),
            {n: c for n, c in self.canonical.items() if n != c and self._is_state(c)},
            _layers(self.programs.forward, self.canonical, set(parameters)),
            self._loss_spec(),
            int(self.xs[0].shape[0]),
            self.places,
        )

    def _is_state(self, name: str) -> bool:
        return self.canonical[name] == name and name not in self.constants

    def _constant_buffers(self) -> set[str]:
        """Buffers outside of the state_dict that nothing changes (position numbers, say) are constants of the graph."""
        persistent = set(self.module.state_dict())
        changed = {_own_name(n) for n in self.programs.forward.graph_signature.buffers_to_mutate.values()}
        return {name for name in self.named if name not in persistent and name not in changed}

    def _role(self, name: str) -> str:
        return "parameter" if isinstance(self.named[name], nn.Parameter) else "buffer"

    def _function(self, name: str, program: ExportedProgram, ports: list, results: list, training: bool) -> relax.Function:
        """One exported program as a function whose state is its last arguments and, where it changes, its last results."""
        variables: dict[str, Any] = {}  # placeholder -> variable or constant
        state: dict[signature.Port, relax.Var] = {}
        users = list(program.graph_signature.user_inputs)
        examples = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        for user, port in zip(users, ports, strict=True):
            variables[user] = _variable(port[1], examples[user])
        for spec in program.graph_signature.input_specs:
            if spec.kind != InputKind.USER_INPUT:
                variables[spec.arg.name] = self._state_variable(program, spec, examples[spec.arg.name], state)
        random = relax.Var(RANDOM_STATE[1], relax.TensorType([2], "int64"))
        arguments = [variables[user] for user in users] + list(state.values())
        with self.builder.function(name, [*arguments, random], private=False):
            with self.builder.dataflow():
                translator = Translator(self.builder, random if training else None, inference=not training)
                translation = translator.translate(program, variables)
                self.places.update(translation.places if training else {})
                fields, changed = self._results(program, translation.outputs)
                if not training:
                    changed = {}  # to predict changes nothing
                if translation.draws:
                    state[RANDOM_STATE] = random
                    changed[RANDOM_STATE] = self.builder.emit(random + relax.const(np.array([0, 1]), "int64"))
                outputs = [self.builder.emit_output(value) for value in [*fields, *changed.values()]]
            self.builder.emit_func_output(relax.Tuple(outputs))
        return self._finish(name, state, ports + list(state), results + list(changed))

    def _finish(self, name: str, state: dict, inputs: list, outputs: list) -> relax.Function:
        """The built function without the random state, if it draws nothing, and with its ports."""
        function = self.builder.get()[name]
        if RANDOM_STATE not in state:
            function = relax.Function(function.params[:-1], function.body, function.ret_ty, function.is_pure, function.attrs)
        return signature.with_ports(function.with_attr("global_symbol", name), inputs, outputs)

    def _state_variable(self, program: ExportedProgram, spec: Any, example: Any, state: dict) -> Any:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise ModelError(
                f"the model has an operator with effects beyond its results ({spec.kind.name.lower()}); replace it"
            )
        name = _own_name(spec.target)
        if name not in self.named:
            return self._foreign(program, spec.target)
        name = self.canonical[name]
        if name in self.constants:
            return self.named[name]
        port = (self._role(name), name)
        if port not in state:
            state[port] = _variable(name, example)
        return state[port]

    @staticmethod
    def _foreign(program: ExportedProgram, target: str) -> torch.Tensor:
        """A tensor that is not the model's: a constant of the graph, or of a loss that is a module."""
        tensor = program.constants.get(target, program.state_dict.get(target))
        if tensor is None or (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            raise ModelError(f"loss: its tensor {target} is trainable; make it a part of the model, or freeze it")
        return tensor

    def _results(self, program: ExportedProgram, outputs: Sequence[relax.Expr]) -> tuple[list, dict]:
        """(what the program returns, new values of the buffers that it changes)."""
        fields, changed = [], {}
        for spec, value in zip(program.graph_signature.output_specs, outputs, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                fields.append(value)
            elif spec.kind == OutputKind.BUFFER_MUTATION:
                changed[("buffer", self.canonical[_own_name(spec.target)])] = value
            elif spec.kind == OutputKind.PARAMETER_MUTATION:
                raise ModelError(
                    f"the model changes its parameter {_own_name(spec.target)} while it runs; only a step may do that"
                )
        return fields, changed

    def _loss_spec(self) -> LossSpec:
        if not isinstance(self.loss, str):
            return LossSpec("custom", None, None)
        if self.loss != "cross_entropy":
            return LossSpec(self.loss, None, None)
        logits = self.programs.outputs[0]
        return LossSpec(self.loss, int(logits.shape[1 if logits.dim() > 1 else 0]), IGNORE_INDEX)


def _without_loss(forward: relax.Function, outputs: list) -> relax.Function:
    """The outputs of ``forward`` alone, which needs no targets for them and changes nothing."""
    whole = relax.utils.copy_with_new_vars(forward)
    ports = signature.inputs(forward)
    # Whatever reads a target, checks of it too.
    loss = {var for (role, _), var in zip(ports, whole.params, strict=True) if role == "target"}
    kept = []
    for binding in whole.body.blocks[0].bindings:
        if loss.isdisjoint(relax.analysis.free_vars(binding.value)):
            kept.append(binding)
        else:
            loss.add(binding.var)
    body = relax.BlockBuilder().normalize(
        relax.SeqExpr([relax.DataflowBlock(kept)], relax.Tuple(whole.body.body.fields[1 : 1 + len(outputs)]))
    )
    bare = relax.analysis.remove_all_unused(relax.Function(whole.params, body, body.ty, whole.is_pure, whole.attrs))
    named = signature.with_ports(bare.with_attr("global_symbol", "predict"), ports, outputs)
    return signature.keeping(named, lambda port, _: port[0] != "target")


def _own_name(target: str) -> str:
    """The model's own name of a tensor that the wrapper holds; nothing for what is not the model's."""
    return target.removeprefix("model.") if target.startswith("model.") else ""


def _canonical_names(named: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Each name's first name: tied tensors are one object."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named.items()}


def _variable(name: str, example: torch.Tensor) -> relax.Var:
    dtype = Translator._convert_data_type(example.dtype)
    return relax.Var(name, relax.TensorType([int(d) for d in example.shape], dtype))


# ---- layers ----

_KINDS = {
    "_native_batch_norm_legit_functional": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "addmm": "linear",
    "mm": "linear",
    "matmul": "linear",
    "convolution": "conv2d",
}


def _layers(program: ExportedProgram, canonical: Mapping[str, str], parameters: set[str]) -> tuple[Layer, ...]:
    """One layer for each module that has parameters of its own, in the order in which the model uses them."""
    owners: dict[str, list[str]] = {}
    readers: dict[str, Any] = {}
    flat: dict[Any, str] = {}
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    names = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        name = canonical.get(_own_name(names.get(node.name, "")), "")
        users = [user for user in node.users if "val" in user.meta]  # not those that only check it
        if node.op == "placeholder" and name in parameters and users:
            reader = min(users, key=order.__getitem__)
            # Flat names (a foreign exporter's) belong to the operator that reads them: its weight names the layer.
            owner = name.rpartition(".")[0] or flat.setdefault(reader, name)
            owners.setdefault(owner, []).append(name)
            if owner not in readers or order[reader] < order[readers[owner][1]]:
                readers[owner] = (node, reader)
    used = sorted(owners, key=lambda owner: order[readers[owner][1]])
    return tuple(_layer(owner, owners[owner], *readers[owner]) for owner in used)


def _layer(name: str, parameters: list[str], weight: Any, reader: Any) -> Layer:
    kind = reader.target.__name__.split(".")[0]
    kind = _KINDS.get(kind, kind)
    data = next((n for n in reader.all_input_nodes if n is not weight), weight)
    result = reader.meta["val"][0] if isinstance(reader.meta["val"], (tuple, list)) else reader.meta["val"]
    w, x, y = (tuple(int(d) for d in t.shape) for t in (weight.meta["val"], data.meta["val"], result))
    macs = math.prod(y) * math.prod(w[1:]) if kind.startswith("conv") or kind == "linear" else 0
    return Layer(name, kind, tuple(parameters), w, x, y, macs, math.prod(x) * 4 if macs else 0)
