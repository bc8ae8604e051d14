"""A comparison on an NVIDIA GPU; where there is none, on an emulated one: who takes part, what is refused, all compute the same."""

from __future__ import annotations

import ctypes
import shutil
import sys
import textwrap
import time
from pathlib import Path

import cuda_graphs
import emulator
import pytest
import torch

from tvmtrain import bench, cli, contestant, gpu_load, gpu_peers, jobs, peers, runtime
from tvmtrain.bench import Contestant, Machine, Result, Settings, Spread
from tvmtrain.console import Console
from tvmtrain.contestant import GPU_PEERS, OURS, PEERS, Memory, Started, Turn
from tvmtrain.errors import BusyMachineError, DeviceError, InputError
from tvmtrain.spec import SGD, Adam, AdamW, LayerUpdate, Optimizer, UpdatePlan

NETWORK = textwrap.dedent("""
    import torch
    from torch import nn

    def network():
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3))
        return model, torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 2, 0])
""")
FILTERED = UpdatePlan({"0": LayerUpdate(filter=2), "4": LayerUpdate()})
SPARSE = UpdatePlan({"0": LayerUpdate(weight=0.5, select="random"), "4": LayerUpdate()})


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE", 0.0)
    monkeypatch.setattr(bench, "LOOK", 0.02)
    monkeypatch.setattr(bench, "GPU_WARMUP", 0.02)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "network.py").write_text(NETWORK)
    return f"{tmp_path}/network.py:network"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """This machine's GPU and all peers; without one, an emulated GPU and those whose steps PyTorch itself runs, one by one."""
    if not emulator.needed() and torch.cuda.is_available():
        return GPU_PEERS
    if shutil.which("g++") is None:
        pytest.skip("neither an NVIDIA GPU nor g++, which compiles for the emulated one")
    found = type("Found", (), {"device_name": "an emulated GPU"})
    monkeypatch.setattr(runtime, "gpu", lambda: found)
    monkeypatch.setattr(gpu_peers, "check", lambda _: None)
    tests = str(Path(__file__).parent)
    monkeypatch.setattr(bench, "START", f"import sys; sys.path.append({tests!r}); import gpu_contestant; gpu_contestant.main()")
    return ("eager-cl-graph",)


@pytest.mark.parametrize(
    "plan",
    [None, pytest.param(FILTERED, marks=pytest.mark.slow), pytest.param(SPARSE, marks=pytest.mark.slow)],
    ids=["dense", "filtered", "sparse"],
)
def test_all_compute_the_same(plan: UpdatePlan | None, here: tuple[str, ...], model: str, tmp_path: Path) -> None:
    if plan is not None:
        (tmp_path / "plan.toml").write_text(plan.to_toml())
    job = jobs.Job(model, device="cuda", plan=plan and tmp_path / "plan.toml", optimizer=SGD(lr=bench.RATE, momentum=0.9))
    found = bench.bench(job, Settings(2, 3, warmup=1, threads=1, peers=here, anyway=True), Console(sys.stderr))
    assert {c.name: c.failed for c in found.contestants} == dict.fromkeys((OURS, *here))
    assert found.sound
    assert found.machine.gpu
    parameters = 4 * (4 * 8 * 9 + 8 + 16 + 512 * 3 + 3)
    assert all(parameters < c.steady <= c.first for c in found.contestants)
    assert all((c.seconds is None) == (c.name in ("eager", "eager-cl")) for c in found.contestants)


# PyTorch's side, on the processor.


@pytest.mark.parametrize(
    "optimizer",
    [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, clip_norm=0.5), Adam(lr=0.01), AdamW(lr=0.01)],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_a_captured_step_is_the_step(optimizer: Optimizer, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first one on: what was done before the capture is undone, running statistics and momentum too."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which captures itself")
    cuda_graphs.emulate(monkeypatch.setattr)
    job = jobs.Job(model, optimizer=optimizer, training=True)
    eager, captured = peers.start("eager", job, None, 1), gpu_peers.start("eager-graph", job, None, 1)
    wanted = [eager.step() for _ in range(5)]
    assert wanted[4] < wanted[0]
    assert [captured.step() for _ in range(5)] == pytest.approx(wanted, rel=1e-5)
    assert captured.memory.peak() == cuda_graphs.PEAKS


def test_warmup_has_a_stream_of_its_own(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = cuda_graphs.emulate(monkeypatch.setattr)
    taken = []
    monkeypatch.setattr(peers.Training, "of", counting(peers.Training.of, lambda: taken.append(streams.current.name)))
    step = gpu_peers.start("eager-graph", jobs.Job(model), None, 1).step
    assert not taken, "nothing is captured before its time"
    for _ in range(3):
        step()
    assert taken == ["stream 1"] * gpu_peers.WARMUP + ["stream 0"]
    assert streams.events == [
        "stream 1 waits for stream 0",
        "on stream 1",
        "stream 0 waits for stream 1",
        "capture while on stream 0",
    ]


def counting(make, note):
    def of(*arguments, **options):
        training = make(*arguments, **options)

        def update():
            note()
            return training.update()

        return peers.Training(training.module, training.optimizer, update)

    return of


@pytest.mark.parametrize("name", ["eager", "eager-graph"])
def test_every_step_takes_its_batch_to_the_gpu(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_graphs.emulate(monkeypatch.setattr)
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.clone()) or pinned[-1])
    step = gpu_peers.start(name, jobs.Job(model, optimizer=SGD(lr=0.0), training=False), None, 1).step
    before = step()
    assert step() == before
    pinned[0].mul_(3)
    changed = step()
    assert changed != pytest.approx(before, rel=1e-3)
    pinned[0].div_(3)
    assert step() == pytest.approx(before, rel=1e-6)


