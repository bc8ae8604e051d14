"""The native half in tests: built once, and the C API through ctypes, as much like ``TrainStep`` as a test wants it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi

from tvmtrain import native
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


# Building. Compiling takes longer than all that is tested of it: what was compiled from the same sources is kept.


def built(name: str, make: Callable[[Path], object], *facts: str) -> Path:
    """The folder ``name`` as ``make`` fills it from the sources at hand, kept for later runs; one process makes it, others wait."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(p for p in native.SOURCES.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.name.encode() + path.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvmtrain" / "tests"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{digest.hexdigest()[:16]}"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in root.glob(f"{name}-*"):
                shutil.rmtree(old)
            aside = root / f"new-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            make(aside)
            aside.rename(folder)
    return folder


def for_host() -> Path:
    """bin/tvmtrain-run, lib/ with our library and TVM's, include/."""

    def make(folder: Path) -> None:
        native.build(folder)
        for package, name in ((tvm, "tvm_runtime"), (tvm_ffi, "tvm_ffi")):
            (folder / "lib" / f"lib{name}.so").symlink_to(Path(package.__file__).parent / "lib" / f"lib{name}.so")

    return built("native-host", make, tvm.__version__, tvm.__file__)


def probe() -> Path:
    """The readers alone, with AddressSanitizer and UndefinedBehaviorSanitizer."""

    def make(folder: Path) -> None:
        native.compile_targets(folder, ("tvmtrain-probe",), settings={"TVMTRAIN_SANITIZE": "ON", "CMAKE_BUILD_TYPE": "Debug"})

    return built("native-probe", make) / "tvmtrain-probe"
