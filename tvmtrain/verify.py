"""A compiled step against PyTorch: outputs, loss, every gradient, running statistics, parameters after some steps.

What PyTorch itself cannot reproduce cannot be asked of the step: every comparison also runs PyTorch from weights that are one
rounding error away, and a tensor passes within ten times of what this changes.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tvmtrain import builder, console, exporting, graph, importer, jobs, philox, selection
from tvmtrain.artifact import Selection
from tvmtrain.errors import NonFiniteLossError, TvmtrainError
from tvmtrain.oracle import FilteredGradients
from tvmtrain.runtime import TrainStep
from tvmtrain.spec import SGD, AdamW, Layer, LayerUpdate, Optimizer, UpdatePlan

ABSOLUTE = 1e-6  # differences that count as none, whatever their share
OWN_FACTOR = 10.0  # and those within this factor of PyTorch's own
SHOWN = 10

Tensors = tuple[torch.Tensor, ...]
Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One tensor of the compiled step beside PyTorch's.

    ``kind``: output, loss, gradient, statistic or parameter. ``absolute``: the largest difference; ``relative``: its share of the
    tensor's own largest value; ``own``: the same share between PyTorch and PyTorch from weights one rounding error away.
    ``verdict``: "ok"; "rounding" beyond the tolerance, but tiny or within what PyTorch itself cannot reproduce; or "departs".
    """

    kind: str
    name: str
    layer: str
    shape: tuple[int, ...]
    relative: float
    absolute: float
    own: float
    verdict: str

    @property
    def ok(self) -> bool:
        return self.verdict != "departs"


@dataclass(frozen=True)
class Report:
    """All comparisons of one verification, and where a departure begins.

    ``direction``: "forward", "backward" or "update", the first of them that departs, or None. ``first_layer``: in the model's order
    of use, the first layer that departs in it. ``nearest_loss``: where the backward, which comes from the loss, departs first.
    """

    passed: bool
    tolerance: float
    steps: int
    comparisons: tuple[Comparison, ...]
    direction: str | None = None
    first_layer: str | None = None
    nearest_loss: str | None = None
    message: str = ""

    def worst(self, kind: str) -> list[Comparison]:
        """The comparisons of ``kind``: those that depart first, mere rounding last, and the largest shares first among equals."""
        rank = ("departs", "ok", "rounding")
        return sorted((c for c in self.comparisons if c.kind == kind), key=lambda c: (rank.index(c.verdict), -c.relative))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def verify(
    model: Any,
    x: Any,
    y: Any,
    *,
    loss: importer.Loss = "cross_entropy",
    optimizer: Optimizer | None = None,
    plan: UpdatePlan | None = None,
    arena: int | None = None,
    device: str = "host",
    steps: int = 20,
    tolerance: float = 1e-3,
    seed: int = 0,
    out: console.Console | None = None,
) -> Report:
    """Compare the compiled step of ``model`` with PyTorch on the batch ``x``, ``y``, whose samples are paired anew every step.

    model, x, y, loss, optimizer, seed: as for ``trace``; the model is left as it was. tolerance: of a tensor's difference,
    relative to its own largest value. Raises what ``trace`` and ``build`` raise.
    """
    module = importer.as_module(model)
    xs, ys = _tensors(x), _tensors(y)
    optimizer = optimizer if optimizer is not None else SGD()
    out = out or console.Console(io.StringIO())
    with out.working("tracing"):
        traced = graph.trace(module, x, y, loss=loss, optimizer=optimizer, seed=seed)
        traced = traced if plan is None else traced.apply(plan)
        traced = traced if arena is None else traced.within(arena, device)
    with out.working(f"compiling for {device}"):
        step = builder.build(traced, device, gradients=True).load()
    check = _Check(module, traced, step, loss, optimizer, tolerance, seed)
    with out.working(f"comparing {steps} steps with PyTorch"):
        check.forward_and_backward(xs, ys)
        check.steps(list(_batches(xs, ys, steps, seed)))
    return _report(check, xs, ys, steps)


