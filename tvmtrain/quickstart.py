"""The whole road on real data in about a minute: handwritten digits, a small MobileNetV2, a new domain, PyTorch beside it.

A network is pre-trained in PyTorch on half of scikit-learn's digits (1797 images of 8x8 pixels, light on dark). The other half
is inverted, dark on light: there it fails. It is then fine-tuned on them twice from the same
weights, with the same batches in the same order: by the compiled step and by PyTorch.
"""

from __future__ import annotations

import copy
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from tvmtrain import builder, console, data, graph, runtime, training
from tvmtrain.errors import InputError, StorageError
from tvmtrain.runtime import TrainStep
from tvmtrain.spec import SGD

PIXELS = 16  # height and width that the 8x8 images are enlarged to
BATCH = 32
PRETRAINING_EPOCHS = 8
EPOCHS = 8
OPTIMIZER = SGD(lr=0.05, momentum=0.9, weight_decay=1e-4)
BLOCK = 20  # steps of one side before it is the other's turn
TRIED = 7  # steps to find out with how many threads PyTorch is faster

Arrays = tuple[np.ndarray, ...]
Trainer = Callable[[Arrays, Arrays, float], float]  # (inputs, targets, learning rate) -> loss


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 to more channels, 3x3 per channel, 1x1 to few; added to its input where shapes allow."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = channels * expansion
        self.conv = nn.Sequential(
            *_convolution(channels, inside, 1),
            *_convolution(inside, inside, 3, stride, inside),
            *_convolution(inside, out, 1)[:2],
        )
        self.adds = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class DigitNet(nn.Module):
    """Digits [N, 1, 16, 16] in 0..1 to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, 16, 3),
            InvertedResidual(16, 24, 2, 4),
            InvertedResidual(24, 24, 1, 4),
            InvertedResidual(24, 40, 2, 4),
            InvertedResidual(40, 40, 1, 4),
            *_convolution(40, 96, 1),
        )
        self.classifier = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU6()


def network() -> tuple[nn.Module, torch.Tensor]:
    """The network with random weights, and an example batch: ``tvmtrain verify tvmtrain.quickstart:network``."""
    return DigitNet(), torch.rand(BATCH, 1, PIXELS, PIXELS)


@dataclass(frozen=True)
class Side:
    """One way of fine-tuning: accuracy on the new domain's test images after it, milliseconds of a step (median)."""

    accuracy: float
    loss: float
    ms_per_step: float


@dataclass(frozen=True)
class Result:
    """What the quickstart found. Accuracies are shares of test images; ``before`` is the pre-trained network's on the new domain.

    ``threads`` are those of each side. So small a network can be faster in PyTorch with one thread than with all: both are tried
    (``pytorch_ms_by_threads``, milliseconds of a step), and PyTorch gets the faster.
    """

    folder: str
    samples: dict[str, int]
    pretrained: float
    before: float
    compiled: Side
    pytorch: Side
    pytorch_ms_by_threads: dict[int, float]
    threads: dict[str, int]
    steps: int
    compile_seconds: float
    seconds: float
    next: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Images:
    """uint8 images [N, 16, 16, 1] and labels [N]."""

    x: np.ndarray
    y: np.ndarray

    def split(self, share: float) -> tuple[Images, Images]:
        """The first ``share`` of the images, and the others."""
        at = int(len(self.y) * share)
        return Images(self.x[:at], self.y[:at]), Images(self.x[at:], self.y[at:])

    def inverted(self) -> Images:
        return Images(255 - self.x, self.y)

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.x.transpose(0, 3, 1, 2).astype("float32") / np.float32(255))


