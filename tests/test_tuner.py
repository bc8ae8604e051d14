"""Tuning: every decision is a correct schedule, a search can end at any moment, and what it found is what builds use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, astuple, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_cases import close, module, run
from torch import nn
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.s_tir import meta_schedule as ms

import tvmtrain as tt
from tvmtrain import cli, lowering, operators, roofline, targets, trials, tuner
from tvmtrain.console import Console
from tvmtrain.errors import DeviceError, StorageError
from tvmtrain.schedules import cpu, records
from tvmtrain.schedules.decisions import DEFAULT, OPTIONS, VERSION, Decisions
from tvmtrain.schedules.records import Record, Records

rng = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(records.VARIABLE, str(tmp_path / "records"))
    return tmp_path / "records" / "host"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the search, not how fast anything is."""
    monkeypatch.setattr(tuner, "TURNS", 1)
    monkeypatch.setattr(trials, "CLOCK", ms.runner.EvaluatorConfig(number=1, repeat=1, min_repeat_ms=0))
    monkeypatch.setattr(roofline, "measure", lambda threads: roofline.Roofline(1e12, 1e11, threads, "compiler"))


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype("float32")


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays]


# --- The space ----------------------------------------------------------------------------------------------------------------


def convolution(strides: int, groups: int = 1):
    """Its three kernels in Relax, from x, w and dy."""
    how = {"strides": [strides, strides], "padding": [1, 1, 1, 1], "groups": groups}

    def make(x: relax.Var, w: relax.Var, dy: relax.Var) -> relax.Expr:
        bb = relax.BlockBuilder()
        y = bb.normalize(R.nn.conv2d(x, w, **how))
        return relax.Tuple([R.nn.relu(y), operators.conv2d_dgrad(y, dy), operators.conv2d_wgrad(y, dy)])

    return make


def oracle(x: np.ndarray, w: np.ndarray, dy: np.ndarray, stride: int, groups: int) -> list[np.ndarray]:
    """The same by PyTorch."""
    tx, tw, tdy = tensors(x, w, dy)
    y = F.conv2d(tx, tw, None, stride, 1, 1, groups)
    mask = [True, True, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        tdy, tx, tw, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, mask
    )
    return [y.relu().numpy(), dx.numpy(), dw.numpy()]


SHAPES = {
    "plain": ((2, 6, 16, 16), (8, 6, 3, 3), 1, 1),
    "small maps": ((3, 16, 7, 7), (24, 16, 3, 3), 1, 1),
    "stride 2": ((2, 5, 13, 13), (8, 5, 3, 3), 2, 1),
    "depthwise": ((2, 8, 15, 16), (8, 1, 3, 3), 1, 8),
    "one channel": ((1, 1, 11, 8), (1, 1, 3, 3), 1, 1),
}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.tuples(*(st.integers(0, n - 1) for n in OPTIONS)))
def test_every_decision_computes_the_same(name: str, chosen: tuple[int, ...]) -> None:
    shape, weights, stride, groups = SHAPES[name]
    x, w = array(*shape), array(*weights)
    dy = array(*F.conv2d(*tensors(x, w), None, stride, 1, 1, groups).shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "decisions", lambda _self, _function: Decisions(*chosen))
        got = run(convolution(stride, groups), x, w, dy)
    for g, wanted in zip(got, oracle(x, w, dy, stride, groups), strict=True):
        close(g, wanted)


@pytest.mark.parametrize("chosen", [(0, 3, 1, 1, 0), (1, 0, 2, 2, 1), (1, 7, 0, 0, 2)])
def test_decisions_of_products_and_sums(chosen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Records, "decisions", lambda _self, _function: Decisions(*chosen))
    a, b = array(37, 64), array(64, 48)
    close(run(R.matmul, a, b)[0], a @ b)
    x = array(9, 5, 121)
    close(run(lambda v: R.sum(v, [0, 2]), x)[0], x.sum((0, 2)))
    close(run(lambda v: R.sum(v, [1]), a)[0], a.sum(1))


