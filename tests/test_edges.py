"""Places where a plausible translation is wrong: zeros under roots, closed rows of attention, windows that hang over, truth values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tvmtrain as tt
from tvmtrain.errors import ModelError, UnsupportedOperatorError

OPEN = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
ADDED = torch.zeros(3, 3).masked_fill(~OPEN, float("-inf"))
X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])

FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "softplus with a threshold": (lambda w: F.softplus(w * 2, 1, 1), (4, 5)),
    "average over a window that hangs over": (lambda w: F.avg_pool2d(w, 2, 2, 0, True, True, 3), (2, 3, 5, 5)),
    "norm of zeros": (lambda w: w.norm(dim=1), (4, 5)),
    "normalized zeros": (lambda w: F.normalize(w, dim=1), (4, 5)),
    "deviation of equals": (lambda w: w.std(1), (4, 5)),
    "zeroth power of zero": (lambda w: w**0 + w, (4, 5)),
    "closed rows": (lambda w: F.scaled_dot_product_attention(w, w, w, attn_mask=OPEN), (2, 3, 4)),
    "closed rows, added": (lambda w: F.scaled_dot_product_attention(w, w, w, attn_mask=ADDED), (2, 3, 4)),
    "products and sums of truths": (lambda w: w * ((w > 0) * (w < 1)) + (w > 0).cumsum(1) * w, (4, 5)),
}


class Of(nn.Module):
    """A function of a parameter, whose second row is zero."""

    def __init__(self, function: Callable, shape: tuple[int, ...]) -> None:
        super().__init__()
        value = torch.randn(shape)
        value[1] = 0
        self.value, self.function = nn.Parameter(value), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.value) + 0 * x.sum()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_pytorchs(name: str) -> None:
    model, x = Of(*FUNCTIONS[name]), torch.zeros(2, 2)
    y = torch.randn(model(x).shape)
    step = tt.build(tt.trace(model, x, y, loss="mse"), gradients=True).load()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    np.testing.assert_allclose(step.gradients(x, y)["value"], model.value.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert step(x, y, lr=0.0) == pytest.approx(loss.item(), rel=1e-5)


def test_a_loss_that_is_a_module_with_tensors() -> None:
    model, loss = nn.Linear(3, 4), nn.CrossEntropyLoss(weight=torch.rand(4))
    step = tt.build(tt.trace(model, X, Y, loss=loss)).load()
    assert float(step.evaluate(X, Y)) == pytest.approx(loss(model(X), Y).item(), rel=1e-5)
    assert step(X, Y) == pytest.approx(loss(model(X), Y).item(), rel=1e-5)


class Half(nn.Module):
    """One layer learns; the other is read but gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.learns, self.stays = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.learns(x) + self.stays(x).detach()


def test_what_gets_no_gradient_does_not_decay() -> None:
    graph = tt.trace(Half(), X, Y, optimizer=tt.SGD(lr=0.1, weight_decay=0.1))
    assert graph.trained == ("learns.weight", "learns.bias")
    step = tt.build(graph).load()
    before = step.state_dict()
    step(X, Y)
    np.testing.assert_array_equal(step.state_dict()["stays.weight"], before["stays.weight"])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + torch.randn_like(x) if self.training else x)


def test_noise_is_new_in_every_step_and_absent_from_predictions() -> None:
    model = Noisy()
    step = tt.build(tt.trace(model, X, Y)).load()
    assert len({step(X, Y, lr=0.0) for _ in range(3)}) == 3
    np.testing.assert_allclose(step.predict(X), model.eval()(X).detach().numpy(), rtol=1e-5, atol=1e-6)


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.my_model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True))
        self.second = nn.InstanceNorm2d(3, track_running_stats=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.my_model(x)).mean([2, 3]))


def test_refusals_of_converters_are_collected_with_their_places() -> None:
    with pytest.raises(UnsupportedOperatorError) as error:
        tt.trace(Refused(), torch.randn(5, 3, 4, 4), Y)
    assert "my_model.0 (InstanceNorm2d)" in str(error.value)
    assert "second (InstanceNorm2d)" in str(error.value)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.head(x)
        return (out, out * 2) if self.training else (out,)


def test_a_result_that_differs_between_modes() -> None:
    tt.trace(Auxiliary(), X, Y)
    with pytest.raises(ModelError, match="2 tensors in training mode and 1 in evaluation"):
        tt.trace(Auxiliary(), X, Y, loss=lambda outputs, y: F.cross_entropy(outputs[0], y))
