"""Kernels against PyTorch, at shapes that are not friendly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relax_cases import close, run
from torch.nn import functional
from tvm import relax
from tvm.relax.op.grad import avg_pool2d_backward, max_pool2d_backward, take_backward

from tvmtrain import kernels, operators

# Every example is compiled: few of them, without a deadline.
slow = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@dataclass(frozen=True)
class Convolution:
    batch: int
    group_in: int
    group_out: int
    groups: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]

    @property
    def fits(self) -> bool:
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        padded = [s + self.padding[i] + self.padding[i + 2] for i, s in enumerate(self.size)]
        return all(p >= s for p, s in zip(padded, spans, strict=True))


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


convolutions = st.builds(
    Convolution,
    batch=st.integers(1, 3),
    group_in=st.sampled_from([1, 1, 2, 3, 8, 9, 17]),
    group_out=st.sampled_from([1, 1, 2, 5, 8, 12]),
    groups=st.sampled_from([1, 1, 2, 3, 8]),
    size=pairs(1, 20),
    kernel=st.one_of(st.just((1, 1)), st.just((3, 3)), pairs(1, 7)),
    strides=st.one_of(st.just((1, 1)), pairs(1, 3)),
    dilation=st.one_of(st.just((1, 1)), pairs(1, 3)),
    padding=st.one_of(st.just((0, 0, 0, 0)), st.just((1, 1, 1, 1)), st.tuples(*[st.integers(0, 3)] * 4)),
).filter(lambda c: c.fits)


small_maps = st.builds(
    Convolution,
    batch=st.integers(1, 7),
    group_in=st.sampled_from([16, 20, 50, 64, 96, 317]),
    group_out=st.sampled_from([16, 17, 24, 40]),
    groups=st.just(1),
    size=pairs(1, 8),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 5)]),
    strides=st.one_of(st.just((1, 1)), pairs(1, 2)),
    dilation=st.one_of(st.just((1, 1)), pairs(1, 2)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
).filter(lambda c: c.fits)


# A row of all images is whole vectors.
lined_up = st.builds(
    replace,
    small_maps,
    batch=st.sampled_from([2, 4, 8]),
    size=st.tuples(st.integers(2, 9), st.just(8)),
    kernel=st.sampled_from([(3, 3), (2, 3), (5, 3)]),
    padding=st.tuples(*[st.sampled_from([0, 1, 2])] * 4),
).filter(lambda c: c.fits)


def check_convolution(case: Convolution) -> None:
    """y, dX and dW of a convolution, against PyTorch."""
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.group_in * case.groups, *case.size, requires_grad=True)
    w = torch.randn(case.group_out * case.groups, case.group_in, *case.kernel, requires_grad=True)
    top, left, bottom, right = case.padding
    y = functional.conv2d(
        functional.pad(x, (left, right, top, bottom)), w, stride=case.strides, dilation=case.dilation, groups=case.groups
    )
    gy = torch.randn_like(y)
    y.backward(gy)

    def step(x: relax.Expr, w: relax.Expr, gy: relax.Expr) -> relax.Expr:
        call = relax.op.nn.conv2d(x, w, strides=case.strides, padding=case.padding, dilation=case.dilation, groups=case.groups)
        return relax.Tuple([call, operators.conv2d_dgrad(call, gy), operators.conv2d_wgrad(call, gy)])

    results = run(step, *(t.detach().numpy() for t in (x, w, gy)))
    for got, wanted in zip(results, (y, x.grad, w.grad), strict=True):
        assert wanted is not None
        close(got, wanted.detach().numpy())


@slow
@given(lined_up)
def test_rows_of_all_images_side_by_side(case: Convolution) -> None:
    check_convolution(case)


@slow
@given(convolutions)
def test_convolutions(case: Convolution) -> None:
    check_convolution(case)


@slow
@given(convolutions)
def test_weights_of_large_maps_part_by_part(case: Convolution) -> None:
    """As of maps that are too large for a cache, with a cache of a few numbers."""
    with pytest.MonkeyPatch.context() as small:
        for name, size in (("LARGE_MAP", 2), ("LARGEST_PART", 64), ("LARGEST_PARTIAL", 48)):
            small.setattr(kernels, name, size)
        check_convolution(case)


@slow
@given(small_maps)
def test_convolutions_of_many_channels_on_small_maps(case: Convolution) -> None:
    check_convolution(case)


@pytest.mark.parametrize(
    "case",
    [
        # name: why it is here
        pytest.param(Convolution(2, 1, 1, 24, (15, 13), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="depthwise, stride 2, odd"),
        pytest.param(Convolution(2, 1, 2, 6, (9, 9), (5, 5), (1, 1), (2, 2), (4, 4, 4, 4)), id="depthwise multiplier, dilated"),
        pytest.param(Convolution(2, 40, 24, 1, (7, 7), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, 7x7"),
        pytest.param(Convolution(2, 24, 40, 1, (8, 8), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, 8x8"),
        pytest.param(Convolution(2, 40, 72, 1, (16, 20), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, many filters"),
        pytest.param(Convolution(3, 9, 12, 1, (15, 19), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, large and odd"),
        pytest.param(Convolution(2, 8, 16, 1, (37, 33), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0)), id="pointwise, large, stride 2"),
        pytest.param(Convolution(2, 8, 16, 1, (9, 7), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0)), id="pointwise, stride 2"),
        pytest.param(Convolution(4, 20, 36, 1, (14, 14), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, runs of four"),
        pytest.param(Convolution(8, 17, 13, 1, (11, 6), (1, 1), (2, 1), (1, 1), (0, 0, 1, 0)), id="pointwise, runs, padded"),
        pytest.param(Convolution(8, 19, 13, 1, (3, 8), (1, 1), (1, 2), (1, 1), (0, 0, 0, 0)), id="pointwise, runs, stride 2"),
        pytest.param(Convolution(1, 3, 3, 1, (5, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, one column"),
        pytest.param(Convolution(2, 3, 32, 1, (33, 33), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="first layer"),
        pytest.param(Convolution(1, 16, 16, 1, (14, 14), (3, 3), (1, 1), (1, 1), (0, 0, 1, 1)), id="padded at the end only"),
        pytest.param(Convolution(2, 16, 24, 1, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), id="gathered taps, 7x7"),
        pytest.param(Convolution(2, 24, 20, 1, (9, 8), (3, 3), (2, 2), (1, 1), (1, 0, 1, 2)), id="gathered taps, stride 2"),
        pytest.param(Convolution(1, 16, 16, 1, (6, 7), (3, 2), (1, 1), (2, 2), (2, 1, 2, 1)), id="gathered taps, dilated"),
        pytest.param(Convolution(4, 16, 24, 1, (7, 4), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), id="gathered rows of all images"),
        pytest.param(Convolution(2, 20, 16, 1, (9, 8), (3, 2), (1, 2), (2, 1), (2, 1, 0, 3)), id="gathered rows, dilated"),
        pytest.param(Convolution(2, 16, 17, 1, (16, 16), (5, 3), (2, 2), (1, 1), (2, 1, 2, 1)), id="gathered rows of residues"),
        pytest.param(Convolution(2, 12, 8, 1, (12, 32), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), id="neighbouring rows"),
        pytest.param(Convolution(2, 320, 16, 1, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), id="a sum in layers"),
        pytest.param(Convolution(3, 96, 24, 1, (5, 3), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="three small maps"),
        pytest.param(Convolution(2, 3, 8, 1, (96, 96), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="dW image by image"),
        pytest.param(Convolution(1, 16, 64, 1, (80, 80), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="dW in parts of an image"),
        pytest.param(Convolution(1, 4, 4, 2, (8, 8), (2, 2), (3, 3), (1, 1), (0, 0, 0, 0)), id="stride beyond the kernel"),
        pytest.param(Convolution(2, 16, 24, 1, (9, 9), (3, 3), (3, 3), (1, 1), (1, 1, 1, 1)), id="padding within the stride"),
        pytest.param(Convolution(2, 8, 16, 1, (8, 8), (4, 4), (4, 4), (1, 1), (1, 1, 1, 1)), id="patches, padded"),
        pytest.param(Convolution(8, 40, 24, 1, (4, 4), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, 4x4"),
        pytest.param(Convolution(8, 16, 32, 1, (14, 14), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, 14x14"),
        pytest.param(Convolution(1, 2, 3, 1, (5, 5), (1, 1), (1, 1), (1, 1), (2, 2, 2, 2)), id="padding beyond the kernel"),
        pytest.param(Convolution(1, 1, 1, 1, (1, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="one element"),
    ],
)
def test_convolutions_of_networks(case: Convolution) -> None:
    check_convolution(case)


@pytest.mark.parametrize(
    "case",
    [
        # name: why it is here
        pytest.param(Convolution(2, 1, 1, 6, (16, 16), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="even"),
        pytest.param(Convolution(1, 1, 1, 1, (13, 11), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="one channel, odd"),
        pytest.param(Convolution(1, 1, 1, 5, (7, 7), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="7x7"),
        pytest.param(Convolution(2, 1, 1, 3, (14, 28), (5, 5), (2, 2), (1, 1), (2, 2, 2, 2)), id="5x5"),
        pytest.param(Convolution(2, 1, 1, 3, (14, 15), (3, 3), (2, 2), (1, 1), (0, 0, 1, 1)), id="padded at the end only"),
        pytest.param(Convolution(2, 1, 1, 3, (12, 18), (3, 3), (3, 3), (1, 1), (1, 1, 1, 1)), id="stride 3"),
        pytest.param(Convolution(2, 1, 1, 3, (9, 16), (3, 3), (1, 2), (1, 1), (1, 1, 1, 1)), id="along rows only"),
        pytest.param(Convolution(2, 1, 1, 3, (16, 9), (3, 3), (2, 1), (1, 1), (1, 1, 1, 1)), id="along columns only"),
        pytest.param(Convolution(2, 1, 1, 3, (16, 16), (3, 3), (2, 2), (2, 2), (2, 2, 2, 2)), id="dilated"),
        pytest.param(Convolution(2, 1, 1, 3, (16, 16), (2, 1), (3, 4), (1, 1), (0, 0, 0, 0)), id="stride beyond the kernel"),
        pytest.param(
            Convolution(2, 1, 1, 3, (20, 25), (3, 3), (5, 5), (1, 1), (1, 1, 1, 1)), id="a stride too long to write out"
        ),
        pytest.param(
            Convolution(2, 1, 1, 3, (16, 16), (9, 9), (2, 2), (1, 1), (4, 4, 4, 4)), id="a kernel too large to write out"
        ),
        pytest.param(Convolution(1, 1, 1, 40, (32, 32), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="on all cores"),
        pytest.param(Convolution(2, 4, 6, 1, (12, 16), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="dense"),
        pytest.param(Convolution(2, 4, 6, 1, (11, 9), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0)), id="dense, pointwise, odd"),
        pytest.param(Convolution(2, 24, 20, 1, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="dense, gathered"),
        pytest.param(Convolution(3, 320, 16, 1, (7, 5), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="dense, gathered, odd"),
    ],
)
def test_gradients_through_strided_convolutions_are_masked_at_once(case: Convolution) -> None:
    """ReLU6 before the convolution: what follows dX reads it row by row. Many places are exactly 0 or 6."""
    torch.manual_seed(0)
    x = (2 * torch.randn(case.batch, case.group_in * case.groups, *case.size)).round().requires_grad_()
    w = torch.randn(case.group_out * case.groups, case.group_in, *case.kernel)
    top, left, bottom, right = case.padding
    inside = functional.pad(functional.hardtanh(x, 0.0, 6.0), (left, right, top, bottom))
    y = functional.conv2d(inside, w, stride=case.strides, dilation=case.dilation, groups=case.groups)
    gy = torch.randn_like(y)
    y.backward(gy)

    def step(x: relax.Expr, w: relax.Expr, gy: relax.Expr) -> relax.Expr:
        call = relax.op.nn.conv2d(x, w, strides=case.strides, padding=case.padding, dilation=case.dilation, groups=case.groups)
        zero, six = relax.const(0.0), relax.const(6.0)
        passes = relax.op.logical_and(relax.op.greater(x, zero), relax.op.less(x, six))
        return relax.op.where(passes, operators.conv2d_dgrad(call, gy), zero)

    (got,) = run(step, *(t.detach().numpy() for t in (x, w, gy)))
    assert x.grad is not None
    close(got, x.grad.numpy())


windows = st.tuples(pairs(1, 4), pairs(1, 3), pairs(4, 12), st.booleans(), st.booleans(), st.data())


@slow
@given(windows)
def test_average_pooling(window: tuple) -> None:
    kernel, strides, size, ceil_mode, include, data = window
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    x = torch.randn(2, 3, *size, requires_grad=True)
    y = functional.avg_pool2d(x, kernel, strides, padding, ceil_mode, include)
    gy = torch.randn_like(y)
    y.backward(gy)

    def step(gy: relax.Expr, x: relax.Expr) -> relax.Expr:
        options = (kernel, strides, [*padding, *padding], [1, 1], ceil_mode, include)
        return relax.Tuple([relax.op.nn.avg_pool2d(x, *options), avg_pool2d_backward(gy, x, *options)])

    results = run(step, gy.numpy(), x.detach().numpy())
    for got, wanted in zip(results, (y.detach(), x.grad), strict=True):
        assert wanted is not None
        close(got, wanted.numpy())


@slow
@given(windows, pairs(1, 2))
def test_max_pooling_gives_ties_to_the_first(window: tuple, dilation: tuple[int, int]) -> None:
    kernel, strides, size, ceil_mode, _, data = window
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    if any(s + 2 * p <= (k - 1) * d for s, p, k, d in zip(size, padding, kernel, dilation, strict=True)):
        return
    # Few different values: most windows have several maxima.
    x = torch.randint(0, 3, (2, 3, *size)).float().requires_grad_()
    y = functional.max_pool2d(x, kernel, strides, padding, dilation, ceil_mode)
    gy = torch.randn_like(y)
    y.backward(gy)

    def step(gy: relax.Expr, x: relax.Expr) -> relax.Expr:
        options = (kernel, strides, [*padding, *padding], dilation, ceil_mode)
        return relax.Tuple([relax.op.nn.max_pool2d(x, *options), max_pool2d_backward(gy, x, *options)])

    results = run(step, gy.numpy(), x.detach().numpy())
    for got, wanted in zip(results, (y.detach(), x.grad), strict=True):
        assert wanted is not None
        close(got, wanted.numpy())


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "ceil_mode"),
    [
        # (images, channels, rows, columns)
        ((2, 3, 32, 32), 3, 2, 1, False),  # ResNet's
        ((1, 1, 35, 37), 3, 2, 0, True),  # odd
        ((2, 2, 14, 14), 2, 2, 0, False),
        ((1, 5, 7, 7), 3, 1, 1, False),
        ((1, 1, 1, 1), 1, 1, 0, False),
        ((2, 2, 17, 16), 2, 3, 0, False),  # places that no window covers
        ((2, 2, 20, 20), 3, 5, 1, False),  # a stride too long to write out
        ((2, 2, 20, 20), 6, 2, 3, False),  # a window too large to write out
        ((8, 40, 16, 16), 3, 2, 1, False),  # on all cores
    ],
)
def test_max_pooling_of_networks(shape: tuple[int, ...], kernel: int, stride: int, padding: int, ceil_mode: bool) -> None:
    """After ReLU, before its mask: whole windows of zeros; and a gradient of infinity stays where it belongs."""
    torch.manual_seed(0)
    x = torch.randn(shape).round().requires_grad_()
    y = functional.max_pool2d(functional.relu(x), kernel, stride, padding, 1, ceil_mode)
    gy = torch.randn_like(y)
    gy[0, 0, 0, 0] = float("inf")
    y.backward(gy)

    def step(gy: relax.Expr, x: relax.Expr) -> relax.Expr:
        pooled = max_pool2d_backward(
            gy, relax.op.nn.relu(x), (kernel, kernel), (stride, stride), [padding] * 4, (1, 1), ceil_mode
        )
        return relax.op.where(relax.op.greater(x, relax.const(0.0)), pooled, relax.const(0.0))

    (got,) = run(step, gy.numpy(), x.detach().numpy())
    assert x.grad is not None
    np.testing.assert_allclose(got, x.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_max_pooling_in_half_precision() -> None:
    x = torch.randint(0, 3, (2, 3, 8, 8)).float()
    gy = torch.randint(-4, 4, (2, 3, 4, 4)).float()
    leaf = x.clone().requires_grad_()
    functional.max_pool2d(leaf, 3, 2, 1).backward(gy)
    options = ((3, 3), (2, 2), [1] * 4)
    (got,) = run(lambda gy, x: max_pool2d_backward(gy, x, *options), *(t.numpy().astype("float16") for t in (gy, x)))
    assert leaf.grad is not None
    np.testing.assert_array_equal(got, leaf.grad.numpy())


@pytest.mark.parametrize(("shape", "axis"), [((5, 7), 0), ((4, 6), 1), ((2, 5, 3), 1)])
def test_rows_taken_twice_add_up(shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape, requires_grad=True)
    index = torch.randint(0, shape[axis], (9,))
    y = torch.index_select(x, axis, index)
    gy = torch.randn_like(y)
    y.backward(gy)
    (got,) = run(lambda gy, x, i: take_backward(gy, x, i, axis=axis), gy.numpy(), x.detach().numpy(), index.numpy())
    assert x.grad is not None
    close(got, x.grad.numpy())


@pytest.mark.parametrize(
    ("shape", "target"), [((2, 3, 4), (3, 1)), ((2, 3, 4, 5), (3, 1, 1)), ((5, 4), (1, 4)), ((4, 3), (4, 3))]
)
def test_sums_to_a_broadcast_shape(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    (got,) = run(lambda v: relax.op.collapse_sum_to(v, relax.ShapeExpr(list(target))), x)
    close(got, torch.from_numpy(x).sum_to_size(target).numpy())