def quickstart(folder: str | Path, out: console.Console) -> Result:
    """Pre-train, compile into ``folder``, fine-tune both ways. Raises ``StorageError`` where ``folder`` cannot be written."""
    started = time.perf_counter()
    folder = _made(Path(folder))
    first, second = digits().split(0.5)
    (train_a, test_a), (train_b, test_b) = first.split(0.75), second.inverted().split(2 / 3)
    out.line(
        f"{len(first.y)} digits to pre-train on and {len(second.y)} inverted ones to fine-tune on, {PIXELS}x{PIXELS} pixels"
    )
    # One thread is enough for images this small, and it does not suffer where other programs run beside it.
    torch.set_num_threads(1)
    with out.working(f"pre-training in PyTorch, {PRETRAINING_EPOCHS} epochs"):
        model = pretrain(train_a)
    before, pretrained = _accuracy(model, test_b), _accuracy(model, test_a)
    out.line(
        f"accuracy of the pre-trained network: {console.percent(pretrained)} on digits, {console.percent(before)} on inverted ones"
    )
    start = time.perf_counter()
    with out.working("compiling the training step for this machine"):
        step = _compile(model, folder)
    compile_seconds = time.perf_counter() - start
    npz = _save_data(folder / "digits.npz", train_b, test_b)
    train, test = _load(npz, step)
    tried = _pytorch_by_threads(model, train)
    torch.set_num_threads(min(tried, key=tried.__getitem__))
    out.line(f"fine-tuning compiled and in PyTorch, {EPOCHS} epochs each, by turns of {BLOCK} steps")
    compiled, pytorch = fine_tune(step, model, train, test, out)
    step.save(folder / "finetuned.safetensors")
    return Result(
        folder=str(folder),
        samples={"pretraining": len(train_a.y), "training": len(train_b.y), "test": len(test_b.y)},
        pretrained=pretrained,
        before=before,
        compiled=compiled,
        pytorch=pytorch,
        pytorch_ms_by_threads=tried,
        threads={"compiled": runtime.default_threads(), "pytorch": torch.get_num_threads()},
        steps=step.steps,
        compile_seconds=round(compile_seconds, 2),
        seconds=round(time.perf_counter() - started, 1),
        next=next_commands(folder),
    )


def show(result: Result, out: console.Console) -> None:
    """Print ``result``."""
    rows = [
        (
            name,
            console.percent(result.before),
            console.percent(side.accuracy),
            console.number(side.loss),
            f"{side.ms_per_step:.2f}",
        )
        for name, side in (("compiled", result.compiled), ("PyTorch", result.pytorch))
    ]
    out.table(("inverted digits", ">accuracy before", ">after", ">loss after", ">ms per step"), rows)
    ratio = result.compiled.ms_per_step / result.pytorch.ms_per_step
    out.line(f"{result.steps} steps of {BATCH} images; a compiled step takes {ratio:.2f} times as long as PyTorch's")
    tried = ", ".join(f"{ms:.1f} ms with {_threads(count)}" for count, ms in result.pytorch_ms_by_threads.items())
    out.line(f"threads: {result.threads['compiled']} compiled; PyTorch has the faster of {tried}")
    out.line(f"compiled in {result.compile_seconds:.1f} s into {result.folder}; {result.seconds:.0f} s in all")
    out.line()
    out.line("next:", style="bold")
    for command in result.next:
        out.line(f"  {command}")


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def digits() -> Images:
    """scikit-learn's digits, enlarged, in an order that mixes the classes and the writers."""
    stored = load_digits()
    rows = np.random.default_rng(0).permutation(len(stored.target))
    large = data.resize((stored.images[rows, None] * (255 / 16)).astype("float32"), PIXELS, PIXELS)
    return Images(large.round().astype("uint8").transpose(0, 2, 3, 1), stored.target[rows].astype("int64"))


def pretrain(images: Images) -> nn.Module:
    """The network trained on ``images``, in training mode."""
    torch.manual_seed(0)
    model = DigitNet()
    train = _torch_side(model)
    x, y = images.tensor().numpy(), images.y
    for rows, lr in _batches(len(y), PRETRAINING_EPOCHS):
        train((x[rows],), (y[rows],), lr)
    return model


def fine_tune(
    step: TrainStep, model: nn.Module, train: data.Dataset, test: data.Dataset, out: console.Console
) -> tuple[Side, Side]:
    """(compiled, PyTorch): both from the weights of ``model`` on the same batches, by turns of some steps."""
    model = copy.deepcopy(model)
    sides: tuple[Trainer, Trainer] = (step, _torch_side(model))
    times: tuple[list[float], list[float]] = ([], [])
    batches = list(_batches(len(train), EPOCHS))
    with out.progress("fine-tuning", len(batches)) as bar:
        for start in range(0, len(batches), BLOCK):
            block = [(*train.batch(rows), lr) for rows, lr in batches[start : start + BLOCK]]
            for side, milliseconds in zip(sides, times, strict=True):
                milliseconds += _timed(side, block)
            compiled, pytorch = (statistics.median(milliseconds) for milliseconds in times)
            bar.advance(len(block), f"compiled {compiled:.1f} ms/step  PyTorch {pytorch:.1f} ms/step")
    x, y = test.batch(range(len(test)))
    score = step.evaluate(x, y)
    model.eval()
    with torch.no_grad():
        logits, labels = model(torch.from_numpy(x[0])), torch.from_numpy(y[0])
    loss = float(nn.functional.cross_entropy(logits, labels))
    accuracy = float((logits.argmax(1) == labels).float().mean())
    return Side(score.accuracy or 0.0, float(score), compiled), Side(accuracy, loss, pytorch)


