"""PruneFrozen: what is frozen runs as inference, folded once when weights are loaded."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from parity import Reference, compiled, departures, quick_device
from torch import nn
from tvm import relax
from tvm.relax import op as R

import tvmtrain as tt
from tvmtrain import signature
from tvmtrain.passes.prune_frozen import PruneFrozen

CLASSES = 4


def network() -> nn.Sequential:
    """A convolution alone before its BatchNorm, one with a bias, and a BatchNorm without affine parameters."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 9, 7), torch.randint(0, CLASSES, (4,))


PLANS = {
    "classifier": {"11": tt.LayerUpdate()},
    "middle": {"3": tt.LayerUpdate(), "11": tt.LayerUpdate()},
    "a batchnorm": {"4": tt.LayerUpdate()},
    "the first": {"0": tt.LayerUpdate()},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gradients_and_predictions_are_pytorchs_and_follow_other_weights(plan: dict[str, tt.LayerUpdate]) -> None:
    model, (x, y) = network(), batch()
    step = tt.build(tt.trace(model, x, y).apply(tt.UpdatePlan(plan)), quick_device(), gradients=True).load()
    for _ in range(2):
        _, theirs = Reference(model, x, y).gradients()
        ours = step.gradients(x, y)
        assert set(ours) == {name for name in theirs if name.rpartition(".")[0] in plan}
        assert not departures(ours, {name: theirs[name] for name in ours})
        np.testing.assert_allclose(step.predict(x), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
        for tensor in model.state_dict().values():  # other weights, which reach the folded ones only if they are folded again
            if tensor.dtype == torch.float32:
                tensor.mul_(1.25)
        step.load_state_dict(model.state_dict())


def test_a_restored_step_goes_on_with_folded_weights_of_its_own(tmp_path) -> None:
    model, (x, y) = network(), batch()
    artifact = tt.build(tt.trace(model, x, y).apply(tt.UpdatePlan(PLANS["classifier"])), quick_device())
    step, other = artifact.load(), artifact.load()
    for tensor in model.state_dict().values():
        tensor.copy_(tensor * 2)
    step.load_state_dict(model.state_dict())
    step(x, y, lr=0.1)
    step.save(tmp_path / "now.safetensors")
    other.restore(tmp_path / "now.safetensors")
    assert other(x, y, lr=0.1) == step(x, y, lr=0.1)


def test_frozen_batchnorms_are_folded_and_nothing_else_is() -> None:
    model, (x, y) = network(), batch()
    graph = tt.trace(model, x, y)
    # All is trained, but for the statistics of a BatchNorm that has nothing else.
    assert prepared(graph.module()) == {"7:scale", "7:scale:shift"}
    module = graph.apply(tt.UpdatePlan({"3": tt.LayerUpdate()})).module()
    assert prepared(module) == {"0.weight:1", "0.weight:1:shift", "4:scale", "4:scale:shift", "6.weight:7", "6.weight:7:shift"}
    for name in ("train_step", "predict"):
        assert not operators(module[name])["relax.nn.batch_norm"]
    read = {name for role, name in signature.inputs(module["train_step"]) if role in ("parameter", "buffer")}
    assert not read & {"0.weight", "1.running_mean", "6.weight", "7.running_var"}
    # With its own bias, where that is frozen.
    whole = graph.apply(tt.UpdatePlan(PLANS["classifier"])).module()
    assert prepared(whole) >= {"3.weight:4:3.bias", "3.weight:4:3.bias:shift"}
    assert ("parameter", "3.bias") not in signature.inputs(whole["train_step"])
    # The backward ends at the first trained layer: through the last convolution, not through the trained one.
    assert operators(module["train_step"])["tvmtrain.conv2d_dgrad"] == 1


def prepared(module: tvm.IRModule) -> set[str]:
    return {name for _, name in signature.outputs(module["prepare"])}


def test_batch_statistics_are_never_folded() -> None:
    model, (x, y) = network().train(), batch()
    module = tt.trace(model, x, y).apply(tt.UpdatePlan(PLANS["classifier"])).module()
    assert not [v.name_hint for v in module.get_global_vars() if v.name_hint == "prepare"]
    exact = Reference(model, x, y).double()
    assert not departures(compiled(exact).gradients(exact.x, exact.y), exact.gradients()[1])


def operators(function: relax.Function) -> Counter[str]:
    bindings = [b.value for block in function.body.blocks for b in block.bindings]
    return Counter(str(value.op.name) for value in bindings if isinstance(value, relax.Call))


def written_by_hand() -> tvm.IRModule:
    """loss = sum(batch_norm(conv2d(x, weight), ...) * y)."""
    shapes = {"x": (2, 3, 5, 5), "y": (2, 4, 5, 5), "c.weight": (4, 3, 1, 1)}
    shapes |= {f"b.{kind}": (4,) for kind in ("weight", "bias", "running_mean", "running_var")}
    x, y, w, *norm = (relax.Var(name.replace(".", "_"), relax.TensorType(list(s), "float32")) for name, s in shapes.items())
    bb = relax.BlockBuilder()
    with bb.function("forward", [x, y, w, *norm]):
        with bb.dataflow():
            normal = bb.emit(R.nn.batch_norm(bb.emit(R.nn.conv2d(x, w)), *norm, axis=1, epsilon=1e-3, training=False))
            out = bb.emit(relax.TupleGetItem(normal, 0))
            loss = bb.emit(R.sum(bb.emit(R.multiply(out, y))))
            results = [bb.emit_output(loss)]
        bb.emit_func_output(relax.Tuple(results))
    mod = bb.get()
    roles = ["input", "target", "parameter", "parameter", "parameter", "buffer", "buffer"]
    mod["forward"] = signature.with_ports(mod["forward"], list(zip(roles, shapes, strict=True)), [("loss", "loss")])
    return mod


def test_the_pass_alone_on_a_module_written_by_hand() -> None:
    random = np.random.default_rng(0)
    mod = tvm.transform.Sequential([PruneFrozen(()), relax.transform.DeadCodeElimination(["forward", "prepare"])])(
        written_by_hand()
    )
    assert operators(mod["forward"])["relax.nn.conv2d"] == 1
    functions = {"before": written_by_hand()["forward"], "after": mod["forward"], "prepare": mod["prepare"]}
    named = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    machine = relax.VirtualMachine(tvm.compile(named, target="llvm"), tvm.cpu())
    ports = signature.inputs(written_by_hand()["forward"])
    shapes = [[int(d) for d in var.ty.shape] for var in written_by_hand()["forward"].params]
    values = {
        port: tvm.runtime.tensor(random.uniform(0.5, 2, s).astype("float32")) for port, s in zip(ports, shapes, strict=True)
    }
    made = machine["prepare"](*[values[port] for port in signature.inputs(mod["prepare"])])
    values |= dict(zip(signature.outputs(mod["prepare"]), made, strict=True))
    before = machine["before"](*[values[port] for port in ports])[0].numpy()
    after = machine["after"](*[values[port] for port in signature.inputs(mod["forward"])])[0].numpy()
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_loss_of_a_plan_that_freezes_all_but_the_classifier_falls_as_in_pytorch() -> None:
    model, (x, y) = network(), batch()
    step = tt.build(tt.trace(model, x, y).apply(tt.UpdatePlan(PLANS["classifier"])), quick_device()).load()
    rule = torch.optim.SGD(model[11].parameters(), lr=0.1)
    for _ in range(5):
        rule.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        rule.step()
        assert step(x, y, lr=0.1) == pytest.approx(loss.item(), abs=1e-5)


class Placed(nn.Module):
    """What is added between convolution and BatchNorm has a number for each row, as many as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.classifier = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        self.place = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(self.conv(x) + self.place.view(1, 1, 8, 1)).mean((2, 3)))


def test_what_is_added_along_rows_is_no_bias() -> None:
    model, x = Placed().eval(), torch.randn(2, 3, 8, 8)
    nn.init.normal_(model.norm.running_mean)
    graph = tt.trace(model, x, torch.tensor([0, 1])).apply(tt.UpdatePlan({"classifier": tt.LayerUpdate()}))
    np.testing.assert_allclose(
        tt.build(graph, quick_device()).load().predict(x), model(x).detach().numpy(), rtol=1e-4, atol=1e-5
    )
