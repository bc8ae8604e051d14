"""The C API and the runner do what Python's ``TrainStep`` does: bit for bit on this machine, within rounding on an emulated board."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from builds import for_host, once
from native_step import ARTIFACT, CHECKPOINT, INPUT, NONFINITE, STORAGE, NativeError, NativeStep
from safetensors.numpy import load_file, save_file
from torch import nn

import tvmtrain as tt
from tvmtrain import data, elf, native, runtime, toolchain
from tvmtrain.artifact import Artifact
from tvmtrain.training import Rate, order

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="the native half is for x86-64 and aarch64"
)

BATCH, SIZE = 4, 8
SELECTS = ("first", "magnitude", "random", "rotate")


@pytest.fixture(scope="module")
def host() -> Path:
    return for_host()


@pytest.fixture(scope="module")
def library(host: Path) -> Path:
    return host / "lib/libtvmtrain.so"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-written toy: labels, an ignored one, a tied name, a buffer that nothing reads."""
    return toy.artifact().save(tmp_path_factory.mktemp("native") / "toy")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batch statistics, Dropout, a filtered convolution, and a share of the channels by each kind of selection."""
    return once(tmp_path_factory, "network", lambda folder: tt.build(_graph()).save(folder))


def _model() -> nn.Module:
    torch.manual_seed(1)
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(3):
        block += [nn.Conv2d(8, 8, 1), nn.ReLU()]
    depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *block, depthwise, nn.Dropout(0.3), nn.Flatten(), nn.Linear(1024, 5)
    )


def _graph() -> tt.TrainGraph:
    x, y = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 5, (BATCH,))
    graph = tt.trace(_model(), x, y, loss="cross_entropy", optimizer=tt.SGD(lr=0.05, momentum=0.9))
    layers = {"0": tt.LayerUpdate(filter=2), "3": tt.LayerUpdate(), "14": tt.LayerUpdate()}
    weights = {
        name: tt.LayerUpdate(weight=0.4, select=select) for name, select in zip(("2", "5", "7", "9"), SELECTS, strict=True)
    }
    return graph.apply(tt.UpdatePlan({**layers, **weights, "11": tt.LayerUpdate(weight=0.3, select="random")}))


def _batches(count: int, features: tuple[int, ...], classes: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [
        (generator.standard_normal((BATCH, *features)).astype("float32"), generator.integers(0, classes, BATCH))
        for _ in range(count)
    ]


def _same_state(native_file: Path, python_file: Path) -> None:
    ours, theirs = load_file(native_file), load_file(python_file)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize(("folder", "features", "classes"), [("dense", (6,), 3), ("network", (3, SIZE, SIZE), 5)])
def test_losses_state_and_predictions_are_those_of_python(
    folder: str, features: tuple[int, ...], classes: int, library: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = request.getfixturevalue(folder)
    here, there = tt.load(artifact, threads=1), NativeStep(library, artifact)
    for i, (x, y) in enumerate(_batches(12, features, classes)):
        lr = 0.05 if i % 2 else None
        assert there(x, y, -1.0 if lr is None else lr) == here(x, y, lr=lr)
    here.save(tmp_path / "here"), there.save(tmp_path / "there")
    _same_state(tmp_path / "there", tmp_path / "here")
    for samples in (1, BATCH, 2 * BATCH + 3):
        x = np.random.default_rng(samples).standard_normal((samples, *features)).astype("float32")
        wanted = here.predict(x)
        np.testing.assert_array_equal(there.predict(x, wanted.shape), wanted)
    for name, value in here.state_dict().items():
        np.testing.assert_array_equal(there.read(name, value.shape, str(value.dtype)), value)


def test_a_step_starts_with_the_state_of_python_zeros_or_not(library: Path, tmp_path: Path) -> None:
    state = toy.state()
    state["optimizer:momentum:fc.bias"][1] = 0.5
    folder = Artifact(toy.manifest(), state, toy.executable("cross_entropy")).save(tmp_path / "out")
    assert {"optimizer:momentum:fc.bias"} == {
        n for n in load_file(folder / "parameters.safetensors") if n.startswith("optimizer")
    }
    NativeStep(library, folder).save(tmp_path / "there")
    tt.load(folder).save(tmp_path / "here")
    _same_state(tmp_path / "there", tmp_path / "here")
    assert load_file(tmp_path / "here")["optimizer:momentum:fc.bias"].tolist() == [0, 0.5, 0]


def test_checkpoints_go_both_ways(network: Path, library: Path, tmp_path: Path) -> None:
    before, after = _batches(5, (3, SIZE, SIZE), 5), _batches(7, (3, SIZE, SIZE), 5, seed=1)
    straight = tt.load(network, threads=1)
    wanted = [straight(x, y) for x, y in before + after]
    here, there = tt.load(network, threads=1), NativeStep(library, network)
    for x, y in before:
        here(x, y), there(x, y)
    here.save(tmp_path / "python"), there.save(tmp_path / "native")
    resumed, again = tt.load(network, threads=1), NativeStep(library, network)
    resumed.restore(tmp_path / "native"), again.restore(tmp_path / "python")
    assert again.steps == resumed.steps == 5
    assert [again(x, y) for x, y in after] == [resumed(x, y) for x, y in after] == wanted[5:]


class Scaled(nn.Module):
    """A second input that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.fc(x * scale)


