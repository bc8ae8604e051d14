"""A training step on a board, driven from here: ``connect("pi:9090", key="K").load("out/")`` is a ``TrainStep`` like any other.

The library goes there, the parameters and the optimizer's state stay there, a batch goes there at each step and a loss comes back.
On the board runs ``tvmtrain serve`` or, without Python, ``tvmtrain-serve``; ``tvmtrain.session`` lists what is asked of them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tvmtrain import artifact, features, runtime
from tvmtrain.artifact import Entry, Manifest
from tvmtrain.errors import DeviceError, RemoteError
from tvmtrain.runtime import Mark, TrainStep
from tvmtrain.session import PROTOCOL

# Not before tvmtrain.runtime, which sees to it that TVM does not bring PyTorch along.
from tvm import rpc  # isort: skip

# Seconds until a board that does not answer is given up: at first, and in the middle of a session, where it may compute.
GREETING, ANSWER = 20.0, 300.0
# What TVM says when a function failed on the board, and the connection is as sound as before.
FAILED_THERE = "Error caught from RPC call"
T = TypeVar("T")
# A socket of this process: its file descriptor, and the name by which the system knows it from the next one with that number.
Wire = tuple[int, str]


@dataclass(frozen=True)
class Address:
    """Where a server or a tracker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """``host:port``. Raises ``RemoteError``."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise RemoteError(f"address: got {text!r}; want host:port, as in 192.168.0.7:9090")
        return cls(host.strip("[]"), int(port))


@dataclass(frozen=True)
class Facts:
    """What a board tells of itself; ``emulated``: why its times mean nothing, "" where they do; sizes in bytes."""

    server: str
    name: str
    arch: str
    cores: int
    memory: int
    available: int
    hwcap: tuple[int, int]
    flags: str
    gpu: bool
    emulated: str
    log: str

    @property
    def features(self) -> frozenset[str] | None:
        """Instruction sets (``tvmtrain.features``); None where it does not tell."""
        return features.told(self.arch, self.hwcap, self.flags)

    @classmethod
    def parse(cls, text: str, where: str) -> Facts:
        """From ``board()``. Raises ``RemoteError`` for anything else."""
        try:
            told = json.loads(text)
            if told["protocol"] != PROTOCOL:
                raise RemoteError(
                    f"{where} has tvmtrain's protocol {told['protocol']} and this is {PROTOCOL}: install the same tvmtrain on both"
                )
            kinds = {"server": str, "name": str, "arch": str, "cores": int, "memory": int, "available": int, "flags": str}
            values = {name: kind(told[name]) for name, kind in kinds.items()}
            (first, second), log = map(int, told["hwcap"]), str(told.get("log", ""))
            return cls(**values, hwcap=(first, second), gpu=bool(told["gpu"]), emulated=str(told["emulated"]), log=log)
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteError(
                f"{where} tells of itself {text[:80]!r}, which this tvmtrain does not understand: {error}"
            ) from error


class Board:
    """A session with a board: it ends with this object, and the board forgets all of it."""

    def __init__(self, session: Any, where: str, sockets: Set[Wire] = frozenset()) -> None:
        self.session, self.where, self._sockets = session, where, sockets
        self._functions: dict[str, Callable[..., Any]] = {}
        self._numbers = itertools.count()
        self._uploads = itertools.count()
        self._dropped: list[int] = []
        self.threads = 0  # of the step that was loaded last
        self.facts = Facts.parse(str(self.ask("board")), where)

    def __str__(self) -> str:
        return f"{self.facts.name} ({self.where})" if hasattr(self, "facts") else self.where

    @property
    def log(self) -> str:
        """Where to look for what happened there."""
        named = hasattr(self, "facts") and self.facts.log
        return f"its log is {self.facts.log}" if named else "its log is what its server prints"

    def load(self, path: str | os.PathLike[str], threads: int | None = None, cores: Sequence[int] = ()) -> TrainStep:
        """Start the artifact in the folder ``path`` there.

        threads: by default those that the server was told; cores: numbers of the board's processors, by default all.
        Raises ``ArtifactError`` for one that is damaged or of another processor, ``DeviceError`` for a board with too little memory.
        """
        stored = artifact.read(path, foreign=True)
        check(stored.manifest, self)
        self.threads = int(self.ask("threads", threads or 0, ",".join(map(str, cores))))
        # A name of its own: a file that is loaded there must not be written to, and the loader takes an equal path for an equal library.
        name = f"{next(self._uploads)}-{artifact.LIBRARY}"
        self.remotely(lambda: self.session.upload(str(stored.library), name))
        machine = int(self.ask("start", name, artifact.on_gpu(stored.manifest)))
        return TrainStep(There(self, machine), stored.manifest, stored.state)

    def close(self) -> None:
        """End the session now, also one that is lost: a server has one at a time, and would wait for the end of this one."""
        for file, _ in self._sockets & _sockets():
            with suppress(OSError), socket.socket(fileno=os.dup(file)) as own:
                own.shutdown(socket.SHUT_RDWR)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call one of ``tvmtrain.session``'s functions. Raises ``RemoteError``."""
        return self.remotely(lambda: self._function(name)(*arguments))

    def keep(self, machine: int, value: np.ndarray) -> int:
        """The number of a copy of ``value`` there."""
        self._forget()
        number = next(self._numbers)
        self.ask("put", number, machine, str(value.dtype), np.asarray(value, order="C").tobytes(), *value.shape)
        return number

    def numbers(self, count: int) -> list[int]:
        """New ones, one after the other."""
        return list(itertools.islice(self._numbers, count))

    def drop(self, number: int) -> None:
        """Nobody has this tensor any more; the board is told with the next question."""
        self._dropped.append(number)

    def _forget(self) -> None:
        dropped, self._dropped = self._dropped, []
        if dropped:
            self.ask("free", *dropped)

    def _function(self, name: str) -> Callable[..., Any]:
        if name not in self._functions:
            try:
                self._functions[name] = self.session.get_function(f"tvmtrain.{name}")
            except AttributeError as error:
                raise RemoteError(
                    f"{self.where} is an RPC server without tvmtrain's functions; start `tvmtrain serve` (or tvmtrain-serve) there"
                ) from error
        return self._functions[name]

    def remotely(self, do: Callable[[], T]) -> T:
        """What ``do`` does with the session; what goes wrong there is a ``RemoteError`` that names the board and its log."""
        try:
            return do()
        except RemoteError:
            raise
        except Exception as error:
            if FAILED_THERE in str(error):
                raise RemoteError(f"board {self} failed: {_reason(error)}; {self.log}") from error
            raise RemoteError(f"the connection to board {self} is lost: {_reason(error)}; {self.log}") from error


