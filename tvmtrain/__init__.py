"""tvmtrain compiles the training step of a PyTorch model with Apache TVM.

Names are looked up when they are first used: a device that only runs a step imports neither PyTorch nor the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvmtrain.artifact import Artifact
    from tvmtrain.builder import build
    from tvmtrain.errors import TvmtrainError
    from tvmtrain.graph import TrainGraph, trace
    from tvmtrain.remote import Board, connect
    from tvmtrain.runtime import TrainStep, load
    from tvmtrain.spec import SGD, Adam, AdamW, LayerUpdate, UpdatePlan
    from tvmtrain.targets import Device

_HOMES = {
    "Adam": "spec",
    "AdamW": "spec",
    "Artifact": "artifact",
    "Board": "remote",
    "Device": "targets",
    "LayerUpdate": "spec",
    "SGD": "spec",
    "TrainGraph": "graph",
    "TrainStep": "runtime",
    "TvmtrainError": "errors",
    "UpdatePlan": "spec",
    "build": "builder",
    "connect": "remote",
    "load": "runtime",
    "trace": "graph",
}

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Artifact",
    "Board",
    "Device",
    "LayerUpdate",
    "TrainGraph",
    "TrainStep",
    "TvmtrainError",
    "UpdatePlan",
    "build",
    "connect",
    "load",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
