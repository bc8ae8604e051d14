"""From what a command line says about a model to the model itself, its example batch and its artifact."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvmtrain import builder, codegen, console, describe, exporting, graph, importer, targets
from tvmtrain.artifact import Artifact
from tvmtrain.costs import EntryMemory
from tvmtrain.errors import InputError, ModelError
from tvmtrain.report import Summary
from tvmtrain.spec import SGD, Optimizer, UpdatePlan

FORM = "a factory returns model, x, y: three values, not model, (x, y); x is a tuple where the model takes several inputs"
SHAPE = re.compile(r"\d+([x,]\d+)*([x,][a-z]+\d+)?")


@dataclass(frozen=True)
class Example:
    """One input's shape, batch first, and dtype, as ``--x`` writes it: "8x3x96x96" or "8x128,int64"."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def parse(cls, text: str) -> Example:
        """Raises ``ValueError`` for anything else."""
        parts = re.split("[x,]", text)
        dtype = torch.float32 if parts[-1].isdigit() else getattr(torch, parts.pop(), None)
        if not SHAPE.fullmatch(text) or not isinstance(dtype, torch.dtype) or "0" in parts:
            raise ValueError(f"got {text!r}, wanted sizes with the batch first, and a dtype: 8x3x96x96 or 8x128,int64")
        return cls(tuple(map(int, parts)), dtype)


@dataclass(frozen=True)
class Job:
    """What to compile.

    model: "package.module:factory", "path/to/file.py:factory", or the path of a .pt2 or .onnx file. The factory takes nothing and
    returns an nn.Module, or (module, x) or (module, x, y) with example tensors.
    examples: shapes of the inputs, if nothing else says them. batch: another batch size than theirs.
    training: model.train() or .eval() before tracing; None: as it is. seed: of the factory's random weights and of Dropout.
    """

    model: str
    examples: tuple[Example, ...] = ()
    batch: int | None = None
    loss: str = "cross_entropy"
    optimizer: Optimizer = field(default_factory=SGD)
    device: str = "host"
    plan: Path | None = None
    arena: int | None = None
    training: bool | None = None
    seed: int = 0
    gradients: bool = False


@dataclass(frozen=True)
class Prepared:
    """A model in its mode, with an example batch."""

    module: nn.Module
    x: tuple[torch.Tensor, ...]
    y: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Compiled:
    """What was built, where it lies, the seconds that each stage took, and bytes and FLOPs of a training step.

    ``runs_here``: whether this machine's processor runs it. ``memory`` is that of ``train_step`` beside the state; ``summary`` is there if
    it was asked for.
    """

    folder: str
    device: str
    runs_here: bool
    loss: str
    optimizer: dict[str, Any]
    inputs: dict[str, str]
    layers: int
    parameters: int
    trained: int
    seconds: dict[str, float]
    memory: EntryMemory
    backward_flops: int
    summary: Summary | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compile_model(job: Job, folder: str | Path, out: console.Console, *, summary: bool = False) -> Compiled:
    """Trace, build and save ``job`` into ``folder``. Raises the errors of these stages.

    summary: also tell what a step costs, beside the step before the plan: lowers both, some seconds.
    """
    seconds: dict[str, float] = {}
    with out.working(f"loading {job.model}"), _timed(seconds, "load"):
        prepared = prepare(job)
    with out.working("tracing"), _timed(seconds, "trace"):
        whole = _traced(job, prepared)
        traced = _planned(job, whole)
    costs = None
    if summary:
        with out.working("counting"), _timed(seconds, "summary"):
            costs = traced.summary(against=None if job.plan is None else whole, device=job.device)
    with out.working(f"compiling for {job.device}"), _timed(seconds, "build"):
        artifact = builder.build(traced, job.device, gradients=job.gradients)
    with _timed(seconds, "save"):
        artifact.save(folder)
    return _compiled(artifact, traced, folder, seconds, costs)


def trace(job: Job, prepared: Prepared) -> graph.TrainGraph:
    """The training step of a prepared ``job``, with its plan applied."""
    return _planned(job, _traced(job, prepared))


def _traced(job: Job, prepared: Prepared) -> graph.TrainGraph:
    x, y = (values[0] if len(values) == 1 else values for values in (prepared.x, prepared.y))
    return graph.trace(prepared.module, x, y, loss=job.loss, optimizer=job.optimizer, seed=job.seed)


def _planned(job: Job, traced: graph.TrainGraph) -> graph.TrainGraph:
    traced = traced if job.plan is None else traced.apply(UpdatePlan.from_toml(job.plan))
    return traced if job.arena is None else traced.within(job.arena, job.device)


def prepare(job: Job) -> Prepared:
    """Load the model of ``job`` and make its example batch. Raises ``ModelError`` or ``InputError`` saying what is missing, and,
    before all that, ``DeviceError`` for a device that is unknown or cannot be built for here."""
    codegen.tools(targets.load(job.device))
    torch.manual_seed(job.seed)
    module, x, y = load_model(job.model)
    _set_mode(module, job.training)
    x = _inputs(job, module, x)
    y = y if y and job.batch is None else (targets_like(job.loss, predict(module, x)),)
    return Prepared(module, x, y)


