"""A hand-written compiled step, small enough to read: a linear layer, SGD with momentum, a counter and a random state."""

from __future__ import annotations

import functools
import platform

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op
from tvm.runtime import Executable

from tvmtrain.artifact import Artifact, Entry, LossSpec, Manifest, TensorSpec
from tvmtrain.costs import EntryMemory, Kernel, LayerCost, Memory, Timeline

BATCH, FEATURES, CLASSES = 4, 6, 3
MOMENTUM = 0.9
IGNORE = -100

X = TensorSpec("input", "x", (BATCH, FEATURES), "float32")
LABELS = TensorSpec("target", "y", (BATCH,), "int64")
VALUES = TensorSpec("target", "y", (BATCH, CLASSES), "float32")
RATE = TensorSpec("rate", "lr", (), "float32")
LOSS = TensorSpec("loss", "loss", (), "float32")
OUTPUT = TensorSpec("output", "logits", (BATCH, CLASSES), "float32")
WEIGHT = TensorSpec("parameter", "fc.weight", (CLASSES, FEATURES), "float32")
BIAS = TensorSpec("parameter", "fc.bias", (CLASSES,), "float32")
SEEN = TensorSpec("buffer", "fc.seen", (), "int64")
RANDOM = TensorSpec("random", "random:state", (2,), "int64")
VELOCITY = tuple(TensorSpec("optimizer", f"optimizer:momentum:{spec.name}", spec.shape, spec.dtype) for spec in (WEIGHT, BIAS))
UNREAD = TensorSpec("buffer", "fc.scale", (2,), "float32")
STATE = (WEIGHT, BIAS, SEEN, *VELOCITY, RANDOM)


def artifact(loss: str = "cross_entropy", seed: int = 0) -> Artifact:
    """The toy with ``loss`` cross_entropy, mse or custom (the mean squared error again); weights from ``seed``."""
    return Artifact(manifest(loss), state(seed), executable(loss))


def manifest(loss: str = "cross_entropy") -> Manifest:
    classes = (CLASSES, IGNORE) if loss == "cross_entropy" else (None, None)
    return Manifest(
        entries=entries(_target(loss)),
        aliases={"head.weight": "fc.weight"},
        trained=(WEIGHT.name, BIAS.name),
        loss=LossSpec(loss, *classes),
        optimizer={"name": "sgd", "momentum": MOMENTUM},
        plan='["fc"]\nweight = 1.0\n',
        device={"name": "host", "arch": platform.machine()},
        versions={"tvmtrain": "0.1.0", "tvm": tvm.__version__},
        lr=0.1,
        batch=BATCH,
        memory=memory(entries(_target(loss))),
        costs=(LayerCost("fc", "linear", 21, 96, 264),),
        kernels=(Kernel("matmul", 2, 144, 240), Kernel("add", 1, 12, 108)),
        unread=(UNREAD,),
    )


def memory(entries: tuple[Entry, ...]) -> Memory:
    """Of an arena that two kernels use: 48 bytes of a saved mask and 16 beside it, then the mask and a gradient."""
    line = Timeline(0, (0, 0), (48, 48), (0, 72), (16, 0), (0, 0), (0, 8), (4, 52))
    figures = EntryMemory(arena=128, lower_bound=120, results=52, workspace=8, saved_features=0, saved_masks=48)
    return Memory({entry.name: figures for entry in entries}, line)


def state(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    values = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in (*STATE, UNREAD)}
    trained = {spec.name: random.standard_normal(spec.shape).astype("float32") for spec in (WEIGHT, BIAS)}
    return values | trained


def entries(target: TensorSpec) -> tuple[Entry, ...]:
    gradients = tuple(TensorSpec("gradient", spec.name, spec.shape, spec.dtype) for spec in (WEIGHT, BIAS))
    return (
        Entry("train_step", (X, target, RATE, *STATE), (LOSS, OUTPUT, *STATE)),
        Entry("predict", (X, WEIGHT, BIAS), (OUTPUT,)),
        Entry("loss", (OUTPUT, target), (LOSS,)),
        Entry("gradients", (X, target, WEIGHT, BIAS), (LOSS, *gradients)),
    )


@functools.cache
def executable(loss: str) -> Executable:
    mod = module(loss)
    return tvm.compile(mod, target=tvm.target.Target({"kind": "llvm"}))


def module(loss: str) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    for entry in entries(_target(loss)):
        variables = [relax.Var(_identifier(spec.name), relax.TensorType(spec.shape, spec.dtype)) for spec in entry.inputs]
        with builder.function(entry.name, variables):
            with builder.dataflow():
                results = builder.emit_output(relax.Tuple(list(_bodies[entry.name](loss, *variables))))
            builder.emit_func_output(results)
    return builder.finalize()


def _target(loss: str) -> TensorSpec:
    return LABELS if loss == "cross_entropy" else VALUES


def _identifier(name: str) -> str:
    return name.replace(".", "_").replace(":", "_")


def _logits(x, weight, bias):
    return op.add(op.matmul(x, op.permute_dims(weight)), bias)


def _loss(loss, logits, y):
    """The loss and its gradient with respect to the logits."""
    if loss != "cross_entropy":
        error = op.subtract(logits, y)
        scale = relax.const(2 / (BATCH * CLASSES), "float32")
        return op.mean(op.multiply(error, error)), op.multiply(error, scale)
    numbers = relax.const(np.arange(CLASSES)[None], "int64")
    hot = op.astype(op.equal(op.expand_dims(y, 1), numbers), "float32")
    # An ignored label is no class at all: its row of ``hot`` is zero.
    counts = op.sum(hot, axis=1, keepdims=True)
    total = op.sum(hot)
    loss = op.divide(op.negative(op.sum(op.multiply(op.nn.log_softmax(logits, 1), hot))), total)
    return loss, op.divide(op.subtract(op.multiply(op.nn.softmax(logits, 1), counts), hot), total)


def _gradients(loss, x, y, weight, bias):
    logits = _logits(x, weight, bias)
    value, slope = _loss(loss, logits, y)
    return value, logits, op.matmul(op.permute_dims(slope), x), op.sum(slope, axis=0)


def _train_step(loss, x, y, rate, weight, bias, seen, weight_velocity, bias_velocity, random):
    value, logits, *gradients = _gradients(loss, x, y, weight, bias)
    momentum = relax.const(MOMENTUM, "float32")
    velocities = [op.add(op.multiply(momentum, v), g) for v, g in zip((weight_velocity, bias_velocity), gradients, strict=True)]
    moved = [op.subtract(p, op.multiply(rate, v)) for p, v in zip((weight, bias), velocities, strict=True)]
    counted = op.add(seen, relax.const(1, "int64"))
    return value, logits, *moved, counted, *velocities, op.add(random, relax.const(np.array([0, 1]), "int64"))


def _entry_gradients(loss, x, y, weight, bias):
    value, _, *gradients = _gradients(loss, x, y, weight, bias)
    return value, *gradients


_bodies = {
    "train_step": _train_step,
    "predict": lambda loss, x, weight, bias: (_logits(x, weight, bias),),
    "loss": lambda loss, logits, y: (_loss(loss, logits, y)[0],),
    "gradients": _entry_gradients,
}
