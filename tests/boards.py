"""Servers for the tests of boards: on 127.0.0.1 alone, each in a process group of its own that ends with its test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import builds
import psutil

from tvmtrain.native import SERVER

ROOT = Path(__file__).resolve().parents[1]
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


def native(*options: str) -> list[str]:
    """The command of the server without Python, for this machine."""
    return [str(builds.for_host() / SERVER), "--port", "0", "--key", KEY, *options]


def emulated(*options: str) -> list[str]:
    """The same on an emulated board."""
    return [*builds.EMULATOR, str(builds.for_board() / SERVER), "--port", "0", "--key", KEY, *options]
