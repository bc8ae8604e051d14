"""The native half, compiled for tests: it takes longer than all that is tested of it, so what the same sources made is kept.

One process makes it and others wait; where a tool is missing, the test skips and says which.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import tvm
import tvm_ffi

from tvmtrain import native, wheels
from tvmtrain.errors import DeviceError
from tvmtrain.wheels import Package

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")
DEBIAN = {"cmake": "cmake", "c++": "g++", COMPILER: "g++-aarch64-linux-gnu", EMULATOR[0]: "qemu-user-static"}
LIBRARIES = {"apache-tvm": "tvm/lib/libtvm_runtime.so", "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so"}

KEPT = 24 * 3600.0  # seconds since its last use: another checkout may be at work with it


def need(*programs: str) -> None:
    """Skip the test unless ``programs`` are installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: {DEBIAN[program]})")


def for_host() -> Path:
    """bin/, lib/ with our library and TVM's, include/."""
    need("cmake", "c++")

    def make(folder: Path) -> None:
        native.build(folder)
        for package, name in ((tvm, "tvm_runtime"), (tvm_ffi, "tvm_ffi")):
            (folder / "lib" / f"lib{name}.so").symlink_to(Path(package.__file__).parent / "lib" / f"lib{name}.so")

    return built("native-host", make, tvm.__version__, tvm.__file__)


def for_board() -> Path:
    """The same for aarch64, to be run by ``EMULATOR``."""
    need("cmake", COMPILER, EMULATOR[0])
    found = aarch64_wheels()

    def make(folder: Path) -> None:
        (folder / "lib").mkdir(parents=True)
        for package, file in LIBRARIES.items():
            (folder / "lib" / Path(file).name).write_bytes(wheels.files(found[package], [file])[file])
        native.build(folder, folder / "lib", (COMPILER,))

    return built("native-aarch64", make, *(path.name for path in found.values()))


def aarch64_wheels() -> dict[str, Path]:
    """TVM's wheels for aarch64 by package, of the versions that are installed here."""
    try:
        with _one_at_a_time("wheels"):
            return {name: wheels.find(Package(name, metadata.version(name)), "aarch64", []) for name in LIBRARIES}
    except DeviceError as error:
        pytest.skip(f"no wheels of TVM for aarch64: {error}")


def probe() -> Path:
    """The readers alone, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    need("cmake", "c++")

    def make(folder: Path) -> None:
        native.compile_targets(folder, ("tvmtrain-probe",), settings={"TVMTRAIN_SANITIZE": "ON", "CMAKE_BUILD_TYPE": "Debug"})

    return built("native-probe", make) / "tvmtrain-probe"


def built(name: str, make: Callable[[Path], object], *facts: str) -> Path:
    """The folder ``name`` as ``make`` fills it from the sources at hand."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(p for p in native.SOURCES.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.name.encode() + path.read_bytes())
    folder = _root() / f"{name}-{digest.hexdigest()[:16]}"
    with _one_at_a_time(name):
        if not folder.exists():
            for old in _root().glob(f"{name}-*"):
                if time.time() - old.stat().st_mtime > KEPT:
                    shutil.rmtree(old)
            aside = _root() / f"new-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            make(aside)
            aside.rename(folder)
        os.utime(folder)
    return folder


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` as ``make`` fills it once in this run of the tests, however many processes there are."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with _one_at_a_time(name, root):
        if not (root / name).exists():
            make(root / f"new-{name}")
            (root / f"new-{name}").rename(root / name)
    return root / name


def _root() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvmtrain" / "tests"
    root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def _one_at_a_time(name: str, root: Path | None = None) -> Iterator[None]:
    with open((root or _root()) / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
