"""TVM's RPC server on a board with Python: one session at a time, each in a process of its own, started again whatever one does."""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from tvmtrain import session
from tvmtrain.console import Console
from tvmtrain.errors import RemoteError
from tvmtrain.remote import Address

# Not before tvmtrain.runtime, which sees to it that TVM does not bring PyTorch along.
from tvm.rpc import base as tvm_base  # isort: skip
from tvm.rpc import server as tvm_server  # isort: skip

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
GREETING = 5.0  # seconds within which a client has to say what it wants
LONGEST_KEY = 1024  # bytes of what it says
WARNING = "this server runs code for whoever reaches it and knows its key; bind it to a network that you trust"


class Listener:
    """A listening socket whose clients have said what TVM's loop waits for: one that says less would keep all others out."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_server((host, port), family=_family(host), backlog=4)
        self.port: int = self._socket.getsockname()[1]

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        """As a socket's."""
        while True:
            client, address = self._socket.accept()
            with suppress(OSError):
                if _has_greeted(client, time.monotonic() + GREETING):
                    _keep_alive(client)
                    return client, address
            client.close()


def serve(host: str, port: int, key: str, tracker: Address | None, settings: session.Settings, out: Console) -> NoReturn:
    """Serve until the process ends. Raises ``RemoteError`` for an address that cannot be bound."""
    try:
        listener = Listener(host, port)
    except OSError as error:
        raise RemoteError(
            f"{host}:{port} cannot be bound: {error.strerror or error}; choose another --host or --port"
        ) from error
    _log_to(settings.log)
    session.register(settings)
    out.line(WARNING, style="yellow")
    out.line(f"listening on {host}:{listener.port}")
    os.register_at_fork(after_in_child=_end_with_parent)
    home = os.getcwd()
    at = None if tracker is None else (tracker.host, tracker.port)
    while True:
        try:
            tvm_server._listen_loop(listener, listener.port, key, at, None, None)
        except Exception as error:
            # A session's process crashed, a client spoke nonsense, or the disk is full: TVM's loop ends there.
            tvm_server.logger.warning("%s: %s; listening again", type(error).__name__, error)
            os.chdir(home)
            time.sleep(0.5)


def _has_greeted(client: socket.socket, until: float) -> bool:
    """Whether by then (of ``time.monotonic``) all of TVM's first words are there to be read: a number, a length and a key."""
    magic, size = struct.unpack("<ii", _peek(client, 8, until).ljust(8, b"\0"))
    if magic != tvm_base.RPC_MAGIC or not 1 <= size <= LONGEST_KEY:
        return False
    return len(_peek(client, 8 + size, until)) == 8 + size


def _peek(client: socket.socket, size: int, until: float) -> bytes:
    """The first ``size`` bytes, which stay where they are; fewer where no more have come."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    ready, _, _ = select.select([client], [], [], max(0.0, until - time.monotonic()))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    return client.recv(size, socket.MSG_PEEK) if ready else b""


def _end_with_parent() -> None:
    """A session's process ends when the server does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _log_to(path: str) -> None:
    """Also write TVM's messages to a file."""
    if path:
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        tvm_server.logger.addHandler(handler)
        sys.stderr.flush()


def _keep_alive(client: socket.socket) -> None:
    """The system notices within a minute that the other end has vanished."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
        client.setsockopt(socket.IPPROTO_TCP, option, value)


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