def verify_job(job: jobs.Job, *, steps: int, tolerance: float, out: console.Console) -> Report:
    """``verify`` for what a command line names."""
    with out.working(f"loading {job.model}"):
        prepared = jobs.prepare(job)
    return verify(
        prepared.module,
        _one(prepared.x),
        _one(prepared.y),
        loss=job.loss,
        optimizer=job.optimizer,
        plan=None if job.plan is None else UpdatePlan.from_toml(job.plan),
        arena=job.arena,
        device=job.device,
        steps=steps,
        tolerance=tolerance,
        seed=job.seed,
        out=out,
    )


def show(report: Report, out: console.Console) -> None:
    """Print ``report``: one line per kind of tensor, then the worst gradients."""
    rows = [(title, *_row(worst[0])[2:]) for kind, title in _titles(report).items() if (worst := report.worst(kind))]
    out.table(("compared with PyTorch", ">relative", ">absolute", ">PyTorch's own", "verdict"), rows)
    shown = report.worst("gradient")[:SHOWN]
    out.table(("worst gradients", "shape", ">relative", ">absolute", ">PyTorch's own", "verdict"), [_row(c) for c in shown])
    out.line(report.message, style="bold green" if report.passed else "bold red")


# The same random numbers in PyTorch.


class SameRandomNumbers(TorchDispatchMode):
    """PyTorch draws inside get the numbers that the compiled step draws at step number ``step``.

    Below autograd, Dropout, attention's dropout and stochastic depth all come down to a few operators; the n-th draw of a step
    is stream n, in PyTorch's order as in the graph's.
    """

    def __init__(self, seed: int, step: int) -> None:
        super().__init__()
        self.seed, self.step, self.stream = seed, step, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            return _DRAWS[func](self, *args)
        return func(*args, **(kwargs or {}))

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        """The next stream's numbers in [0, 1)."""
        stream, self.stream = self.stream, self.stream + 1
        return torch.from_numpy(philox.uniform_numpy(self.seed, self.step, tuple(shape), stream))

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Normal numbers from the next two streams, by Box and Muller."""
        first, second = self.uniform(shape), self.uniform(shape)
        return torch.sqrt(-2 * torch.log(1 - first)) * torch.cos(2 * math.pi * second)


def _native_dropout(mode: SameRandomNumbers, x: torch.Tensor, p: float, train: bool | None) -> Tensors:
    if not train or not p:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = mode.uniform(x.shape) < 1.0 - p
    return x * keep * (0.0 if p == 1 else 1.0 / (1.0 - p)), keep


_aten = torch.ops.aten
_DRAWS: dict[Any, Callable[..., Any]] = {
    _aten.bernoulli_.float: lambda mode, x, p=0.5, *rest: x.copy_(mode.uniform(x.shape) < p),
    _aten.bernoulli_.Tensor: lambda mode, x, p, *rest: x.copy_(mode.uniform(x.shape) < p),
    _aten.bernoulli.p: lambda mode, x, p, *rest: (mode.uniform(x.shape) < p).to(x.dtype),
    _aten.bernoulli.default: lambda mode, x, *rest: (mode.uniform(x.shape) < x).to(x.dtype),
    _aten.rand.default: lambda mode, shape, *rest: mode.uniform(shape),
    _aten.randn.default: lambda mode, shape, *rest: mode.normal(shape),
    _aten.randn_like.default: lambda mode, x, *rest: mode.normal(x.shape),
    _aten.rand_like.default: lambda mode, x, *rest: mode.uniform(x.shape),
    _aten.native_dropout.default: _native_dropout,
}


# PyTorch's side.


class _Reference:
    """The model trained by PyTorch, on a copy."""

    def __init__(
        self,
        module: nn.Module,
        trained: Sequence[str],
        loss: importer.Loss,
        optimizer: Optimizer,
        seed: int,
        selections: Sequence[Selection] = (),
        filtered: Mapping[str, LayerUpdate] | None = None,
    ) -> None:
        self.selections, self.filtered = selections, dict(filtered or {})
        self.module = copy.deepcopy(module)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in trained)
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.loss, self.spec, self.seed = loss, optimizer, seed
        self.optimizer = _torch_optimizer(optimizer, list(self.trained.values()))
        self.taken = 0

    def nudged(self) -> _Reference:
        """The same from weights that are one rounding error away."""
        other = _Reference(self.module, list(self.trained), self.loss, self.spec, self.seed, self.selections, self.filtered)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in other.module.parameters():
                sign = torch.randint(0, 2, parameter.shape, generator=random) * 2 - 1
                parameter.mul_(1 + sign * torch.finfo(parameter.dtype).eps)
        return other

    def backward(self, xs: Tensors, ys: Tensors) -> float:
        """The loss of the next step; gradients are left at the parameters."""
        self.optimizer.zero_grad()
        with SameRandomNumbers(self.seed, self.taken), FilteredGradients(self._filters()):
            loss = exporting.apply_loss(self.loss, self.module(*xs), ys)
        loss.backward()
        return float(loss.detach())

    def _filters(self) -> list[tuple[torch.Tensor, tuple[int, int], str]]:
        weights = dict(self.module.named_parameters())
        return [(weights[name], update.patch, update.scaling) for name, update in self.filtered.items() if update.patch]

    def step(self, xs: Tensors, ys: Tensors, channels: Values) -> float:
        """One step that trains ``channels``, by layer name, of the partly trained layers."""
        loss = self.backward(xs, ys)
        others = [(self.trained[chosen.weight], _others(chosen, self.trained, channels)) for chosen in self.selections]
        before = [(weight, where, weight.detach().clone(), self._state(weight)) for weight, where in others]
        for weight, where in others:
            if weight.grad is not None:
                weight.grad[where] = 0  # for the norm by which gradients are clipped
        if self.spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained.values(), self.spec.clip_norm)
        self.optimizer.step()
        self._put_back(before)
        self.taken += 1
        return loss

    def _state(self, weight: nn.Parameter) -> dict[str, torch.Tensor]:
        """Copies of the optimizer's moving means of a weight."""
        kept = self.optimizer.state[weight].items() if weight in self.optimizer.state else ()
        return {key: value.clone() for key, value in kept if torch.is_tensor(value) and value.shape == weight.shape}

    def _put_back(self, before: Sequence[tuple[nn.Parameter, Any, torch.Tensor, dict[str, torch.Tensor]]]) -> None:
        """What is not chosen is as it was, state too: torch.optim has no rule that leaves a part of a parameter alone."""
        with torch.no_grad():
            for weight, where, old, state in before:
                weight[where] = old[where]
                for key, value in self._state(weight).items():
                    self.optimizer.state[weight][key][where] = state.get(key, torch.zeros_like(value))[where]

    def gradients(self, xs: Tensors, ys: Tensors, channels: Values) -> Values:
        """Every gradient at the first step, of partly trained weights at ``channels``; the model is left as it was."""
        other = _Reference(self.module, list(self.trained), self.loss, self.spec, self.seed, filtered=self.filtered)
        other.backward(xs, ys)
        found = {n: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for n, p in other.trained.items()}
        for chosen in self.selections:
            shape = found[chosen.weight].shape
            at = selection.places(chosen, shape, channels[chosen.layer])
            found[chosen.weight] = found[chosen.weight].take(at, selection.axis(chosen, shape))
        return found

    def parameters(self) -> Values:
        return {name: p.detach().numpy() for name, p in self.trained.items()}

    def statistics(self) -> Values:
        kept = self.module.state_dict()
        return {name: b.numpy() for name, b in self.module.named_buffers() if name in kept}


