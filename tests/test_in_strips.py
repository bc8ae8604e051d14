"""The forward in strips: the same numbers for any row-by-row network, smaller, and only where it may be."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_memory import allocations, batch, mobile
from torch import nn
from tvm import relax
from tvm.relax import op as R

import tvmtrain as tt
from tvmtrain import signature
from tvmtrain.errors import PlanError
from tvmtrain.passes.in_strips import Forward, InStrips
from tvmtrain.passes.rows import Rows, Window
from tvmtrain.report import Summary


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv(x))


class Padded(nn.Module):
    """TensorFlow's SAME padding of even sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, (0, 1, 0, 1))


@st.composite
def convolutions(draw, channels: int) -> tuple[list[nn.Module], int]:
    kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, min(2, kernel * dilation // 2)))
    if draw(st.booleans()):
        groups, out = channels, channels
    else:
        groups, out = 1, draw(st.integers(1, 5))
    sizes = {"stride": draw(st.integers(1, 2)), "padding": padding, "dilation": dilation, "groups": groups}
    return [nn.Conv2d(channels, out, kernel, **sizes), draw(st.sampled_from([nn.ReLU6(), nn.SiLU(), nn.Identity()]))], out


@st.composite
def networks(draw) -> tuple[nn.Module, torch.Tensor]:
    """Up to six convolutions with what stands between them, on an image of up to 40 rows."""
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(
        draw(st.integers(1, 2)), channels := draw(st.integers(1, 4)), draw(st.integers(9, 40)), draw(st.integers(9, 20))
    )
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 6))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "residual", "pool", "pad"]))
        if kind == "conv":
            more, channels = draw(convolutions(channels))
        elif kind == "pool":
            more = [nn.MaxPool2d(draw(st.integers(2, 3)), stride=draw(st.integers(1, 2)), padding=1)]
        else:
            more = [{"residual": Residual(channels), "pad": Padded()}[kind]]
        layers += more
    model = nn.Sequential(*layers, nn.Conv2d(channels, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    return model, x


def predicted(mod: tvm.IRModule, graph: tt.TrainGraph, x: torch.Tensor) -> np.ndarray:
    function = mod["predict"].with_attr("global_symbol", "predict")
    values = {("input", signature.inputs(function)[0][1]): x.numpy()} | {
        (role, name): value for name, value in graph.imported.state.items() for role in ("parameter", "buffer")
    }
    vm = relax.VirtualMachine(tvm.compile(tvm.IRModule({"predict": function}), target="llvm"), tvm.cpu())
    arguments = [tvm.runtime.tensor(values[port]) for port in signature.inputs(function)]
    return vm["predict"](*arguments)[0].numpy()


def strips_of(function: relax.Function) -> int:
    """Joins of more than one strip."""
    return sum(
        isinstance(b.value, relax.Call) and b.value.op.name == "relax.concat"
        for block in function.body.blocks
        for b in block.bindings
    )


def test_strips_compute_what_pytorch_computes():
    cut: list[int] = []

    @given(networks(), st.floats(0.1, 0.5))
    @settings(
        max_examples=12,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    def check(network: tuple[nn.Module, torch.Tensor], share: float) -> None:
        model, x = network
        try:
            wanted = model(x).detach().numpy()
        except RuntimeError:
            return  # nothing was left of the image
        graph = tt.trace(model, x, torch.zeros(len(x), dtype=torch.int64))
        module = tvm.IRModule({"predict": graph.imported.module["predict"]})
        whole = Forward(module["predict"])
        parts = [whole.part(i, j) for i, j in zip(whole.waists, whole.waists[1:], strict=False)]
        peak = max((part.cost(1).peak for part in parts if part), default=1)
        strips = InStrips(int(share * peak))(module)
        cut.append(strips_of(strips["predict"]))
        got = predicted(strips, graph, x)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * max(1e-3, np.abs(wanted).max()))

    check()
    assert sum(count > 0 for count in cut) > len(cut) // 4


def test_each_residual_block_of_a_row_is_a_part_of_its_own():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *(Residual(8) for _ in range(3)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    graph = tt.trace(nn.Sequential(*layers), torch.randn(1, 3, 16, 16), torch.tensor([0]))
    # The input, what goes into each block, and what comes out of the last; then the mean and its reshape.
    forward = Forward(graph.imported.module["predict"])
    maps = [i for i in forward.waists if i >= 0 and [int(d) for d in forward.value(i).ty.shape] == [1, 8, 16, 16]]
    assert len(maps) == 4
    assert all(forward.part(i, j) is not None for i, j in itertools.pairwise(maps))


def test_strips_are_tried_where_only_a_kernel_is_too_large():
    """Tensors alone would fit: it is the padded copy of a convolution that does not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    graph = tt.trace(model, torch.randn(1, 3, 64, 64), torch.tensor([0]))
    graph = graph.apply(tt.UpdatePlan({"6": tt.LayerUpdate()}))
    allowed = graph.summary().arena * 95 // 100
    assert graph.within(allowed).summary().arena <= allowed


def test_a_strip_of_padding_behind_the_image():
    """A pointwise convolution of stride 2 whose last row lies on padding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 1, stride=2, padding=(1, 0)), nn.Conv2d(16, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x = torch.randn(1, 2, 31, 31)
    graph = tt.trace(model.eval(), x, torch.tensor([0]))
    module = InStrips(8000)(tvm.IRModule({"predict": graph.imported.module["predict"]}))
    assert strips_of(module["predict"]) > 0
    np.testing.assert_allclose(predicted(module, graph, x), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 3), st.integers(0, 6), st.integers(0, 6), st.data())
def test_a_window_reads_the_rows_that_a_convolution_reads(height, span, stride, before, after, data):
    """Against PyTorch: which rows of the image have a gradient from these rows of the result."""
    if height + before + after < span:
        return
    x = torch.ones(1, 1, height, 1, requires_grad=True)
    y = nn.functional.conv2d(nn.functional.pad(x, (0, 0, before, after)), torch.ones(1, 1, span, 1), stride=(stride, 1))
    first = data.draw(st.integers(0, y.shape[2] - 1))
    rows = Rows(first, data.draw(st.integers(first + 1, y.shape[2])))
    y[:, :, rows.first : rows.last].sum().backward()
    read = torch.nonzero(x.grad[0, 0, :, 0]).flatten().tolist()
    window = Window(stride, before, span, height)
    found = window.reads(rows)
    if stride <= span:
        assert list(range(found.first, found.last)) == read
    else:
        # Rows between two windows are computed, and read by nobody.
        assert set(read) <= set(range(found.first, found.last))
    top, bottom = window.padding(rows)
    assert top <= before
    assert bottom <= after


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(2)


@functools.cache
def last_two() -> tt.TrainGraph:
    """The front, where images are large, is frozen."""
    graph = tt.trace(mobile().eval(), *images(), optimizer=tt.SGD(lr=0.05, momentum=0.9))
    return graph.apply(tt.UpdatePlan.last(graph.layers, 2))


@functools.cache
def whole() -> Summary:
    return last_two().summary()


@functools.cache
def small() -> tt.TrainGraph:
    return last_two().within(whole().arena * 6 // 10)


def test_steps_in_strips_are_the_same_steps():
    assert small().strips is not None
    assert strips_of(small().module()["train_step"]) > 0 == strips_of(last_two().module()["train_step"])
    old, new = tt.build(last_two()).load(), tt.build(small()).load()
    x, y = images()
    for _ in range(3):
        assert new(x, y) == pytest.approx(old(x, y), rel=1e-6)
    for (name, value), other in zip(new.state_dict().items(), old.state_dict().values(), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(new.predict(x), old.predict(x), rtol=1e-5, atol=1e-6)


def test_the_runtime_allocates_no_more_than_was_asked_for():
    x, y = images()
    with allocations() as sizes:
        step = tt.build(small()).load()
        step(x, y)
        step.predict(x)
    assert max(sizes) <= whole().arena * 6 // 10


def test_work_that_is_done_again_is_counted():
    found = small().summary()
    assert whole().forward_flops < found.forward_flops < 2 * whole().forward_flops
    assert found.backward_flops == whole().backward_flops
    assert found.saved_features == whole().saved_features


def test_what_cannot_be_made_smaller_is_said():
    graph = tt.trace(mobile(), *batch(), optimizer=tt.SGD())
    with pytest.raises(
        PlanError, match=r"'train_step' takes [\d,]+ bytes at the least that was found for host, wanted at most 1,000"
    ):
        graph.within(1000)


def test_what_the_backward_reads_is_whole():
    """Everything is trained: the step has no waist but its end. Nothing keeps ``predict`` from strips."""
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 2, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(242, 4),
    ]
    module = InStrips(1)(tt.trace(nn.Sequential(*layers), *batch()).module())
    assert strips_of(module["train_step"]) == 0
    assert strips_of(module["predict"]) > 0


def test_a_limit_that_is_kept_changes_nothing():
    module = last_two().module()
    tvm.ir.assert_structural_equal(InStrips(10**9)(module), module)


def by_hand() -> tvm.IRModule:
    """y = conv(relu(conv(x))), a function of someone else's with the attributes of ``signature``."""
    x, first, second = (
        relax.Var(name, relax.TensorType(shape, "float32"))
        for name, shape in (("x", (1, 2, 16, 8)), ("first", (8, 2, 3, 3)), ("second", (2, 8, 3, 3)))
    )
    builder = relax.BlockBuilder()
    with builder.function("main", [x, first, second]):
        with builder.dataflow():
            hidden = builder.emit(R.nn.relu(builder.emit(R.nn.conv2d(x, first, padding=1))))
            out = builder.emit_output(R.nn.conv2d(hidden, second, strides=2, padding=1))
        builder.emit_func_output(relax.Tuple([out]))
    mod = builder.get()
    ports = [("input", "x"), ("parameter", "first"), ("parameter", "second")]
    mod["main"] = signature.with_ports(mod["main"], ports, [("output", "y")])
    return mod


def test_two_convolutions_in_two_strips():
    """8 rows of the result, 4 in a strip: 9 rows of the hidden image, and 10 of x, with one row of padding at one end."""
    before = by_hand()
    whole = 8 * 16 * 8 * 4 + 2 * 8 * 4 * 4
    after = tvm.transform.Sequential([InStrips(whole - 1)])(before)
    calls = [b.value for b in after["main"].body.blocks[0].bindings]
    shapes = [(call.op.name.removeprefix("relax."), [int(d) for d in call.ty.shape][2]) for call in calls]
    assert shapes == [
        ("strided_slice", 9),
        ("nn.conv2d", 8),
        ("nn.relu", 8),
        ("nn.conv2d", 4),
        ("strided_slice", 10),
        ("nn.conv2d", 9),
        ("nn.relu", 9),
        ("nn.conv2d", 4),
        ("concat", 8),
    ]
    convolutions = [[int(v) for v in call.attrs.padding] for call in calls if call.op.name == "relax.nn.conv2d"]
    assert convolutions == [[1, 1, 0, 1], [1, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1]]