class Tensor:
    """A tensor on a board."""

    def __init__(self, board: Board, number: int, shape: tuple[int, ...], dtype: str) -> None:
        self.board, self.number, self.shape, self.dtype = board, number, shape, dtype

    def __del__(self) -> None:
        self.board.drop(self.number)

    def numpy(self) -> np.ndarray:
        """A copy here."""
        return np.frombuffer(self.board.ask("get", self.number), self.dtype).reshape(self.shape).copy()


class There:
    """A board as the ``Place`` of a step: its machine number ``machine``. ``seconds``: what the last call took there."""

    def __init__(self, board: Board, machine: int) -> None:
        self.board, self._machine = board, machine
        self.seconds = 0.0

    def tensor(self, value: np.ndarray) -> Tensor:
        """As in ``Place``."""
        return Tensor(self.board, self.board.keep(self._machine, value), value.shape, str(value.dtype))

    def given(self, key: tuple[str, str], value: np.ndarray) -> Tensor:
        """As in ``Place``."""
        return self.tensor(value)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """As in ``Place``."""
        return one is other

    def call(self, entry: Entry, arguments: Sequence[Any]) -> Sequence[Any]:
        """As in ``Place``."""
        numbers = self.board.numbers(len(entry.outputs))
        self.seconds = float(self.board.ask("call", self._machine, entry.name, numbers[0], *(t.number for t in arguments)))
        return [Tensor(self.board, n, spec.shape, spec.dtype) for n, spec in zip(numbers, entry.outputs, strict=True)]

    @contextmanager
    def marked(self) -> Iterator[list[Mark]]:
        """As in ``Place``."""
        marks: list[Mark] = []
        self.board.ask("watch", self._machine, True)
        try:
            yield marks
        finally:
            self.board.ask("watch", self._machine, False)
        marks += [
            (str(name), bool(before), float(start), float(end))
            for name, before, start, end in json.loads(self.board.ask("marks"))
        ]


def connect(address: str | Address, key: str = "", *, answer: float = ANSWER) -> Board:
    """A session with the server at ``host:port``; answer: seconds until a board that is silent is given up.

    Raises ``RemoteError`` where nobody listens, the key is another, or the server is busy with somebody else.
    """
    address = Address.parse(address) if isinstance(address, str) else address
    where = str(address)
    _check_name(address)
    before = _sockets()
    session = _within(GREETING, lambda: rpc.connect(address.host, address.port, key), where, key)
    own = _sockets() - before
    _patience(own, answer)
    return Board(session, where, own)


def _check_name(address: Address) -> None:
    """Raise ``RemoteError`` for a host of which nobody here knows the address."""
    try:
        socket.getaddrinfo(address.host, address.port)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name at all, "192.168.0..7"
        why = getattr(error, "strerror", None) or error
        raise RemoteError(
            f"{address} cannot be reached: this machine does not know the name {address.host!r} ({why}); check it, or give "
            f"the board's number, as in 192.168.0.7:{address.port}"
        ) from error


