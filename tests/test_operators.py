"""Every operator with its gradient, in PyTorch and compiled; where values tie or sit on a bound, PyTorch's choice counts.

Cases of one theme are one model: each applies its function to parameters of its own, so that their gradients are the gradients
of the function's inputs. A wrong one is named in the failure by its case.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import Reference, compiled, departures
from torch import nn

import tvmtrain as tt
from tvmtrain.errors import ModelError, UnsupportedOperatorError

THEMES: dict[str, Callable[[], list[Case]]] = {}


@dataclass(frozen=True)
class Case:
    """``apply`` of ``tensors``: those of floating point are parameters, the others are buffers."""

    name: str
    apply: Callable[..., Any]
    tensors: tuple[torch.Tensor, ...]


def case(name: str, apply: Callable[..., Any], *tensors: torch.Tensor) -> Case:
    return Case(name, apply, tensors)


def theme(make: Callable[[], list[Case]]) -> Callable[[], list[Case]]:
    THEMES[make.__name__] = make
    return make


class Apply(nn.Module):
    """One case as a module."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.apply_to = case.apply
        for i, tensor in enumerate(case.tensors):
            if tensor.is_floating_point():
                self.register_parameter(f"input{i}", nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(f"input{i}", tensor.clone())
        self.count = len(case.tensors)

    def forward(self) -> tuple[torch.Tensor, ...]:
        result = self.apply_to(*(getattr(self, f"input{i}") for i in range(self.count)))
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class Bench(nn.Module):
    """All cases of a theme; ``x`` only makes it a model with an input."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.names = [c.name for c in cases]
        for c in cases:
            setattr(self, c.name, Apply(c))

    def forward(self, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        return {"x": (x,)} | {name: getattr(self, name)() for name in self.names}


def weighted(results: dict[str, tuple[torch.Tensor, ...]], y: torch.Tensor) -> torch.Tensor:
    """A loss in which every element of every result has a weight of its own."""
    total = y.sum() * 0
    for name, values in results.items():
        for value in values:
            if name != "x" and value.is_floating_point():
                ramp = torch.linspace(-1.0, 1.5, value.numel()) if value.numel() > 1 else torch.ones(1)
                total = total + (value * ramp.reshape(value.shape)).sum()
    return total


def check(cases: list[Case]) -> None:
    """Results and gradients of all cases, to 1e-3 of their own largest value (1e-6 near zero)."""
    assert len({c.name for c in cases}) == len(cases)
    reference = Reference(Bench(cases).train(), torch.zeros(2), torch.zeros(2), weighted)
    step = compiled(reference)
    _, gradients = reference.gradients()
    wrong = departures(step.gradients(reference.x, reference.y), gradients)
    step(reference.x, reference.y, lr=0.0)
    with torch.no_grad():
        results = [t.numpy() for t in reference.value(reference.model)[1]]
    ours = {str(i): np.asarray(value) for i, value in enumerate(step.outputs)}
    wrong += [f"result {line}" for line in departures(ours, {str(i): value for i, value in enumerate(results)})]
    assert not wrong, "\n".join(wrong)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.3


def corners(*places: float) -> torch.Tensor:
    """Random numbers, each of ``places`` itself, and numbers close to it."""
    at = torch.tensor(places)
    return torch.cat([torch.randn(17) * 4, at, at, at + 1e-3, at - 1e-3])


def without_gradient(a: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        b, c = (a * 3).exp(), a + 1
    return a * b + c


def write_columns(a: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    a = a * 1
    a[:, i] = b
    return a


def write_slice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a * 1
    a[:, 1:3] = b
    a[0] = 2.0
    return a


@theme
def activations() -> list[Case]:
    functions: dict[str, tuple[Callable, torch.Tensor]] = {
        "relu": (F.relu, corners(0)),
        "relu6": (F.relu6, corners(0, 6)),
        "hardtanh": (F.hardtanh, corners(-1, 1)),
        "hardtanh_wide": (lambda x: F.hardtanh(x, -2.0, 3.0), corners(-2, 3)),
        "clamp": (lambda x: x.clamp(-0.5, 2.0), corners(-0.5, 2)),
        "clamp_min": (lambda x: x.clamp(min=0.5), corners(0.5)),
        "clamp_max": (lambda x: x.clamp(max=0.5), corners(0.5)),
        "clip_method": (lambda x: torch.clip(x, 0, 1), corners(0, 1)),
        "abs": (torch.abs, corners(0)),
        "gelu": (F.gelu, corners(0)),
        "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), corners(0)),
        "silu": (F.silu, corners(0)),
        "hardswish": (F.hardswish, corners(-3, 3)),
        "hardsigmoid": (F.hardsigmoid, corners(-3, 3)),
        "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), corners(0)),
        "elu": (lambda x: F.elu(x, 0.7), corners(0)),
        "celu": (lambda x: F.celu(x, 0.7), corners(0)),
        "selu": (F.selu, corners(0)),
        "softplus": (F.softplus, torch.cat([corners(0), torch.tensor([-100.0, 100.0])])),
        "softplus_beta": (lambda x: F.softplus(x, beta=2.0), corners(0)),
        "mish": (F.mish, torch.cat([corners(0), torch.tensor([-100.0, 100.0])])),
        "logsigmoid": (F.logsigmoid, torch.cat([corners(0), torch.tensor([-200.0, 200.0])])),
        "sigmoid": (torch.sigmoid, torch.cat([corners(0), torch.tensor([-200.0, 200.0])])),
        "tanh": (torch.tanh, torch.cat([corners(0), torch.tensor([-200.0, 200.0])])),
        "softsign": (F.softsign, corners(0)),
        "tanhshrink": (F.tanhshrink, corners(0)),
        "hardshrink": (F.hardshrink, corners(-0.5, 0.5)),
        "softshrink": (F.softshrink, corners(-0.5, 0.5)),
        "threshold": (lambda x: F.threshold(x, 0.1, 20.0), corners(0.1)),
    }
    cases = [case(name, function, values) for name, (function, values) in functions.items()]
    return [
        *cases,
        case("prelu", F.prelu, torch.cat([normal(2, 3, 5).flatten(), torch.zeros(6)]).reshape(3, 3, 4), normal(3)),
        case("prelu_shared", F.prelu, normal(2, 3, 5), normal(1)),
        case("glu", F.glu, normal(3, 6)),
        case("glu_axis", lambda x: F.glu(x, 1), normal(3, 4, 5)),
    ]


@theme
def elementwise() -> list[Case]:
    x = normal(3, 5)
    return [
        case("exp", torch.exp, x),
        case("expm1", torch.expm1, x),
        case("log", torch.log, positive(7)),
        case("log1p", torch.log1p, positive(7)),
        case("log2", torch.log2, positive(7)),
        case("erf", torch.erf, corners(0)),
        case("sqrt", torch.sqrt, positive(7)),
        case("rsqrt", torch.rsqrt, positive(7)),
        case("square", torch.square, x),
        case("reciprocal", torch.reciprocal, positive(7)),
        case("neg", torch.neg, x),
        case("sin", torch.sin, x),
        case("cos", torch.cos, x),
        case("atan", torch.atan, x),
        case("floor", lambda t: t.floor() * t, x),
        case("round", lambda t: t.round() * t, x),
        case("sign", lambda t: t.sign() * t, x),
        case("pow2", lambda t: t**2, corners(0)),
        case("pow3", lambda t: t**3, corners(0)),
        case("pow_half", lambda t: t**0.5, positive(7)),
        case("pow_inverse", lambda t: t**-1, positive(7)),
        case("pow_real", lambda t: t**1.7, positive(7)),
        case("pow_zero", lambda t: t**0, x),
        case("pow_tensor", torch.pow, positive(7), normal(7)),
        case("scalar_pow", lambda t: 2.0**t, x),
        case("maximum", torch.maximum, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])),
        case("minimum", torch.minimum, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])),
        case("maximum_broadcast", torch.maximum, normal(3, 4), normal(4)),
        case("add_alpha", lambda a, b: torch.add(a, b, alpha=0.3), normal(3, 4), normal(4)),
        case("sub_alpha", lambda a, b: torch.sub(a, b, alpha=3), normal(3, 4), normal(3, 1)),
        case("rsub", lambda a: 3 - a, x),
        case("divide", lambda a, b: a / b, normal(3, 4), positive(4)),
        case("divide_number", lambda a: 2.5 / a, positive(4)),
        case("multiply_broadcast", lambda a, b: a * b, normal(3, 1, 4), normal(2, 1)),
        case("scalar_tensor", lambda a, b: a * b, normal(3, 4), torch.tensor(1.7)),
        case("integer_mask", lambda a, m: a * m, normal(4), torch.tensor([0, 1, 1, 0])),
        case("boolean_mask", lambda a, m: a * m, normal(4), torch.tensor([True, False, True, True])),
        case("integer_plus", lambda a, m: m + a, normal(4), torch.arange(4)),
        case("integer_divide", lambda a, m: a + m / 3, normal(4), torch.arange(4)),
        case("compare", lambda a, b: (a > b).float() * a + (a <= 0.5) * b, normal(9), normal(9)),
        case("where", lambda a, b: torch.where(a > 0, a * 2, b), normal(3, 4), normal(4)),
        case("where_scalars", lambda a: torch.where(a > 0, a, 0.5) + torch.where(a > 1, 2.0, a), normal(9)),
        case("masked_fill", lambda a, m: a.masked_fill(m, -3.0), normal(2, 3), torch.tensor([True, False, True])),
        case("logical", lambda a: a * ((a > 0) & ~(a > 1) | (a < -1)), normal(20)),
        case("addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.5), normal(4), normal(4), normal(4)),
        case("lerp", lambda a, b: torch.lerp(a, b, 0.3), normal(4), normal(4)),
        case("cast", lambda a: a.double().mul(2).float() + a.to(torch.int64), normal(9)),
        case("atan2", torch.atan2, positive(5), positive(5)),
        case("ones_like", lambda a: torch.ones_like(a) * a + torch.zeros_like(a) + a.new_full((3,), 2.0), normal(3)),
        case("detach", lambda a: a * a.detach(), normal(5)),
        case("no_grad", without_gradient, normal(5)),
        case("whole_slice", lambda a: a[...] * a[:], normal(5)),
    ]


@theme
def shapes() -> list[Case]:
    x = normal(2, 3, 4)
    return [
        case("reshape", lambda a: a.reshape(3, -1), x),
        case("view_flatten", lambda a: a.view(6, 4).flatten(), x),
        case("unflatten", lambda a: a.unflatten(2, (2, 2)), x),
        case("transpose", lambda a: a.transpose(0, 2), x),
        case("permute", lambda a: a.permute(2, 0, 1), x),
        case("t", lambda a: a.t(), normal(3, 5)),
        case("squeeze", lambda a: a.squeeze(), normal(1, 3, 1)),
        case("squeeze_axis", lambda a: a.squeeze(2), normal(1, 3, 1)),
        case("squeeze_not_one", lambda a: a.squeeze(1), normal(1, 3, 1)),
        case("unsqueeze", lambda a: a.unsqueeze(-2) * a[:, None], normal(3, 5)),
        case("pad", lambda a: F.pad(a, (1, 2, 0, 3)), x),
        case("pad_value", lambda a: F.pad(a, (2, 0), value=1.5), x),
        case("pad_negative", lambda a: F.pad(a, (-1, 2, 1, -1)), x),
        case("pad_all_negative", lambda a: F.pad(a, (-1, -1, -1, 0)), x),
        case("pad_reflect", lambda a: F.pad(a, (2, 1, 1, 0), mode="reflect"), normal(1, 2, 3, 4)),
        case("pad_replicate", lambda a: F.pad(a, (2, 1, 1, 3), mode="replicate"), normal(1, 2, 3, 4)),
        case("pad_circular", lambda a: F.pad(a, (2, 1, 1, 2), mode="circular"), normal(1, 2, 3, 4)),
        case("slice", lambda a: a[:, 1:], x),
        case("slice_step", lambda a: a[..., 1::2], normal(2, 7)),
        case("slice_both_steps", lambda a: a[::2, ::3], normal(5, 8)),
        case("slice_negative", lambda a: a[-2:, :-1], normal(4, 5)),
        case("slice_beyond", lambda a: a[:, 1:100], normal(2, 5)),
        case("select", lambda a: a[1] + a.select(0, 0), x),
        case("select_last", lambda a: a[:, -1], x),
        case("narrow", lambda a: a.narrow(2, 1, 2), x),
        case("cat", lambda a, b: torch.cat([a, b, a], 1), normal(2, 3), normal(2, 1)),
        case("cat_negative", lambda a, b: torch.cat([a, b], -2), normal(2, 3), normal(1, 3)),
        case("cat_mixed", lambda a, b: torch.cat([a, b], 0), normal(2), torch.arange(3)),
        case("stack", lambda a, b: torch.stack([a, b], -1), normal(2, 3), normal(2, 3)),
        case("split", lambda a: torch.split(a, 2, 1), normal(2, 5)),
        case("split_sizes", lambda a: torch.split(a, [1, 4], 1), normal(2, 5)),
        case("chunk", lambda a: [p * (i + 1) for i, p in enumerate(a.chunk(3, -1))], normal(2, 7)),
        case("chunk_unused", lambda a: a.chunk(2, 0)[1], normal(4, 3)),
        case("unbind", lambda a: [p * (i + 1) for i, p in enumerate(a.unbind(1))], normal(2, 3)),
        case("flip", lambda a: a.flip(0, 2), x),
        case("roll", lambda a: a.roll(1, 1), x),
        case("roll_both", lambda a: a.roll((1, -2), (0, 2)), x),
        case("roll_flat", lambda a: a.roll(5), x),
        case("tile", lambda a: a.tile(2, 1, 3), x),
        case("tile_more_axes", lambda a: a.tile(2, 2, 1, 1), x),
        case("repeat", lambda a: a.repeat(2, 1, 1, 2), x),
        case("repeat_interleave", lambda a: a.repeat_interleave(3, 1), x),
        case("expand", lambda a: a.expand(4, -1, 5), normal(3, 1)),
        case("broadcast_to", lambda a: torch.broadcast_to(a, (2, 3, 4)), normal(4)),
        case("index", lambda a, i: a[i], normal(5, 3), torch.tensor([0, 2, 2, 4])),
        case("index_axis", lambda a, i: a[:, i], normal(3, 5), torch.tensor([[0, 2], [2, 4]])),
        case("index_pair", lambda a, i: a[i, i], normal(5, 5), torch.tensor([0, 2, 2])),
        case("index_list", lambda a: a[:, [0, 2, 1]], normal(2, 3)),
        case("index_rows", lambda a: a[torch.arange(3), [1, 0, 1]], normal(3, 2)),
        case("index_apart", lambda a, i: a[i, :, i], normal(3, 4, 5), torch.tensor([0, 2, 2])),
        case("index_negative", lambda a, i: a[:, i], normal(3, 4), torch.tensor([-1, 0, -3])),
        case("index_put", lambda a, b, i: a.index_put((i,), b), normal(4, 3), normal(2, 3), torch.tensor([0, 2])),
        case("index_put_axis", write_columns, normal(2, 5, 3), normal(2, 1, 3), torch.tensor([0, 4])),
        case(
            "index_add",
            lambda a, b, i: a.index_put((i,), b, accumulate=True),
            normal(4, 3),
            normal(3, 3),
            torch.tensor([0, 2, 2]),
        ),
        case("fold", lambda a: F.fold(a, (5, 6), (2, 3), padding=1, stride=2), normal(2, 12, 9)),
        case("assign_slice", write_slice, normal(3, 5), normal(3, 2)),
        case("index_select", lambda a, i: a.index_select(1, i), normal(3, 5), torch.tensor([4, 0, 4])),
        case("gather", lambda a, i: a.gather(1, i), normal(2, 4), torch.tensor([[0, 3, 3], [1, 0, 2]])),
        case("embedding", lambda w, i: F.embedding(i, w), normal(6, 3), torch.tensor([[0, 2], [2, 5]])),
        case("embedding_padding", lambda w, i: F.embedding(i, w, padding_idx=2), normal(6, 3), torch.tensor([[0, 2], [2, 5]])),
        case("triu", lambda a: a.triu(1), normal(4, 5)),
        case("tril", lambda a: a.tril(-1), normal(2, 4, 4)),
        case("pixel_shuffle", lambda a: F.pixel_shuffle(a, 2), normal(2, 8, 3, 5)),
        case("pixel_unshuffle", lambda a: F.pixel_unshuffle(a, 2), normal(2, 2, 4, 6)),
        case("channel_shuffle", lambda a: a.reshape(2, 2, 3, 4).transpose(1, 2).reshape(2, 6, 4), normal(2, 6, 4)),
        case("unfold", lambda a: F.unfold(a, (2, 3), padding=1, stride=2), normal(2, 3, 5, 6)),
        case("meshgrid", lambda a, b: torch.meshgrid(a, b, indexing="ij"), normal(3), normal(2)),
        case("movedim", lambda a: a.movedim(0, -1), x),
    ]


@theme
def reductions() -> list[Case]:
    x = normal(2, 3, 4)
    ties = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    return [
        case("sum", torch.sum, x),
        case("sum_axes", lambda a: a.sum((0, 2)), x),
        case("sum_keep", lambda a: a.sum(1, keepdim=True), x),
        case("mean", torch.mean, x),
        case("mean_axes", lambda a: a.mean((-1, 0)), x),
        case("mean_keep", lambda a: a.mean((1, 2), keepdim=True), x),
        case("amax", lambda a: a.amax(1), ties),
        case("amin", lambda a: a.amin((0, 1)), ties),
        case("amax_keep", lambda a: a.amax((1, 2), keepdim=True), x),
        case("max_axis", lambda a: a.max(1), ties),
        case("max_axis_keep", lambda a: a.max(0, keepdim=True), ties),
        case("min_axis", lambda a: a.min(1), ties),
        case("max_all", lambda a: a.max(), ties),
        case("min_all", lambda a: a.min(), ties),
        case("argmax", lambda a: (a.argmax(1), a * 1), ties),
        case("var", lambda a: a.var(1), x),
        case("var_biased", lambda a: a.var((0, 2), unbiased=False, keepdim=True), x),
        case("var_mean", lambda a: torch.var_mean(a, 1), x),
        case("std", lambda a: a.std(), x),
        case("std_axis", lambda a: a.std(-1), x),
        case("norm", lambda a: a.norm(), x),
        case("norm_axis", lambda a: a.norm(dim=1), x),
        case("norm_1", lambda a: a.norm(p=1, dim=2, keepdim=True), x),
        case("vector_norm", lambda a: torch.linalg.vector_norm(a, dim=(1, 2)), x),
        case("normalize", lambda a: F.normalize(a, dim=1), x),
        case("cosine_similarity", lambda a, b: F.cosine_similarity(a, b, 1), normal(3, 5), normal(3, 5)),
        case("cumsum", lambda a: a.cumsum(1), x),
        case("logsumexp", lambda a: a.logsumexp(1), x),
        case("softmax", lambda a: F.softmax(a, -1), x),
        case("softmax_first", lambda a: F.softmax(a, 0), x),
        case("softmax_large", lambda a: F.softmax(a * 100, 1), x),
        case("log_softmax", lambda a: F.log_softmax(a, 1), x),
        case("log_softmax_large", lambda a: F.log_softmax(a * 100, 2), x),
        case("softmin", lambda a: F.softmin(a, 1), x),
    ]


@theme
def products() -> list[Case]:
    return [
        case("matmul", torch.matmul, normal(3, 4), normal(4, 5)),
        case("matmul_batched", torch.matmul, normal(2, 3, 4), normal(2, 4, 5)),
        case("matmul_broadcast", torch.matmul, normal(2, 1, 3, 4), normal(3, 4, 5)),
        case("matmul_one_for_many", torch.matmul, normal(2, 3, 4), normal(4, 5)),
        case("matmul_many_for_one", torch.matmul, normal(3, 4), normal(2, 4, 5)),
        case("matmul_vector", torch.matmul, normal(3, 4), normal(4)),
        case("vector_matmul", torch.matmul, normal(4), normal(4, 5)),
        case("dot", torch.matmul, normal(4), normal(4)),
        case("batched_vector", torch.matmul, normal(2, 3, 4), normal(4)),
        case("vector_batched", torch.matmul, normal(4), normal(2, 4, 3)),
        case("mv", torch.mv, normal(3, 4), normal(4)),
        case("bmm", torch.bmm, normal(2, 3, 4), normal(2, 4, 5)),
        case(
            "baddbmm",
            lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2.0),
            normal(2, 3, 5),
            normal(2, 3, 4),
            normal(2, 4, 5),
        ),
        case("addmm", lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2.0), normal(5), normal(3, 4), normal(4, 5)),
        case("einsum", lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), normal(2, 2, 3, 4), normal(2, 2, 5, 4)),
        case("einsum_outer", lambda a, b: torch.einsum("i,j->ij", a, b), normal(3), normal(4)),
        case("einsum_sum", lambda a, b: torch.einsum("nchw,cd->nd", a, b), normal(2, 3, 4, 5), normal(3, 6)),
        case("outer", torch.outer, normal(3), normal(4)),
        case("linear", F.linear, normal(2, 3, 4), normal(5, 4), normal(5)),
        case("linear_no_bias", F.linear, normal(3, 4), normal(5, 4)),
        case("linear_vector", F.linear, normal(4), normal(5, 4), normal(5)),
    ]


@theme
def attention() -> list[Case]:
    q, k, v = normal(2, 2, 5, 4), normal(2, 2, 7, 4), normal(2, 2, 7, 3)
    sdpa = F.scaled_dot_product_attention
    mask = torch.rand(5, 7) > 0.3
    mask[:, 0] = True
    return [
        case("plain", sdpa, q, k, v),
        case("scale", lambda a, b, c: sdpa(a, b, c, scale=0.3), q, k, v),
        case("causal", lambda a, b, c: sdpa(a, b, c, is_causal=True), q, k, v),
        case("boolean_mask", lambda a, b, c, m: sdpa(a, b, c, attn_mask=m), q, k, v, mask),
        case("number_mask", lambda a, b, c, m: sdpa(a, b, c, attn_mask=m), q, k, v, normal(2, 1, 5, 7)),
        case("three_axes", sdpa, q[0], k[0], v[0]),
        case(
            "grouped",
            lambda a, b, c: sdpa(a, b, c, enable_gqa=True),
            normal(1, 4, 3, 4),
            normal(1, 2, 5, 4),
            normal(1, 2, 5, 4),
        ),
        case("softmax_mask", lambda a, m: F.softmax(a.masked_fill(~m, float("-inf")), -1), normal(2, 5, 7), mask),
    ]


@theme
def normalizations() -> list[Case]:
    x = normal(3, 4, 5, 6) * 3 + 100  # a large mean: a variance from squares would have lost its digits
    return [
        case("layer_norm", lambda a, g, b: F.layer_norm(a, (6,), g, b), normal(3, 5, 6), normal(6), normal(6)),
        case("layer_norm_axes", lambda a, g, b: F.layer_norm(a, (5, 6), g, b), x, normal(5, 6), normal(5, 6)),
        case("layer_norm_plain", lambda a: F.layer_norm(a, (4, 5, 6), eps=1e-3), x),
        case("layer_norm_no_bias", lambda a, g: F.layer_norm(a, (6,), g), normal(2, 6), normal(6)),
        case("group_norm", lambda a, g, b: F.group_norm(a, 2, g, b), x, normal(4), normal(4)),
        case("group_norm_plain", lambda a: F.group_norm(a, 4), x),
        case("group_norm_1d", lambda a, g, b: F.group_norm(a, 1, g, b), normal(2, 4, 7), normal(4), normal(4)),
        case("instance_norm", F.instance_norm, x),
        case("instance_norm_affine", lambda a, g, b: F.instance_norm(a, None, None, g, b), x, normal(4), normal(4)),
        case("batch_norm_statistics", lambda a, g, b: F.batch_norm(a, None, None, g, b, True), x, normal(4), normal(4)),
        case("batch_norm_plain", lambda a: F.batch_norm(a, None, None, training=True), normal(5, 3)),
        case("rms_norm", lambda a, g: F.rms_norm(a, (6,), g, 1e-5), normal(3, 6), normal(6)),
    ]


@theme
def convolutions() -> list[Case]:
    x, w = normal(2, 4, 9, 8), normal(6, 4, 3, 3)
    return [
        case("plain", F.conv2d, x, w, normal(6)),
        case("one_by_one", F.conv2d, x, normal(5, 4, 1, 1)),
        case("one_by_one_strided", lambda a, b: F.conv2d(a, b, stride=2), x, normal(5, 4, 1, 1)),
        case("one_by_one_padded", lambda a, b: F.conv2d(a, b, padding=1), x, normal(5, 4, 1, 1)),
        case("strided", lambda a, b: F.conv2d(a, b, stride=2, padding=1), x, w),
        case("strides_differ", lambda a, b: F.conv2d(a, b, stride=(3, 2), padding=(0, 2)), x, w),
        case("dilated", lambda a, b: F.conv2d(a, b, padding=2, dilation=2), x, w),
        case("dilated_strided", lambda a, b: F.conv2d(a, b, stride=2, padding=(3, 1), dilation=(3, 1)), x, w),
        case("same", lambda a, b, c: F.conv2d(a, b, c, padding="same"), x, normal(6, 4, 4, 2), normal(6)),
        case("same_dilated", lambda a, b: F.conv2d(a, b, padding="same", dilation=2), x, normal(6, 4, 2, 3)),
        case("valid", lambda a, b: F.conv2d(a, b, padding="valid"), x, w),
        case("grouped", lambda a, b: F.conv2d(a, b, padding=1, groups=2), x, normal(6, 2, 3, 3)),
        case("depthwise", lambda a, b, c: F.conv2d(a, b, c, padding=1, groups=4), x, normal(4, 1, 3, 3), normal(4)),
        case("depthwise_strided", lambda a, b: F.conv2d(a, b, stride=2, padding=2, groups=4), x, normal(4, 1, 5, 5)),
        case("depthwise_multiplied", lambda a, b: F.conv2d(a, b, padding=1, groups=4), x, normal(8, 1, 3, 3)),
        case("few_channels", lambda a, b: F.conv2d(a, b, stride=2, padding=3), normal(2, 3, 11, 13), normal(8, 3, 7, 7)),
        case("padding_wide", lambda a, b: F.conv2d(a, b, padding=4), normal(1, 2, 3, 3), normal(3, 2, 3, 3)),
        case("uncovered_end", lambda a, b: F.conv2d(a, b, stride=3), normal(1, 2, 9, 10), normal(3, 2, 2, 2)),
        case("asymmetric", lambda a, b: F.conv2d(F.pad(a, (0, 1, 0, 1)), b, stride=2), x, w),
        case("one_image", lambda a, b: F.conv2d(a, b), x[0], w),
        case("conv1d", lambda a, b, c: F.conv1d(a, b, c, stride=2, padding=1), normal(2, 3, 11), normal(4, 3, 3), normal(4)),
        case("conv1d_same", lambda a, b: F.conv1d(a, b, padding="same", dilation=3), normal(2, 3, 11), normal(4, 3, 4)),
        case("conv1d_depthwise", lambda a, b: F.conv1d(a, b, groups=3), normal(2, 3, 11), normal(3, 1, 4)),
    ]


@theme
def transposed_convolutions() -> list[Case]:
    x = normal(2, 4, 5, 6)
    transposed = F.conv_transpose2d
    return [
        case("plain", transposed, x, normal(4, 3, 3, 3), normal(3)),
        case("strided", lambda a, b: transposed(a, b, stride=2, padding=1), x, normal(4, 3, 3, 3)),
        case("upscaling", lambda a, b, c: transposed(a, b, c, stride=2), x, normal(4, 3, 2, 2), normal(3)),
        case(
            "output_padding", lambda a, b: transposed(a, b, stride=3, padding=1, output_padding=(2, 1)), x, normal(4, 3, 3, 4)
        ),
        case("grouped", lambda a, b: transposed(a, b, stride=2, groups=2), x, normal(4, 3, 3, 3)),
        case("depthwise", lambda a, b: transposed(a, b, stride=2, padding=1, groups=4), x, normal(4, 1, 4, 4)),
        case("dilated", lambda a, b: transposed(a, b, padding=2, dilation=(2, 3)), x, normal(4, 3, 3, 3)),
        case(
            "one_axis",
            lambda a, b, c: F.conv_transpose1d(a, b, c, stride=2, padding=1, output_padding=1),
            normal(2, 3, 5),
            normal(3, 4, 3),
            normal(4),
        ),
    ]


@theme
def pools() -> list[Case]:
    x, odd = normal(2, 3, 8, 8), normal(2, 3, 7, 10)
    plateau = torch.ones(1, 2, 7, 7)
    steps = torch.randint(0, 3, (1, 2, 9, 9)).float()
    return [
        case("max", lambda a: F.max_pool2d(a, 2), x),
        case("max_overlap", lambda a: F.max_pool2d(a, 3, 2, 1), odd),
        case("max_ceil", lambda a: F.max_pool2d(a, 3, 2, ceil_mode=True), x),
        case("max_ceil_padded", lambda a: F.max_pool2d(a, 3, 2, 1, ceil_mode=True), odd),
        case("max_dilated", lambda a: F.max_pool2d(a, 3, 1, 1, dilation=2), odd),
        case("max_rectangle", lambda a: F.max_pool2d(a, (2, 3), (1, 2), (1, 0)), odd),
        case("max_plateau", lambda a: F.max_pool2d(a, 3, 2, 1), plateau),
        case("max_plateau_ceil", lambda a: F.max_pool2d(a, 2, 2, ceil_mode=True), plateau),
        case("max_ties", lambda a: F.max_pool2d(a, 3, 2), steps),
        case("max_negative", lambda a: F.max_pool2d(a - 10, 3, 2, 1), odd),
        case("max_1d", lambda a: F.max_pool1d(a, 3, 2, 1), normal(2, 3, 9)),
        case("avg", lambda a: F.avg_pool2d(a, 2), x),
        case("avg_overlap", lambda a: F.avg_pool2d(a, 3, 2, 1), odd),
        case("avg_ceil", lambda a: F.avg_pool2d(a, 3, 2, ceil_mode=True), x),
        case("avg_ceil_padded", lambda a: F.avg_pool2d(a, 3, 2, 1, ceil_mode=True), odd),
        case("avg_without_pad", lambda a: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False), odd),
        case("avg_ceil_without_pad", lambda a: F.avg_pool2d(a, 3, 2, 1, ceil_mode=True, count_include_pad=False), x),
        case("avg_divisor", lambda a: F.avg_pool2d(a, 3, 2, 1, divisor_override=5), odd),
        case("avg_rectangle", lambda a: F.avg_pool2d(a, (1, 3), (2, 1)), odd),
        case("avg_1d", lambda a: F.avg_pool1d(a, 3, 2, 1), normal(2, 3, 9)),
        case("lp", lambda a: F.lp_pool2d(a, 2, 2), positive(1, 2, 6, 6)),
        case("adaptive_one", lambda a: F.adaptive_avg_pool2d(a, 1), odd),
        case("adaptive_divides", lambda a: F.adaptive_avg_pool2d(a, (4, 2)), x),
        case("adaptive_does_not", lambda a: F.adaptive_avg_pool2d(a, (3, 4)), odd),
        case("adaptive_grows", lambda a: F.adaptive_avg_pool2d(a, (9, None)), odd),
        case("adaptive_1d", lambda a: F.adaptive_avg_pool1d(a, 4), normal(2, 3, 9)),
        case("adaptive_max", lambda a: F.adaptive_max_pool2d(a, (3, 4)), odd),
        case("adaptive_max_one", lambda a: F.adaptive_max_pool2d(a, 1), steps),
    ]


@theme
def resizing() -> list[Case]:
    x = normal(2, 3, 5, 7)
    resize = F.interpolate
    return [
        case("nearest", lambda a: resize(a, scale_factor=2), x),
        case("nearest_size", lambda a: resize(a, size=(8, 3)), x),
        case("nearest_exact", lambda a: resize(a, size=(8, 3), mode="nearest-exact"), x),
        case("nearest_real", lambda a: resize(a, scale_factor=1.7), x),
        case("bilinear", lambda a: resize(a, scale_factor=2, mode="bilinear"), x),
        case("bilinear_corners", lambda a: resize(a, size=(9, 4), mode="bilinear", align_corners=True), x),
        case("bilinear_real", lambda a: resize(a, scale_factor=(1.7, 0.6), mode="bilinear"), x),
        case("bilinear_recomputed", lambda a: resize(a, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True), x),
        case("bilinear_to_one", lambda a: resize(a, size=(1, 1), mode="bilinear"), x),
        case("bilinear_smooth", lambda a: resize(a, size=(3, 4), mode="bilinear", antialias=True), x),
        case("bicubic", lambda a: resize(a, size=(9, 11), mode="bicubic"), x),
        case("bicubic_corners", lambda a: resize(a, scale_factor=2, mode="bicubic", align_corners=True), x),
        case("linear", lambda a: resize(a, size=9, mode="linear"), normal(2, 3, 5)),
        case("nearest_1d", lambda a: resize(a, scale_factor=3), normal(2, 3, 5)),
        case("upsample", nn.UpsamplingBilinear2d(scale_factor=2), x),
    ]


@theme
def losses() -> list[Case]:
    logits, labels = normal(6, 5), torch.tensor([0, 4, 2, -100, 1, 1])
    dense, places = normal(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    holes = places.clone()
    holes[0, :2] = 255
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
    zeros_ones = (normal(6, 5) > 0).float()
    p, q = F.softmax(normal(4, 3), 1), F.log_softmax(normal(4, 3), 1)
    ce, bce = F.cross_entropy, F.binary_cross_entropy_with_logits
    return [
        case("cross_entropy", ce, logits, labels),
        case("cross_entropy_weight", lambda a, t: ce(a, t, weight), logits, labels),
        case("cross_entropy_smooth", lambda a, t: ce(a, t, label_smoothing=0.1), logits, labels),
        case(
            "cross_entropy_all", lambda a, t: ce(a, t, weight, label_smoothing=0.2, ignore_index=1), logits, labels.clamp(min=0)
        ),
        case("cross_entropy_sum", lambda a, t: ce(a, t, reduction="sum"), logits, labels),
        case("cross_entropy_each", lambda a, t: ce(a, t, weight, reduction="none"), logits, labels),
        case("cross_entropy_large", lambda a, t: ce(a * 1000, t), logits, labels),
        case("cross_entropy_dense", ce, dense, places),
        case("cross_entropy_holes", lambda a, t: ce(a, t, ignore_index=255, label_smoothing=0.1), dense, holes),
        case("cross_entropy_one", ce, normal(5), torch.tensor(2)),
        case("cross_entropy_shares", lambda a: ce(a, torch.full((6, 5), 0.2)), logits),
        case("nll", lambda a, t: F.nll_loss(F.log_softmax(a, 1), t), logits, labels),
        case("nll_dense", lambda a, t: F.nll_loss(F.log_softmax(a, 1), t, reduction="sum"), dense, places),
        case("mse", F.mse_loss, normal(4, 3), normal(4, 3)),
        case("mse_sum", lambda a, b: F.mse_loss(a, b, reduction="sum"), normal(4, 3), normal(4, 3)),
        case("l1", F.l1_loss, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])),
        case("smooth_l1", lambda a: F.smooth_l1_loss(a, torch.zeros(25), beta=0.5), corners(0, 0.5)),
        case("huber", lambda a: F.huber_loss(a, torch.zeros(25), delta=0.5), corners(0, 0.5)),
        case("bce_logits", lambda a: bce(a * 50, zeros_ones), normal(6, 5)),
        case("bce_logits_weights", lambda a: bce(a, zeros_ones, weight, pos_weight=weight + 1), normal(6, 5)),
        case("bce", lambda a: F.binary_cross_entropy(torch.sigmoid(a), zeros_ones), normal(6, 5)),
        case("kl_div", lambda a: F.kl_div(F.log_softmax(a, 1), p, reduction="batchmean"), normal(4, 3)),
        case("kl_div_log", lambda a: F.kl_div(F.log_softmax(a, 1), q, log_target=True), normal(4, 3)),
        case("hinge", lambda a: F.hinge_embedding_loss(a, zeros_ones * 2 - 1), normal(6, 5)),
        case("soft_margin", lambda a: F.soft_margin_loss(a, zeros_ones * 2 - 1), normal(6, 5)),
        case("cosine", lambda a, b: F.cosine_embedding_loss(a, b, torch.tensor([1.0, -1.0, 1.0])), normal(3, 5), normal(3, 5)),
        case("triplet", F.triplet_margin_loss, normal(3, 5), normal(3, 5), normal(3, 5)),
        case("poisson", lambda a: F.poisson_nll_loss(a, torch.ones(4)), normal(4)),
        case(
            "dice",
            lambda a: 1 - (2 * (a.sigmoid() * zeros_ones).sum() + 1) / (a.sigmoid().sum() + zeros_ones.sum() + 1),
            normal(6, 5),
        ),
    ]


@pytest.mark.parametrize("name", THEMES)
def test_theme(name: str) -> None:
    check(THEMES[name]())


# ---- modules with parameters and state of their own ----


class Zoo(nn.Module):
    """Each of ``modules`` on the same input; of modules that return several tensors, the first."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.zoo = nn.ModuleDict(modules)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = [module(x) for module in self.zoo.values()]
        return [result[0] if isinstance(result, tuple) else result for result in results]


def ramps(results: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return weighted({str(i): (value,) for i, value in enumerate(results)}, y)


def numbered(tensors: Any) -> dict[str, np.ndarray]:
    return {str(i): np.asarray(tensor) for i, tensor in enumerate(tensors)}


def check_module(model: nn.Module, x: torch.Tensor, steps: int = 1) -> None:
    """Gradients, then all state after ``steps`` steps, and what the model predicts with it."""
    reference = Reference(model, x, torch.zeros(len(x)), ramps)
    step = compiled(reference)
    wrong = departures(step.gradients(x, reference.y), reference.gradients()[1])
    losses, trained = reference.train(steps, lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    ours = [step(x, reference.y, lr=1e-3) for _ in range(steps)]
    np.testing.assert_allclose(ours, losses[:-1], rtol=1e-4, atol=1e-4)
    wrong += departures(step.state_dict(), {name: value.numpy() for name, value in trained.state_dict().items()})
    with torch.no_grad():
        expected = trained.eval()(x)
    predicted = step.predict(x)
    wrong += departures(numbered(predicted if isinstance(predicted, tuple) else (predicted,)), numbered(expected))
    assert not wrong, "\n".join(wrong)


def batchnorms(one: type[nn.Module], channels: int) -> nn.Module:
    """Every kind of BatchNorm at once, some of them in eval mode inside of a model that trains."""
    zoo = Zoo(
        plain=one(channels),
        slow=one(channels, momentum=0.01, eps=1e-3),
        average=one(channels, momentum=None),
        bare=one(channels, affine=False),
        forgetful=one(channels, track_running_stats=False),
        frozen=one(channels),
        frozen_average=one(channels, momentum=None),
        fixed=one(channels),
    ).train()
    for name in ("plain", "frozen", "fixed"):
        nn.init.normal_(zoo.zoo[name].weight)
    for name in ("frozen", "frozen_average"):
        zoo.zoo[name].eval()
        nn.init.uniform_(zoo.zoo[name].running_var, 0.5, 2.0)
        nn.init.normal_(zoo.zoo[name].running_mean)
    zoo.zoo["fixed"].requires_grad_(False)
    return zoo


def test_batchnorm_of_images() -> None:
    check_module(batchnorms(nn.BatchNorm2d, 3), torch.randn(4, 3, 5, 2) * 3 + 10, steps=3)


def test_batchnorm_of_vectors() -> None:
    """Four values per channel: the factor N/(N-1) of the running variance is large."""
    check_module(batchnorms(nn.BatchNorm1d, 3), torch.randn(4, 3), steps=3)


def test_batchnorm_of_sequences() -> None:
    check_module(batchnorms(nn.BatchNorm1d, 3), torch.randn(4, 3, 7), steps=2)


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.slow
def test_sequence_modules() -> None:
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    zoo = Zoo(
        attention=SelfAttention(),
        attention_with_bias=SelfAttention(add_bias_kv=True),
        encoder=nn.TransformerEncoderLayer(8, 2, 16, **options),
        encoder_first=nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, activation="gelu", **options),
        lstm=nn.LSTM(8, 5, batch_first=True),
        lstm_deep=nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True),
        gru=nn.GRU(8, 5, batch_first=True),
        rnn=nn.RNN(8, 5, batch_first=True),
    )
    check_module(zoo.train(), torch.randn(2, 4, 8))


def test_modules_with_weights() -> None:
    zoo = Zoo(
        weight_norm=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        prelu=nn.PReLU(4),
        separable=nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)),
        up=nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        group=nn.GroupNorm(2, 4),
        instance=nn.InstanceNorm2d(4, affine=True),
        reflect=nn.Conv2d(4, 5, 3, padding=2, padding_mode="reflect"),
        circular=nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
        replicate=nn.Conv2d(4, 5, 3, padding=1, padding_mode="replicate"),
    )
    check_module(zoo.train(), torch.randn(2, 4, 7, 6))


