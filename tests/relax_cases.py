"""Small Relax functions, compiled and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import tvm
from tvm import relax
from tvm.runtime.vm import VirtualMachine

from tvmtrain import lowering, targets
from tvmtrain.targets import Device

# Where ``run`` runs; None: on this machine's processor.
_device: Device | None = None


@contextmanager
def on(device: Device) -> Iterator[None]:
    """Let ``run`` compile for ``device``, which this machine has, and run there."""
    global _device
    _device, before = device, _device
    try:
        yield
    finally:
        _device = before


def module(make: Callable[..., relax.Expr], *arrays: np.ndarray) -> tvm.IRModule:
    """One Relax function ``main`` of as many tensors, with the value of ``make``."""
    bb = relax.BlockBuilder()
    variables = [relax.Var(f"v{i}", relax.TensorType(list(a.shape), str(a.dtype))) for i, a in enumerate(arrays)]
    with bb.function("main", variables):
        with bb.dataflow():
            out = bb.emit_output(bb.normalize(make(*variables)))
        bb.emit_func_output(out)
    return bb.get()


def run(make: Callable[..., relax.Expr], *arrays: np.ndarray, device: Device | None = None) -> list[np.ndarray]:
    """The results of ``make``, compiled for this machine, or for a ``device`` whose code runs here."""
    device = device or _device or targets.load("host")
    place = tvm.cuda() if device.gpu else tvm.cpu()
    module_of = lowering.compile_module(module(make, *arrays), device)
    result = VirtualMachine(module_of, place)["main"](*[tvm.runtime.tensor(a, place) for a in arrays])
    return [result.numpy()] if isinstance(result, tvm.runtime.Tensor) else [r.numpy() for r in result]


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal but for rounding, relative to the largest value wanted."""
    assert got.shape == wanted.shape
    if wanted.size:
        error = float(np.abs(got - wanted).max())
        assert error <= tolerance * max(float(np.abs(wanted).max()), 1e-3), error
