"""A MobileNetV2 trains on an emulated board without Python, by the runner and over the network, as on this machine, up to rounding."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import boards
import numpy as np
import pytest
import torch
from boards import KEY
from builds import EMULATOR, for_board
from models import build, images
from parity import quick_device
from safetensors.numpy import load_file, save_file

import tvmtrain as tt
from tvmtrain import elf, native, remote, targets, toolchain

STEPS, BATCH, SIZE = 20, 4, 32


@pytest.fixture(scope="module")
def board() -> Path:
    return for_board()


def _train(
    board: Path, artifact: Path, folder: Path, *words: str, cpu: str = "cortex-a72", status: int = 0
) -> tuple[list[dict], str]:
    command = [*EMULATOR, str(board / native.RUNNER), str(artifact), "--data", str(folder / "data"), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "QEMU_CPU": cpu})
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    generator = np.random.default_rng(0)
    x = generator.standard_normal((STEPS * BATCH, 3, SIZE, SIZE)).astype("float32")
    save_file({"x": x, "y": generator.integers(0, 10, len(x))}, folder / "data")
    return folder


@pytest.fixture(scope="module")
def graph() -> tt.TrainGraph:
    model, x, y = build(images("MobileNetV2", size=SIZE, depth_multiplier=0.35), training=False)
    return tt.trace(model, x[:BATCH], y[:BATCH], loss="cross_entropy", optimizer=tt.SGD(lr=0.002, momentum=0.9, clip_norm=1.0))


def _plan(graph: tt.TrainGraph, kind: str) -> tt.UpdatePlan:
    filtered = tt.UpdatePlan.last(graph.layers, 4, filter=2)
    sparse = tt.UpdatePlan.last(graph.layers, 4, weight=0.25, select="random")
    if kind == "both":
        return tt.UpdatePlan({**filtered.layers, **dict(list(sparse.layers.items())[2:])})
    return filtered if kind == "filtered" else sparse


@pytest.mark.parametrize("kind", ["both", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("filtered", "sparse"))])
def test_twenty_steps_on_a_board_are_those_of_this_machine(
    kind: str, board: Path, samples: Path, graph: tt.TrainGraph, tmp_path: Path
) -> None:
    small = graph.apply(_plan(graph, kind))
    folder = tt.build(small, "raspberry-pi-4b").save(tmp_path / "board")
    step, data = tt.build(small, quick_device()).load(), load_file(samples / "data")
    batches = [(data["x"][i : i + BATCH], data["y"][i : i + BATCH]) for i in range(0, STEPS * BATCH, BATCH)]
    losses = [step(x, y) for x, y in batches]
    assert losses[-1] != losses[0]
    step.save(tmp_path / "here")

    lines, _ = _train(board, folder, samples, "--log", "1", "--threads", "1", "--checkpoint", str(tmp_path / "there"))
    _same([line["loss"] for line in lines[:-1]], losses, tmp_path)
    assert {line["ms_per_step"] for line in lines} == {None}, "an emulator's times are nobody's"
    step.restore(tmp_path / "there")
    assert step.steps == STEPS

    with boards.running(boards.emulated(), tmp_path, QEMU_CPU="cortex-a72") as server:
        found = remote.connect(server.address, KEY)
        assert "qemu" in found.facts.emulated.lower()
        assert found.facts.arch == "aarch64"
        there = found.load(folder, threads=1)
        told = [there(x, y) for x, y in batches]
        there.save(tmp_path / "there")
    _same(told, losses, tmp_path)


def _same(losses: Sequence[float], wanted: Sequence[float], folder: Path) -> None:
    """Losses, and all state in the checkpoints "there" and "here"."""
    assert losses == pytest.approx(wanted, abs=1e-4)
    here, there = load_file(folder / "here"), load_file(folder / "there")
    assert set(here) == set(there)
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_code_for_another_machine_is_refused_in_words(board: Path, samples: Path, tmp_path: Path) -> None:
    x, y = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 10))
    graph = tt.trace(model, x, y, loss="cross_entropy", optimizer=tt.SGD(lr=0.01))
    tt.build(graph).save(tmp_path / "host")
    _, error = _train(board, tmp_path / "host", samples, status=1)
    assert "was compiled for x86_64" in error
    assert "this machine is aarch64; build it for this machine" in error


def test_code_for_a_newer_core_is_refused_before_it_dies(board: Path, samples: Path, tmp_path: Path) -> None:
    x, y = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 10))
    graph = tt.trace(model, x, y, loss="cross_entropy", optimizer=tt.SGD(lr=0.01))
    newer = targets.load("raspberry-pi-4b")
    newer = replace(newer, name="newer", target={**newer.target, "mcpu": "neoverse-v1"})
    tt.build(graph, newer).save(tmp_path / "newer")
    _, error = _train(board, tmp_path / "newer", samples, status=1)
    assert "was compiled for device 'newer', whose processor has" in error
    assert "sve" in error
    _train(board, tmp_path / "newer", samples, cpu="max")


def test_programs_for_boards_start_on_old_systems(board: Path) -> None:
    for name in (native.RUNNER, native.SERVER, native.LIBRARY):
        found = elf.read((board / name).read_bytes(), name)
        assert found.arch == "aarch64"
        assert toolchain.version(found.glibc) <= (2, 27)
        assert toolchain.version(found.libstdcxx) <= (3, 4, 24)