def connect_through(
    tracker: str | Address, key: str, *, answer: float = ANSWER, wait: float = GREETING, limit: float = 0
) -> Board:
    """A session with a board that the tracker at ``host:port`` has under ``key``.

    wait: seconds for one to become free; limit: seconds after which the board ends the session (0: never). Raises ``RemoteError``.
    """
    tracker = Address.parse(tracker) if isinstance(tracker, str) else tracker
    check_tracker(tracker, key)
    before = _sockets()
    where = f"a board of {key!r} of tracker {tracker}"
    session = _within(
        wait, lambda: rpc.connect_tracker(tracker.host, tracker.port).request(key, session_timeout=limit), where, key
    )
    own = _sockets() - before
    _patience(own, answer)
    return Board(session, _peer(own) or where, own)


def boards(tracker: Address, key: str) -> list[str]:
    """Addresses of the servers that the tracker knows under ``key``, busy or not. Raises ``RemoteError``."""
    try:
        socket.create_connection((tracker.host, tracker.port), timeout=GREETING).close()
    except OSError as error:
        raise RemoteError(
            f"no tracker answers at {tracker}; start one: python -m tvm.exec.rpc_tracker --host HOST --port {tracker.port}"
        ) from error
    known = _within(GREETING, lambda: rpc.connect_tracker(tracker.host, tracker.port).summary(), f"tracker {tracker}", key)
    return [":".join(map(str, server["addr"])) for server in known["server_info"] if server["key"] == f"server:{key}"]


def check_tracker(tracker: Address, key: str) -> list[str]:
    """The servers under ``key``. Raises ``RemoteError`` where there are none."""
    if not (found := boards(tracker, key)):
        raise RemoteError(
            f"tracker {tracker} has no board under the key {key!r}; on each board: tvmtrain serve --tracker {tracker} --key {key}"
        )
    return found


def check(manifest: Manifest, board: Board) -> None:
    """Raise ``ArtifactError`` or ``DeviceError`` for a step that this board cannot run."""
    facts = board.facts
    artifact.check_machine(manifest, facts.arch, facts.features, f"board {board}")
    if artifact.on_gpu(manifest) and not facts.gpu:
        raise DeviceError(f"the step was compiled for an NVIDIA GPU, and the server of board {board} finds none there")
    runtime.check_memory(manifest, runtime.Memory(facts.memory, facts.available), f"board {board}")


def _within(seconds: float, do: Callable[[], T], where: str, key: str) -> T:
    """What TVM waits for without end, for so long. A thread that waits on is left behind."""
    box: list[Any] = []

    def work() -> None:
        try:
            box.append((do(), None))
        except Exception as error:
            box.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise RemoteError(f"{where} did not answer within {seconds:.0f} s: it is busy with another session, or hangs")
    value, error = box[0]
    if error is not None:
        raise RemoteError(_refusal(error, where, key)) from error
    return value


def _refusal(error: Exception, where: str, key: str) -> str:
    text = str(error)
    if "matches key" in text:
        return f"{where} has another key than {key!r}: give the one that its server was started with"
    reason = (
        "nothing answers there: it is off, in another network, or has no server" if "sock.Connect" in text else _reason(error)
    )
    return (
        f"{where} cannot be reached: {reason}; start `tvmtrain serve` on the board or, without Python there, bin/tvmtrain-serve of "
        "its bundle, with --host 0.0.0.0, and with the same --port and --key"
    )


def _reason(error: Exception) -> str:
    """The last line of what TVM says, which is the reason; before it are places in TVM's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^Check failed: \(.*\) is false:\s*", "", lines[-1]) if lines else type(error).__name__


# TVM's socket has no time limits, and does not show itself: it is the one that was not there before.


def _sockets() -> set[Wire]:
    """File descriptors of this process that are sockets, each with the system's name of its socket."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if (name := os.readlink(path)).startswith("socket:"):
                found.add((int(path.name), name))
    return found


def _patience(sockets: Set[Wire], seconds: float) -> None:
    """Let a read or write of these sockets fail after so long (whole seconds), and earlier if the other end has vanished."""
    limit = max(1, math.ceil(seconds)).to_bytes(8, "little") + bytes(8)
    for file, _ in sockets:
        with suppress(OSError), socket.socket(fileno=os.dup(file)) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
                own.setsockopt(socket.IPPROTO_TCP, option, value)


def _peer(sockets: Set[Wire]) -> str:
    """The address at the other end of one of these sockets."""
    for file, _ in sockets:
        with suppress(OSError), socket.socket(fileno=os.dup(file)) as own:
            return "{}:{}".format(*own.getpeername()[:2])
    return ""
