"""Training on a board: the same bits as here, checkpoints come home, and whatever happens to a board is told by its name."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import boards
import numpy as np
import pytest
import torch
import toy
from boards import KEY, Server
from builds import once
from parity import quick_device
from safetensors.numpy import load_file
from torch import nn
from tvm.rpc import base as rpc_base
from tvm.s_tir import meta_schedule as ms

import tvmtrain as tt
from tvmtrain import artifact, cli, fleet, remote, runtime, targets, training, trials, tuner
from tvmtrain.console import Console
from tvmtrain.data import Dataset
from tvmtrain.errors import ArtifactError, DeviceError, InputError, NonFiniteLossError, RemoteError
from tvmtrain.schedules import records

Start = Callable[..., Server]
KINDS = ("python", "native")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boards")


@pytest.fixture
def start(shared: Path) -> Iterator[Start]:
    """Starts servers that end with the test."""
    with ExitStack() as alive:

        def serve(kind: str, *options: str, **environment: str) -> Server:
            if kind == "tracker":
                command = boards.tracker()
            elif kind == "emulated":
                environment = {"QEMU_CPU": "cortex-a72"} | environment
                command = boards.emulated(*options)
            else:
                command = boards.in_python(*options) if kind == "python" else boards.native(*options)
            return alive.enter_context(boards.running(command, shared, **environment))

        yield serve


@pytest.fixture(scope="session")
def toy_folder(shared: Path) -> Path:
    return toy.artifact().save(shared / "toy")


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((toy.BATCH, toy.FEATURES)).astype("float32"), rng.integers(0, toy.CLASSES, toy.BATCH)


def assert_same_state(one: tt.TrainStep, other: tt.TrainStep) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def assert_same_checkpoints(one: Path, other: Path) -> None:
    wanted = toy.manifest().state
    (mine, steps), (theirs, others) = (artifact.read_checkpoint(path, wanted) for path in (one, other))
    assert steps == others
    for name in wanted:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


# --- A step there is a step here ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """MobileNetV2's: narrow, wide, depthwise, narrow."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.conv = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(Block(8, 8, 1), Block(8, 12, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 5)),
    )


