"""CUDA graphs of PyTorch where there is no NVIDIA GPU: what it would do there it does on the processor.

A graph records operators as CUDA's does kernels, and a replay has them write into the same tensors. It says nothing about speed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tvmtrain import gpu_peers

PEAKS = 2**20  # bytes that PyTorch says to have on the GPU at most


class Graph:
    """``torch.cuda.CUDAGraph``: calls of operators, and the tensors in which their results have to lie."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, arguments, options, results in self.calls:
                for old, new in zip(tensors(results), tensors(function(*arguments, **options)), strict=True):
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), options: Any = None) -> Any:
        results = function(*arguments, **(options or {}))
        self.graph.calls.append((function, arguments, options or {}, results))
        return results


class Streams:
    """``torch.cuda``'s streams: what runs on which, and which waits for which."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.current = self.new()
        self.events: list[str] = []

    def new(self) -> Stream:
        return Stream(self, f"stream {next(self.numbers)}")

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        self.events.append(f"on {stream.name}")
        yield
        self.current = before

    @contextlib.contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        self.events.append(f"capture while on {self.current.name}")
        with Recorder(graph):
            yield


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def wait_stream(self, other: Stream) -> None:
        self.streams.events.append(f"{self.name} waits for {other.name}")


def tensors(results: Any) -> list[torch.Tensor]:
    several = results if isinstance(results, (tuple, list)) else (results,)
    return [result for result in several if isinstance(result, torch.Tensor)]


def emulate(replace: Callable[[Any, str, Any], None]) -> Streams:
    """``replace(object, attribute, value)`` what PyTorch needs a GPU for; its tensors stay on the processor."""
    streams = Streams()
    replace(gpu_peers, "PLACE", "cpu")
    replace(gpu_peers, "check", lambda _: None)
    replace(torch.Tensor, "pin_memory", torch.Tensor.clone)
    new = {"CUDAGraph": Graph, "graph": streams.capture, "Stream": streams.new, "stream": streams.on}
    new |= {"current_stream": lambda: streams.current, "synchronize": lambda: None}
    new |= {"reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: PEAKS}
    for name, value in new.items():
        replace(torch.cuda, name, value)
    return streams