def test_float32_stays_float32(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_graphs.emulate(monkeypatch.setattr)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    gpu_peers.start("eager", jobs.Job(model), None, 1)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark


# The clock.


def test_the_clock_is_read_when_the_device_is_done() -> None:
    did: list[str] = []
    memory = Memory(lambda: 0, lambda: did.append("reset"), lambda: 7)
    started = Started(lambda: did.append("step") or 0.0, memory, lambda: did.append("wait") or time.sleep(0.01))
    taken = contestant._taken(started, Turn(warmup=2, steps=3), before=2)
    assert did == ["step", "step", "wait", "reset", *["step", "wait"] * 3]
    assert min(taken.ms) >= 10
    assert (len(taken.ms), taken.peak) == (3, 5)


def test_a_gpu_gets_time_to_get_warm() -> None:
    did: list[float] = []
    started = Started(lambda: did.append(time.sleep(0.002)) or 0.0, contestant._constant(0), lambda: None)
    contestant._taken(started, Turn(warmup=1, steps=1, seconds=0.04), before=0)
    assert len(did) > 4
    assert Settings().on("cuda", True).warm == bench.GPU_WARMUP
    assert Settings().on("host", False).warm == 0


# Who takes part, and where.


def test_peers_of_a_device() -> None:
    assert Settings().on("host", False).peers == PEERS
    assert Settings().on("cuda", True).peers == GPU_PEERS
    assert set(PEERS) < set(GPU_PEERS)
    some = Settings(peers=("eager-graph", "eager"))
    assert some.on("cuda", True).peers == some.peers
    with pytest.raises(InputError, match=r"got eager-graph; want some of eager, .*compile-cl on device 'host'"):
        some.on("host", False)
    with pytest.raises(InputError, match="want each once"):
        Settings(peers=("eager", "eager"))


def test_a_graph_on_a_processor_is_an_error(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", model, "--peers", "eager-cl-graph", "--anyway"]) == 1
    assert "got eager-cl-graph; want some of" in capsys.readouterr().err


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_Process", lambda *_: pytest.fail("nothing is started"))


@pytest.mark.usefixtures("nothing_starts")
def test_no_gpu_that_tvm_finds(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runtime, "load_gpu_runtime", lambda: None)
    monkeypatch.setattr(runtime.tvm, "cuda", lambda _: type("Nothing", (), {"exist": False}))
    assert cli.main(["bench", model, "--device", "jetson-nano"]) == 1
    message = capsys.readouterr().err
    assert "device 'jetson-nano' is a GPU, and TVM finds none here" in message
    assert "--rpc" in message


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(("cuda", "said"), [(None, "was built without CUDA"), ("13.0", "finds no GPU")])
def test_no_gpu_that_pytorch_finds(cuda: str | None, said: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "gpu", lambda: type("Found", (), {"device_name": "a GPU"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    job = jobs.Job(model, device="cuda")
    with pytest.raises(DeviceError, match=rf"device 'cuda' is a GPU, and the PyTorch .* {said}.*install PyTorch with CUDA"):
        bench.bench(job, Settings(anyway=True), Console(sys.stderr))
    with pytest.raises(DeviceError, match=said):
        gpu_peers.start("eager", job, None, 1)
    assert bench._gpu("cuda", Settings(peers=())) == "a GPU", "ours alone asks nothing of PyTorch"


# How busy the GPU is.


@pytest.mark.parametrize(("told", "idle"), [("echo 37", 0.63), ("echo '[N/A]'", None), ("echo 0; exit 9", None)])
def test_what_nvidia_smi_tells(told: str, idle: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = --id=0000:41:00.0 ] || exit 3\n{told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeCuda())
    found = gpu_load.idle_share()
    assert found == (None if idle is None else pytest.approx(idle))
    program.unlink()
    assert gpu_load.idle_share() is None


class FakeCuda:
    def cudaDeviceGetPCIBusId(self, text: ctypes.Array, size: int, device: int) -> int:
        assert (size, device) == (len(text), 0)
        text.value = b"0000:41:00.0"
        return 0


def test_a_gpu_without_an_address_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no such library")))
    assert gpu_load.idle_share() is None
    monkeypatch.setattr(FakeCuda, "cudaDeviceGetPCIBusId", lambda *_: 100)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeCuda())
    assert gpu_load.idle_share() is None


def test_a_busy_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "idle_share", lambda: 1.0)
    monkeypatch.setattr(gpu_load, "idle_share", lambda: 0.4)
    assert not bench.look_at(Settings()).busy
    with pytest.raises(BusyMachineError, match=r"100\.0% idle and its H200 40\.0%"):
        bench.look_at(Settings(), "H200")
    machine = bench.look_at(Settings(anyway=True), "H200")
    assert (machine.busy, machine.gpu, machine.gpu_idle_before) == (True, "H200", 0.4)
    assert machine.afterwards().gpu_idle_after == 0.4
    assert Machine("a processor", 2, 0.0, 1.0).afterwards().gpu_idle_after is None


def test_what_is_shown_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine("a processor", 2, 0.0, 0.99, 0.99, "H200", 1.0, 0.5)
    spread = Spread(1.0, 1.0, 1.0)
    ran = [Contestant(name, None, spread, spread, (1.5, 1.4), True) for name in (OURS, "compile-graph")]
    result = Result("m", Settings(), tuple(ran), machine, "compile-graph", 1.0, not machine.busy)
    bench.show(result, Console())
    shown = capsys.readouterr().out
    assert "H200, a processor; memory: of all tensors on the GPU" in shown
    assert "its GPU 100.0% and 50.0%" in shown
    assert result.to_dict()["machine"]["gpu"] == "H200"
