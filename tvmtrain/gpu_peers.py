"""A training step in PyTorch on this machine's NVIDIA GPU: as in ``peers``, and as one CUDA graph.

The terms are those of the compiled step: a batch that lies in the processor's memory goes to the GPU in every step, and the loss
comes back; float32 is computed in float32, without TF32. PyTorch's batch is pinned, as its loaders leave it, goes into the same
tensors every time, and cuDNN tries what is fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from tvmtrain import jobs, peers
from tvmtrain.contestant import GRAPH, Memory, Started
from tvmtrain.errors import DeviceError

PLACE = "cuda"
WARMUP = 3  # steps before a capture, as PyTorch asks for: what is made at the first use has to be there


def check(device: str) -> None:
    """Raise ``DeviceError`` where PyTorch cannot compute on a GPU, for a comparison on ``device``."""
    if torch.cuda.is_available():
        return
    has = "finds no GPU" if torch.version.cuda else "was built without CUDA"
    raise DeviceError(
        f"device {device!r} is a GPU, and the PyTorch {torch.__version__} that is installed {has}, so that its peers cannot run there; "
        "install PyTorch with CUDA (pytorch.org/get-started) and an NVIDIA driver that is new enough for it"
    )


def start(name: str, job: jobs.Job, trained: Iterable[str] | None, threads: int) -> Started:
    """The step of ``job`` as ``name``, one of ``contestant.GPU_PEERS``, has it; else as ``peers.start``. Raises ``DeviceError``."""
    check(job.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    here = peers.prepared(name, job, trained, threads)
    there = jobs.Prepared(here.module.to(PLACE), *(tuple(t.to(PLACE, copy=True) for t in ts) for ts in (here.x, here.y)))
    batch = [(t.pin_memory(), copy) for t, copy in zip((*here.x, *here.y), (*there.x, *there.y), strict=True)]
    graph = name.endswith(GRAPH)
    training = peers.Training.of(name, job, there, capturable=graph)
    update: Callable[[], torch.Tensor] = training.update
    memory = Memory(lambda: 0, torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated)
    if graph:
        captured = Captured(training)
        update, memory = captured, replace(memory, reset=lambda: None, peak=lambda: captured.peak)

    def step() -> float:
        for source, copy in batch:
            copy.copy_(source, non_blocking=True)
        return update().item()

    return Started(step, memory, torch.cuda.synchronize)


class Captured:
    """The update of ``training`` as one CUDA graph: captured at the first call, and then as if no step had been taken.

    peak: bytes of tensors at most while it was captured; a replay finds them in the graph's own memory, where PyTorch does not count.
    """

    def __init__(self, training: peers.Training) -> None:
        self.training, self.peak = training, 0
        self._replay: Callable[[], None] | None = None
        self._loss = torch.empty(())

    def __call__(self) -> torch.Tensor:
        """One step; its loss is overwritten by the next one."""
        if self._replay is None:
            put_back = _kept(self.training.module)
            self._replay = self._capture()
            put_back()
            _forget(self.training.optimizer)
        self._replay()
        return self._loss

    def _capture(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self.training.update()
        torch.cuda.current_stream().wait_stream(side)
        # Gradients that a graph makes have to lie in its own memory.
        self.training.optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self.training.update()
        self.peak = torch.cuda.max_memory_allocated()
        return graph.replay


def _kept(module: nn.Module) -> Callable[[], None]:
    """What gives the parameters and buffers of ``module`` the values of now, in the memory that they are in."""
    tensors = [*module.parameters(), *module.buffers()]
    values = [t.detach().to("cpu", copy=True) for t in tensors]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)

    return put_back


def _forget(optimizer: torch.optim.Optimizer) -> None:
    """The state of an optimizer that has taken no step is zero in SGD, Adam and AdamW; it stays where the graph knows it."""
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()
