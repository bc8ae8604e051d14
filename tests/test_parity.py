"""Whole networks: every gradient, and twenty steps of SGD, as PyTorch has them, with BatchNorm and Dropout in both modes.

Each network is compared twice. In double precision every batch has to agree: that is the proof of all rules and kernels. In
single precision a unit may sit so close to a ReLU's corner that rounding alone decides its branch, in PyTorch as in the compiled
step, and every gradient before it changes; some batches among several have to agree there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import models
import pytest
import torch
from parity import Reference, assert_same_steps, compiled, gradient_departures

import tvmtrain as tt

STEPS = 20
BATCHES, AGREEING = 12, 2
# These amplify rounding: only at so small a rate PyTorch in single precision agrees with itself.
RATE, SMALL_RATE, DOUBLE_RATE = 1e-5, 3e-8, 1e-6
AMPLIFYING = ("mobilenet", "deeplab", "levit")
# Half a minute of compilation each: the others wait for `pytest -m slow`.
QUICK = ("mobilenet_v2", "resnet", "squeezenet", "vit")


def quick(names: tuple[str, ...]) -> list:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in models.EXAMPLES]


MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def check_double(example: models.Example, training: bool, device: tt.Device | str | None = None) -> None:
    reference = Reference(*models.build(example, training), seed=3).double()
    step = compiled(reference, device=device)
    for other in islice(batches(reference), 2):
        assert not (wrong := gradient_departures(other, step)), "\n".join(wrong[:12])
    assert_same_steps(reference, step, STEPS, DOUBLE_RATE, within=1e-5)


def check_single(name: str, example: models.Example, training: bool, device: tt.Device | str | None = None) -> None:
    reference = Reference(*models.build(example, training), seed=3)
    step = compiled(reference, device=device)
    wrong: list[list[str]] = []
    for other in batches(reference):
        wrong.append(gradient_departures(other, step))
        if wrong.count([]) == AGREEING:
            break
    assert wrong.count([]) == AGREEING, f"gradients differ in {wrong}"
    assert_same_steps(reference, step, STEPS, SMALL_RATE if name.startswith(AMPLIFYING) else RATE)


def batches(reference: Reference) -> Iterator[Reference]:
    """The reference's own batch, and others like it."""
    generator = torch.Generator().manual_seed(1)
    x, y = reference.x, reference.y
    yield reference
    for _ in range(BATCHES - 1):
        labels = torch.randint(0, models.CLASSES, y.shape, generator=generator)
        yield Reference(reference.model, _like(x, generator), labels, reference.loss, reference.seed)


def _like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if x.dtype == torch.int64:
        return torch.randint(1, models.WORDS, x.shape, generator=generator)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def needs_data(name: str) -> None:
    if name == "mcunet" and not models.MCUNET.is_file():
        pytest.skip(f"{models.MCUNET} is not here; TVMTRAIN_DATA names the folder")


@pytest.mark.parametrize("name", quick(QUICK))
def test_network_with_batch_statistics_in_double_precision(name: str) -> None:
    needs_data(name)
    check_double(models.EXAMPLES[name], training=True)


@pytest.mark.parametrize("name", quick(("resnet", "vit")))
def test_network_with_running_statistics_in_single_precision(name: str) -> None:
    needs_data(name)
    check_single(name, models.EXAMPLES[name], training=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.EXAMPLES)
def test_network_with_running_statistics_in_double_precision(name: str) -> None:
    needs_data(name)
    check_double(models.EXAMPLES[name], training=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.EXAMPLES)
def test_network_with_batch_statistics_in_single_precision(name: str) -> None:
    needs_data(name)
    check_single(name, models.EXAMPLES[name], training=True)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", models.LIBRARY)
def test_network_of_the_library(name: str, training: bool) -> None:
    check_double(models.LIBRARY[name], training)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", models.FULL)
def test_network_at_full_size(name: str, training: bool) -> None:
    needs_data(name)
    check_single(name, models.FULL[name], training, device="host")