def kernels(make=R.matmul, *arrays: np.ndarray) -> list[tirx.PrimFunc]:
    arrays = arrays or (array(64, 96), array(96, 160))
    fused = lowering.fuse(module(make, *arrays), targets.load("host"))
    return [f for _, f in fused.functions_items() if isinstance(f, tirx.PrimFunc)]


def test_decisions_change_the_schedule_and_the_defaults_do_not() -> None:
    (kernel,) = kernels()
    device = targets.load("host")
    plain = records.key_of(cpu.schedule(kernel, device))
    assert records.key_of(cpu.schedule(kernel, device, DEFAULT)) == plain
    assert records.key_of(cpu.schedule(kernel, device, Decisions(tile=1))) != plain


# --- Records ------------------------------------------------------------------------------------------------------------------


def record(kernel: str = "0123456789abcdef") -> Record:
    return Record(kernel, "matmul", Decisions(tile=2, order=1), 10.0, 12.5, 40)


def test_records_come_back(folder: Path) -> None:
    device = targets.load("host")
    assert records.load(device) == Records()
    assert records.save(device, [record()], {"command": 'tvmtrain tune "a b.py:f"', "trials": 40}) == folder
    assert records.load(device).by_kernel == {record().kernel: record()}
    origin = targets.tomllib.loads((folder / records.ORIGIN).read_text())
    assert origin["command"] == 'tvmtrain tune "a b.py:f"'
    assert origin["tvm"] == tvm.__version__
    assert origin["target"]["kind"] == "llvm"


def test_records_of_other_conditions_warn_and_are_not_used(folder: Path) -> None:
    device = targets.load("host")
    records.save(device, [record()], {})
    first, *rest = (folder / records.RECORDS).read_text().splitlines()
    (folder / records.RECORDS).write_text("\n".join([json.dumps(json.loads(first) | {"tvm": "0.1"}), *rest]))
    with pytest.warns(UserWarning, match=r"'tvm': '0.1'.*not used; tune again"):
        assert records.load(device) == Records()


OURS = f'{{"templates": {VERSION}}}\n'


@pytest.mark.parametrize("damage", ["", "[]", "{", OURS + '{"kernel": 3}', OURS + '{"decisions": [99, 0, 0, 0, 0]}'])
def test_damaged_records_are_refused(folder: Path, damage: str) -> None:
    folder.mkdir(parents=True)
    (folder / records.RECORDS).write_text(damage)
    with pytest.raises(DeviceError, match=r"records.jsonl is damaged: .*; delete it, or tune again"):
        records.load(targets.load("host"))


def test_a_kernel_is_known_by_its_loops(tmp_path: Path) -> None:
    (one,), (again,), (other,) = kernels(), kernels(), kernels(R.matmul, array(64, 96), array(96, 161))
    assert records.key_of(one) == records.key_of(again.with_attr("global_symbol", "another_name"))
    assert records.key_of(one) != records.key_of(other)
    code = "import test_tuner as t; from tvmtrain.schedules import records; print(records.key_of(t.kernels()[0]))"
    there = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == records.key_of(one), "a key is the same in every process"


# --- Searching ----------------------------------------------------------------------------------------------------------------


def graph() -> tt.TrainGraph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.Flatten(), nn.Linear(24 * 64, 10))
    return tt.trace(model, torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), optimizer=tt.SGD(lr=0.1))


def search(count: int = 16, **how) -> tuner.Result:
    return tuner.tune(graph(), "host", tuner.Settings(minutes=2, trials=count, **how), Console(), command="a test")


def lines(folder: Path) -> list[trials.Trial]:
    (path,) = folder.glob("trials-*.jsonl")
    return list(trials.read_log(path))


def losses(tuned: bool) -> list[float]:
    step = tt.build(graph(), "host", tuned=tuned).load()
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype("float32")
    return [step(x, np.array([1, 2])) for _ in range(4)]