def _others(chosen: Selection, weights: Mapping[str, nn.Parameter], channels: Values) -> tuple[slice | torch.Tensor, ...]:
    """An index of what a weight has beside the chosen channels."""
    shape = tuple(weights[chosen.weight].shape)
    axis = selection.axis(chosen, shape)
    rest = np.setdiff1d(np.arange(shape[axis]), selection.places(chosen, shape, channels[chosen.layer]))
    return (*(slice(None),) * axis, torch.from_numpy(rest))


def _torch_optimizer(spec: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if isinstance(spec, SGD):
        return torch.optim.SGD(
            parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov
        )
    kind = torch.optim.AdamW if isinstance(spec, AdamW) else torch.optim.Adam
    return kind(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)


# Comparing.


class _Check:
    """The step, PyTorch, PyTorch one rounding error away, and what has been compared so far."""

    def __init__(
        self,
        module: nn.Module,
        traced: graph.TrainGraph,
        step: TrainStep,
        loss: importer.Loss,
        optimizer: Optimizer,
        tolerance: float,
        seed: int,
    ) -> None:
        self.module, self.traced, self.step, self.tolerance = module, traced, step, tolerance
        self.torch = _Reference(module, traced.trained, loss, optimizer, seed, traced.selections, traced.filtered)
        self.nudged = self.torch.nudged()
        self.owners = {name: layer.name for layer in traced.layers for name in layer.parameters}
        self.found: list[Comparison] = []

    def forward_and_backward(self, xs: Tensors, ys: Tensors) -> None:
        """Outputs in evaluation mode, the loss and all gradients of the first step."""
        outputs = self.step.predict(xs)
        ours = outputs if isinstance(outputs, tuple) else (outputs,)
        theirs, own = (_outputs(ref.module, self.torch.loss, xs) for ref in (self.torch, self.nudged))
        for i, (our, their, nudged) in enumerate(zip(ours, theirs, own, strict=True)):
            self._compare("output", f"output {i}", our, their, nudged)
        gradients, channels = self.step.gradients(xs, ys), self.step.channels
        expected, disturbed = (ref.gradients(xs, ys, channels) for ref in (self.torch, self.nudged))
        for name, value in expected.items():
            self._compare("gradient", name, gradients[name], value, disturbed[name])

    def steps(self, batches: Sequence[tuple[Tensors, Tensors]]) -> None:
        """Train all three on ``batches``; statistics are compared after the first step too, before differences grow."""
        for i, (xs, ys) in enumerate(batches):
            channels = self.step.channels
            ours, theirs, own = self._loss(xs, ys), *(ref.step(xs, ys, channels) for ref in (self.torch, self.nudged))
            self._compare("loss", f"step {i + 1}", np.array(ours), np.array(theirs), np.array(own))
            if math.isnan(ours):
                return
            if i in (0, len(batches) - 1):
                self._statistics(i + 1)
        state = self.step.state_dict()
        nudged = self.nudged.parameters()
        for name, value in self.torch.parameters().items():
            self._compare("parameter", name, state[name], value, nudged[name])

    def _loss(self, xs: Tensors, ys: Tensors) -> float:
        """The compiled step's loss; NaN where it refuses to go on."""
        try:
            return self.step(xs, ys)
        except NonFiniteLossError:
            return math.nan

    def _statistics(self, steps: int) -> None:
        state, own = self.step.state_dict(), self.nudged.statistics()
        for name, value in self.torch.statistics().items():
            self._compare("statistic", name, state[name], value, own[name], f"{name} (step {steps})")

    def _compare(self, kind: str, name: str, ours: np.ndarray, theirs: np.ndarray, nudged: np.ndarray, shown: str = "") -> None:
        layer = self.owners.get(name, name.rpartition(".")[0] if kind in ("gradient", "statistic", "parameter") else "")
        self.found.append(compare(kind, shown or name, layer, ours, theirs, nudged, self.tolerance))

    def bad(self, kind: str) -> list[Comparison]:
        return [c for c in self.found if c.kind == kind and not c.ok]


def compare(
    kind: str, name: str, layer: str, ours: np.ndarray, theirs: np.ndarray, nudged: np.ndarray, tolerance: float
) -> Comparison:
    """``ours`` beside ``theirs``, and how far ``nudged`` is from them."""
    relative, absolute = _difference(ours, theirs)
    own, _ = _difference(nudged, theirs)
    within = relative <= OWN_FACTOR * own or absolute <= ABSOLUTE
    verdict = "ok" if relative <= tolerance else "rounding" if within else "departs"
    return Comparison(kind, name, layer, tuple(theirs.shape), relative, absolute, own, verdict)


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(share of the largest value of ``b``, absolute); NaN anywhere is an infinite difference."""
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    if not b.size:
        return 0.0, 0.0
    absolute = float(np.abs(a - b).max())
    if not math.isfinite(absolute):
        return math.inf, math.inf
    largest = float(np.abs(b).max())
    return (absolute / largest if largest else math.inf if absolute else 0.0), absolute


# Where a departure begins.


def _report(check: _Check, xs: Tensors, ys: Tensors, steps: int) -> Report:
    passed = all(c.ok for c in check.found)
    place = _Place() if passed else _locate(check, xs, ys)
    return Report(
        passed=passed,
        tolerance=check.tolerance,
        steps=steps,
        comparisons=tuple(check.found),
        direction=place.direction,
        first_layer=place.first,
        nearest_loss=place.nearest_loss,
        message=_agreement(check) if passed else place.message,
    )


@dataclass(frozen=True)
class _Place:
    direction: str | None = None
    first: str | None = None
    nearest_loss: str | None = None
    message: str = ""


def _locate(check: _Check, xs: Tensors, ys: Tensors) -> _Place:
    """Forward before backward before update: what comes first makes the others depart too."""
    first_loss = [c for c in check.bad("loss") if c.name == "step 1"]
    if check.bad("output") or first_loss:
        first = _first_forward(check, xs, ys)
        what = "the outputs in evaluation mode" if check.bad("output") else "the loss of the first training step"
        where = f"; the first layer whose output departs: {first}" if first else ""
        return _Place("forward", first, None, f"departs from PyTorch in the forward pass: {what}{where}")
    if check.bad("gradient"):
        return _backward(check)
    departed = check.bad("statistic") + check.bad("parameter") + check.bad("loss")
    layers = _in_order(check.traced.layers, {c.layer for c in departed if c.layer})
    kinds = ", ".join(dict.fromkeys(c.kind for c in departed))
    message = f"forward and gradients agree; departs in the update: {kinds}, first {departed[0].name}"
    return _Place("update", layers[0] if layers else None, None, message)


def _backward(check: _Check) -> _Place:
    departed = {c.layer for c in check.bad("gradient")}
    order = _in_order(check.traced.layers, departed)
    first, last = order[0], order[-1]
    total = len({c.layer for c in check.found if c.kind == "gradient"})
    where = f"first in the model's order: {first}" if first == last else f"from {first} to {last}"
    return _Place(
        "backward",
        first,
        last,
        f"the forward pass agrees; departs from PyTorch in the backward pass, in {len(order)} of {total} layers: {where}. "
        f"Coming from the loss, the first is {last}: look at it and at what reads its output",
    )


def _in_order(layers: Sequence[Layer], names: set[str]) -> list[str]:
    """``names`` in the model's order of use; those that are no layers come last."""
    known = [layer.name for layer in layers if layer.name in names]
    return known + sorted(names - set(known))


def _agreement(check: _Check) -> str:
    message = "agrees with PyTorch"
    own = max((c.own for c in check.found if c.kind in ("loss", "parameter") and c.verdict != "rounding"), default=0.0)
    if own > check.tolerance / OWN_FACTOR:
        message += f", which differs from itself by {own:.1e} after one rounding error: a smaller --lr compares more sharply"
    return message


def _first_forward(check: _Check, xs: Tensors, ys: Tensors) -> str | None:
    """The first leaf module whose output departs, found by compiling the model once more with all of them as outputs."""
    if isinstance(check.module, torch.fx.GraphModule):  # an exported program has no modules left
        return None
    probe = _Probe(check.module)
    loss = check.torch.loss

    def first_output(outputs: Sequence[Any], target: Any) -> torch.Tensor:
        return exporting.apply_loss(loss, outputs[0], target if isinstance(target, tuple) else (target,))

    try:
        traced = graph.trace(probe, _one(xs), _one(ys), loss=first_output, seed=check.torch.seed)
        step = builder.build(traced).load()
        step(xs, ys)
        compiled = {"training": step.outputs, "evaluation": step.predict(xs)}
    except TvmtrainError:  # as the model departs, it need not run: then the place stays open
        return None
    for mode, ours in compiled.items():
        theirs = _probe_outputs(probe, xs, check.torch.seed, mode == "training")
        # Before them come the model's own outputs.
        for (name, their), our in zip(theirs, ours[-len(theirs) :], strict=True):
            if not compare("output", name, name, our, their, their, check.tolerance).ok:
                return name
    return None


class _Probe(nn.Module):
    """A model that also returns the outputs of its leaf modules, in the order of use; ``names`` are their modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.names: list[str] = []

    def forward(self, *xs: torch.Tensor) -> tuple[Any, ...]:
        seen: list[torch.Tensor] = []
        names: list[str] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    # A clone: the next module may work in place.
                    seen.append(output.clone())
                    names.append(name)

            return hook

        leaves = [(name, m) for name, m in self.model.named_modules() if not list(m.children())]
        handles = [module.register_forward_hook(note(name)) for name, module in leaves]
        try:
            result = self.model(*xs)
        finally:
            for handle in handles:
                handle.remove()
        self.names[:] = names
        return (result, *seen)


def _probe_outputs(probe: _Probe, xs: Tensors, seed: int, training: bool) -> list[tuple[str, np.ndarray]]:
    """(leaf module, its output), in the order of use."""
    probe = copy.deepcopy(probe)
    with torch.no_grad(), SameRandomNumbers(seed, 0):
        if not training:
            probe.eval()
        _, *seen = probe(*xs)
    return [(name, tensor.numpy()) for name, tensor in zip(probe.names, seen, strict=True)]


# Small things.


def _tensors(values: Any) -> Tensors:
    return tuple(torch.as_tensor(v) for v in (values if isinstance(values, (tuple, list)) else (values,)))


def _one(values: Tensors) -> Any:
    return values[0] if len(values) == 1 else values


def _batches(xs: Tensors, ys: Tensors, steps: int, seed: int) -> Iterator[tuple[Tensors, Tensors]]:
    """The same samples with the targets of others: new labels, and inputs in the range that the model is for."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = [torch.randperm(len(xs[0]), generator=random), torch.randperm(len(ys[0]), generator=random)]
        yield tuple(x[rows[0]] for x in xs), tuple(y[rows[1]] for y in ys)


def _outputs(module: nn.Module, loss: importer.Loss, xs: Tensors) -> list[np.ndarray]:
    with torch.no_grad(), exporting.evaluating(module):
        return [tensor.numpy() for tensor in exporting.outputs_of(module(*xs), loss)]


def _titles(report: Report) -> dict[str, str]:
    return {
        "output": "outputs, evaluation mode",
        "loss": f"loss, {report.steps} steps",
        "gradient": "gradients, worst",
        "statistic": "running statistics, worst",
        "parameter": f"parameters after {report.steps} steps, worst",
    }


def _row(c: Comparison) -> tuple[str, ...]:
    numbers = (f"{c.relative:.1e}", f"{c.absolute:.1e}", f"{c.own:.1e}")
    return c.name, console.shape(c.shape), *numbers, c.verdict


__all__ = ["Comparison", "Report", "SameRandomNumbers", "compare", "show", "verify", "verify_job"]