def test_predictions_with_an_input_that_all_samples_share(host: Path, library: Path, tmp_path: Path) -> None:
    x, y = torch.randn(BATCH, 6), torch.randint(0, 3, (BATCH,))
    graph = tt.trace(Scaled(), (x, torch.ones(6)), y, loss="cross_entropy", optimizer=tt.SGD(lr=0.05))
    folder = tt.build(graph).save(tmp_path / "out")
    here, there = tt.load(folder, threads=1), NativeStep(library, folder)
    scale, names = np.arange(6, dtype="float32"), [name for name, _, _ in there.specs("input")]
    for samples in (1, BATCH, 2 * BATCH + 3):
        x = np.random.default_rng(samples).standard_normal((samples, 6)).astype("float32")
        wanted = here.predict((x, scale))
        np.testing.assert_array_equal(there.predict((x, scale), wanted.shape), wanted)
    error = _failure(there.predict, (x, scale[:5]), wanted.shape)
    assert error.status == INPUT
    assert "has shape [5]; want [6]" in str(error)

    save_file(dict(zip((*names, "y"), (x, scale, np.zeros(len(x), "int64")), strict=True)), tmp_path / "data")
    _run(host, folder, "--data", tmp_path / "data", "--threads", 1, "--predict", tmp_path / "predicted")
    (output,) = load_file(tmp_path / "predicted").values()
    np.testing.assert_array_equal(output, wanted)


def test_what_a_step_takes_and_gives_is_told(network: Path, library: Path) -> None:
    step = NativeStep(library, network)
    assert step.specs("input") == [("x", "float32", (BATCH, 3, SIZE, SIZE))]
    assert step.specs("target") == [("y", "int64", (BATCH,))]
    assert [(dtype, shape) for _, dtype, shape in step.specs("output")] == [("float32", (BATCH, 5))]
    assert step.api.tvmtrain_rate(step.handle) == pytest.approx(0.05)


def _failure(call, *arguments) -> NativeError:
    with pytest.raises(NativeError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 6), "float32"), np.zeros(3, "int64"), "want [4, 6]: training needs batches of exactly 4"),
        (np.zeros((4, 7), "float32"), np.zeros(4, "int64"), "want [4, 6]"),
        (np.zeros((4, 6), "float64"), np.zeros(4, "int64"), "dtype float64; want float32"),
        (np.full((4, 6), np.nan, "float32"), np.zeros(4, "int64"), "NaN or infinite values, the first at (0, 0)"),
        (np.zeros((4, 6), "float32"), np.array([0, 1, 3, 0]), "the label 3 at (2); want 0..2, or -100 to be ignored"),
    ],
)
def test_wrong_data_are_refused_and_change_nothing(x, y, message: str, dense: Path, library: Path, tmp_path: Path) -> None:
    step = NativeStep(library, dense)
    step.save(tmp_path / "before")
    error = _failure(step, x, y)
    assert error.status == INPUT
    assert message in str(error)
    step.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_a_loss_that_is_not_finite_leaves_the_state(library: Path, tmp_path: Path) -> None:
    x, y = torch.randn(BATCH, 64), torch.randint(0, 3, (BATCH,))
    graph = tt.trace(nn.Linear(64, 3), x, y, loss="cross_entropy", optimizer=tt.SGD(lr=0.05, momentum=0.9))
    step = NativeStep(library, tt.build(graph).save(tmp_path / "out"))
    x, y = x.numpy(), y.numpy()
    step(x, y)
    step.save(tmp_path / "before")
    huge = np.where(step.read("weight", (3, 64), "float32")[:1] > 0, np.float32(3e38), np.float32(-3e38))
    error = _failure(step, np.repeat(huge, BATCH, axis=0), y)
    assert error.status == NONFINITE
    assert "the loss of step 2 is" in str(error)
    step.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    assert step(x, y) > 0


