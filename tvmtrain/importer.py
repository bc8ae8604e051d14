"""A PyTorch model, an exported program or an ONNX file as Relax functions: forward with loss, predict, loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from tvm import relax

from tvmtrain import signature
from tvmtrain.artifact import LossSpec
from tvmtrain.converters.base import Place
from tvmtrain.errors import ModelError
from tvmtrain.exporting import Loss, Programs, export_all, is_exported
from tvmtrain.spec import Layer
from tvmtrain.translator import Translator

IGNORE_INDEX = -100  # PyTorch's default for cross_entropy

Tensors = torch.Tensor | Sequence[torch.Tensor]
RANDOM_STATE = ("random", "random:state")


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
    programs = export_all(module, xs, ys, loss)
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


class _Import:
    """One import: names, ties and kinds of all tensors, then the three functions."""

    def __init__(self, module: nn.Module, programs: Programs, xs: tuple, ys: tuple, loss: Loss) -> None:
        self.module, self.programs, self.loss = module, programs, loss
        self.xs, self.ys = xs, ys
        self.builder = relax.BlockBuilder()
        self.inference_only = is_exported(module)
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
