"""A training step in PyTorch as fast as PyTorch has it: fused optimizer, channels last, ``torch.compile``.

ONNX Runtime and JAX are no peers here: neither comes with this project, so nobody would run what stood here for them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tvmtrain import importer, jobs
from tvmtrain.contestant import Step
from tvmtrain.errors import InputError
from tvmtrain.spec import SGD, AdamW, Optimizer

CHANNELS_LAST, COMPILED = "-cl", "compile"


def start(name: str, job: jobs.Job, trained: Iterable[str] | None, threads: int) -> Step:
    """The step of ``job`` as ``name``, one of ``contestant.PEERS``, has it; it returns its loss.

    trained: names of parameters; None: those that require a gradient. A weight of which a step of ours trains a share is trained whole.
    """
    torch.set_num_threads(threads)
    prepared = jobs.prepare(job)
    module, x, y = prepared.module, prepared.x, prepared.y
    if trained is not None:
        _train(module, set(trained))
    if name.endswith(CHANNELS_LAST):
        module = module.to(memory_format=torch.channels_last)
        x = tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in x)

    def forward() -> torch.Tensor:
        return importer.apply_loss(job.loss, module(*x), y)

    loss_of = torch.compile(forward) if name.startswith(COMPILED) else forward
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = _optimizer(job.optimizer, parameters)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        if job.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, job.optimizer.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def _train(module: nn.Module, names: set[str]) -> None:
    known = dict(module.named_parameters())
    if missing := sorted(names - known.keys()):
        raise InputError(f"the compiled step trains {', '.join(missing[:5])}, which PyTorch's model does not have by that name")
    for name, parameter in known.items():
        parameter.requires_grad_(name in names)


def _optimizer(spec: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if isinstance(spec, SGD):
        options = {"momentum": spec.momentum, "weight_decay": spec.weight_decay, "nesterov": spec.nesterov}
        return torch.optim.SGD(parameters, lr=spec.lr, fused=True, **options)
    kind = torch.optim.AdamW if isinstance(spec, AdamW) else torch.optim.Adam
    return kind(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)
