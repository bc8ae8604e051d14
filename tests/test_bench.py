"""A comparison: contestants compute the same, one that fails is told and stops nobody, a busy machine is refused."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tvmtrain import bench, cli, contestant, jobs
from tvmtrain.bench import Contestant, Machine, Result, Settings, Spread
from tvmtrain.console import Console
from tvmtrain.contestant import OURS, Failed, Order
from tvmtrain.errors import BusyMachineError, InputError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import speed
import threads

# PyTorch cannot run it with channels last.
NETWORK = textwrap.dedent("""
    import torch
    from torch import nn

    class Contiguous(nn.Module):
        def forward(self, x):
            if not x.is_contiguous():
                raise RuntimeError("only rows, please\\nand no channels last")
            return x

    def network():
        print("this goes nowhere near the answers")
        model = nn.Sequential(Contiguous(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
        return model, torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 0])
""")


class Stat:
    """/proc/stat of a machine with these (busy, idle) ticks, one pair for each reading."""

    def __init__(self, *readings: tuple[int, int]) -> None:
        self.readings = iter(readings)

    def read_text(self) -> str:
        busy, idle = next(self.readings)
        return f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(bench, "PAUSE", 0.0)
    monkeypatch.setattr(bench, "LOOK", 0.02)


@pytest.fixture
def model(tmp_path) -> str:
    (tmp_path / "network.py").write_text(NETWORK)
    return f"{tmp_path}/network.py:network"


def test_a_comparison_goes_on_without_those_who_fail(model, capsys, tmp_path):
    saved = tmp_path / "result.json"
    words = ["bench", model, "--peers", "eager-cl,eager", "--rounds", "2", "--steps", "4", "--threads", "1"]
    code = cli.main([*words, "--anyway", "--json", "-o", str(saved)])
    out, messages = capsys.readouterr()
    result = json.loads(out)
    assert code == 0, messages
    assert json.loads(saved.read_text()) == result
    found = {c["name"]: c for c in result["contestants"]}
    assert list(found) == [OURS, "eager", "eager-cl"]

    assert "RuntimeError: only rows, please and no channels last" in found["eager-cl"]["failed"]
    assert "eager-cl is out" in messages
    assert result["sound"]
    for name in (OURS, "eager"):
        assert found[name]["failed"] is None
        assert found[name]["same"]
        assert 0 < found[name]["best"]["low"] <= found[name]["best"]["median"] <= found[name]["best"]["high"]
    assert found[OURS]["losses"] == pytest.approx(found["eager"]["losses"], rel=1e-4)
    assert found[OURS]["losses"][1] < found[OURS]["losses"][0], "the first step has moved the weights"
    assert found[OURS]["seconds"] > 0
    assert found["eager"]["seconds"] is None
    assert result["rival"] == "eager"
    assert result["ratio"] == pytest.approx(found["eager"]["best"]["median"] / found[OURS]["best"]["median"])


@pytest.mark.parametrize(
    ("does", "said"), [("print('no memory', file=sys.stderr); os._exit(7)", "with 7: no memory"), ("0", "with 0")]
)
def test_a_process_that_dies_is_a_contestant_that_fails(does, said, monkeypatch):
    monkeypatch.setattr(bench, "START", f"import os, sys; {does}")
    with bench.running(Order(OURS, "nowhere", 1), dict(os.environ)) as process:
        assert isinstance(process.said, Failed)
        assert said in process.said.reason


@pytest.mark.slow
def test_every_peer_computes_the_same(model):
    job = jobs.Job(model.replace("network.py:network", "own.py:own"), optimizer=jobs.SGD(lr=bench.RATE, momentum=0.9))
    Path(job.model.partition(":")[0]).write_text(
        "import torch\nfrom torch import nn\n\ndef own():\n"
        "    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))\n"
        "    return model, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])\n"
    )
    found = bench.bench(job, Settings(1, 3, threads=1, anyway=True), Console(sys.stderr))
    assert {c.name: c.failed for c in found.contestants} == dict.fromkeys((OURS, *contestant.PEERS))
    assert found.sound


def test_a_busy_machine_is_refused(model, capsys, monkeypatch):
    monkeypatch.setattr(bench, "STAT", Stat((100, 100), (130, 170)))
    monkeypatch.setattr(bench, "_Process", lambda *_: pytest.fail("nothing is started"))
    assert cli.main(["bench", model]) == 1
    message = capsys.readouterr().err
    assert "70.0% idle" in message
    assert "wanted 85.0%" in message
    assert "--anyway" in message


def test_an_idle_machine_is_not(monkeypatch):
    monkeypatch.setattr(bench, "STAT", Stat((100, 100), (114, 186)))
    assert not bench.look_at(Settings()).busy
    monkeypatch.setattr(bench, "STAT", Stat((100, 100), (116, 184)))
    with pytest.raises(BusyMachineError, match=r"84\.0% idle"):
        bench.look_at(Settings())
    monkeypatch.setattr(bench, "STAT", Stat((100, 100), (116, 184)))
    assert bench.look_at(Settings(anyway=True)).busy


def test_where_the_system_does_not_tell_nobody_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "STAT", tmp_path / "nowhere")
    assert bench.look_at(Settings()).idle_before is None


def result(*contestants: Contestant, busy: bool = False) -> Result:
    machine = Machine("a processor", 2, 0.0, 0.5 if busy else 0.99, 0.99)
    job = jobs.Job("module:factory")
    return bench._result(job, Settings(), bench._compared(contestants, Settings()), machine)


def ran(name: str, ms: float, *losses: float) -> Contestant:
    return Contestant(name, None, Spread(ms, ms, ms), Spread(ms, ms, ms), losses)


def test_the_rival_is_the_fastest_other(capsys):
    found = result(ran(OURS, 4.0, 1.5, 1.4), ran("eager", 10.0, 1.5, 1.4), ran("compile", 6.0, 1.5, 1.4001))
    assert (found.rival, found.ratio, found.sound, found.quiet) == ("compile", 1.5, True, True)
    bench.show(found, Console())
    shown = capsys.readouterr().out
    assert "compile, takes 1.50 times as long" in shown
    assert "departs" not in shown


def test_losses_that_depart_are_no_comparison(capsys):
    found = result(ran(OURS, 4.0, 1.5, 1.41), ran("eager", 10.0, 1.5, 1.4), Contestant("compile", "no C++ compiler"), busy=True)
    assert [c.same for c in found.contestants] == [False, True, False]
    assert not found.sound
    bench.show(found, Console())
    shown = capsys.readouterr().out
    assert "departs" in shown
    assert "compares nothing" in shown
    assert "compile is out: no C++ compiler" in shown
    assert "no record" in shown
    assert not result(Contestant(OURS, "out"), ran("eager", 1.0, 1.0, 1.0)).sound
    assert not replace(found, contestants=()).sound


def test_a_spread_is_a_median_and_two_percentiles():
    assert Spread.of([float(i) for i in range(100, -1, -1)]) == Spread(50.0, 10.0, 90.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_settings_that_make_no_sense(capsys):
    with pytest.raises(InputError, match="got tuna; want some of eager"):
        Settings(peers=("tuna",))
    with pytest.raises(InputError, match="0 rounds"):
        Settings(rounds=0)
    with pytest.raises(SystemExit):
        cli.main(["bench", "network:network", "--peers", "eager,tuna"])
    assert "got tuna, wanted some of eager,eager-cl" in capsys.readouterr().err


def test_a_plan_is_not_compared_where_it_was_not_built(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_build", lambda *_: Failed("ModelError: no"))
    job = jobs.Job(model, plan=tmp_path / "plan.toml")
    found = bench.bench(job, Settings(anyway=True, peers=("eager",)), Console(sys.stderr))
    assert [(c.name, c.failed) for c in found.contestants] == [
        (OURS, "ModelError: no"),
        ("eager", "the step that they are compared with was not built"),
    ]
    assert not found.sound


def test_pytorch_gets_its_best_surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    eager, ours = (bench.environment(name, 2, tmp_path) for name in ("eager", OURS))
    assert bench.STRONGEST.items() <= eager.items()
    assert "OMP_WAIT_POLICY" not in eager
    assert (ours["TVM_NUM_THREADS"], ours["TVM_USE_RUNTIME_LIB"]) == ("2", "1")
    assert not bench.STRONGEST.keys() & ours.keys()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_memory_is_what_a_step_adds():
    before = contestant._settled()
    block = bytearray(64 * 2**20)
    assert 60 * 2**20 < contestant._bytes("VmHWM") - before < 80 * 2**20
    del block
    contestant._reset_peak()
    assert contestant._bytes("VmHWM") - before < 30 * 2**20
    assert Order(OURS, "folder", 1).job is None


def test_peers_may_train_more_than_a_plan(model, tmp_path):
    (tmp_path / "plan.toml").write_text('[layers."2"]\nbias = false\n')
    job = jobs.Job(model, plan=tmp_path / "plan.toml", optimizer=jobs.SGD(lr=1.0))
    after = []
    for everything in (False, True):
        settings = Settings(1, 2, threads=1, peers=("eager",), anyway=True, peers_train_all=everything)
        found = bench.bench(job, settings, Console(sys.stderr))
        assert found.sound
        ours, eager = found.contestants
        after.append((ours.losses[1], eager.losses[1]))
    assert after[0][1] == pytest.approx(after[0][0], rel=1e-4)
    assert after[1][1] != pytest.approx(after[1][0], rel=1e-2), "other parameters have moved, too"


def test_one_thread_and_two(model, capsys):
    times = threads.measure(jobs.Job(model), (1, 2), Settings(1, 2, warmup=0, anyway=True))
    assert min(times) > 0
    threads.show({"network": {1: 3.0, 2: 2.0}}, (1, 2), Console())
    assert capsys.readouterr().out.split()[-4:] == ["network", "3.00", "2.00", "1.50"]


def test_rows_of_the_speed_table():
    assert [row.factory for row in speed.chosen("resnet")] == ["resnet18"]
    assert speed.chosen("") == speed.ROWS
    assert len({row.name for row in speed.ROWS}) == len(speed.ROWS) == 8
    assert {row.factory for row in speed.ROWS} <= vars(speed).keys()
    assert [row.plan is not None for row in speed.chosen("against all") if row.rival_trains_all] == [True, True]
    with speed.job(speed.ROWS[4]) as job:
        plan = jobs.UpdatePlan.from_toml(job.plan)
    assert [(u.weight, u.filter) for u in plan.layers.values()] == [(0.25, None)] * 4 + [(1.0, None)]
    assert not job.plan.exists()


def test_calibrated_statistics_are_those_of_the_batch():
    model, x = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)), 5 + 3 * torch.randn(64, 2, 2, 2)
    model, x, _ = speed.calibrated(model, x, torch.zeros(64, dtype=torch.int64))
    assert not model.training
    assert model[0].momentum == 0.1
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    assert model[0](x).std().item() == pytest.approx(1.0, rel=0.05)