def test_an_artifact_that_is_not_whole_is_refused_by_name(dense: Path, library: Path, tmp_path: Path) -> None:
    for name, damage, message in (
        ("lib.so", lambda data: data[:-1], "lib.so: it has"),
        ("lib.so", lambda data: data[:-1] + b"\1", "lib.so: its sha256"),
        ("parameters.safetensors", lambda data: data[:-1] + b"\1", "parameters.safetensors: its sha256"),
        ("manifest.json", lambda data: data.replace(b'"batch": 4', b'"batch": 5'), "manifest.json: its digest"),
        ("manifest.json", lambda data: data[:100], "manifest.json: not JSON"),
    ):
        folder = shutil.copytree(dense, tmp_path / "copy", dirs_exist_ok=True)
        (folder / name).write_bytes(damage((dense / name).read_bytes()))
        error = _failure(NativeStep, library, folder)
        assert error.status == ARTIFACT
        assert message in str(error)
    assert "the file is missing" in str(_failure(NativeStep, library, tmp_path))


def _rewritten(folder: Path, change) -> None:
    """The manifest after ``change``, with the digest that fits."""
    from tvmtrain.artifact import _json_digest

    content = json.loads((folder / "manifest.json").read_text())
    del content["digest"]
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content | {"digest": _json_digest(content)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["device"].update(arch="riscv64"), "compiled for riscv64"),
        (lambda m: m.update(features=["sve", "teleport"]), "whose processor has"),
        (lambda m: m.update(format=2), "format 2, and this tvmtrain reads format 5"),
        (lambda m: m["device"].update(name="späße\x7f\U0001f600", arch="riscv64"), "späße\x7f\U0001f600"),
    ],
)
def test_an_artifact_for_elsewhere_is_refused_before_it_is_loaded(
    change, message: str, dense: Path, library: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(dense, tmp_path / "copy")
    _rewritten(folder, change)
    (folder / "lib.so").write_bytes(b"nothing that could be loaded")
    error = _failure(NativeStep, library, folder)
    assert error.status == ARTIFACT
    assert message in str(error)


def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    dense: Path, network: Path, library: Path, tmp_path: Path
) -> None:
    step, other = NativeStep(library, dense), NativeStep(library, network)
    x, y = _batches(1, (6,), 3)[0]
    step(x, y)
    step.save(tmp_path / "good"), other.save(tmp_path / "other")
    good = (tmp_path / "good").read_bytes()
    for bytes_, message in (
        ((tmp_path / "other").read_bytes(), "does not fit this model"),
        (good[:-1] + bytes([good[-1] ^ 1]), "its digest does not fit"),
        (good[:200], "truncated or damaged"),
        ((dense / "parameters.safetensors").read_bytes(), "weights alone become a checkpoint where Python is"),
    ):
        (tmp_path / "bad").write_bytes(bytes_)
        error = _failure(step.restore, tmp_path / "bad")
        assert error.status == CHECKPOINT
        assert message in str(error)
    step.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == good
    assert _failure(step.save, tmp_path / "missing" / "file").status == STORAGE


def test_a_checkpoint_of_another_plan_is_called_that(dense: Path, library: Path, tmp_path: Path) -> None:
    from tvmtrain import artifact

    step, here = NativeStep(library, dense), tt.load(dense)
    step.save(tmp_path / "good")
    state = load_file(tmp_path / "good")
    bias, weight = "optimizer:momentum:fc.bias", "optimizer:momentum:fc.weight"
    for changed, planned in (
        ({n: v for n, v in state.items() if n != bias}, True),
        (state | {"selection:fc": np.zeros((), "int64")}, True),
        (state | {weight: state[weight][:, :2].copy()}, True),
        ({n: v for n, v in state.items() if n != "fc.bias"}, False),
        (state | {"fc.weight": state["fc.weight"][:, :2].copy()}, False),
        (state | {"fc2.weight": state["fc.weight"]}, False),
    ):
        artifact.write_checkpoint(tmp_path / "bad", changed, 3, "0.1.0")
        there = _failure(step.restore, tmp_path / "bad")
        with pytest.raises(tt.errors.CheckpointError) as caught:
            here.restore(tmp_path / "bad")
        for message in (str(there), str(caught.value)):
            assert "does not fit this model: " in message
            assert ("compile with the same --plan" in message) == planned


def test_channels_out_of_range_in_a_checkpoint_are_refused(network: Path, library: Path, tmp_path: Path) -> None:
    """They would be read and written beyond the weights."""
    from tvmtrain import artifact

    step = NativeStep(library, network)
    step.save(tmp_path / "good")
    state = load_file(tmp_path / "good")
    state["selection:5"] = np.array([0, 1, 2**30], "int32")
    artifact.write_checkpoint(tmp_path / "bad", state, 3, "0.1.0")
    assert "different ones of its 8" in str(_failure(step.restore, tmp_path / "bad"))


