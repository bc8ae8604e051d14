"""What a step needs of memory: the plan of an arena alone, and what the runtime really allocates."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tvm import relax, tirx
from tvm.ir.transform import PassContext, Sequential

import tvmtrain as tt
from tvmtrain import arena, builder, lowering, passes, targets
from tvmtrain.errors import NonFiniteLossError
from tvmtrain.passes import order, plan_arena, share_workspace

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


def test_no_other_way_is_tried_once_none_can_be_smaller(monkeypatch):
    tried = []
    attempt = arena._Puzzle.attempt
    monkeypatch.setattr(arena._Puzzle, "attempt", lambda self, order, gap: tried.append(gap) or attempt(self, order, gap))
    alike = [arena.Block(64, i, i + 1) for i in range(9)]
    assert arena.plan(alike).size == arena.lower_bound(alike)
    assert len(tried) == 1


# --- The order --------------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Operations that read up to two earlier ones; some make nothing."""
    count = draw(st.integers(1, 14))
    reads = [set(draw(st.lists(st.integers(0, i - 1), max_size=2))) if i else set() for i in range(count)]
    made, own = (draw(st.lists(st.integers(0, 100), min_size=count, max_size=count)) for _ in range(2))
    return order.Problem(reads, made, reads, own)


def simulated(problem: order.Problem, sequence: list[int]) -> int:
    """The peak, by running the operations: every result stays until its last reader is done."""
    alive, done, highest = set(), set(), 0
    for i in sequence:
        assert problem.before[i] <= done
        done.add(i)
        alive.add(i)
        highest = max(highest, sum(problem.size[j] for j in alive) + problem.own[i])
        alive = {j for j in alive if any(j in problem.reads[k] for k in range(len(problem.size)) if k not in done)}
    return highest


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_an_order_is_valid_and_never_worse_than_the_one_before(problem):
    found = order.best_order(problem)
    assert sorted(found) == list(range(len(problem.size)))
    assert simulated(problem, found) == order.peak(problem, found)
    assert simulated(problem, found) <= simulated(problem, list(range(len(found))))
    assert found == order.best_order(problem)


def test_what_frees_memory_runs_first():
    # Two large values, each read by an operation with a small result: one after the other, they are never alive together.
    reads = [set(), set(), {0}, {1}, {2, 3}]
    problem = order.Problem(reads, [100, 100, 1, 1, 1], reads, [0] * 5)
    assert order.peak(problem, list(range(5))) == 201
    assert order.peak(problem, order.best_order(problem)) == 102


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
def overridden(name: str) -> Iterator[list[tuple[tuple, object]]]:
    """(arguments, result) of every call of a function of TVM's virtual machine."""
    original, calls = tvm_ffi.get_global_func(name), []

    def recorded(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]

    tvm_ffi.register_global_func(name, recorded, override=True)
    try:
        yield calls
    finally:
        tvm_ffi.register_global_func(name, original, override=True)


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


def figure(entry: str, name: str) -> int:
    """Bytes, as the artifact tells them."""
    return getattr(built().manifest.memory.entries[entry], name)


@pytest.mark.parametrize("name", ["train_step", "predict"])
def test_the_arena_is_what_the_runtime_allocates(name):
    made = built()
    with allocations() as sizes:
        step = made.load()
        step(*batch()) if name == "train_step" else step.predict(batch()[0])
    assert sizes[0] == figure(name, "arena")
    assert sum(sizes) == figure(name, "arena") + figure(name, "results")


@pytest.mark.parametrize("name", ["train_step", "predict"])
def test_the_arena_is_within_five_percent_of_the_lower_bound(name):
    assert figure(name, "lower_bound") <= figure(name, "arena") <= 1.05 * figure(name, "lower_bound")


def test_the_backward_reads_what_the_forward_saved():
    saved = figure("train_step", "saved_features")
    inputs = sum(layer.saved_bytes for layer in traced().layers)
    # Dense weight gradients need the input of every layer but the first, whose input is the caller's; BatchNorm needs its own.
    assert saved > inputs - batch()[0].numel() * 4
    assert saved < figure("train_step", "arena")
    assert figure("predict", "saved_features") == 0


def test_every_tensor_of_the_arena_lies_in_it():
    """A tensor at an offset is no copy: its pointer is the arena's plus the offset."""
    size = figure("train_step", "arena")
    with overridden("vm.builtin.ensure_zero_offset") as calls:
        step = built().load()
        step(*batch())
    places = [moved.data_ptr() for _, moved in calls]
    assert places == [tensor.data_ptr() for (tensor,), _ in calls]
    assert 0 < max(places) - min(places) < size
    assert all(place % arena.ALIGNMENT == 0 for place in places)


# --- State in place ---------------------------------------------------------------------------------------------------------


