"""What the backward makes again instead of keeping it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.ir.transform import Sequential
from tvm.relax import op as R

import tvmtrain as tt
from tvmtrain import passes, signature
from tvmtrain.passes.recompute import Recompute

SHAPE = (2, 4, 8, 8)


def step(residual: bool = False) -> tvm.IRModule:
    """A train_step by hand: y = relu(h * g), of which a weight gradient and a mask read y, and another gradient reads h."""
    h, dy, dz = (relax.Var(name, relax.TensorType(SHAPE, "float32")) for name in ("h", "dy", "dz"))
    g = relax.Var("g", relax.TensorType((1, 4, 1, 1), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("train_step", [h, g, dy, dz]):
        with builder.dataflow():
            xhat = builder.emit(R.nn.softmax(h))
            scaled = builder.emit(R.multiply(xhat, g))
            y = builder.emit(R.nn.relu(R.add(scaled, h) if residual else scaled))
            loss = builder.emit_output(R.sum(y))
            one = builder.emit(R.ones([], "float32"))
            late = builder.emit(R.multiply(dy, one))
            dw = builder.emit_output(R.sum(builder.emit(R.multiply(y, late))))
            dx = builder.emit_output(R.sum(builder.emit(R.multiply(xhat, builder.emit(R.multiply(dz, one))))))
        builder.emit_func_output(relax.Tuple([loss, dw, dx]))
    mod = builder.get()
    inputs = [("input", "h"), ("parameter", "g"), ("input", "dy"), ("input", "dz")]
    outputs = [("loss", "loss"), ("gradient", "w"), ("gradient", "x")]
    mod["train_step"] = signature.with_ports(mod["train_step"], inputs, outputs)
    return mod


def names(mod: tvm.IRModule) -> list[str]:
    bindings = mod["train_step"].body.blocks[0].bindings
    return [b.value.op.name.removeprefix("relax.") for b in bindings]


def test_an_activation_is_made_again_before_its_reader():
    before = names(step())
    after = names(Sequential([Recompute()])(step()))
    assert before == [
        "nn.softmax",
        "multiply",
        "nn.relu",
        "sum",
        "ones",
        "multiply",
        "multiply",
        "sum",
        "multiply",
        "multiply",
        "sum",
    ]
    # softmax is kept for dx, and is no elementwise operation; multiply and relu are done again.
    assert after == [*before[:6], "multiply", "nn.relu", *before[6:]]


def test_results_stay_the_same():
    arrays = [np.random.default_rng(0).normal(size=s).astype("float32") for s in (SHAPE, (1, 4, 1, 1), SHAPE, SHAPE)]

    def run(mod: tvm.IRModule) -> list[np.ndarray]:
        function = mod["train_step"].with_attr("global_symbol", "train_step")
        vm = relax.VirtualMachine(tvm.compile(tvm.IRModule({"train_step": function}), target="llvm"), tvm.cpu())
        return [out.numpy() for out in vm["train_step"](*map(tvm.runtime.tensor, arrays))]

    for old, new in zip(run(step()), run(Recompute()(step())), strict=True):
        np.testing.assert_array_equal(old, new)


def test_what_would_need_another_large_tensor_is_kept():
    """relu(xhat * g + h): the backward keeps no h."""
    mod = step(residual=True)
    kept = Recompute()(mod)
    # h is an argument of the step, which is there anyway: made again. Behind a softmax of its own it is not.
    assert names(kept).count("nn.relu") == 2
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("train_step", [x]):
        with builder.dataflow():
            first, second = builder.emit(R.nn.softmax(x)), builder.emit(R.nn.softmax(x, 1))
            y = builder.emit(R.nn.relu(builder.emit(R.add(first, second))))
            loss = builder.emit_output(R.sum(y))
            late = builder.emit(R.ones(SHAPE, "float32"))
            dw = builder.emit_output(R.sum(builder.emit(R.multiply(y, late))))
            dx = builder.emit_output(R.sum(builder.emit(R.multiply(first, late))))
        builder.emit_func_output(relax.Tuple([loss, dw, dx]))
    other = builder.get()
    outputs = [("loss", "loss"), ("gradient", "w"), ("gradient", "x")]
    other["train_step"] = signature.with_ports(other["train_step"], [("input", "x")], outputs)
    tvm.ir.assert_structural_equal(Recompute()(other), other)


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.SiLU()], ids=["relu6", "silu"])
def test_a_trained_batchnorm_keeps_one_tensor(activation, monkeypatch):
    torch.manual_seed(0)
    layers = [
        layer
        for i in range(4)
        for layer in (nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation)
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    x, y = torch.randn(4, 3, 24, 24), torch.arange(4)
    graph = tt.trace(model, x, y, optimizer=tt.SGD(lr=0.05, momentum=0.9))
    summary, new = graph.summary(), tt.build(graph).load()
    monkeypatch.setattr(passes, "Recompute", lambda: Sequential([]))
    kept, old = graph.summary(), tt.build(graph).load()
    image = 4 * 8 * 24 * 24 * 4
    # Without it each layer keeps what BatchNorm made and what the activation made of that, or more.
    assert summary.saved_features < 4.2 * image
    assert kept.saved_features > 6.8 * image
    assert summary.arena < 0.75 * kept.arena
    for _ in range(3):
        assert new(x, y) == pytest.approx(old(x, y), rel=1e-6)
    for (name, value), other in zip(new.state_dict().items(), old.state_dict().values(), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6, err_msg=name)