# ---- any geometry ----


@st.composite
def convolution(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """(shape of x, shape of w, options) of a convolution that has at least one output."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    axes = [
        [draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 3))] for _ in range(2)
    ]
    sizes = [max(1, (k - 1) * d + 1 - 2 * p) + draw(st.integers(0, 6)) for k, _, p, d in axes]
    kernel, stride, padding, dilation = (tuple(axis[i] for axis in axes) for i in range(4))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (draw(st.integers(1, 3)), channels, *sizes), (filters, channels // groups, *kernel), options


def noted(number: int, *what: Any) -> str:
    """A name that says what a generated case is; attributes cannot hold dots."""
    return f"{number}_{'_'.join(map(str, what))}".replace(".", "")


FEW = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FEW
@given(st.lists(convolution(), min_size=6, max_size=6))
def test_convolutions_of_any_geometry(geometries: list[tuple]) -> None:
    check(
        [
            case(
                noted(i, *geometry),
                functools.partial(F.conv2d, **geometry[2]),
                torch.randn(geometry[0]),
                torch.randn(geometry[1]),
            )
            for i, geometry in enumerate(geometries)
        ]
    )


@st.composite
def pooling(draw: st.DrawFn) -> tuple[str, tuple[int, ...], dict[str, Any]]:
    """(kind, shape of x, options) of a pool."""
    kernel, stride = (tuple(draw(st.integers(1, 4)) for _ in range(2)) for _ in range(2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    sizes = tuple(k + draw(st.integers(0, 7)) for k in kernel)
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": draw(st.booleans())}
    kind = draw(st.sampled_from(["max", "avg"]))
    if kind == "avg":
        options["count_include_pad"] = draw(st.booleans())
    return kind, (2, 2, *sizes), options


@FEW
@given(st.lists(pooling(), min_size=8, max_size=8))
def test_pools_of_any_geometry(geometries: list[tuple]) -> None:
    """Small whole numbers, so that maxima tie."""
    pools = {"max": F.max_pool2d, "avg": F.avg_pool2d}
    check(
        [
            case(noted(i, kind, x, options), functools.partial(pools[kind], **options), torch.randint(0, 4, x).float())
            for i, (kind, x, options) in enumerate(geometries)
        ]
    )


# ---- what is refused ----


class Odd(nn.Module):
    def __init__(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.apply_to = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_to(x)


def after_a_layer(*functions: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    odd = {f"odd{i}": Odd(apply) for i, apply in enumerate(functions)}
    return nn.Sequential(OrderedDict(linear=nn.Linear(5, 5), **odd))


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnsupportedOperatorError) as caught:
        tt.trace(model, torch.randn(3, 5), torch.randint(0, 5, (3,)))
    return str(caught.value)


def test_all_that_cannot_be_imported_is_named_with_its_place() -> None:
    message = refusal(after_a_layer(torch.special.bessel_j0, torch.special.i1))
    assert "2 operator(s)" in message
    assert "special_bessel_j0.default: odd0 (Odd)" in message
    assert "special_i1.default: odd1 (Odd)" in message


def test_all_that_cannot_be_differentiated_is_named_with_its_place() -> None:
    message = refusal(after_a_layer(lambda x: x.topk(5, 1)[0], lambda x: x.cumprod(1)))
    assert "2 operator(s)" in message
    assert "differentiated" in message
    assert "topk.default: odd0 (Odd)" in message
    assert "cumprod.default: odd1 (Odd)" in message


def test_a_mask_as_index_is_refused() -> None:
    with pytest.raises((UnsupportedOperatorError, ModelError)):
        tt.trace(after_a_layer(lambda x: x[x > 0].sum() + x), torch.randn(3, 5), torch.randint(0, 5, (3,)))


def test_what_lies_before_the_first_trained_parameter_needs_no_gradient() -> None:
    model = nn.Sequential(Odd(lambda x: x.topk(5, 1)[0]), nn.Linear(5, 5))
    reference = Reference(model, torch.randn(3, 5), torch.randint(0, 5, (3,)))
    step = compiled(reference)
    assert not departures(step.gradients(reference.x, reference.y), reference.gradients()[1])
