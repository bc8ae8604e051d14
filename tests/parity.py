"""The same training step in PyTorch and compiled, side by side: what the tests of operators and of whole models measure."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import tvmtrain as tt
from tvmtrain import philox, targets

RELATIVE, ABSOLUTE = 1e-3, 1e-6  # a gradient's error: of its own largest value, or at all
LOSSES: dict[str, Callable] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


@functools.cache
def quick_device() -> tt.Device:
    """This machine as a processor with short vectors, compiled without optimization: half the time of the real one."""
    host = targets.load("host")
    target = {**host.target, "opt-level": 0}
    return replace(host, name="quick", target=target, vector_bits=128, vector_registers=8)


class SameRandomNumbers(TorchFunctionMode):
    """PyTorch draws what the compiled step draws: stream s of step t of a seed, in the order of the calls."""

    def __init__(self, seed: int, step: int) -> None:
        super().__init__()
        self.seed, self.step, self.streams = seed, step, 0

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        stream, self.streams = self.streams, self.streams + 1
        return torch.from_numpy(philox.uniform_numpy(self.seed, self.step, shape, stream))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout, torch.dropout_):
            return self.drop(*args, **kwargs)
        if func in (F.dropout1d, F.dropout2d, F.dropout3d):
            return self.drop(*args, **kwargs, axes=2)
        if func is torch.rand:
            return self.uniform(tuple(args[0]) if isinstance(args[0], (tuple, list, torch.Size)) else args)
        if func is torch.rand_like:
            return self.uniform(tuple(args[0].shape))
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: Any,
        dropout_p: float,
        scale: Any = None,
        **rest: Any,
    ) -> torch.Tensor:
        """The weights are what an identity for v gives; PyTorch drops among them."""
        identity = torch.eye(k.shape[-2]).expand(*k.shape[:-1], k.shape[-2])
        weights = F.scaled_dot_product_attention(q, k, identity, attn_mask, scale=scale, **rest)
        return self.drop(weights, dropout_p) @ v

    def drop(
        self,
        x: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool = True,
        axes: int | None = None,
    ) -> torch.Tensor:
        """``axes``: how many leading axes have numbers of their own; Dropout2d drops whole channels."""
        if not (training and train and p):
            return x
        shape = [n if axes is None or a < axes else 1 for a, n in enumerate(x.shape)]
        return torch.where(self.uniform(tuple(shape)) < 1 - p, x / (1 - p) if p < 1 else x * 0, torch.zeros(()))


@dataclass(frozen=True)
class Reference:
    """One model with its data and loss, run by PyTorch itself."""

    model: nn.Module
    x: Any
    y: Any
    loss: Any = "cross_entropy"
    seed: int = 0

    def value(self, model: nn.Module, step: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(loss, outputs) of a step."""
        with SameRandomNumbers(self.seed, step):
            result = model(*self.x) if isinstance(self.x, tuple) else model(self.x)
        if not isinstance(self.loss, str):
            return self.loss(result, self.y), [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        output = primary(result)
        return LOSSES[self.loss](output, self.y), [output]

    def double(self) -> Reference:
        """The same in double precision."""
        x, y = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, (self.x, self.y))
        return replace(self, model=copy.deepcopy(self.model).double(), x=x, y=y)

    def gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """(loss, gradient of each parameter that PyTorch gives one)."""
        model = copy.deepcopy(self.model)
        loss, _ = self.value(model)
        loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return loss.item(), {name: p.grad.numpy() for name, p in trained.items() if p.grad is not None}

    def train(
        self, steps: int, optimizer: Callable[..., torch.optim.Optimizer], threads: int = 1
    ) -> tuple[list[float], nn.Module]:
        """(the loss before each step and after the last, the trained model)."""
        model = copy.deepcopy(self.model)
        rule = optimizer([p for p in model.parameters() if p.requires_grad])
        losses = []
        with torch_threads(threads):
            for step in range(steps):
                rule.zero_grad()
                loss, _ = self.value(model, step)
                loss.backward()
                rule.step()
                losses.append(loss.item())
            losses.append(self.value(copy.deepcopy(model), steps)[0].item())
        return losses, model


def primary(result: Any) -> torch.Tensor:
    """The logits of whatever a model returns."""
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if hasattr(result, "logits") else next(iter(pytree.tree_leaves(result)))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled(reference: Reference, optimizer: Any = None, device: Any = None) -> tt.TrainStep:
    """The compiled step of a reference, with its gradients."""
    graph = tt.trace(
        reference.model, reference.x, reference.y, loss=reference.loss, optimizer=optimizer or tt.SGD(), seed=reference.seed
    )
    return tt.build(graph, device or quick_device(), gradients=True).load()


def departures(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], allowed: Mapping[str, float] | None = None
) -> list[str]:
    """One line for each tensor that is beyond all tolerances, NaN included, worst first.

    allowed: an absolute error per tensor that is accepted, too.
    """
    found = []
    for name, want in theirs.items():
        got = ours[name]
        assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
        error = float(np.max(np.abs(got.astype("float64") - want.astype("float64")), initial=0))
        size = float(np.max(np.abs(want), initial=0))
        if not error <= max(ABSOLUTE, RELATIVE * size, (allowed or {}).get(name, 0)):
            found.append((error / max(size, 1e-30), f"{name}: off by {error:.3g}, largest value {size:.3g}"))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


def gradient_departures(reference: Reference, step: tt.TrainStep) -> list[str]:
    """Gradients that agree neither with PyTorch nor with PyTorch in double precision.

    Where a unit sits within rounding of a ReLU's corner, PyTorch itself takes another branch in double precision, and all
    gradients before it change. And a gradient that is zero but for rounding (a bias before a BatchNorm) has no digits to compare:
    four times PyTorch's own rounding is accepted.
    """
    ours = step.gradients(reference.x, reference.y)
    _, theirs = reference.gradients()
    assert set(ours) == set(theirs)
    if not (wrong := departures(ours, theirs)):
        return []
    _, exact = reference.double().gradients()
    rounding = {name: 4 * float(np.max(np.abs(exact[name] - value), initial=0)) for name, value in theirs.items()}
    own = {name: error for name, error in rounding.items() if error <= RELATIVE * max(1.0, float(np.max(np.abs(theirs[name]))))}
    return departures(ours, theirs, own) and departures(ours, exact, own) and wrong


def assert_same_steps(reference: Reference, step: tt.TrainStep, steps: int, lr: float, within: float = 1e-3) -> None:
    """Losses of plain SGD and the buffers afterwards, at a rate at which PyTorch agrees with itself ten times better."""
    sgd = functools.partial(torch.optim.SGD, lr=lr)
    theirs, model = reference.train(steps, sgd, threads=1)
    again, _ = reference.train(steps, sgd, threads=2)
    assert np.max(np.abs(np.subtract(theirs, again))) <= within / 10, f"PyTorch departs from itself at lr={lr}: no test"
    ours = [step(reference.x, reference.y, lr=lr) for _ in range(steps)]
    state = step.state_dict()
    ours.append(step(reference.x, reference.y, lr=lr))
    assert np.max(np.abs(np.subtract(ours, theirs))) <= within, f"losses {ours} and PyTorch's {theirs}"
    buffers = {name: value.numpy() for name, value in model.state_dict().items() if name in dict(model.named_buffers())}
    wrong = departures(state, buffers)
    assert not wrong, "buffers after training differ:\n" + "\n".join(wrong[:12])
