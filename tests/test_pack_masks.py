"""Masks in bits: by NumPy's own packing, for any shape, and only those that wait for the backward."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.ir.transform import Sequential
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.passes.pack_masks import PackMasks


def run(function: relax.Function, *arrays: np.ndarray) -> list[np.ndarray]:
    mod = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    found = vm["main"](*[tvm.runtime.tensor(a) for a in arrays])
    return [value.numpy() for value in found]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@example([2, 12, 7, 7], 0)
@example([8, 3, 7, 5], 0)
@example([8, 5], 0)
@example([3, 8, 1], 0)
@settings(max_examples=10, deadline=None)
def test_bits_are_those_of_numpy_and_come_back(shape, seed):
    """Eight maps together, if there are multiples of eight; else so many of other rows; else numbers."""
    mask = relax.Var("mask", relax.TensorType(shape, "bool"))
    builder = relax.BlockBuilder()
    with builder.function("main", [mask]):
        with builder.dataflow():
            bits = builder.emit_output(operators.pack_bits(mask))
            again = builder.emit_output(operators.unpack_bits(bits, shape))
        builder.emit_func_output(relax.Tuple([bits, again]))
    values = np.random.default_rng(seed).random(shape) < 0.5
    packed, unpacked = run(builder.get()["main"], values)
    order = {1: [], 2: [1], 3: [1, 2], 4: [2, 1, 3]}[len(shape)]
    lead = next((i for i in order if np.prod(shape[:i]) % 8 == 0), len(shape))
    rows = values.reshape(-1, *shape[lead:])
    np.testing.assert_array_equal(packed, np.packbits(rows, axis=0, bitorder="little"))
    np.testing.assert_array_equal(unpacked, values)


def step(shape: list[int], early: bool) -> tvm.IRModule:
    """gx = where(x > 0, loss, 0), its mask made before the loss or after it."""
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("train_step", [x]):
        with builder.dataflow():
            y = builder.emit(R.nn.relu(x))
            mask = builder.emit(R.greater(y, relax.const(0.0, "float32"))) if early else None
            loss = builder.emit_output(R.sum(y))
            if mask is None:
                mask = builder.emit(R.greater(y, relax.const(0.0, "float32")))
            late = builder.emit(R.ones(shape, "float32"))
            gx = builder.emit_output(R.where(mask, late, relax.const(0.0, "float32")))
        builder.emit_func_output(relax.Tuple([loss, gx]))
    mod = builder.get()
    mod["train_step"] = signature.with_ports(mod["train_step"], [("input", "x")], [("loss", "loss"), ("gradient", "x")])
    return mod


@pytest.mark.parametrize(
    ("shape", "packed"),
    [([2000], [250]), ([2, 12, 7, 7], [3, 7, 7]), ([8, 4, 7, 9], [4, 7, 9]), ([3, 5, 8, 9], [15, 9]), ([3, 5, 7, 10], [132])],
)
def test_a_mask_that_waits_is_packed(shape, packed):
    before = step(shape, early=True)
    after = Sequential([PackMasks()])(before)
    values = [b.value for b in after["train_step"].body.blocks[0].bindings]
    names = [value.op.name.rpartition(".")[2] for value in values]
    assert names == ["relu", "greater", "pack_bits", "sum", "ones", "unpack_bits", "where"]
    assert [int(d) for d in values[2].ty.shape] == packed
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    for old, new in zip(run(before["train_step"], x), run(after["train_step"], x), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(run(after["train_step"], x)[1], (x > 0).astype("float32"))


@pytest.mark.parametrize(("size", "early"), [(2000, False), (100, True)], ids=["after the loss", "small"])
def test_what_is_read_at_once_or_small_stays(size, early):
    mod = step([size], early)
    tvm.ir.assert_structural_equal(PackMasks()(mod), mod)
