"""A PyTorch model with its loss as programs of ``torch.export``: a training step's forward, what it predicts, its loss alone."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from tvmtrain.errors import ModelError, TvmtrainError
from tvmtrain.translator import BATCH_STATISTICS, RANDOM, decompositions, mark_stops

LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}

Loss = str | Callable[[Any, Any], torch.Tensor]
# Operators that drop values where an argument says so: its place and its name.
DROPPING = {"dropout": (2, "train"), "native_dropout": (2, "train"), "scaled_dot_product_attention": (4, "dropout_p")}


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
class Programs:
    """``predict``: None where it is ``forward`` without the loss."""

    forward: ExportedProgram
    predict: ExportedProgram | None
    loss: ExportedProgram

    @property
    def outputs(self) -> list[torch.Tensor]:
        return _predicted(self.forward, self.predict)


def export_all(module: nn.Module, xs: tuple, ys: tuple, loss: Loss) -> Programs:
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
    return Programs(forward, predict, alone)


def _predicting(module: nn.Module, xs: tuple, loss: Loss, seen: list[pytree.TreeSpec]) -> ExportedProgram:
    with evaluating(module):
        return _export(_Outputs(module, loss, seen), xs, "the model in eval mode")


def _evaluates(module: nn.Module, forward: ExportedProgram) -> bool:
    """Whether a training step computes what evaluation does: nothing is in training mode, changes a buffer or draws numbers."""
    if is_exported(module) or any(child.training for child in module.modules()):
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
        if not is_exported(module):
            module.eval()
        yield
    finally:
        for child, flag in flags.items():
            child.training = flag


def is_exported(module: nn.Module) -> bool:
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
