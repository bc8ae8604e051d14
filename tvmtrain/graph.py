"""TrainGraph: a model's training step in Relax, before it is compiled for a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmtrain import autodiff, fitting, importer, passes, report, signature
from tvmtrain.artifact import STATE_ROLES, Entry, LossSpec, Selection
from tvmtrain.converters.base import unsupported
from tvmtrain.errors import PlanError
from tvmtrain.report import Summary
from tvmtrain.spec import SGD, Layer, LayerUpdate, Optimizer, UpdatePlan
from tvmtrain.summarize import summarize
from tvmtrain.targets import Device
from tvmtrain.uncollected import uncollected


@dataclass(frozen=True)
class TrainGraph:
    """The training step of a model: what ``trace`` gives, what ``apply`` rewrites and what ``build`` compiles.

    strips: bytes that a part of the forward may need at once (``within``); None: it is computed whole.
    """

    imported: importer.Imported
    optimizer: Optimizer
    trained: tuple[str, ...]
    seed: int = 0
    plan: UpdatePlan | None = None
    strips: int | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every module with parameters of its own, in the order in which the model uses them."""
        return self.imported.layers

    @property
    def loss(self) -> LossSpec:
        return self.imported.loss

    @property
    def parameters(self) -> tuple[str, ...]:
        """PyTorch names of all parameters, trained or not."""
        return self.imported.parameters

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The layers of which a step trains a share of the channels, and how those are chosen."""
        return tuple(
            Selection(layer.name, weight, layer.channels, layer.channels_of(update.weight), update.select, self.seed)
            for layer, update in self._planned()
            if 0 < update.weight < 1 and (weight := _weight_of(layer)) in self.trained
        )

    @property
    def filtered(self) -> dict[str, LayerUpdate]:
        """Weight -> what is trained of it, of the convolutions whose gradients are filtered."""
        found = [(_weight_of(layer), update) for layer, update in self._planned() if update.patch is not None]
        return {weight: update for weight, update in found if weight is not None}

    def _planned(self) -> list[tuple[Layer, LayerUpdate]]:
        """The layers that the plan names; none without a plan."""
        plan = self.plan.layers if self.plan is not None else {}
        return [(layer, plan[layer.name]) for layer in self.layers if layer.name in plan]

    def apply(self, plan: UpdatePlan) -> TrainGraph:
        """A new graph that trains what ``plan`` names; this one is unchanged.

        Raises PlanError for layers that are unknown, with near matches, or that cannot be trained in the way asked for.
        """
        plan.check(self.layers)
        trained = {name for layer in self.layers for name in _trained_of(layer, plan.layers.get(layer.name))}
        if not trained:
            raise PlanError("update plan: it trains nothing; name at least one layer with weight > 0 or bias = true")
        ordered = _trainable(self.imported, [name for name in self.imported.state if name in trained])
        applied = replace(self, trained=ordered, plan=plan, strips=None)
        passes.check(applied._training(), self.imported.module)
        return applied

    def within(self, arena: int, device: str | Device = "host") -> TrainGraph:
        """A new graph whose ``train_step`` and ``predict`` have arenas of at most ``arena`` bytes on ``device``; this one is unchanged.

        Where the forward needs more, what is frozen of it is computed a few rows at a time, which takes longer. Raises PlanError if
        that is not enough, with the bytes that are. Lowers the step up to five times: some seconds each.
        """
        return fitting.within(self, arena, device)

    def summary(self, against: TrainGraph | None = None, device: str | Device = "host") -> Summary:
        """What a step costs, and beside it what ``against`` costs: operations, bytes kept, the arena that ``device``'s code allocates.

        ``print`` shows a table, ``to_dict`` is for JSON; ``report`` has the counting rules. Lowers the step: some seconds.
        """
        return report.compared(summarize(self, device), None if against is None else summarize(against, device))

    def module(self, *, gradients: bool = False) -> tvm.IRModule:
        """The functions ``train_step``, ``predict`` and ``loss``; with ``gradients``, an entry that returns them, too."""
        return passes.pipeline(self._training(), self.optimizer, gradients=gradients)(self.imported.module)

    def computed(self) -> tvm.IRModule:
        """What ``module`` computes, gradients too, before it is arranged for memory: layers' costs can be read from it."""
        return passes.step(self._training(), self.optimizer, gradients=True)(self.imported.module)

    def arranged(self, computed: tvm.IRModule) -> tvm.IRModule:
        """``computed``, of this graph, as ``module`` returns it."""
        return passes.arrangement(self._training())(computed)

    def _training(self) -> passes.Training:
        """What the plan asks for, by parameter."""
        sparse = {chosen.weight: chosen.count for chosen in self.selections}
        fixed = frozenset(chosen.weight for chosen in self.selections if chosen.fixed)
        patches = {weight: update.patch for weight, update in self.filtered.items() if update.patch is not None}
        scaling = {weight: update.scaling for weight, update in self.filtered.items()}
        return passes.Training(self.trained, sparse, fixed, patches, scaling, self.strips)

    def state_bytes(self, entries: Iterable[Entry]) -> dict[str, int]:
        """Bytes of the tensors that live as long as the step does, by role."""
        entries = tuple(entries)
        # The channels of a weight have its name.
        roles = {tensor.name: tensor.role for entry in entries for tensor in entry.inputs if tensor.role in STATE_ROLES}
        total: dict[str, int] = {}
        for name, value in self.state(entries).items():
            role = roles.get(name, "parameter" if name in self.parameters else "buffer")
            total[role] = total.get(role, 0) + value.nbytes
        return total

    def entries(self, module: tvm.IRModule) -> tuple[Entry, ...]:
        """What the functions of ``module`` take and return."""
        functions = {v.name_hint: f for v, f in module.functions.items() if isinstance(f, relax.Function)}
        return tuple(signature.entry(name, function) for name, function in sorted(functions.items()))

    def state(self, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
        """Initial values of every parameter, buffer, optimizer and random state tensor."""
        values = dict(self.imported.state)
        for tensor in (t for entry in entries for t in entry.inputs):
            if tensor.role == "optimizer":
                values[tensor.name] = np.zeros(tensor.shape, tensor.dtype)
            elif tensor.role == "random":
                values[tensor.name] = np.array([self.seed, 0], "int64")
        return values


@uncollected()
def trace(
    model: Any, x: Any, y: Any, *, loss: importer.Loss = "cross_entropy", optimizer: Optimizer | None = None, seed: int = 0
) -> TrainGraph:
    """The training step of ``model`` for batches shaped like the examples ``x`` and ``y``.

    model: an nn.Module, an ExportedProgram, or a path to a .pt2 or .onnx file. What has ``requires_grad`` is trained; each
    module's own ``training`` flag decides its BatchNorm and Dropout.
    x, y: example tensors, or tuples of them; their shapes are the compiled ones.
    loss: "cross_entropy", "mse", "bce_with_logits", or a PyTorch callable (output, target) -> scalar.
    seed: of the random numbers of Dropout and stochastic depth.
    Raises ModelError, and UnsupportedOperatorError with every operator that cannot be trained.
    """
    imported = importer.import_model(model, x, y, loss)
    trained = _trainable(imported, imported.trainable)
    return TrainGraph(imported, optimizer if optimizer is not None else SGD(), trained, seed)


def _trained_of(layer: Layer, update: LayerUpdate | None) -> list[str]:
    if update is None:
        return []
    if update.filter is not None and (layer.kind != "conv2d" or _weight_of(layer) is None):
        raise PlanError(
            f"update plan, layer {layer.name!r}: only 2-D convolutions with a weight of their own have filtered gradients, and this is "
            f"a {layer.kind} with {', '.join(layer.parameters)}; use no filter"
        )
    if 0 < update.weight < 1 and layer.kind not in ("conv2d", "linear"):
        raise PlanError(f"update plan, layer {layer.name!r}: a {layer.kind} has no share of channels; use weight = 0 or 1")
    weights = [name for name in layer.parameters if not name.endswith("bias")]
    biases = [name for name in layer.parameters if name.endswith("bias")]
    return (weights if update.weight else []) + (biases if update.bias else [])


def _weight_of(layer: Layer) -> str | None:
    """The name of its weight, trained or not: whatever is no bias, as in ``_trained_of``; foreign exporters have names of their own."""
    return next((name for name in layer.parameters if not name.endswith("bias")), None)


def _trainable(imported: importer.Imported, names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` that the loss depends on; PyTorch's optimizers skip the others, weight decay and all.

    Raises one error for all operators without a gradient rule on the way from them to the loss.
    """
    if not names:
        raise PlanError("nothing to train: no parameter of this model has requires_grad")
    forward = imported.module["forward"]
    reaching = autodiff.reaching(forward)
    trained = tuple(name for name in names if name in reaching)
    if not trained:
        raise PlanError(f"nothing to train: the loss does not depend on {', '.join(names[:5])}")
    missing = [imported.places[var] for var in autodiff.without_rule(forward, set(trained)) if var in imported.places]
    if missing:
        raise unsupported("differentiated", missing)
    return trained


__all__ = ["TrainGraph", "trace"]
