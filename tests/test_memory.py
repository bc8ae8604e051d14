"""What a step needs of memory: the plan of an arena alone, and what the runtime really allocates."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tvmtrain as tt
from tvmtrain import arena, builder, targets
from tvmtrain.passes import plan_arena

# --- The planner alone ------------------------------------------------------------------------------------------------------

blocks_of_dags = st.lists(
    st.builds(
        lambda size, first, length: arena.Block(size, first, first + length),
        st.one_of(st.integers(1, 64), st.integers(1000, 400_000)),
        st.integers(0, 60),
        st.one_of(st.integers(0, 3), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=40,
)


@given(blocks_of_dags)
@settings(max_examples=150, deadline=None)
def test_tensors_that_are_alive_together_share_no_byte(blocks):
    plan = arena.plan(blocks)
    last = max(block.last for block in blocks)
    for step in range(last + 1):
        # Byte by byte, in units of the alignment: nothing of the planner's own arithmetic.
        owner: dict[int, int] = {}
        for i, (block, offset) in enumerate(zip(blocks, plan.offsets, strict=True)):
            if block.first <= step <= block.last:
                assert offset % arena.ALIGNMENT == 0
                units = range(offset // arena.ALIGNMENT, -(-(offset + block.size) // arena.ALIGNMENT))
                assert offset + block.size <= plan.size
                assert not owner.keys() & set(units)
                owner |= dict.fromkeys(units, i)


def live_bytes(blocks: list[arena.Block], step: int) -> int:
    return sum(block.size for block in blocks if block.first <= step <= block.last)


@given(blocks_of_dags)
@settings(max_examples=50, deadline=None)
def test_the_lower_bound_is_the_largest_sum_of_live_bytes(blocks):
    steps = range(max(block.last for block in blocks) + 1)
    assert arena.lower_bound(blocks) == max(live_bytes(blocks, step) for step in steps)


def dag(random: np.random.Generator, nodes: int) -> list[arena.Block]:
    """The tensors of a random graph whose nodes read some of the last eight, as layers do, and a few of all before, as a backward does."""
    last = list(range(nodes))
    for node in range(1, nodes):
        near = random.integers(max(0, node - 8), node, 2)
        far = random.integers(0, node, 1) if random.random() < 0.3 else []
        for read in (*near, *far):
            last[read] = node
    return [arena.Block(int(size), node, last[node]) for node, size in enumerate(random.integers(1_000, 500_000, nodes))]


def test_random_graphs_are_within_five_percent_of_the_lower_bound():
    random = np.random.default_rng(0)
    for nodes in (5, 20, 60):
        for _ in range(10):
            blocks = dag(random, nodes)
            assert arena.plan(blocks).size <= 1.05 * arena.lower_bound(blocks) + nodes * arena.ALIGNMENT


def test_a_plan_of_nothing_and_the_same_plan_twice():
    assert arena.plan([]) == arena.Plan((), 0)
    blocks = dag(np.random.default_rng(1), 50)
    assert arena.plan(blocks) == arena.plan(blocks)


# --- What the runtime allocates ---------------------------------------------------------------------------------------------


def separable(channels: int, out: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, 2 * channels, 1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU6(),
        nn.Conv2d(2 * channels, 2 * channels, 3, stride=stride, padding=1, groups=2 * channels, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU6(),
        nn.Conv2d(2 * channels, out, 1, bias=False),
        nn.BatchNorm2d(out),
    ]


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def mobile() -> nn.Module:
    """A MobileNetV2 in small: inverted residuals with and without stride."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        Residual(*separable(8, 8, 1)),
        *separable(8, 12, 2),
        Residual(*separable(12, 12, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 24, 24, generator=generator), torch.arange(4)


@functools.cache
def traced() -> tt.TrainGraph:
    return tt.trace(mobile(), *batch(), optimizer=tt.SGD(lr=0.05, momentum=0.9, weight_decay=1e-4))


@functools.cache
def built() -> tt.Artifact:
    return tt.build(traced())


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes of every storage that TVM's virtual machine allocates."""
    name = "vm.builtin.alloc_storage"
    original, sizes = tvm_ffi.get_global_func(name), []

    def counted(*args):
        sizes.append(int(next(iter(args[1]))))
        return original(*args)

    tvm_ffi.register_global_func(name, counted, override=True)
    try:
        yield sizes
    finally:
        tvm_ffi.register_global_func(name, original, override=True)


def figures(name: str) -> dict[str, int]:
    """Bytes of a compiled function, by the attributes of its plan."""
    planned = builder.plan(builder.lower(traced().module(), targets.load("host")))
    attrs = planned[name].attrs
    return {key: int(attrs[key]) for key in (plan_arena.ARENA, plan_arena.LOWER_BOUND, plan_arena.RESULTS)}


def test_the_arena_is_what_the_runtime_allocates():
    for name in ("train_step", "predict"):
        with allocations() as sizes:
            step = built().load()
            step(*batch()) if name == "train_step" else step.predict(batch()[0])
        wanted = figures(name)
        assert sizes[0] == wanted[plan_arena.ARENA]
        assert sum(sizes) == wanted[plan_arena.ARENA] + wanted[plan_arena.RESULTS]


@pytest.mark.parametrize("name", ["train_step", "predict"])
def test_the_arena_is_within_five_percent_of_the_lower_bound(name):
    wanted = figures(name)
    assert wanted[plan_arena.LOWER_BOUND] <= wanted[plan_arena.ARENA] <= 1.05 * wanted[plan_arena.LOWER_BOUND]