def bits(step: tt.TrainStep) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in step._moment.tensors.items()}


def with_optimizer(optimizer: tt.SGD | tt.Adam | tt.AdamW) -> tt.TrainGraph:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 22 * 22, 4)
    )
    return tt.trace(model, *batch(), optimizer=optimizer)


class Crossed(nn.Module):
    """Two buffers whose new values are each made of both old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 24 * 24, 4)
        self.register_buffer("a", torch.randn(24))
        self.register_buffer("b", torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a * self.b
        a, b = 0.9 * self.a + self.b, self.a - 0.5 * self.b
        self.a.copy_(a)
        self.b.copy_(b)
        return self.linear(x.flatten(1))


def test_two_states_are_made_of_each_other():
    model = Crossed()
    step = tt.build(tt.trace(model, *batch())).load()
    for _ in range(3):
        step(*batch())
        model(batch()[0])
    for name in ("a", "b"):
        torch.testing.assert_close(torch.from_numpy(step._moment.tensors[name].numpy()), getattr(model, name))


OPTIMIZERS = {
    "sgd": tt.SGD(lr=0.05),
    "momentum": tt.SGD(lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True, clip_norm=1.0),
    "adam": tt.Adam(lr=0.01, weight_decay=1e-2),
    "adamw": tt.AdamW(lr=0.01, weight_decay=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_updated_where_it_is(name):
    made = tt.build(with_optimizer(OPTIMIZERS[name]))
    with allocations() as sizes:
        step = made.load()
        tensors = step._moment.tensors
        places = {key: tensor.data_ptr() for key, tensor in tensors.items()}
        for _ in range(3):
            before = bits(step)
            step(*batch())
    after = bits(step)
    assert {key: tensor.data_ptr() for key, tensor in step._moment.tensors.items()} == places
    assert [key for key in before if before[key] == after[key]] == []
    assert step._moment.tensors is tensors, "what is in place is not looked at again"
    # The arena, the loss and the output; nothing for new state.
    assert sizes == sizes[:3] * 3
    assert sorted(sizes[1:3]) == [4, 64]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_without_these_passes(name, monkeypatch):
    graph = with_optimizer(OPTIMIZERS[name])
    new = tt.build(graph).load()
    monkeypatch.setattr(lowering, "UpdateInPlace", lambda: Sequential([]))
    monkeypatch.setattr(lowering, "OrderForMemory", lambda: Sequential([]))
    monkeypatch.setattr(lowering, "PlanArena", relax.transform.StaticPlanBlockMemory)
    figures = new.manifest.memory
    monkeypatch.setattr(builder, "_memory", lambda *_: figures)
    monkeypatch.setattr(passes, "GuardState", lambda: Sequential([]))
    old = tt.build(graph).load()
    for _ in range(3):
        assert new(*batch()) == old(*batch())
    assert bits(new) == bits(old)
    np.testing.assert_array_equal(new.outputs[0], old.outputs[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_not_finite_leaves_every_bit(name):
    step = tt.build(with_optimizer(OPTIMIZERS[name])).load()
    step(*batch())
    state = step.state_dict()
    last = [name for name in state if name.endswith("bias")][-1]
    state[last][:] = np.inf
    step.load_state_dict(state)
    before, outputs = bits(step), step.outputs
    with pytest.raises(NonFiniteLossError):
        step(*batch())
    assert bits(step) == before
    assert step.steps == 1
    np.testing.assert_array_equal(step.outputs[0], outputs[0])


def test_an_interrupt_waits_for_the_end_of_the_step(monkeypatch):
    step = built().load()
    run = step._run

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        results = run(*args)
        signal.raise_signal(signal.SIGINT)
        return results

    before = bits(step)
    monkeypatch.setattr(step, "_run", interrupted)
    # A process that was started in the background ignores it.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            step(*batch())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert step.steps == 1
    assert bits(step) != before


# --- What the forward keeps -------------------------------------------------------------------------------------------------


def few_biases() -> tt.TrainGraph:
    """The backward goes through the whole network, and of most activations it needs to know whether they were positive."""
    graph = tt.trace(mobile().eval(), *batch(), optimizer=tt.SGD(lr=0.05, momentum=0.9))
    plan = tt.UpdatePlan({graph.layers[1].name: tt.LayerUpdate(weight=0), graph.layers[-1].name: tt.LayerUpdate()})
    return graph.apply(plan)


def test_masks_are_kept_instead_of_activations(monkeypatch):
    graph = few_biases()
    new = tt.build(graph)
    for name in ("HoistSaved", "PackMasks"):
        monkeypatch.setattr(passes, name, lambda: Sequential([]))
    old = tt.build(graph)
    wanted, got = (made.manifest.memory.entries["train_step"] for made in (old, new))
    # The rest is the loss's own. A mask has a bit where an activation has four bytes; the few labels keep theirs.
    assert got.saved_features < 1000
    assert got.saved_masks * 30 <= wanted.saved_features
    assert got.arena < 0.6 * wanted.arena
    first, second = new.load(), old.load()
    for _ in range(3):
        assert first(*batch()) == second(*batch())
    assert bits(first) == bits(second)


def test_memory_is_known_before_anything_is_compiled():
    found = few_biases().summary()
    whole = tt.trace(mobile().eval(), *batch(), optimizer=tt.SGD(lr=0.05, momentum=0.9)).summary()
    assert found.parameters == whole.parameters
    assert found.optimizer_state < whole.optimizer_state
    assert found.saved_features + found.saved_masks < 0.5 * whole.saved_features
    assert found.to_dict()["arena"] == found.arena < whole.arena
    assert found.lower_bound <= found.arena <= 1.05 * found.lower_bound


def test_an_activation_that_a_weight_gradient_reads_anyway_gets_no_mask():
    graph = tt.trace(nn.Sequential(nn.Flatten(), nn.Linear(1728, 8), nn.ReLU(), nn.Linear(8, 4)), *batch(), optimizer=tt.SGD())
    block = graph.module()["train_step"].body.blocks[0]
    assert not [b.var for b in block.bindings if b.var.name.startswith("saved_")]


def test_a_mask_and_gathered_channels_are_kept_together():
    graph = tt.trace(mobile().eval(), *batch(), optimizer=tt.SGD())
    half = {layer.name: tt.LayerUpdate(weight=0.5) for layer in graph.layers if layer.kind == "conv2d"}
    found, whole = graph.apply(tt.UpdatePlan(half)).summary(), graph.summary()
    # Of four bytes of an activation that a ReLU6 made, two are gathered and one is its mask.
    assert found.saved_masks > 0
    assert found.saved_features + found.saved_masks < 0.85 * whole.saved_features


# --- What a kernel needs for itself -----------------------------------------------------------------------------------------


def test_a_padded_copy_lies_in_the_arena(monkeypatch):
    """One image for a convolution of stride 2: all its filters read a padded copy with even and odd columns apart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    x, y = torch.randn(1, 3, 64, 64), torch.tensor([1])
    graph = tt.trace(model, x, y)
    new = tt.build(graph)
    monkeypatch.setattr(lowering, "ShareWorkspace", lambda: Sequential([]))
    old = tt.build(graph)
    copy = 3 * 65 * 2 * 33 * 4
    taken, alone = (made.manifest.memory.entries["predict"] for made in (new, old))
    assert (taken.workspace, alone.workspace) == (0, copy)
    assert taken.lower_bound >= copy + 16 * 32 * 32 * 4
    assert taken.arena >= alone.arena
    np.testing.assert_array_equal(new.load().predict(x), old.load().predict(x))