def build(device: str | tt.Device) -> tt.Artifact:
    """The small MobileNetV2 with a filtered and a sparse plan for ``device``."""
    torch.manual_seed(0)
    model, x, y = network(), torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,))
    graph = tt.trace(model, x, y, loss="cross_entropy", optimizer=tt.SGD(lr=0.05, momentum=0.9))
    last = tt.UpdatePlan.last(graph.layers, 4, filter=2).layers
    filtered = {
        "4.conv.0": tt.LayerUpdate(weight=0.5, select="random"),
        "4.conv.6": tt.LayerUpdate(weight=0.25, select="magnitude"),
    }
    assert set(filtered) <= set(last)
    return tt.build(graph.apply(tt.UpdatePlan({**last, **filtered})), device)


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((4, 3, 16, 16)).astype("float32"), rng.integers(0, 5, 4)) for _ in range(count)]


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "quick", lambda folder: build(quick_device()).save(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_have_the_same_bits(start: Start, quick: Path, kind: str, tmp_path: Path) -> None:
    server, folder = start(kind), quick
    here, there = runtime.load(folder, threads=1), remote.connect(server.address, KEY).load(folder, threads=1)
    for x, y in batches(20):
        assert there(x, y, lr=0.1) == here(x, y, lr=0.1)
    np.testing.assert_array_equal(there.outputs[0], here.outputs[0])
    assert_same_state(there, here)
    x, y = batches(1)[0]
    np.testing.assert_array_equal(there.predict(x[:3]), here.predict(x[:3]))
    assert there.evaluate(x, y) == here.evaluate(x, y)
    there.save(tmp_path / "there.safetensors")
    here.restore(tmp_path / "there.safetensors")
    assert here.steps == 20
    assert here(x, y) == there(x, y)
    there.load_state_dict(here.state_dict())
    assert_same_state(there, here)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_with_data_stays_here(start: Start, kind: str, toy_folder: Path) -> None:
    step = remote.connect(start(kind).address, KEY).load(toy_folder)
    x, y = batch(0)
    with pytest.raises(InputError, match=r"want 0\.\.2"):
        step(x, y + 5)
    before = step.state_dict()
    np.testing.assert_array_equal(before["fc.weight"], runtime.load(toy_folder).state_dict()["fc.weight"])
    infinite = np.full_like(before["fc.weight"], np.inf)
    step.load_state_dict(before | {"fc.weight": infinite, "head.weight": infinite})
    with pytest.raises(NonFiniteLossError):
        step(x, y)
    assert step.steps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_board_keeps_no_tensor_that_nobody_has(start: Start, kind: str, toy_folder: Path) -> None:
    server = start(kind)
    board = remote.connect(server.address, KEY)
    step = board.load(toy_folder)
    taken = []
    for i in range(40):
        step(*batch(i))
        (session,) = server.sessions()
        taken.append(session.memory_info().rss)
    assert board.numbers(1)[0] > 400, "so many have been"
    alive = [n for n in range(board.numbers(1)[0]) if _is_there(board, n)]
    state = len(step.manifest.state)
    assert state <= len(alive) <= 3 * state + 10


def _is_there(board: remote.Board, number: int) -> bool:
    try:
        board.ask("get", number)
    except RemoteError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_of_the_machine_there_are_those_here(start: Start, kind: str, toy_folder: Path) -> None:
    there, here = remote.connect(start(kind).address, KEY).load(toy_folder), runtime.load(toy_folder)
    found = []
    for step in (there, here):
        with step.marked() as marks:
            step(*batch(0))
        found.append([(name, before) for name, before, _, _ in marks])
        assert all(start <= end for _, _, start, end in marks)
    assert found[0] == found[1]
    assert len(found[0]) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_threads_are_those_that_were_asked_for(start: Start, kind: str, toy_folder: Path) -> None:
    board = remote.connect(start(kind, "--threads", "1").address, KEY)
    assert board.ask("threads", 0, "") == 1
    board = remote.connect(start(kind).address, KEY)
    cores = sorted(runtime._CPUS)
    assert board.ask("threads", 2, str(cores[0])) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_computes_with_the_threads_and_on_the_cores_that_were_asked_for(start: Start, kind: str, quick: Path) -> None:
    first, every = min(runtime._CPUS), set(runtime._CPUS)
    for threads, cores, places in ((3, (), every), (2, (first,), {first})):
        server = start(kind)
        board = remote.connect(server.address, KEY)
        board.load(quick, threads, cores)(*batches(1)[0])
        (session,) = server.sessions()
        assert session.num_threads() == threads
        assert {frozenset(os.sched_getaffinity(thread.id)) for thread in session.threads()} == {frozenset(places)}


# --- Boards that are not what was wanted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_another_key_is_refused_by_name(start: Start, kind: str) -> None:
    address = start(kind).address
    with pytest.raises(RemoteError, match=f"{address} has another key than 'other'"):
        remote.connect(address, "other")
    assert remote.connect(address, KEY).facts.arch == artifact.machine()


def test_nobody_there() -> None:
    with pytest.raises(
        RemoteError, match=r"^127\.0\.0\.1:1 cannot be reached: nothing answers there: .*; start `tvmtrain serve`.*-serve of"
    ):
        remote.connect("127.0.0.1:1")
    with pytest.raises(
        RemoteError, match=r"^board\.invalid:9090 cannot be reached: .* does not know the name 'board\.invalid' \("
    ):
        remote.connect("board.invalid:9090")
    with pytest.raises(RemoteError, match=r"does not know the name '192\.168\.0\.\.7'"):
        remote.connect("192.168.0..7:9090")
    with pytest.raises(RemoteError, match=r"no tracker answers at 127\.0\.0\.1:1"):
        remote.connect_through("127.0.0.1:1", KEY)
    for text in ("nowhere", "host:", "host:99999", ":1"):
        with pytest.raises(RemoteError, match="want host:port"):
            remote.connect(text)


def test_places_in_tvms_source_are_not_told() -> None:
    text = "Traceback\nCheck failed: (sig == 0 && f(x)) is false: cannot obtain address"
    assert remote._reason(RuntimeError(text)) == "cannot obtain address"


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_server_is_told(start: Start, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = start(kind).address
    first = remote.connect(address, KEY)
    monkeypatch.setattr(remote, "GREETING", 0.5)
    with pytest.raises(RemoteError, match="busy with another session"):
        remote.connect(address, KEY)
    assert first.facts.name


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_says_nothing_or_nonsense_keeps_nobody_out(start: Start, kind: str) -> None:
    port = start(kind).port()
    silent = socket.create_connection(("127.0.0.1", port))
    slow = socket.create_connection(("127.0.0.1", port))
    slow.sendall(b"\x71")
    magic = b"\x71\xf2\x0f\x00"
    for nonsense in (
        *(b"GET / HTTP/1.1\r\n\r\n", bytes(4), magic + b"\xff\xff\xff\x7f", magic + bytes(4)),
        *(magic + b"\x01\0\0\0 ", magic + b"\x02\0\0\0\xff\xff", magic + b"\x09\0\0\0client:"),
    ):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(nonsense)
    assert remote.connect(f"127.0.0.1:{port}", KEY).facts.cores >= 1
    silent.close()
    slow.close()


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_of_one_session(start: Start, kind: str, toy_folder: Path, quick: Path) -> None:
    """The second library must not be written over the first, whose code is mapped."""
    board = remote.connect(start(kind).address, KEY)
    folders = (toy_folder, quick, toy_folder)
    there, here = [board.load(folder, threads=1) for folder in folders], [runtime.load(folder, threads=1) for folder in folders]
    for i, (x, y) in enumerate(batches(2)):
        assert there[1](x, y) == here[1](x, y)
        for j in (0, 2):
            assert there[j](*batch(i)) == here[j](*batch(i))


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_that_is_closed_makes_room(start: Start, kind: str, toy_folder: Path, monkeypatch) -> None:
    address = start(kind).address
    step = remote.connect(address, KEY).load(toy_folder)
    step.place.board.close()
    monkeypatch.setattr(remote, "GREETING", 10.0)
    assert remote.connect(address, KEY).facts.cores >= 1
    with pytest.raises(RemoteError, match="is lost"):
        step(*batch(0))


def test_an_artifact_of_another_processor_is_refused_before_it_travels(start: Start, tmp_path: Path) -> None:
    folder = toy.artifact().save(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    foreign = toy.manifest()
    object.__setattr__(foreign, "device", {"name": "pi", "arch": "aarch64"})
    artifact.Artifact(foreign, toy.state(), toy.executable("cross_entropy")).save(folder)
    board = remote.connect(start("native").address, KEY)
    with pytest.raises(ArtifactError, match=rf"compiled for aarch64 \(device 'pi'\) and board .* is {artifact.machine()}"):
        board.load(folder)
    assert manifest != json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_of_another_processor_is_no_missing_file(start: Start, kind: str, tmp_path: Path) -> None:
    board = remote.connect(start(kind).address, KEY)
    foreign = bytearray((toy.artifact().save(tmp_path / "out") / "lib.so").read_bytes())
    foreign[18:20] = (0xF3).to_bytes(2, "little")  # RISC-V
    board.session.upload(foreign, "lib.so")
    with pytest.raises(RemoteError, match=r"lib\.so has code for another processor"):
        board.ask("start", "lib.so", False)


def test_a_board_with_too_little_memory(toy_folder: Path) -> None:
    manifest = artifact.read(toy_folder).manifest
    assert artifact.memory_needed(manifest) > sum(manifest.state_bytes.values())
    with pytest.raises(DeviceError, match=r"pi has 0\.0 of 1\.0 MiB available"):
        runtime.check_memory(manifest, runtime.Memory(2**20, 10), "pi")
    runtime.check_memory(manifest, runtime.Memory(0, 0), "unknown")
    here = runtime.memory()
    assert 0 < here.available <= here.total


def test_emulation_is_told(start: Start) -> None:
    for kind in KINDS:
        assert remote.connect(start(kind).address, KEY).facts.emulated == ""
        assert remote.connect(start(kind, "--emulated").address, KEY).facts.emulated == "--emulated"
        assert "QEMU_CPU" in remote.connect(start(kind, QEMU_CPU="max").address, KEY).facts.emulated


# --- Boards that go away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_board_is_named_and_comes_back(start: Start, kind: str, toy_folder: Path) -> None:
    server = start(kind)
    step = remote.connect(server.address, KEY).load(toy_folder)
    step(*batch(0))
    server.end_session()
    with pytest.raises(RemoteError, match=f"connection to board .*{server.address}.* is lost"):
        step(*batch(1))
    assert step.steps == 1
    again = remote.connect(server.address, KEY).load(toy_folder)
    assert again(*batch(0)) == runtime.load(toy_folder)(*batch(0))


def test_a_board_that_hangs_is_given_up(start: Start, toy_folder: Path) -> None:
    server = start("native")
    step = remote.connect(server.address, KEY, answer=1.0).load(toy_folder)
    (session,) = server.sessions()
    session.suspend()
    began = time.monotonic()
    with pytest.raises(RemoteError, match="is lost"):
        step(*batch(0))
    assert time.monotonic() - began < 10


def test_a_board_that_stops_reading_is_given_up(start: Start) -> None:
    server = start("native")
    board = remote.connect(server.address, KEY, answer=1.0)
    board._function("put")  # asked for now: later nobody answers
    (session,) = server.sessions()
    session.suspend()
    size = 64 << 20  # more than any buffer
    put = (0, 0, "uint8", bytes(size), size)
    with pytest.raises(RemoteError, match=f"connection to board .*{server.address}.* is lost"):
        remote._within(20, lambda: board.ask("put", *put), "the test", KEY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    x, y = zip(*(batch(i) for i in range(10)), strict=True)
    np.savez(tmp_path / "data.npz", x=np.concatenate(x), y=np.concatenate(y))
    return tmp_path / "data.npz"


def run_on(server: Server, folder: Path, data: Path, *options: str) -> int:
    return cli.main(["run", str(folder), "--data", str(data), "--rpc", server.address, "--key", KEY, *options])


def test_a_run_there_is_a_run_here(start: Start, toy_folder: Path, data: Path, tmp_path: Path, capsys) -> None:
    server, home = start("python"), tmp_path / "home.safetensors"
    assert run_on(server, toy_folder, data, "--epochs", "3", "--save", str(home), "--json") == 0
    there = json.loads(capsys.readouterr().out)
    assert (
        cli.main(["run", str(toy_folder), "--data", str(data), "--epochs", "3", "--save", str(tmp_path / "h"), "--json"]) == 0
    )
    here = json.loads(capsys.readouterr().out)
    assert there["steps"] == here["steps"] == 30
    assert [e["loss"] for e in there["epochs"]] == [e["loss"] for e in here["epochs"]]
    assert_same_checkpoints(home, tmp_path / "h")


def test_a_run_goes_on_when_the_board_comes_back(
    start: Start, toy_folder: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    server, home = start("native"), tmp_path / "home.safetensors"
    monkeypatch.setattr(cli, "PAUSE", 0.1)
    ender = _ending(server, home, times=2)
    options = ["--save", str(home), "--save-every", "5", "--weights", str(tmp_path / "weights"), "--json"]
    assert run_on(server, toy_folder, data, "--epochs", "150", *options) == 0
    ender.join(timeout=30)
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 1500
    assert err.count("the board is back") >= 1
    here = runtime.load(toy_folder)
    here.restore(home)
    assert here.steps == 1500
    assert (
        cli.main(["run", str(toy_folder), "--data", str(data), "--epochs", "150", "--save", str(tmp_path / "h"), "--json"]) == 0
    )
    assert_same_checkpoints(home, tmp_path / "h")
    for name, value in load_file(tmp_path / "weights").items():
        np.testing.assert_array_equal(value, here.state_dict()[name])


class Failing:
    """A place whose calls of ``entry`` fail after ``good`` of them, as a board's that has no memory."""

    def __init__(self, place: runtime.Place, good: int, entry: str = "train_step") -> None:
        self.place, self.left, self.entry = place, good, entry
        self.seconds = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self.place, name)

    def call(self, entry: artifact.Entry, arguments: list[object]) -> object:
        self.left -= entry.name == self.entry
        if self.left < 0:
            raise RemoteError("board pi failed: no memory")
        return self.place.call(entry, arguments)


def fitted(
    folder: Path, home: Path, places: list[tuple[int, str]], test: bool = False, resume: Path | None = None
) -> tuple[training.Run, tt.TrainStep, int]:
    """A run of three epochs of four steps whose board fails as each of ``places`` says, the last of them again and again."""
    started = []

    def start() -> tt.TrainStep:
        step = runtime.load(folder)
        step.place = Failing(step.place, *places[min(len(started), len(places) - 1)])
        started.append(step)
        return step

    x, y = zip(*(batch(i) for i in range(4)), strict=True)
    specs = tuple(spec for spec in toy.manifest().named["train_step"].inputs if spec.role in ("input", "target"))
    samples = Dataset((np.concatenate(x),), (np.concatenate(y),), specs)
    how = training.Settings(3, training.Rate(0.1), save=home, save_every=2, recovery=training.Recovery(start, 3, 0.0, resume))
    step = start()
    if resume is not None:
        step.restore(resume)
    return training.fit(step, samples, samples if test else None, how, Console(sys.stderr)), step, len(started)


def test_what_fails_there_again_and_again_ends(toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"no memory.*The last step was 5") as caught:
        fitted(toy_folder, tmp_path / "home", [(5, "train_step"), (1, "train_step")])
    assert caught.value.saved == tmp_path / "home"


def test_a_board_that_is_lost_in_the_last_evaluation_comes_back(toy_folder: Path, tmp_path: Path) -> None:
    run, step, started = fitted(toy_folder, tmp_path / "home", [(2 + 4, "predict"), (1000, "predict")], test=True)
    assert started == 2
    assert step.steps == run.steps == 12
    assert [epoch.epoch for epoch in run.epochs] == [1, 2, 3]
    wanted = runtime.load(toy_folder)
    wanted.restore(tmp_path / "home")
    assert_same_state(step, wanted)
    assert run.evaluation is not None


@pytest.fixture
def stale(toy_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of another run, where this one is going to write its own: its weights are of twice as many steps."""
    step = runtime.load(toy_folder)
    for i in range(8):
        step(*batch(i), lr=0.3)
    step.save(tmp_path / "home")
    return tmp_path / "home"


def test_a_checkpoint_that_this_run_has_not_written_is_not_taken(toy_folder: Path, stale: Path, tmp_path: Path) -> None:
    _, wanted, _ = fitted(toy_folder, tmp_path / "undisturbed", [(1000, "train_step")])
    run, step, started = fitted(toy_folder, stale, [(1, "train_step"), (1000, "train_step")])
    assert (run.steps, started) == (12, 2)
    assert_same_state(step, wanted)


def test_a_resumed_run_that_has_saved_nothing_yet_goes_on_from_where_it_began(toy_folder: Path, tmp_path: Path) -> None:
    x, y = zip(*(batch(i) for i in range(3)), strict=True)
    begun = runtime.load(toy_folder)
    for one in zip(x, y, strict=True):
        begun(*one, lr=0.3)  # which this run would not have come to
    begun.save(tmp_path / "begun")
    _, wanted, _ = fitted(toy_folder, tmp_path / "undisturbed", [(1000, "train_step")], resume=tmp_path / "begun")
    _, step, started = fitted(
        toy_folder, tmp_path / "home", [(0, "train_step"), (1000, "train_step")], resume=tmp_path / "begun"
    )
    assert (step.steps, started) == (12, 2)
    assert_same_state(step, wanted)


def test_no_checkpoint_is_advised_but_that_of_this_run(toy_folder: Path, stale: Path) -> None:
    before = stale.read_bytes()
    with pytest.raises(RemoteError, match="no checkpoint was written") as caught:
        fitted(toy_folder, stale, [(1, "train_step")])
    assert caught.value.saved is None
    assert stale.read_bytes() == before


def test_the_command_line_advises_no_checkpoint_of_another_run(
    start: Start, toy_folder: Path, data: Path, stale: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(*_: object, **__: object) -> float:
        raise RemoteError("board pi failed: no memory")

    monkeypatch.setattr(cli, "PAUSE", 0.0)
    monkeypatch.setattr(tt.TrainStep, "__call__", fail)
    assert run_on(start("native"), toy_folder, data, "--save", str(stale), "--retries", "1") == 1
    message = capsys.readouterr().err
    assert "no checkpoint was written" in message
    assert "go on with" not in message


def _ending(server: Server, home: Path, times: int) -> threading.Thread:
    """Ends the board's session after a checkpoint has come home, so many times."""

    def work() -> None:
        for _ in range(times):
            until = time.monotonic() + 20
            before = home.stat().st_mtime_ns if home.exists() else 0
            while time.monotonic() < until and not (home.exists() and home.stat().st_mtime_ns != before):
                time.sleep(0.002)
            server.end_session()
            time.sleep(0.3)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_run_whose_board_stays_away_says_how_to_go_on(start, toy_folder, data, tmp_path, monkeypatch, capsys) -> None:
    server, home = start("native"), tmp_path / "home.safetensors"
    monkeypatch.setattr(cli, "PAUSE", 0.1)
    address = server.address

    def kill() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until and not home.exists():
            time.sleep(0.002)
        server.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    options = ["--epochs", "100000", "--save", str(home), "--save-every", "5", "--retries", "2"]
    assert cli.main(["run", str(toy_folder), "--data", str(data), "--rpc", address, "--key", KEY, *options]) == 1
    thread.join(timeout=30)
    message = capsys.readouterr().err
    assert address in message
    last = int(re.search(r"The last step was (\d+)", message).group(1))
    here = runtime.load(toy_folder)
    here.restore(home)
    assert 5 <= here.steps <= last < here.steps + 6
    command = shlex.split(re.search(r"go on with: (tvmtrain run .*)", message).group(1))
    assert command[-2:] == ["--resume", str(home)]


# --- An emulated board: test_native_board.py trains on one ----------------------------------------------------------------------


def test_times_of_an_emulated_board_are_never_told(start: Start, toy_folder: Path, data: Path, capsys) -> None:
    server = start("native", "--emulated")
    assert run_on(server, toy_folder, data) == 0
    out = capsys.readouterr().out
    assert "no times" in out
    assert not re.search(r"\d ms", out)
    assert run_on(server, toy_folder, data, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ms_per_step"] is None
    assert found["epochs"][0]["ms_per_step"] is None


def test_a_profile_of_a_board(start: Start, quick: Path, capsys) -> None:
    address = start("native").address
    options = ["profile", str(quick), "--repeat", "3", "--threads", "1", "--rpc", address, "--key", KEY]
    assert cli.main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    manifest = artifact.read(quick).manifest
    assert {k["name"]: k["calls"] for k in found["kernels"]} == {k.name: k.calls for k in manifest.kernels}
    assert found["roofline"] is None
    assert found["in_kernels"] > 0
    assert cli.main(options) == 0
    assert "is not known" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*options, "--plot", "roofline.svg"])


def test_profile_and_bench_of_an_emulated_board_have_no_times(start: Start, quick: Path, tmp_path: Path, capsys) -> None:
    address = start("native", "--emulated").address
    there = ["--rpc", address, "--key", KEY]
    assert cli.main(["profile", str(quick), *there, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == {k.name: k.calls for k in artifact.read(quick).manifest.kernels}
    (tmp_path / "small.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), torch.randn(3, 4)\n"
    )
    model = f"{tmp_path}/small.py:make"
    assert cli.main(["bench", model, *there, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["with_network"], found["emulated"]) == (None, None, "--emulated")
    assert found["losses"][0] > 0
    for command in (["profile", str(quick)], ["bench", model]):
        assert cli.main([*command, *there]) == 0
        told = capsys.readouterr().out
        assert "emulated: no times" in told
        assert not re.search(r"\d (us|ms)\b", told)
    real = start("native").address
    assert cli.main(["bench", model, "--rpc", real, "--key", KEY, "--steps", "3", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["step"]["median"] <= found["with_network"]["median"]


def test_serve_is_a_command(shared: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--port", "70000"])
    assert cli.main(["serve", "--tracker", "nowhere"]) == 1
    assert "want host:port" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot be bound" in capsys.readouterr().err
    log = shared / "log.txt"
    with boards.running(boards.in_python("--log", str(log)), shared) as server:
        board = remote.connect(server.address, KEY)
        assert board.facts.log == str(log)
        assert "runs code for whoever reaches it" in server.text()
        with pytest.raises(RemoteError, match=re.escape(f"its log is {log}")):
            board.ask("get", 99)
        assert "connected from" in log.read_text()


# --- Boards that share a search ---------------------------------------------------------------------------------------------


@pytest.fixture
def records_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(records.VARIABLE, str(tmp_path / "records"))
    monkeypatch.setattr(tuner, "TURNS", 1)
    monkeypatch.setattr(trials, "CLOCK", ms.runner.EvaluatorConfig(number=1, repeat=1, min_repeat_ms=0))
    return tmp_path / "records"


@pytest.fixture
def graph() -> tt.TrainGraph:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    return tt.trace(model, torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2,)), loss="cross_entropy", optimizer=tt.SGD(lr=0.1))


def search(tracker: Server, graph: tt.TrainGraph, device: str, count: int) -> tuner.Result:
    found = fleet.gather(tracker.address, KEY, targets.load(device), 1)
    return tuner.tune(graph, device, tuner.Settings(5, count, 1), Console(sys.stderr), boards=found)


@contextmanager
def fake_tracker(boards: int) -> Iterator[str]:
    """The address of a tracker that tells of so many boards and then says nothing more; with none, it says nothing at all."""
    known = [{"addr": ["127.0.0.1", 1], "key": f"server:{KEY}"}] * boards

    def answer(listening: socket.socket) -> None:
        kept = []
        with suppress(OSError):
            while boards:
                kept.append(listening.accept()[0])
                with suppress(OSError, struct.error):
                    kept[-1].sendall(rpc_base.recvall(kept[-1], 4))
                    if rpc_base.recvjson(kept[-1])[0] == rpc_base.TrackerCode.SUMMARY:
                        rpc_base.sendjson(kept[-1], [rpc_base.TrackerCode.SUCCESS, {"server_info": known}])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, args=(listening,), daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def test_a_tracker_that_hangs_ends_a_search_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "GREETING", 0.3)
    monkeypatch.setattr(fleet, "BACK", 0.5)
    monkeypatch.setattr(fleet, "LOOK", 0.1)
    monkeypatch.setattr(fleet, "FREE", 0.3)
    with fake_tracker(0) as address:
        with pytest.raises(RemoteError, match=f"tracker {address} did not answer within"):
            fleet.gather(address, KEY, targets.load("host"), 1)
        lost = fleet.Fleet(remote.Address.parse(address), KEY, ("pi (10.0.0.7:9090)",), 1, "")
        with pytest.raises(RemoteError, match=r"tracker .* did not answer .* it had pi \(10\.0\.0\.7:9090\).*tune again"):
            fleet._wait_for(lost)
    with fake_tracker(2) as address, pytest.raises(RemoteError, match=f"of tracker {address} did not answer within"):
        fleet.gather(address, KEY, targets.load("host"), 1)


@pytest.mark.slow
def test_two_boards_share_a_search(start: Start, graph: tt.TrainGraph, records_folder: Path) -> None:
    tracker = start("tracker")
    servers = [start(kind, "--tracker", tracker.address) for kind in KINDS]
    for server in servers:
        server.port()
    wait_for(tracker, 2)
    result = search(tracker, graph, "host", 14)
    assert result.trials >= 12
    assert result.failed == 0, result.error
    assert all("session" in server.text() or "connected" in server.text() for server in servers)
    taken = [len(re.findall("connected from|a session begins", server.text())) for server in servers]
    assert min(taken) > 3, taken
    assert (records_folder / "host" / "records.jsonl").exists()


def wait_for(tracker: Server, count: int) -> None:
    until = time.monotonic() + boards.START
    while len(remote.boards(remote.Address.parse(tracker.address), KEY)) < count:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_board_that_is_killed_costs_a_retry(start: Start, graph: tt.TrainGraph, records_folder: Path) -> None:
    tracker = start("tracker")
    first, second = (start("native", "--tracker", tracker.address) for _ in range(2))
    wait_for(tracker, 2)

    def kill() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and first.text().count("a session begins") < 3:
            time.sleep(0.005)
        first.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = search(tracker, graph, "host", 8)
    thread.join(timeout=60)
    assert first.process.poll() is not None
    assert second.process.poll() is None
    assert result.trials >= 6
    assert result.failed == 0, result.error


def test_a_search_without_boards_says_so(start: Start, graph: tt.TrainGraph, records_folder: Path, monkeypatch) -> None:
    tracker = start("tracker")
    with pytest.raises(RemoteError, match=f"no board under the key '{KEY}'"):
        search(tracker, graph, "host", 1)
    server = start("native", "--tracker", tracker.address)
    wait_for(tracker, 1)
    with pytest.raises(DeviceError, match="is for one kind of board"):
        search(tracker, graph, "raspberry-pi-4b", 1)
    found = fleet.gather(tracker.address, KEY, targets.load("host"), 1)
    server.kill()
    monkeypatch.setattr(fleet, "BACK", 0.5)
    monkeypatch.setattr(remote, "GREETING", 2.0)
    with pytest.raises(RemoteError, match="has no board under the key"):
        fleet._wait_for(found)


@pytest.mark.slow
def test_a_search_on_an_emulated_board_keeps_no_times(start: Start, graph: tt.TrainGraph, records_folder: Path, capsys) -> None:
    tracker = start("tracker")
    server = start("emulated", "--tracker", tracker.address)
    wait_for(tracker, 1)
    result = search(tracker, graph, "raspberry-pi-4b", 6)
    assert result.emulated
    assert result.trials >= 6
    assert result.failed == 0, result.error
    assert result.before is None
    assert not (records_folder / "raspberry-pi-4b").exists()
    tuner.show(result, Console(sys.stderr))
    told = capsys.readouterr().err
    assert "no times" in told
    assert not re.search(r"\d (us|ms)", told)
    assert server.text().count("a session begins") > 5
