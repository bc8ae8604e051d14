"""Small Relax functions, compiled and run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax
from tvm.runtime.vm import VirtualMachine

from tvmtrain import lowering, targets


def module(make: Callable[..., relax.Expr], *arrays: np.ndarray) -> tvm.IRModule:
    """One Relax function ``main`` of as many tensors, with the value of ``make``."""
    bb = relax.BlockBuilder()
    variables = [relax.Var(f"v{i}", relax.TensorType(list(a.shape), str(a.dtype))) for i, a in enumerate(arrays)]
    with bb.function("main", variables):
        with bb.dataflow():
            out = bb.emit_output(bb.normalize(make(*variables)))
        bb.emit_func_output(out)
    return bb.get()


def run(make: Callable[..., relax.Expr], *arrays: np.ndarray) -> list[np.ndarray]:
    """The results of ``make``, compiled for this machine."""
    executable = lowering.compile_module(module(make, *arrays), targets.load("host"))
    result = VirtualMachine(executable, tvm.cpu())["main"](*[tvm.runtime.tensor(a) for a in arrays])
    return [result.numpy()] if isinstance(result, tvm.runtime.Tensor) else [r.numpy() for r in result]


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal but for rounding, relative to the largest value wanted."""
    assert got.shape == wanted.shape
    if wanted.size:
        error = float(np.abs(got - wanted).max())
        assert error <= tolerance * max(float(np.abs(wanted).max()), 1e-3), error