def test_kernels_take_their_workspace_as_arguments():
    """The pass alone: an argument for each buffer, allocated before the call; a second call takes the same kernel."""
    x, w = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in (("x", (1, 4, 9, 9)), ("w", (4, 4, 3, 3))))
    block = relax.BlockBuilder()
    with block.function("main", [x, w]):
        with block.dataflow():
            once = block.emit(relax.op.nn.conv2d(x, w, strides=2, padding=1))
            pair = block.emit(relax.op.concat([once, once], 2))
            wide = block.emit(relax.op.concat([pair, pair], 3))
            out = block.emit_output(
                relax.op.nn.conv2d(relax.op.strided_slice(wide, [2, 3], [0, 0], [9, 9]), w, strides=2, padding=1)
            )
        block.emit_func_output(out)
    device = targets.load("host")
    steps = Sequential(
        [
            share_workspace.place_buffers(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
        ]
    )
    # No module is well-formed for TVM's checker once calls of kernels stand for themselves.
    with PassContext():
        lowered = steps(lowering.lower(block.get(), device))
        shared = share_workspace.ShareWorkspace()(lowered)
    kernels = [f for _, f in shared.functions_items() if isinstance(f, tirx.PrimFunc)]
    assert not any(share_workspace.workspace(kernel) for kernel in kernels)
    before, after = ([b.value for blk in mod["main"].body.blocks for b in blk.bindings] for mod in (lowered, shared))
    calls, wanted = (
        [v for v in values if plan_arena.is_kernel(v) and "conv2d" in v.op.name_hint] for values in (after, before)
    )
    buffers = [share_workspace.workspace(lowered[value.op]) for value in wanted]
    assert [len(value.args) for value in calls] == [len(v.args) + len(b) for v, b in zip(wanted, buffers, strict=True)]
    assert len(buffers) == 2
    assert all(buffers)
