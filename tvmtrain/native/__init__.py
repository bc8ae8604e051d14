"""The native half, for boards without Python: a C API, a runner and a server, compiled by CMake for this machine or a board's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tvmtrain import elf, toolchain
from tvmtrain.errors import DeviceError

SOURCES = Path(__file__).parent
LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so")
RUNNER, SERVER, LIBRARY, HEADER = "bin/tvmtrain-run", "bin/tvmtrain-serve", "lib/libtvmtrain.so", "include/tvmtrain.h"


@dataclass(frozen=True)
class Built:
    """What ``build`` made. ``glibc``: the newest version of the C library that any of it asks for, such as "2.34"."""

    runner: Path
    server: Path
    library: Path
    header: Path
    glibc: str


def build(
    into: str | os.PathLike[str], libraries: str | os.PathLike[str] | None = None, cxx: Sequence[str] = ("c++",)
) -> Built:
    """Compile the runner, the server and the C API and put them into the folder ``into``, as bin/, lib/ and include/.

    ``libraries``: folder with the ``LIBRARIES`` of the machine that they are for; None: those of this Python. Programs look for
    them in lib/ beside bin/. ``cxx``: the C++ compiler and its arguments. Raises ``DeviceError`` for what is missing or fails.
    """
    into = Path(into)
    with tempfile.TemporaryDirectory() as folder:
        places = _own_libraries(Path(folder)) if libraries is None else Path(libraries)
        if missing := [name for name in LIBRARIES if not (places / name).exists()]:
            raise DeviceError(f"{places} lacks {', '.join(missing)}; want TVM's runtime libraries for the machine to build for")
        compile_targets(
            Path(folder) / "build", ("all",), cxx, {"TVM_LIBRARIES": str(places), "TVM_FFI_INCLUDE": str(_headers())}
        )
        _command("cmake", "--install", str(Path(folder) / "build"), "--prefix", str(into))
    runner, server, library = made = [into / name for name in (RUNNER, SERVER, LIBRARY)]
    newest = max((elf.read(path.read_bytes(), path.name).glibc for path in made), key=toolchain.version)
    return Built(runner, server, library, into / HEADER, newest)


def compile_targets(
    folder: Path, targets: Sequence[str], cxx: Sequence[str] = ("c++",), settings: dict[str, str] | None = None
) -> None:
    """Have CMake compile ``targets`` of the sources in ``folder``. Raises ``DeviceError``."""
    if shutil.which("cmake") is None:
        raise DeviceError("cmake is not installed; install the Debian package cmake, or pip install cmake")
    if shutil.which(cxx[0]) is None:
        raise DeviceError(
            f"the C++ compiler {cxx[0]} is not installed; install the Debian package of that name, as g++-aarch64-linux-gnu"
        )
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_CXX_COMPILER": str(_wrapped(cxx, folder)),
        "TVMTRAIN_VERSION": metadata.version("tvmtrain"),
        **(settings or {}),
    }
    _command("cmake", "-S", str(SOURCES), "-B", str(folder), *(f"-D{name}={value}" for name, value in options.items()))
    _command("cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1), "--target", *targets)


def _wrapped(cxx: Sequence[str], folder: Path) -> Path:
    """The compiler as one program, as CMake wants it."""
    if len(cxx) == 1:
        return Path(shutil.which(cxx[0]) or cxx[0])
    script = folder / "c++"
    words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in cxx)
    script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    script.chmod(0o755)
    return script


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines[-10:]
        raise DeviceError(f"{' '.join(words[:2])} failed: " + "\n".join(errors[:10]))


def _own_libraries(folder: Path) -> Path:
    """Links to the libraries of this Python, in one folder."""
    for name, package in zip(LIBRARIES, ("tvm", "tvm_ffi"), strict=True):
        (folder / name).symlink_to(_package(package) / "lib" / name)
    return folder


def _headers() -> Path:
    return _package("tvm_ffi") / "include"


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise DeviceError(f"the package {name} is not installed; pip install tvmtrain")
    return Path(found.origin).parent