def others_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any schedule but the default be a record, however slow: what is tested is that it is kept and used."""
    whole, usual = trials.Stopwatch.run_all, {}

    def run_all(self, pairs):
        found = whole(self, pairs)
        usual.update({t.kernel: t.form for t in found if t.decisions == astuple(DEFAULT)})
        return [replace(t, us=1e3 * t.us) if t.us is not None and t.form == usual.get(t.kernel) else t for t in found]

    monkeypatch.setattr(trials.Stopwatch, "run_all", run_all)
    monkeypatch.setattr(tuner, "FASTER", float("inf"))


def test_a_search_finds_keeps_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others_win(monkeypatch)
    first = search(30)
    assert first.trials == len(lines(folder)) == 30
    assert not first.interrupted
    tried = {(t.kernel, t.decisions) for t in lines(folder)}
    assert len(tried) == 30, "nothing is tried twice"
    assert {k.kernel for k in first.kernels} == {key for key, chosen in tried if chosen == astuple(DEFAULT)}
    assert all(k.us > 0 and k.default_us > 0 and k.share > 0 for k in first.kernels)
    assert targets.tomllib.loads((folder / records.ORIGIN).read_text())["command"] == "a test"
    second = search(6)
    assert second.trials == len(lines(folder)) == 36, "earlier trials count, and six came to them"
    known = records.load(targets.load("host")).by_kernel
    assert known
    assert second.steps is not None
    assert second.steps.untuned > 0 < second.steps.tuned
    assert {k.kernel for k in second.kernels if k.decisions != astuple(DEFAULT)} == set(known)

    seen = []
    found = Records.decisions
    monkeypatch.setattr(Records, "decisions", lambda self, f: seen.append(found(self, f)) or seen[-1])
    np.testing.assert_allclose(losses(tuned=True), losses(tuned=False), rtol=1e-5)
    assert {r.decisions for r in known.values()} <= set(seen)


def test_trials_that_fail_are_told_and_never_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trials.Stopwatch._compiled

    def compiled(self, candidate):
        return whole(self, candidate) if candidate.decisions == DEFAULT else "InternalError: no such instruction"

    monkeypatch.setattr(trials.Stopwatch, "_compiled", compiled)
    result = search(26)
    assert result.failed == sum(t.us is None for t in lines(folder)) > 0
    assert {t.error for t in lines(folder) if t.us is None} == {"InternalError: no such instruction"}
    assert records.load(targets.load("host")).by_kernel == {}
    assert all(k.us == k.default_us for k in result.kernels)


def test_a_kernel_that_crashes_is_a_failed_trial(folder: Path, tmp_path: Path) -> None:
    task = tuner.find_tasks(graph(), targets.load("host"))[0]
    watch = trials.Stopwatch(targets.load("host"), 1, tmp_path)
    candidate = watch.candidate(task, DEFAULT)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert watch.run(candidate, broken).us is None
    (built,) = watch.compile([candidate])
    assert watch.run(candidate, built).us > 0, "the worker that is left, or the next one, goes on"


def test_an_interrupt_keeps_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others_win(monkeypatch)
    whole, calls = trials.Stopwatch.run_all, []

    def run_all(self, pairs):
        calls.append(pairs)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return whole(self, pairs)

    monkeypatch.setattr(trials.Stopwatch, "run_all", run_all)
    result = search(500)
    assert result.interrupted
    assert result.steps is None
    assert result.trials == len(lines(folder)) == 14, "in the middle of a round"
    assert (folder / records.RECORDS).is_file()


def test_a_worker_that_died_is_replaced(folder: Path, tmp_path: Path) -> None:
    task = tuner.find_tasks(graph(), targets.load("host"))[0]
    others = set(psutil.Process().children())
    watch = trials.Stopwatch(targets.load("host"), 1, tmp_path)
    candidate = watch.candidate(task, DEFAULT)
    (built,) = watch.compile([candidate])
    assert watch.run(candidate, built).us > 0
    (worker,) = set(psutil.Process().children()) - others
    worker.send_signal(signal.SIGINT)  # as a terminal does to all it runs
    assert watch.run(candidate, built).us > 0, "an interrupt is not for the worker"
    worker.kill()
    assert watch.run(candidate, built).us is None
    assert watch.run(candidate, built).us > 0


def test_the_cost_model_learns_and_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    whole = ms.cost_model.XGBModel.predict

    def predict(self, context, candidates):
        asked.append(scores := whole(self, context, candidates))
        return scores

    def heaviest(*given):
        return [max(found(*given), key=lambda task: task.flops)]

    found = tuner.find_tasks
    # Which of several tasks gets the trials depends on the clock; and a small one has few schedules: two of them are a round.
    monkeypatch.setattr(tuner, "find_tasks", heaviest)
    monkeypatch.setattr(tuner, "ROUND", 2)
    monkeypatch.setattr(trials, "LEARNED", 6)
    monkeypatch.setattr(ms.cost_model.XGBModel, "predict", predict)
    assert search(14).failed == 0
    assert asked
    assert all(np.isfinite(scores).all() and len(scores) > tuner.ROUND for scores in asked)


def test_a_record_that_nothing_speaks_against_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = targets.load("host")
    task = max(tuner.find_tasks(graph(), device), key=lambda t: t.flops)
    chosen = Decisions(tile=3, order=1)
    records.save(device, [Record(task.key, task.name, chosen, 1.0, 2.0, 5), record()], {})
    search(20)
    assert (task.key, astuple(chosen)) in {(t.kernel, t.decisions) for t in lines(folder)}, "it is tried again"
    assert record().kernel in records.load(device).by_kernel, "another network's"


def test_a_failure_is_tried_again(folder: Path) -> None:
    search(8)
    (path,) = folder.glob("trials-*.jsonl")
    path.write_text("".join(f"{json.dumps(asdict(t) | {'us': None, 'error': 'disk full'})}\n" for t in lines(folder)))
    again = search(8)
    assert again.failed == 0
    assert again.error is None
    assert again.kernels


def test_a_log_that_was_cut_short_is_read_to_there(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    assert list(trials.read_log(path)) == []
    good = trials.Trial("k", (0, 1, 2, 0, 1), "f", 3.5)
    bad = [
        {"decisions": [0, 1, 2, 0, 99]},
        {"decisions": [0, 1, 2, 0, 0.9]},
        {"us": -1.0},
        {"us": float("nan")},
        {"us": "3"},
        {"kernel": 3},
    ]
    text = [json.dumps(asdict(good) | change) for change in ({}, *bad)]
    path.write_text("\n".join([*text, "null", '{"kernel": "k", "deci']))
    assert list(trials.read_log(path)) == [good]
    with path.open("a") as file:
        trials.Log(file).write(good)
    assert list(trials.read_log(path)) == [good, good], "what comes after a cut line is not lost"


def test_where_nothing_can_be_timed_or_written(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="the GPU sm_87; kernels are timed on the processor at hand"):
        tuner.tune(graph(), "jetson-orin-nano", tuner.Settings(), Console())
    other = replace(targets.load("host"), name="board", target={"kind": "llvm", "mcpu": "no-such-core"})
    with pytest.raises(DeviceError, match=r"'board' has \d+ cores of no-such-core, and this machine \d+ of "):
        tuner.tune(graph(), other, tuner.Settings(), Console())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(records.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set TVMTRAIN_RECORDS to a folder that can be written"):
        search(1)


def test_equal_loops_are_one_task() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x).relu()).relu()).mean((2, 3))

    found = tuner.find_tasks(
        tt.trace(Twice(), torch.randn(1, 8, 8, 8), torch.zeros(1, dtype=torch.int64)), targets.load("host")
    )
    assert len({t.key for t in found}) == len(found)
    assert max(t.calls for t in found) > 1
    assert all(t.flops > 0 and t.bytes > 0 for t in found)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "model.py"
    model.write_text("import torch\ndef net():\n    return torch.nn.Linear(12, 5), torch.randn(4, 12)\n")
    assert cli.main(["tune", f"{model}:net", "--minutes", "1", "--trials", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trials"] == 8
    assert said["folder"] == str(folder)
    assert cli.main(["tune", f"{model}:net", "--minutes", "1", "--trials", "2"]) == 0
    assert "every build for host uses them" in capsys.readouterr().out
