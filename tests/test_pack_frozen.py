"""PackFrozen: weights that ``prepare`` makes lie as their kernels read them."""

from __future__ import annotations

import numpy as np
import torch
import tvm
from parity import quick_device
from relax_cases import close
from torch import nn
from torch.nn import functional as F
from tvm import relax
from tvm.relax import op as R

import tvmtrain as tt
from tvmtrain import signature
from tvmtrain.passes.pack_frozen import PackFrozen


def network() -> nn.Sequential:
    """Frozen: twelve filters, a depthwise convolution and seven filters; of these, the first alone can be packed."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 7, 1, bias=False), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(7 * 35, 4)),
    ).eval()
    for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
        for values in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(values)
    return model


def shapes(step: tt.Artifact) -> dict[str, tuple[int, ...]]:
    return {t.name: t.shape for e in step.manifest.entries if e.name == "train_step" for t in e.inputs if t.role == "prepared"}


def test_dense_filters_that_fill_tiles_are_packed_and_follow_other_weights() -> None:
    torch.manual_seed(0)
    model, x, y = network(), torch.randn(2, 3, 7, 5), torch.randint(0, 4, (2,))
    artifact = tt.build(tt.trace(model, x, y).apply(tt.UpdatePlan({"9": tt.LayerUpdate()})), quick_device())
    found = shapes(artifact)
    assert found["0.weight:1"] == (2, 3, 3, 3, 6)
    assert found["3.weight:4"] == (12, 1, 3, 3)
    assert found["6.weight:7"] == (7, 12, 1, 1)
    step = artifact.load()
    for _ in range(2):
        close(step.predict(x), model(x).detach().numpy())
        assert abs(step(x, y, lr=0.0) - F.cross_entropy(model(x), y).item()) < 1e-5
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        step.load_state_dict(model.state_dict())


def test_a_weight_that_a_gradient_is_computed_with_stays_as_it_is() -> None:
    model, x, y = network(), torch.randn(2, 3, 7, 5), torch.randint(0, 4, (2,))
    # The bias of the first BatchNorm is trained: dX goes through what comes after it.
    plan = tt.UpdatePlan({"1": tt.LayerUpdate()})
    packed = shapes(tt.build(tt.trace(model, x, y).apply(plan), quick_device()))
    assert packed["6.weight:7"] == (7, 12, 1, 1)
    wide = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(280, 4)
    ).eval()
    first = shapes(tt.build(tt.trace(wide, x, y).apply(tt.UpdatePlan({"0": tt.LayerUpdate()})), quick_device()))
    last = shapes(tt.build(tt.trace(wide, x, y).apply(tt.UpdatePlan({"4": tt.LayerUpdate()})), quick_device()))
    assert first["1.weight:2"] == (8, 8, 1, 1)
    assert last["1.weight:2"] == (2, 8, 1, 1, 4)


def by_hand() -> tvm.IRModule:
    """prepare: w -> w + w; predict: (x, prepared w) -> conv2d."""
    builder = relax.BlockBuilder()
    w = relax.Var("w", relax.TensorType([8, 3, 2, 2], "float32"))
    with builder.function("prepare", [w]):
        with builder.dataflow():
            twice = builder.emit_output(R.add(w, w))
        builder.emit_func_output(relax.Tuple([twice]))
    x, p = relax.Var("x", relax.TensorType([1, 3, 5, 5], "float32")), relax.Var("p", relax.TensorType([8, 3, 2, 2], "float32"))
    with builder.function("predict", [x, p]):
        with builder.dataflow():
            y = builder.emit_output(R.nn.conv2d(x, p))
        builder.emit_func_output(relax.Tuple([y]))
    mod = builder.get()
    mod["prepare"] = signature.with_ports(mod["prepare"], [("parameter", "w")], [("prepared", "twice")])
    mod["predict"] = signature.with_ports(mod["predict"], [("input", "x"), ("prepared", "twice")], [("output", "y")])
    return mod


def test_the_pass_alone_on_a_module_written_by_hand() -> None:
    mod = tvm.transform.Sequential([PackFrozen()])(by_hand())
    relax.analysis.well_formed(mod)
    run = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    generator = np.random.default_rng(0)
    w, x = (generator.standard_normal(s).astype("float32") for s in ((8, 3, 2, 2), (1, 3, 5, 5)))
    (packed,) = run["prepare"](tvm.runtime.tensor(w))
    assert packed.shape == (2, 3, 2, 2, 4)
    np.testing.assert_array_equal(packed.numpy(), (2 * w).reshape(2, 4, 3, 2, 2).transpose(0, 2, 3, 4, 1))
    (y,) = run["predict"](tvm.runtime.tensor(x), packed)
    close(y.numpy(), F.conv2d(torch.tensor(x), torch.tensor(2 * w)).numpy())
