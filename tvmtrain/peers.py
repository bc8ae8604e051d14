"""A training step in PyTorch as fast as PyTorch has it: fused optimizer, channels last, ``torch.compile``.

ONNX Runtime and JAX are no peers here: neither comes with this project, so nobody would run what stood here for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from tvmtrain import exporting, jobs
from tvmtrain.contestant import PROCESS, Started
from tvmtrain.errors import InputError
from tvmtrain.spec import SGD, AdamW, Optimizer

CHANNELS_LAST, COMPILED = "-cl", "compile"


def start(name: str, job: jobs.Job, trained: Iterable[str] | None, threads: int) -> Started:
    """The step of ``job`` as ``name``, one of ``contestant.PEERS``, has it; it returns its loss.

    trained: names of parameters; None: those that require a gradient. A weight of which a step of ours trains a share is trained whole.
    """
    update = Training.of(name, job, prepared(name, job, trained, threads)).update
    return Started(lambda: update().item(), PROCESS, lambda: None)


def prepared(name: str, job: jobs.Job, trained: Iterable[str] | None, threads: int) -> jobs.Prepared:
    """The model that trains ``trained``, and its batch, in the layout of ``name``. Raises what ``jobs.prepare`` raises."""
    torch.set_num_threads(threads)
    made = jobs.prepare(job)
    if trained is not None:
        _train(made.module, set(trained))
    if CHANNELS_LAST not in name:
        return made
    module = made.module.to(memory_format=torch.channels_last)
    return replace(made, module=module, x=tuple(_channels_last(t) for t in made.x))


@dataclass(frozen=True)
class Training:
    """``update`` is one step on the batch that it was made with, where that lies; its loss lies there, too."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    update: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, name: str, job: jobs.Job, what: jobs.Prepared, capturable: bool = False) -> Training:
        """capturable: the optimizer counts its steps on the GPU, where a CUDA graph has to have them."""

        def forward() -> torch.Tensor:
            return exporting.apply_loss(job.loss, what.module(*what.x), what.y)

        loss_of = torch.compile(forward) if name.startswith(COMPILED) else forward
        parameters = [parameter for parameter in what.module.parameters() if parameter.requires_grad]
        optimizer = _optimizer(job.optimizer, parameters, capturable)

        def update() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            if job.optimizer.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, job.optimizer.clip_norm)
            optimizer.step()
            return loss.detach()

        return cls(what.module, optimizer, update)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _train(module: nn.Module, names: set[str]) -> None:
    known = dict(module.named_parameters())
    if missing := sorted(names - known.keys()):
        raise InputError(f"the compiled step trains {', '.join(missing[:5])}, which PyTorch's model does not have by that name")
    for name, parameter in known.items():
        parameter.requires_grad_(name in names)


def _optimizer(spec: Optimizer, parameters: list[nn.Parameter], capturable: bool) -> torch.optim.Optimizer:
    if isinstance(spec, SGD):
        options = {"momentum": spec.momentum, "weight_decay": spec.weight_decay, "nesterov": spec.nesterov}
        return torch.optim.SGD(parameters, lr=spec.lr, fused=True, **options)
    kind = torch.optim.AdamW if isinstance(spec, AdamW) else torch.optim.Adam
    means = {"betas": spec.betas, "eps": spec.eps}
    return kind(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=True, capturable=capturable, **means)
