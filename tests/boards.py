"""Servers for the tests of boards: on 127.0.0.1 alone, each in a process group of its own that ends with its test."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import tvm
import tvm_ffi

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tvmtrain" / "native" / "src"
HEADERS = Path(tvm_ffi.__file__).parent / "include"
LIBRARIES = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so")
CROSS, EMULATOR, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "/usr/aarch64-linux-gnu"
KEY = "board"
START = 60.0  # seconds: importing TVM on a busy machine


@dataclass
class Server:
    """A running server; ``log`` is the file of all that it prints."""

    process: subprocess.Popen[bytes]
    log: Path

    def port(self) -> int:
        """Where it listens, once it does."""
        until = time.monotonic() + START
        while time.monotonic() < until:
            if found := re.search(r"(?:listening on|bind to) 127\.0\.0\.1:(\d+)", self.text()):
                return int(found.group(1))
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)
        raise AssertionError(f"no server after {START} s: {self.text()}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port()}"

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def sessions(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def end_session(self) -> None:
        """As if the program on the board had crashed: the server lives on."""
        for process in self.sessions():
            process.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, **environment: str) -> Iterator[Server]:
    """``command`` as a server whose group of processes is killed at the end."""
    log = Path(tempfile.mkstemp(suffix=".log", dir=folder)[1])
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=variables, start_new_session=True, cwd=folder, preexec_fn=_end_with_tests
        )
    server = Server(process, log)
    try:
        yield server
    finally:
        server.kill()


def _end_with_tests() -> None:
    """A server ends with the tests' process, too, where that is killed before it can end the server."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def in_python(*options: str) -> list[str]:
    """The command of ``tvmtrain serve``."""
    return [sys.executable, "-m", "tvmtrain", "serve", "--port", "0", "--key", KEY, *options]


def tracker() -> list[str]:
    """The command of TVM's tracker."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [
        sys.executable,
        "-m",
        "tvm.exec.rpc_tracker",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--port-end",
        str(port + 1),
    ]


def native(folder: Path, *options: str) -> list[str]:
    """The command of the server without Python, compiled for this machine."""
    return [str(compiled(folder)), "--port", "0", "--key", KEY, *options]


@functools.cache
def compiled(folder: Path) -> Path:
    """tvmtrain-serve for this machine."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not installed")
    site = Path(tvm.__file__).parents[1]
    return _compile(compiler, [site / name for name in LIBRARIES], folder / "tvmtrain-serve")


@functools.cache
def emulated(folder: Path) -> tuple[str, ...]:
    """The beginning of a command: tvmtrain-serve for a Cortex-A72, under qemu."""
    for program, package in ((CROSS, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user-static")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: {package})")
    program = _compile(CROSS, aarch64_libraries(folder / "lib"), folder / "tvmtrain-serve-aarch64")
    return EMULATOR, "-L", SYSROOT, str(program)


def aarch64_libraries(folder: Path) -> list[Path]:
    """TVM's runtime for aarch64 out of the wheels in the folder TVMTRAIN_WHEELS, or in tvmtrain's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvmtrain" / "wheels"
    where = Path(os.environ.get("TVMTRAIN_WHEELS") or cache)
    wheels = [wheel for wheel in sorted(where.glob("apache_tvm*aarch64.whl")) if wheel.is_file()]
    found = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in set(LIBRARIES) & set(archive.namelist()):
                found[name] = folder / Path(name).name
                folder.mkdir(exist_ok=True)
                found[name].write_bytes(archive.read(name))
    if len(found) < len(LIBRARIES):
        pytest.skip(f"TVMTRAIN_WHEELS ({where}) has no wheels of apache-tvm and apache-tvm-ffi for aarch64 (pip download)")
    return [found[name] for name in LIBRARIES]


def _compile(compiler: str, libraries: Sequence[Path], program: Path) -> Path:
    paths = [f"-Wl,-rpath,{path.parent}" for path in libraries]
    sources = [str(NATIVE / name) for name in ("serve.cc", "session.cc")]
    flags = ["-std=c++17", "-O0", "-Wall", "-isystem", str(HEADERS), "-Wl,--no-as-needed", *paths]
    subprocess.run([compiler, *flags, *sources, *map(str, libraries), "-o", str(program)], check=True)
    return program
