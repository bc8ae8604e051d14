"""A channel's scale at a convolution's weights instead of at its gradient."""

from __future__ import annotations

import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import Reference, compiled, gradient_departures, quick_device
from torch import nn
from tvm import relax

import tvmtrain as tt
from tvmtrain.passes.sides import name_of


def network(channels: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> nn.Module:
    """Two convolutions with BatchNorm of running statistics that are no ones and zeros."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
        nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 5),
    ).eval()
    for norm in (model[1], model[4]):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.data.uniform_(0.5, 1.5)
    return model


def scaled_maps(module: tvm.IRModule) -> list[tuple[int, ...]]:
    """The shapes of what is multiplied with a scale for each channel after the loss, for a convolution's gradient to read."""
    bindings = module["train_step"].body.blocks[0].bindings
    read = {arg for b in bindings if "grad" in name_of(b.value) for arg in b.value.args if isinstance(arg, relax.Var)}
    return [tuple(int(d) for d in b.var.ty.shape) for b in bindings if name_of(b.value) == "relax.multiply" and b.var in read]


def step(model: nn.Module, size: int) -> tvm.IRModule:
    return tt.trace(model, torch.randn(2, 3, size, size), torch.randint(0, 5, (2,)), optimizer=tt.SGD(lr=0.1)).module()


def test_no_map_is_scaled_where_it_is_larger_than_the_weights():
    scaled = scaled_maps(step(network(8), 16))
    assert (2, 8, 16, 16) not in scaled
    assert scaled == [(8, 8, 1, 1)], "the first convolution has no dX, the second one's weights carry the scale"


def test_large_weights_stay_as_they_are():
    """8 channels of 3x3 places for each of 64x64 weights."""
    assert (2, 64, 3, 3) in scaled_maps(step(network(64, kernel=3), 3))


def test_a_map_that_a_bias_reads_too_is_scaled():
    model = network(8)
    model[3].bias = nn.Parameter(torch.zeros(8))
    assert (2, 8, 16, 16) in scaled_maps(step(model, 16))


@settings(max_examples=3, deadline=None)
@given(
    channels=st.sampled_from((1, 4, 7)),
    kernel=st.sampled_from((1, 3)),
    deep=st.booleans(),
    stride=st.integers(1, 2),
    size=st.sampled_from((7, 10, 13)),
)
def test_gradients_are_pytorchs(channels: int, kernel: int, deep: bool, stride: int, size: int):
    torch.manual_seed(channels)
    model = network(channels, kernel, channels if deep else 1, stride)
    reference = Reference(model, torch.randn(2, 3, size, size), torch.randint(0, 5, (2,)))
    assert gradient_departures(reference, compiled(reference, device=quick_device())) == []