# The runner.


def _write_data(path: Path, features: tuple[int, ...], classes: int, count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    arrays = {"x": generator.standard_normal((count, *features)).astype("float32"), "y": generator.integers(0, classes, count)}
    save_file(arrays, path)
    return arrays


def _run(host: Path, *words: object, status: int = 0, **environment: str) -> tuple[list[dict], str]:
    command = [str(host / "bin/tvmtrain-run"), *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def _told(host: Path, *words: object) -> list[str]:
    """The lines for people."""
    command = [str(host / "bin/tvmtrain-run"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_a_run_is_the_run_of_python(schedule: str, network: Path, host: Path, tmp_path: Path) -> None:
    arrays = _write_data(tmp_path / "data", (3, SIZE, SIZE), 5, 23)
    words = (
        "--epochs",
        3,
        "--shuffle",
        "--seed",
        7,
        "--schedule",
        schedule,
        "--warmup",
        2,
        "--lr",
        0.03,
        "--threads",
        1,
        "--log",
        1,
    )
    lines, _ = _run(host, network, "--data", tmp_path / "data", *words, "--checkpoint", tmp_path / "there")
    step, rate = tt.load(network, threads=1), Rate(0.03, schedule, warmup=2)
    losses = []
    for number in range(15):
        rows = order(23, number // 5, 7, True)[number % 5 * BATCH : number % 5 * BATCH + BATCH]
        losses.append(step(arrays["x"][rows], arrays["y"][rows], lr=rate.at(number, 5, 3)))
    assert [line["loss"] for line in lines[:-1]] == losses
    step.save(tmp_path / "here")
    _same_state(tmp_path / "there", tmp_path / "here")
    assert (lines[-1]["kind"], lines[-1]["steps"]) == ("done", 15)


def test_a_resumed_run_is_the_whole_run(network: Path, host: Path, tmp_path: Path) -> None:
    _write_data(tmp_path / "data", (3, SIZE, SIZE), 5, 23)
    words = (network, "--data", tmp_path / "data", "--shuffle", "--threads", 1)
    _run(host, *words, "--steps", 12, "--checkpoint", tmp_path / "whole")
    for steps in (3, 7, 12):
        _run(host, *words, "--steps", steps, "--checkpoint", tmp_path / "parts", "--resume")
    _same_state(tmp_path / "parts", tmp_path / "whole")


def test_images_stay_bytes_and_become_what_python_makes_of_them(network: Path, host: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.integers(0, 256, (9, SIZE, SIZE, 3), "uint8"), y=generator.integers(0, 5, 9))
    step = tt.load(network, threads=1)
    samples = data.load(
        tmp_path / "data.npz", step.manifest, normalization=data.Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    ).train
    assert samples is not None
    data.write(tmp_path / "data", samples)
    assert load_file(tmp_path / "data")["x"].dtype == np.uint8
    _run(
        host,
        network,
        "--data",
        tmp_path / "data",
        "--threads",
        1,
        "--checkpoint",
        tmp_path / "there",
        "--epochs",
        1,
        "--predict",
        tmp_path / "out",
    )
    for i in range(2):
        x, y = samples.batch(range(i * BATCH, (i + 1) * BATCH))
        step(x, y)
    step.save(tmp_path / "here")
    _same_state(tmp_path / "there", tmp_path / "here")
    (x,), _ = samples.batch(range(9))
    (output,) = load_file(tmp_path / "out").values()
    np.testing.assert_array_equal(output, step.predict(x))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((8, 6), "float32")}, "no tensor named 'y'"),
        ({"x": np.zeros((8, 5), "float32"), "y": np.zeros(8, "int64")}, "'x' has shape [8, 5]; want that of the step, [4, 6]"),
        ({"x": np.zeros((8, 6), "float32"), "y": np.zeros(7, "int64")}, "'y' has 7 samples and others have 8"),
        ({"x": np.zeros((0, 6), "float32"), "y": np.zeros(8, "int64")}, "'y' has 8 samples and others have 0"),
        ({"x": np.zeros((0, 6), "float32"), "y": np.zeros(0, "int64")}, "no samples in it"),
        ({"x": np.zeros((8, 6), "float64"), "y": np.zeros(8, "int64")}, "'x' is float64; want float32, or uint8 images"),
        (
            {"x": np.zeros((8, 6), "float32"), "y": np.array([0, 1, 2, -100, 0, 0, 3, 0])},
            "data: target 'y' has the label 3 at (6), sample 6 (from 0); want 0..2, or -100 to be ignored",
        ),
        (
            {"x": np.where(np.arange(8)[:, None] == 5, np.nan, np.ones((8, 6))).astype("float32"), "y": np.zeros(8, "int64")},
            "data: input 'x' has NaN or infinite values, the first at (5, 0), sample 5 (from 0)",
        ),
        (
            {"x": np.zeros((3, 6), "float32"), "y": np.zeros(3, "int64")},
            "3 samples to train on, and the step was compiled for 4",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(
    arrays: dict[str, np.ndarray], message: str, dense: Path, host: Path, tmp_path: Path
) -> None:
    save_file(arrays, tmp_path / "data")
    _, error = _run(host, dense, "--data", tmp_path / "data", status=1)
    assert error.startswith("error: ")
    assert message in error


def test_labels_are_checked_before_anything_is_trained(dense: Path, host: Path, tmp_path: Path) -> None:
    """All of them, in pieces; and those that are not read may be anything."""
    arrays = _write_data(tmp_path / "good", (6,), 3, 20_000)
    arrays["y"][19_998] = 4
    save_file(arrays, tmp_path / "bad")
    words = (dense, "--steps", 4, "--checkpoint", tmp_path / "now")
    told = "bad: target 'y' has the label 4 at (19998), sample 19998"
    for files in (("--data", tmp_path / "bad"), ("--data", tmp_path / "good", "--eval-data", tmp_path / "bad")):
        lines, error = _run(host, *words, *files, status=1)
        assert told in error
        assert (lines, (tmp_path / "now").exists()) == ([], False)
    assert told in _run(host, dense, "--data", tmp_path / "bad", "--eval", status=1)[1]
    _run(host, dense, "--data", tmp_path / "bad", "--predict", tmp_path / "out")
    _run(host, *words, "--data", tmp_path / "good")


def test_a_sample_is_named_in_whatever_order_it_comes(dense: Path, host: Path, tmp_path: Path) -> None:
    arrays = _write_data(tmp_path / "data", (6,), 3, 40)
    arrays["x"][23, 4] = np.nan
    save_file(arrays, tmp_path / "data")
    for more in (("--shuffle",), ("--predict", tmp_path / "out"), ("--eval",)):
        assert "the first at (23, 4), sample 23 (from 0)" in _run(host, dense, "--data", tmp_path / "data", *more, status=1)[1]


def test_an_npz_is_called_that(dense: Path, host: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((8, 6), "float32"), y=np.zeros(8, "int64"))
    assert "tvmtrain deploy --data" in _run(host, dense, "--data", tmp_path / "data.npz", status=1)[1]


def test_wrong_options_are_told(dense: Path, host: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--epochs", "2", "--steps", "3"), "want one of them"),
        (("--resume",), "need --checkpoint"),
        (("--lr", "nan"), "want a number"),
        (("--threads", "0"), "want a whole number of 1 or more"),
        (("--colour", "blue"), "there is no option --colour"),
    ):
        _, error = _run(host, dense, "--data", tmp_path / "data", *words, status=2)
        assert message in error
    _write_data(tmp_path / "data", (6,), 3, 8)
    assert "want numbers of processors" in _run(host, dense, "--data", tmp_path / "data", "--affinity", "a", status=1)[1]
    assert "cannot be read" in _run(host, dense, "--data", tmp_path / "none", status=1)[1]


def _while_running(host: Path, folder: Path, copy: Path, *words: object) -> float:
    """Bytes that the runner says it needs while it trains, by what it says of a step that needs far too much."""
    shutil.copytree(folder, copy)
    arena = json.loads((folder / "manifest.json").read_text())["memory"]["entries"]["train_step"]["arena"]
    _rewritten(copy, lambda m: m["memory"]["entries"]["train_step"].update(arena=2**50, lower_bound=2**50))
    _, error = _run(host, copy, *words, status=1)
    found = re.search(r"training needs ([\d.]+) MiB of memory and this machine has [\d.]+ MiB available", error)
    assert found, error
    return float(found.group(1)) * 2**20 - 2**50 + arena


def _peak_memory(host: Path, *words: object, lines: int) -> int:
    """Bytes that a run has had at most when it has written so many lines."""
    command = [str(host / "bin/tvmtrain-run"), *map(str, words), "--epochs", "100000", "--log", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert all(process.stdout.readline() for _ in range(lines))
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) * 1024


def test_the_memory_that_is_asked_for_is_what_a_run_takes(host: Path, library: Path, tmp_path: Path) -> None:
    """Not less, and little more, of 32 MB of parameters and momentum: to train, and to save too."""
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    x, y = torch.randn(BATCH, 2048), torch.randint(0, 10, (BATCH,))
    graph = tt.trace(model, x, y, loss="cross_entropy", optimizer=tt.SGD(lr=0.01, momentum=0.9))
    folder = tt.build(graph).save(tmp_path / "out")
    save_file({"x": np.ones((8, 2048), "float32"), "y": np.zeros(8, "int64")}, tmp_path / "data")
    words, saving = ("--data", tmp_path / "data", "--threads", 1), ("--checkpoint", tmp_path / "now", "--every", 1)
    needed, available = NativeStep(library, folder).memory(folder, 1)
    assert 0 < available <= runtime.memory().total
    # Here loading takes more than running, and saving more than both.
    assert _while_running(host, folder, tmp_path / "trains", *words) < needed
    keeps = _while_running(host, folder, tmp_path / "saves", *words, *saving)
    assert keeps > 1.1 * needed
    for told, more in ((needed, ()), (keeps, saving)):
        assert 0.7 * told < _peak_memory(host, folder, *words, *more, lines=3) < 1.02 * told


def test_too_little_memory_is_told_before_anything_is_loaded(dense: Path, host: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "copy")
    _rewritten(folder, lambda m: m["memory"]["entries"]["train_step"].update(arena=2**50, lower_bound=2**50))
    _write_data(tmp_path / "data", (6,), 3, 8)
    _, error = _run(host, folder, "--data", tmp_path / "data", status=1)
    assert "training needs 10737418" in error
    assert "available" in error
    _run(host, folder, "--data", tmp_path / "data", "--anyway")


class Pixels(nn.Module):
    """Two rows of logits per sample, or a map of them."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.conv, self.flat = nn.Conv2d(2, 3, 3, padding=1), flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.permute(0, 2, 3, 1).reshape(-1, 3) if self.flat else y


def _ignoring(count: int, *shape: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 3, (count, *shape))
    return np.where(generator.random(labels.shape) < 0.2, -100, labels)


def _shares(count: int, *shape: int) -> np.ndarray:
    weights = np.random.default_rng(2).random((count, 3, *shape)).astype("float32")
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("model", "loss", "target"),
    [
        (Pixels(flat=False), "cross_entropy", _ignoring(10, 4, 4)),
        (Pixels(flat=True), "cross_entropy", _ignoring(160)),
        (Pixels(flat=False), "cross_entropy", _shares(10, 4, 4)),
        (Pixels(flat=False), "bce_with_logits", _shares(10, 4, 4)),
        (Pixels(flat=False), "mse", _shares(10, 4, 4)),
    ],
)
def test_evaluations_are_those_of_python(model: nn.Module, loss: str, target: np.ndarray, host: Path, tmp_path: Path) -> None:
    """Of ten samples, four at a time."""
    rows = len(target) // 10
    x = np.random.default_rng(3).standard_normal((10, 2, 4, 4)).astype("float32")
    example = torch.from_numpy(x[:BATCH]), torch.from_numpy(target[: BATCH * rows])
    folder = tt.build(tt.trace(model, *example, loss=loss, optimizer=tt.SGD(lr=0.01))).save(tmp_path / "out")
    save_file({"x": x, "y": target}, tmp_path / "data")
    wanted = tt.load(folder, threads=1).evaluate(x, target)
    lines, _ = _run(host, folder, "--data", tmp_path / "data", "--eval", "--threads", 1)
    assert lines[0]["loss"] == pytest.approx(float(wanted), rel=1e-12)
    assert lines[0].get("accuracy") == wanted.accuracy
    assert lines[0]["samples"] == wanted.count == 10


def test_a_loss_of_the_users_own_is_evaluated_in_whole_batches(host: Path, tmp_path: Path) -> None:
    folder = toy.artifact("custom").save(tmp_path / "out")
    generator = np.random.default_rng(4)
    x, y = (generator.standard_normal((11, size)).astype("float32") for size in (toy.FEATURES, toy.CLASSES))
    save_file({"x": x, "y": y}, tmp_path / "data")
    wanted = tt.load(folder, threads=1).evaluate(x[:8], y[:8])
    lines, _ = _run(host, folder, "--data", tmp_path / "data", "--eval", "--threads", 1)
    assert (lines[0]["loss"], lines[0]["samples"]) == (float(wanted), 8)
    assert "accuracy" not in lines[0]
    save_file({"x": x[:3], "y": y[:3]}, tmp_path / "data")
    assert "3 samples to evaluate" in _run(host, folder, "--data", tmp_path / "data", "--eval", status=1)[1]


def test_what_was_done_is_told(dense: Path, host: Path, tmp_path: Path) -> None:
    arrays, other = _write_data(tmp_path / "data", (6,), 3, 10), _write_data(tmp_path / "other", (6,), 3, 7)
    now, out = tmp_path / "now", tmp_path / "out"
    words = (dense, "--data", tmp_path / "data", "--threads", 1, "--checkpoint", now)

    lines, _ = _run(host, *words, "--eval-data", tmp_path / "other", "--log", 100)
    assert [line["kind"] for line in lines] == ["progress", "evaluated", "done"]
    step = tt.load(dense, threads=1)
    step.restore(now)
    assert lines[1]["file"] == str(tmp_path / "other")
    assert (lines[1]["loss"], lines[1]["samples"]) == (pytest.approx(float(step.evaluate(other["x"], other["y"]))), 7)
    assert {"steps": 2, "trained": 2, "left_out": 2, "checkpoint": str(now)}.items() <= lines[2].items()

    lines, _ = _run(host, *words, "--resume", "--predict", out, "--eval")
    done = {"kind": "done", "steps": 2, "trained": 0, "threads": 1, "checkpoint": str(now)}
    assert lines[0] == {"kind": "predicted", "samples": 10, "file": str(out)}
    assert lines[1]["loss"] == pytest.approx(float(step.evaluate(arrays["x"], arrays["y"])))
    assert lines[2:] == [done]

    few = _write_data(tmp_path / "few", (6,), 3, 3)
    lines, _ = _run(host, dense, "--data", tmp_path / "few", "--threads", 1, "--epochs", 0, "--eval")
    assert lines[0]["samples"] == len(few["x"]), "fewer than a batch: nothing is to be trained"

    told = _told(host, *words, "--resume", "--predict", out)
    assert told == [
        f"predicted  10 samples to {out}",
        f"done  2 steps  nothing trained  threads 1  restored {now}",
    ]
    told = _told(host, *words, "--resume", "--epochs", 3)
    assert told[0] == "2 of 10 samples are left out of every epoch: training needs whole batches of 4"
    assert told[-1].endswith(f"saved {now}")
    assert _told(host, *words, "--resume", "--epochs", 3)[:-1] == []


def test_predicting_leaves_the_checkpoint_as_it_is(dense: Path, host: Path, tmp_path: Path) -> None:
    _write_data(tmp_path / "data", (6,), 3, 8)
    words = (dense, "--data", tmp_path / "data", "--checkpoint", tmp_path / "now", "--threads", 1)
    _run(host, *words, "--epochs", 2)
    trained = (tmp_path / "now").read_bytes()
    lines, _ = _run(host, *words, "--predict", tmp_path / "out")
    assert "checkpoint" not in lines[-1]
    lines, _ = _run(host, *words, "--predict", tmp_path / "resumed", "--resume")
    assert lines[-1]["checkpoint"] == str(tmp_path / "now")
    assert (tmp_path / "now").read_bytes() == trained
    assert (tmp_path / "out").read_bytes() != (tmp_path / "resumed").read_bytes()
    (tmp_path / "now").unlink()
    assert "there is nothing to train" in _run(host, *words, "--predict", tmp_path / "out", "--resume", status=1)[1]


def test_a_rate_that_float32_lacks_is_refused(dense: Path, library: Path) -> None:
    step, here = NativeStep(library, dense), tt.load(dense)
    x, y = _batches(1, (6,), 3)[0]
    assert "finite in float32" in str(_failure(step, x, y, 1e39))
    with pytest.raises(tt.errors.InputError, match="finite in float32"):
        here(x, y, lr=1e39)
    assert step(x, y) == here(x, y)


def test_processors_and_threads_are_settable(dense: Path, host: Path, tmp_path: Path) -> None:
    _write_data(tmp_path / "data", (6,), 3, 8)
    first = min(os.sched_getaffinity(0))
    words = (dense, "--data", tmp_path / "data")
    assert _run(host, *words, "--affinity", first)[0][-1]["threads"] == 1
    assert _run(host, *words, "--threads", 2)[0][-1]["threads"] == 2
    assert _run(host, *words, TVM_NUM_THREADS="1")[0][-1]["threads"] == 1


def test_killed_at_any_moment_it_goes_on(dense: Path, host: Path, tmp_path: Path) -> None:
    _write_data(tmp_path / "data", (6,), 3, 40)
    words = [str(host / "bin/tvmtrain-run"), str(dense), "--data", str(tmp_path / "data"), "--shuffle", "--threads", "1"]
    subprocess.run([*words, "--steps", "3000", "--checkpoint", str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    words += ["--checkpoint", str(tmp_path / "now"), "--every", "1", "--resume", "--log", "100000"]
    chance, seen = random.Random(0), []
    for _ in range(20):
        process = subprocess.Popen([*words, "--epochs", "1000000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(chance.uniform(0.02, 0.12))
        process.send_signal(signal.SIGKILL)
        assert process.communicate()[1] == b""
        if (tmp_path / "now").exists():
            step = tt.load(dense, threads=1)
            step.restore(tmp_path / "now")
            seen.append(step.steps)
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]
    # What was killed so often is still the run that nobody disturbed.
    if seen[-1] < 3000:
        subprocess.run([*words, "--steps", "3000"], check=True, stdout=subprocess.DEVNULL)
        _same_state(tmp_path / "now", tmp_path / "whole")


def test_data_cut_off_while_a_run_reads_them_end_it_with_an_error(dense: Path, host: Path, tmp_path: Path) -> None:
    _write_data(tmp_path / "data", (6,), 3, 40)
    whole = (tmp_path / "data").read_bytes()
    words = (dense, "--data", tmp_path / "data", "--threads", 1, "--checkpoint", tmp_path / "now", "--resume")
    command = [str(host / "bin/tvmtrain-run"), *map(str, words), "--epochs", "100000000", "--every", "1"]
    for size in (len(whole) - 1, 0):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        os.truncate(tmp_path / "data", size)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        found = re.search(
            rf"^error: {tmp_path}/data has become shorter since it was opened: byte (\d+) of its {len(whole)}", error
        )
        assert found, error
        assert size <= int(found.group(1)) < len(whole)
        (tmp_path / "data").write_bytes(whole)
    # What it saved before that is sound: a run goes on from there.
    step = tt.load(dense, threads=1)
    step.restore(tmp_path / "now")
    _run(host, *words, "--steps", step.steps + 10)
    step.restore(tmp_path / "now")


def test_an_interrupted_run_saves_and_says_so(dense: Path, host: Path, tmp_path: Path) -> None:
    _write_data(tmp_path / "data", (6,), 3, 40)
    words = [
        str(host / "bin/tvmtrain-run"),
        str(dense),
        "--data",
        str(tmp_path / "data"),
        "--checkpoint",
        str(tmp_path / "now"),
    ]
    process = subprocess.Popen([*words, "--epochs", "100000000", "--log", "1000"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    lines = process.stdout.read().splitlines()
    assert process.wait() == 130
    assert lines[-1].startswith("stopped")
    step = tt.load(dense)
    step.restore(tmp_path / "now")
    assert f"{step.steps} steps" in lines[-1]


def test_the_example_in_c(host: Path, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    x, y = torch.zeros(4, 3, 8, 8), torch.arange(4)
    tt.build(tt.trace(model, x, y, loss="cross_entropy", optimizer=tt.SGD(lr=0.05))).save(tmp_path / "out")
    options = (
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{host}/include",
        f"-L{host}/lib",
        "-ltvmtrain",
        f"-Wl,-rpath,{host}/lib",
    )
    subprocess.run(["cc", str(native.SOURCES / "example.c"), *options, "-o", str(tmp_path / "example")], check=True)
    done = subprocess.run([tmp_path / "example"], cwd=tmp_path, check=True, capture_output=True, text=True)
    x.view(-1)[:3] = torch.tensor([1.0, 2.0, 3.0])
    step = tt.load(tmp_path / "out")
    losses = [step(x, y, lr=0.05) for _ in range(20)]
    assert [float(line.split()[1]) for line in done.stdout.splitlines()] == pytest.approx(losses, abs=1e-6)
    step.restore(tmp_path / "now.safetensors")
    assert step.steps == 20


def test_programs_start_on_systems_as_old_as_those_of_tvm(host: Path) -> None:
    """JetPack 4, the oldest that is built for, has glibc 2.27 and the C++ library of gcc 7."""
    for name in (native.RUNNER, native.SERVER, native.LIBRARY):
        found = elf.read((host / name).read_bytes(), name)
        assert toolchain.version(found.glibc) <= (2, 27)
        assert toolchain.version(found.libstdcxx) <= (3, 4, 24)


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tt.errors.DeviceError, match=r"lacks libtvm_runtime.so"):
        native.build(tmp_path / "out", tmp_path)
    with pytest.raises(tt.errors.DeviceError, match="compiler no-such-c\\+\\+ is not installed"):
        native.build(tmp_path / "out", cxx=("no-such-c++",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tt.errors.DeviceError, match="install the Debian package cmake"):
        native.build(tmp_path / "out")
