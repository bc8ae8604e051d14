"""The C API through ctypes, as much like ``TrainStep`` as a test wants it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from tvmtrain.artifact import DTYPES

OK, INPUT, NONFINITE, ARTIFACT, CHECKPOINT, DEVICE, STORAGE, INTERNAL = range(8)


class Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


class Spec(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


class NativeError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NativeStep:
    def __init__(self, library: Path, folder: Path, threads: int = 1) -> None:
        self.api = ctypes.CDLL(str(library))
        self.api.tvmtrain_last_error.restype = ctypes.c_char_p
        self.api.tvmtrain_steps.restype = ctypes.c_int64
        self.api.tvmtrain_steps.argtypes = self.api.tvmtrain_inputs.argtypes = (ctypes.c_void_p,)
        self.api.tvmtrain_rate.restype = ctypes.c_double
        self.handle = ctypes.c_void_p()
        self.check(self.api.tvmtrain_load(str(folder).encode(), threads, ctypes.byref(self.handle)))

    def __del__(self) -> None:
        self.api.tvmtrain_free(self.handle)

    def check(self, status: int) -> None:
        if status != OK:
            raise NativeError(status, self.api.tvmtrain_last_error().decode())

    def memory(self, folder: Path, threads: int) -> tuple[int, int]:
        """Bytes that training takes, and that there are."""
        needed, available = ctypes.c_int64(), ctypes.c_int64()
        self.check(self.api.tvmtrain_memory(str(folder).encode(), threads, ctypes.byref(needed), ctypes.byref(available)))
        return needed.value, available.value

    def __call__(self, x, y, lr: float = -1.0) -> float:
        loss = ctypes.c_double()
        inputs, targets = arrays(x), arrays(y)
        self.check(self.api.tvmtrain_step(self.handle, inputs, targets, ctypes.c_double(lr), ctypes.byref(loss)))
        return loss.value

    def predict(self, x, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        output = np.full(shape, -1, dtype)
        self.check(self.api.tvmtrain_predict(self.handle, arrays(x), arrays(output)))
        return output

    def read(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        value = np.zeros(shape, dtype)
        self.check(self.api.tvmtrain_read(self.handle, name.encode(), arrays(value)))
        return value

    def save(self, path: Path) -> None:
        self.check(self.api.tvmtrain_save(self.handle, str(path).encode()))

    def restore(self, path: Path) -> None:
        self.check(self.api.tvmtrain_restore(self.handle, str(path).encode()))

    @property
    def steps(self) -> int:
        return self.api.tvmtrain_steps(self.handle)

    def specs(self, kind: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of each "input", "target" or "output"."""
        count, found = getattr(self.api, f"tvmtrain_{kind}s")(self.handle), []
        for number in range(count):
            spec = Spec()
            self.check(getattr(self.api, f"tvmtrain_{kind}")(self.handle, number, ctypes.byref(spec)))
            found.append((spec.name.decode(), DTYPES[spec.dtype], tuple(spec.shape[: spec.ndim])))
        return found


def arrays(value):
    """One array, or a tuple of them, as C takes them; the NumPy arrays have to live as long."""
    values = value if isinstance(value, tuple) else (value,)
    return (Array * len(values))(*(_array(one) for one in values))


def _array(value: np.ndarray) -> Array:
    shape = (ctypes.c_int64 * value.ndim)(*value.shape)
    return Array(value.ctypes.data, DTYPES.index(str(value.dtype)), value.ndim, shape)
