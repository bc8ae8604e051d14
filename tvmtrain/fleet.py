"""Boards of one kind that share the trials of a search: TVM's tracker hands them out, MetaSchedule's ``RPCRunner`` keeps all busy.

A trial that fails is tried once more, on whichever board is free: a board that hangs, crashes or goes away costs a trial's time. The
search waits for a board to come back, and ends only where none does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.runner.utils import run_evaluator_common

from tvmtrain import remote
from tvmtrain.errors import DeviceError, RemoteError
from tvmtrain.remote import Address, Board
from tvmtrain.targets import Device

# Seconds: of a trial on the board; until one of some busy boards is free; until a lost one is back.
LIMIT, FREE, BACK = 60, 120.0, 120.0
LOOK = 1.0


@dataclass(frozen=True)
class Fleet:
    """The boards under ``key``: how many there were, their names, and why their times mean nothing ("" where they do)."""

    tracker: Address
    key: str
    names: tuple[str, ...]
    threads: int
    emulated: str

    def connect(self) -> Board:
        """A session with any of them."""
        return remote.connect_through(self.tracker, self.key, wait=FREE)


def gather(tracker: str, key: str, device: Device, threads: int | None = None) -> Fleet:
    """All boards that are free now. Raises ``RemoteError`` without any, ``DeviceError`` for one that is no ``device``.

    threads: that a kernel is timed with (None: those that the server was told).
    """
    address = Address.parse(tracker)
    count = len(remote.check_tracker(address, key))
    # Each is held while the others are asked: the tracker gives a board to one at a time.
    boards = [remote.connect_through(address, key, wait=FREE)]
    with suppress(RemoteError):
        while len(boards) < count:
            boards.append(remote.connect_through(address, key, wait=remote.GREETING))
    for board in boards:
        _check(board, device)
    counts = {int(board.ask("threads", threads or 0, "")) for board in boards}
    emulated = next((board.facts.emulated for board in boards if board.facts.emulated), "")
    return Fleet(address, key, tuple(map(str, boards)), min(counts), emulated)


def _check(board: Board, device: Device) -> None:
    facts = board.facts
    if facts.arch != device.arch:
        raise DeviceError(
            f"board {board} is {facts.arch}, and {device.name!r} is {device.arch}: a tracker's key is for one kind of board"
        )
    if facts.cores != device.cores and not facts.emulated:
        raise DeviceError(
            f"board {board} has {facts.cores} cores, and {device.name!r} has {device.cores}: tune for a board like it"
        )


@dataclass
class Runner:
    """MetaSchedule's runner on a fleet; one worker here for each board."""

    fleet: Fleet
    clock: ms.runner.EvaluatorConfig
    runner: Any = field(init=False)

    def __post_init__(self) -> None:
        config = ms.runner.RPCConfig(
            tracker_host=self.fleet.tracker.host,
            tracker_port=self.fleet.tracker.port,
            tracker_key=self.fleet.key,
            session_timeout_sec=LIMIT,
        )
        self.runner = ms.runner.RPCRunner(
            config,
            self.clock,
            f_create_session=partial(_session, self.fleet.threads),
            f_upload_module=_upload,
            f_run_evaluator=_evaluate,
            f_cleanup=_leave,
            max_workers=len(self.fleet.names),
        )

    def run(self, inputs: Sequence[ms.runner.RunnerInput]) -> list[ms.runner.RunnerResult]:
        """A result for each; one that failed failed twice. Raises ``RemoteError`` where all boards are gone."""
        results = [future.result() for future in self.runner.run(list(inputs))]
        failed = [i for i, result in enumerate(results) if result.error_msg is not None]
        if failed:
            _wait_for(self.fleet)
            again = self.runner.run([inputs[i] for i in failed])
            for i, future in zip(failed, again, strict=True):
                results[i] = future.result()
        return results


def _wait_for(fleet: Fleet) -> None:
    """Until the tracker has a board again."""
    until = time.monotonic() + BACK
    while True:
        try:
            remote.check_tracker(fleet.tracker, fleet.key)
            return
        except RemoteError as error:
            if time.monotonic() > until:
                raise RemoteError(f"{error}; it had {', '.join(fleet.names)}; what was tried is kept: tune again") from error
        time.sleep(LOOK)


# In a worker: what ``RPCRunner`` does with one candidate.


def _session(threads: int, config: ms.runner.RPCConfig) -> Any:
    address = Address(str(config.tracker_host), int(config.tracker_port or 0))
    board = remote.connect_through(address, str(config.tracker_key), answer=LIMIT, wait=FREE, limit=LIMIT)
    board.ask("threads", threads, "")
    board.session.board = board
    return board.session


def _upload(session: Any, local: str, name: str) -> Any:
    def send() -> Any:
        session.upload(local, name)
        return session.load_module(name)

    return session.board.remotely(send)


def _evaluate(session: Any, module: Any, device: Any, config: ms.runner.EvaluatorConfig, arguments: Any) -> list[float]:
    return session.board.remotely(lambda: run_evaluator_common(module, device, config, arguments))


def _leave(session: Any, _path: str | None) -> None:
    """Let the session end, and with it what the board has of it: nobody may hold it in a circle."""
    if session is not None:
        session.board = None
