"""Zeros around an image are part of the convolution that reads it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from parity import Reference, departures, quick_device
from torch import nn
from tvm import relax
from tvm.ir.transform import Sequential
from tvm.relax import op as R

import tvmtrain as tt
from tvmtrain.passes.fold_padding import FoldPadding


class SamePadded(nn.Module):
    """TensorFlow's SAME: a row and a column at the end. The last pad is read by a convolution and by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, padding=(1, 0), groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1, 2)
        self.last = nn.Conv2d(8, 4, 2)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(self.depthwise(F.pad(x, (2, 1, 0, 1))))
        # An even image: the last row and column are padding alone.
        x = self.pointwise(F.pad(x, (0, 1, 0, 1)))
        x = F.pad(x, (1, 0, 1, 1))
        return self.classifier(self.last(x).mean((2, 3)) + x.mean((1, 2, 3))[:, None])


def traced() -> tuple[nn.Module, torch.Tensor, torch.Tensor, tt.TrainGraph]:
    torch.manual_seed(0)
    model, x, y = SamePadded(), torch.randn(2, 3, 24, 21), torch.tensor([0, 2])
    return model, x, y, tt.trace(model, x, y)


def pads(graph: tt.TrainGraph, name: str) -> int:
    bindings = graph.module()[name].body.blocks[0].bindings
    return sum(getattr(getattr(b.value, "op", None), "name", "") == "relax.nn.pad" for b in bindings)


def test_gradients_are_those_of_the_padded_image() -> None:
    model, x, y, graph = traced()
    step = tt.build(graph, quick_device(), gradients=True).load()
    _, theirs = Reference(model, x, y).gradients()
    ours = step.gradients(x, y)
    assert set(ours) == set(theirs)
    assert not departures(ours, theirs)
    np.testing.assert_allclose(step.predict(x), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_only_what_something_else_reads_is_padded() -> None:
    _, _, _, graph = traced()
    assert pads(graph, "train_step") == pads(graph, "predict") == 1


def test_such_a_convolution_can_be_filtered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(256, 3))
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    graph = tt.trace(model, x, y).apply(tt.UpdatePlan({"1": tt.LayerUpdate(filter=2)}))
    ours = tt.build(graph, quick_device(), gradients=True).load().gradients(x, y)
    # The paper's equations: means of the gradient in 2x2 patches times sums of x in 4x4 patches, over the stride; all taps alike.
    out = model[:2](x)
    out.retain_grad()
    F.cross_entropy(model[2:](out), y).backward()
    mean, total = F.avg_pool2d(out.grad, 2), F.avg_pool2d(x, 4, divisor_override=1)
    wanted = torch.einsum("nopq,nipq->oi", mean, total)[:, :, None, None] / 4
    got = torch.from_numpy(ours["1.weight"])
    torch.testing.assert_close(got.expand(4, 3, *got.shape[2:]), wanted.expand(4, 3, *got.shape[2:]), rtol=1e-4, atol=1e-6)


def test_the_pass_alone_on_a_module_written_by_hand() -> None:
    x, w = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in (("x", (1, 2, 8, 8)), ("w", (2, 2, 3, 3))))
    builder = relax.BlockBuilder()
    with builder.function("forward", [x, w]):
        with builder.dataflow():
            image = builder.emit(R.nn.pad(x, [0, 0, 0, 0, 0, 1, 2, 3]))
            y = builder.emit(R.nn.conv2d(image, w, strides=2, padding=[1, 0, 0, 0]))
            ones = builder.emit_output(R.nn.pad(y, [0, 0, 0, 0, 1, 0, 0, 0], pad_value=1.0))
        builder.emit_func_output(relax.Tuple([ones]))
    mod = builder.get()
    after = Sequential([FoldPadding()])(mod)
    calls = [b.value for b in after["forward"].body.blocks[0].bindings]
    assert [call.op.name for call in calls] == ["relax.nn.conv2d", "relax.nn.pad"]
    assert [int(v) for v in calls[0].attrs.padding] == [1, 2, 1, 3]
    assert calls[0].args[0].same_as(after["forward"].params[0])
