"""Compiled updates beside torch.optim, parameter by parameter, at rates that change from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tvmtrain as tt
from tvmtrain.spec import Optimizer, optimizer_to_dict

RATES = (0.05, 0.05, 0.02, 0.0, 0.1, 0.03, 0.01, 0.2, 0.05, 0.001)
CLIP = 0.3  # below the norm of the first gradients, above that of the last

CASES: dict[str, tuple[Optimizer, Callable[..., torch.optim.Optimizer], dict]] = {
    "sgd": (tt.SGD(), torch.optim.SGD, {}),
    "momentum": (tt.SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        tt.SGD(momentum=0.8, nesterov=True, weight_decay=0.01),
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    ),
    "decay": (tt.SGD(weight_decay=0.1), torch.optim.SGD, {"weight_decay": 0.1}),
    "adam": (tt.Adam(), torch.optim.Adam, {}),
    "adam-decay": (
        tt.Adam(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "adamw": (tt.AdamW(), torch.optim.AdamW, {}),
    "adamw-decay": (tt.AdamW(weight_decay=0.3), torch.optim.AdamW, {"weight_decay": 0.3}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("case", CASES)
def test_ten_steps_as_in_torch(case: str, clip: float | None) -> None:
    ours, theirs, options = CASES[case]
    model = network()
    reference = copy.deepcopy(model)
    optimizer = theirs(reference.parameters(), **options)
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 5, generator=random) * 3, torch.randint(0, 3, (6,), generator=random)
    step = tt.build(tt.trace(model, x, y, optimizer=type(ours)(**{**_fields(ours), "clip_norm": clip}))).load()
    clipped = []
    for rate in RATES:
        x, y = torch.randn(6, 5, generator=random) * 3, torch.randint(0, 3, (6,), generator=random)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(x), y)
        loss.backward()
        if clip is not None:
            clipped.append(float(nn.utils.clip_grad_norm_(reference.parameters(), clip)) > clip)
        optimizer.step()
        assert step(x, y, lr=rate) == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        state = step.state_dict()
        for name, parameter in reference.named_parameters():
            np.testing.assert_allclose(state[name], parameter.detach().numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    assert clip is None or any(clipped)


def _fields(optimizer: Optimizer) -> dict:
    return {name: value for name, value in optimizer_to_dict(optimizer).items() if name != "kind"}


def test_the_compiled_rate_is_the_default() -> None:
    model = network()
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    first, second = (tt.build(tt.trace(model, x, y, optimizer=tt.SGD(lr=0.3))).load() for _ in range(2))
    first(x, y)
    second(x, y, lr=0.3)
    for name, value in first.state_dict().items():
        np.testing.assert_array_equal(value, second.state_dict()[name])


@pytest.mark.parametrize(
    "make",
    [
        lambda: tt.SGD(lr=-1),
        lambda: tt.SGD(momentum=1.0),
        lambda: tt.SGD(nesterov=True),
        lambda: tt.Adam(betas=(0.9, 1.0)),
        lambda: tt.AdamW(clip_norm=0),
        lambda: tt.SGD(weight_decay=float("nan")),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"got|needs"):
        make()