def load_model(spec: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(module, example inputs, example targets) of what ``Job.model`` names; examples are empty where nothing says them."""
    if spec.endswith(".pt2"):
        return _load_exported(Path(spec))
    if spec.endswith(".onnx"):
        return importer.as_module(spec), _onnx_inputs(Path(spec)), ()
    made = _call_factory(spec)
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise ModelError(f"{spec} returned {type(made).__name__}; want an nn.Module, (module, x) or (module, x, y)")
    x, y = (_tuple(part) for part in (*parts[1:], (), ())[:2])
    return parts[0], x, y


def predict(module: nn.Module, x: Sequence[torch.Tensor]) -> torch.Tensor:
    """The output that a built-in loss is about, of ``module`` in evaluation mode."""
    try:
        with torch.no_grad(), exporting.evaluating(module):
            return exporting.primary(module(*x))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(console.shape(t.shape) for t in x)
        raise ModelError(f"the model cannot take an example of shape {shapes}: {error}; {FORM}") from error


def targets_like(loss: str, output: torch.Tensor) -> torch.Tensor:
    """Random targets for ``output``: class numbers for cross_entropy, zeros and ones for bce_with_logits, values for mse."""
    if loss == "cross_entropy":
        if output.dim() < 2:
            raise ModelError(f"cross_entropy: the model's output has shape {tuple(output.shape)}; want (batch, classes, ...)")
        return torch.randint(0, output.shape[1], (output.shape[0], *output.shape[2:]))
    if loss == "bce_with_logits":
        return torch.randint(0, 2, output.shape).float()
    return torch.randn(output.shape)


def random_inputs(module: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    """Random values; whole numbers stay below the smallest table of embeddings."""
    numbers = min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=2)
    return tuple(
        torch.randn(e.shape, dtype=e.dtype) if e.dtype.is_floating_point else torch.randint(0, numbers, e.shape).to(e.dtype)
        for e in examples
    )


def _call_factory(spec: str) -> Any:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ModelError(
            f"model {spec!r}: want package.module:factory, path/to/file.py:factory, or the path of a .pt2 or .onnx file"
        )
    module = _import(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ModelError(f"model {spec!r}: {place} has no function {name!r}")
    try:
        return factory()
    except Exception as error:
        raise ModelError(f"model {spec!r}: {name}() failed: {type(error).__name__}: {error}") from error


def _import(place: str) -> Any:
    """A module by its dotted name, also from the current folder, or by the path of its file."""
    path = Path(place)
    folder = str(path.resolve().parent) if path.suffix == ".py" else str(Path.cwd())
    if path.suffix == ".py" and not path.is_file():
        raise ModelError(f"{path}: no such file")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)  # type: ignore[arg-type]
        sys.modules[path.stem] = module
        module_spec.loader.exec_module(module)  # type: ignore[union-attr]
        return module
    except Exception as error:
        raise ModelError(f"{place}: cannot be imported: {type(error).__name__}: {error}") from error


def _load_exported(path: Path) -> tuple[nn.Module, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path}: not a readable exported program: {error}") from error
    arguments = program.example_inputs[0] if program.example_inputs else ()
    return program.module(), tuple(a for a in arguments if isinstance(a, torch.Tensor)), ()


def _onnx_inputs(path: Path) -> tuple[torch.Tensor, ...]:
    """Example inputs of an .onnx file; a free first axis is 1, and any other free axis leaves them to the user."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    examples = []
    for value in (v for v in model.graph.input if v.name not in weights):
        kind = value.type.tensor_type
        sizes = [d.dim_value for d in kind.shape.dim]
        sizes[:1] = [sizes[0] or 1] if sizes else []
        if not sizes or 0 in sizes:
            return ()
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        examples.append(Example(tuple(sizes), getattr(torch, str(dtype))))
    return random_inputs(nn.Identity(), examples)


def _set_mode(module: nn.Module, training: bool | None) -> None:
    if training is None:
        return
    try:
        module.train(training)
    except NotImplementedError as error:
        raise ModelError(
            "an exported program keeps the mode in which it was exported: leave --train and --eval out, and export it in the "
            "mode that you want"
        ) from error


def _inputs(job: Job, module: nn.Module, x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    if job.examples:
        x = random_inputs(module, job.examples)
    if not x:
        raise InputError(f"{job.model} does not say the shape of its input: add --x, as in --x 8x3x96x96 (batch first)")
    if job.batch is None:
        return x
    return tuple(value[torch.arange(job.batch) % len(value)] for value in x)


def _tuple(part: Any) -> tuple[torch.Tensor, ...]:
    return tuple(part) if isinstance(part, (tuple, list)) else (part,)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


def _compiled(
    artifact: Artifact, traced: graph.TrainGraph, folder: str | Path, seconds: dict[str, float], summary: Summary | None
) -> Compiled:
    manifest = artifact.manifest
    inputs = [spec for spec in manifest.named["train_step"].inputs if spec.role in ("input", "target")]
    return Compiled(
        folder=str(folder),
        device=str(manifest.device["name"]),
        runs_here=describe.runs_here(manifest),
        loss=manifest.loss.name,
        optimizer=dict(manifest.optimizer),
        inputs={spec.name: f"{console.shape(spec.shape)} {spec.dtype}" for spec in inputs},
        layers=len(traced.layers),
        parameters=sum(artifact.state[name].size for name in traced.parameters if name in artifact.state),
        trained=sum(artifact.state[name].size for name in manifest.trained),
        seconds=seconds,
        memory=manifest.memory.entries["train_step"],
        backward_flops=sum(cost.flops for cost in manifest.costs),
        summary=summary,
    )
