"""The random numbers: known answers, the same in TVM and NumPy, and what Dropout makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import te

import tvmtrain as tt
from tvmtrain import philox

# Random123's known answers of philox2x32-10: counter, key, first word.
KNOWN = [
    ((0, 0), 0, 0xFF1DAE59),
    ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, 0x2C3F628B),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, 0xDD7CE038),
]


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN)
def test_known_answers(counter: tuple[int, int], key: int, word: int) -> None:
    assert philox.bits(np.array([counter[0]], "uint64"), counter[1], key)[0] == word


@pytest.mark.parametrize(("seed", "step", "stream"), [(0, 0, 0), (7, 3, 2), (-1, 2**33 + 1, 5), (2**40 + 3, 1, 1000)])
def test_compiled_numbers_are_numpys(seed: int, step: int, stream: int) -> None:
    state = te.placeholder((2,), "int64", name="state")
    kernel = tvm.compile(te.create_prim_func([state, philox.uniform(state, (3, 50), stream)]), target="llvm")
    out = tvm.runtime.tensor(np.empty((3, 50), "float32"))
    kernel(tvm.runtime.tensor(np.array([seed, step], "int64")), out)
    np.testing.assert_array_equal(out.numpy(), philox.uniform_numpy(seed, step, (3, 50), stream))


def test_numbers_are_uniform_and_streams_differ() -> None:
    first, second = (philox.uniform_numpy(0, 0, (100_000,), stream) for stream in (0, 1))
    assert first.min() >= 0
    assert first.max() < 1
    counts, _ = np.histogram(first, bins=20, range=(0, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-squared with 19 degrees: one in 10,000 is beyond
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


class Dropped(nn.Module):
    """Shows what Dropout does: the output is the dropped input, times a parameter that is 1."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop, self.scale = nn.Dropout(p), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x) * self.scale


def dropped(p: float = 0.3, seed: int = 0) -> tt.TrainStep:
    x = torch.ones(8, 500)
    return tt.build(tt.trace(Dropped(p), x, x, loss="mse", seed=seed)).load()


def ones() -> np.ndarray:
    return np.ones((8, 500), "float32")


def outputs(step: tt.TrainStep, count: int = 1) -> list[np.ndarray]:
    """What training steps that change nothing return."""
    found = []
    for _ in range(count):
        step(ones(), ones(), lr=0.0)
        found.append(step.outputs[0])
    return found


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    step = dropped(0.3)
    (out,) = outputs(step)
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.7)}
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(step.predict(ones()), ones())


def test_the_same_seed_is_the_same_run_and_steps_differ() -> None:
    runs = [outputs(dropped(seed=seed), 2) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0][0] != runs[0][1]).any()
    assert (runs[0][0] != runs[2][0]).any()


def test_a_checkpoint_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    step = dropped()
    outputs(step)
    step.save(tmp_path / "now.safetensors")
    expected = outputs(step, 2)
    other = dropped(seed=9)
    other.restore(tmp_path / "now.safetensors")
    np.testing.assert_array_equal(outputs(other, 2), expected)


def test_everything_dropped_is_zero() -> None:
    assert not outputs(dropped(1.0))[0].any()