def _pytorch_by_threads(model: nn.Module, samples: data.Dataset) -> dict[int, float]:
    """The median milliseconds of a step of PyTorch on a copy of ``model``, with one thread and with as many as the step has."""
    batches = [(*samples.batch(range(BATCH)), OPTIMIZER.lr)] * TRIED
    found = {}
    for threads in sorted({1, runtime.default_threads()}):
        torch.set_num_threads(threads)
        found[threads] = statistics.median(_timed(_torch_side(copy.deepcopy(model)), batches))
    return found


def next_commands(folder: Path) -> tuple[str, ...]:
    """What to try on what the quickstart has left in ``folder``."""
    name = shlex.quote(str(folder))
    at = f"{name}/digits.npz"
    return (
        f"tvmtrain inspect {name}",
        f"tvmtrain run {name} --data {at} --eval --resume {name}/finetuned.safetensors",
        f"tvmtrain run {name} --data {at} --epochs {EPOCHS} --schedule cosine --shuffle --save {name}/again.safetensors",
        "tvmtrain verify tvmtrain.quickstart:network",
    )


def _compile(model: nn.Module, folder: Path) -> TrainStep:
    x, y = torch.rand(BATCH, 1, PIXELS, PIXELS), torch.zeros(BATCH, dtype=torch.int64)
    artifact = builder.build(graph.trace(model, x, y, optimizer=OPTIMIZER))
    artifact.save(folder)
    return runtime.load(folder)


def _made(folder: Path) -> Path:
    """``folder``, before time is spent on what could not be kept there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}; choose another with -o") from error
    return folder


def _save_data(path: Path, train: Images, test: Images) -> Path:
    try:
        np.savez_compressed(path, x_train=train.x, y_train=train.y, x_test=test.x, y_test=test.y)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another folder with -o") from error
    return path


def _load(npz: Path, step: TrainStep) -> tuple[data.Dataset, data.Dataset]:
    """Samples to train on and to test on, as ``tvmtrain run`` reads them."""
    samples = data.load(npz, step.manifest)
    if samples.train is None or samples.test is None:
        raise InputError(f"{npz} was changed while the quickstart ran; start it again")
    return samples.train, samples.test


def _torch_side(model: nn.Module) -> Trainer:
    """A training step in PyTorch, as everyone writes it, that is called as a compiled one."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=OPTIMIZER.lr, momentum=OPTIMIZER.momentum, weight_decay=OPTIMIZER.weight_decay
    )

    def step(x: Arrays, y: Arrays, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(x[0])), torch.from_numpy(y[0]))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _batches(count: int, epochs: int) -> Iterator[tuple[np.ndarray, float]]:
    """(sample numbers, learning rate) of every step: what ``tvmtrain run --shuffle --schedule cosine`` does."""
    per_epoch = count // BATCH
    rate = training.Rate(OPTIMIZER.lr, "cosine")
    for epoch in range(epochs):
        order = training.order(count, epoch, 0, True)
        for i in range(per_epoch):
            yield order[i * BATCH : (i + 1) * BATCH], rate.at(epoch * per_epoch + i, per_epoch, epochs)


def _timed(side: Trainer, batches: Sequence[tuple[Arrays, Arrays, float]]) -> list[float]:
    """Milliseconds of each step but the first ones, in which threads wake up and caches fill."""
    milliseconds = []
    for x, y, lr in batches:
        start = time.perf_counter()
        side(x, y, lr)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return milliseconds[min(3, len(milliseconds) - 1) :]


def _accuracy(model: nn.Module, images: Images) -> float:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return float((model(images.tensor()).argmax(1) == torch.from_numpy(images.y)).float().mean())
