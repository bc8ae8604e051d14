"""Each pass alone, on a module written by hand with the attributes that passes read: before, after, and what must not remain."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir.transform import Sequential
from tvm.relax import op as R

from tvmtrain import passes, signature
from tvmtrain.passes.differentiate import Differentiate
from tvmtrain.passes.return_gradients import ReturnGradients
from tvmtrain.passes.stop_gradients import StopGradients
from tvmtrain.spec import SGD, Adam


def toy() -> tvm.IRModule:
    """loss = sum(relu(x @ first) @ second * y), with a buffer that counts."""
    shapes = {"x": (4, 3), "y": (4, 2), "first": (3, 5), "second": (5, 2)}
    x, y, first, second = (relax.Var(name, relax.TensorType(list(shape), "float32")) for name, shape in shapes.items())
    count = relax.Var("count", relax.TensorType([], "int64"))
    bb = relax.BlockBuilder()
    with bb.function("forward", [x, y, first, second, count]):
        with bb.dataflow():
            hidden = bb.emit(R.nn.relu(bb.emit(R.matmul(x, first))))
            out = bb.emit(R.matmul(hidden, second))
            loss = bb.emit(R.sum(bb.emit(R.multiply(out, y))))
            results = [bb.emit_output(v) for v in (loss, out, bb.emit(R.add(count, relax.const(1, "int64"))))]
        bb.emit_func_output(relax.Tuple(results))
    mod = bb.get()
    inputs = [("input", "x"), ("target", "y"), ("parameter", "first"), ("parameter", "second"), ("buffer", "count")]
    mod["forward"] = signature.with_ports(mod["forward"], inputs, [("loss", "loss"), ("output", "out"), ("buffer", "count")])
    return mod


def operators(function: relax.Function) -> list[str]:
    calls = [b.value for block in function.body.blocks for b in block.bindings if isinstance(b.value, relax.Call)]
    return [str(call.op.name).removeprefix("relax.") for call in calls]


def run(function: relax.Function, *arrays: np.ndarray) -> list[np.ndarray]:
    mod = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    return [out.numpy() for out in vm["main"](*[tvm.runtime.tensor(a) for a in arrays])]


def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    floats = [random.normal(size=shape).astype("float32") for shape in ((4, 3), (4, 2), (3, 5), (5, 2))]
    return [*floats, np.array(7)]


def expected_gradients(x: np.ndarray, y: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.maximum(x @ first, 0)
    return x.T @ ((y @ second.T) * (hidden > 0)), hidden.T @ y


def test_stop_gradients_marks_what_leads_to_no_trained_parameter() -> None:
    after = StopGradients(("second",))(toy())["forward"]
    before = toy()["forward"]
    bindings = after.body.blocks[0].bindings
    marks = {b.var for b in bindings if isinstance(b.value, relax.Call) and b.value.op.name == "relax.grad.no_grad"}
    products = [b.value for b in bindings if isinstance(b.value, relax.Call) and b.value.op.name == "relax.matmul"]
    assert [argument in marks for call in products for argument in call.args] == [False, False, True, False]
    assert [name for name in operators(after) if name != "grad.no_grad"] == operators(before)
    assert signature.inputs(after) == signature.inputs(before)
    assert signature.outputs(after) == signature.outputs(before)
    for got, wanted in zip(run(after, *arrays()), run(before, *arrays()), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_differentiate_adds_gradients_in_the_order_asked_for() -> None:
    trained = ("second", "first")
    mod = Sequential([StopGradients(trained), Differentiate(trained)])(toy())
    assert [v.name_hint for v in mod.get_global_vars()] == ["adjoint"]
    adjoint = mod["adjoint"]
    assert signature.outputs(adjoint)[3:] == [("gradient", "second"), ("gradient", "first")]
    assert "grad.no_grad" not in operators(adjoint)
    *_, second, first = run(adjoint, *arrays())
    wanted_first, wanted_second = expected_gradients(*arrays()[:4])
    np.testing.assert_allclose(first, wanted_first, rtol=1e-5)
    np.testing.assert_allclose(second, wanted_second, rtol=1e-5)


def test_a_frozen_front_gets_no_backward() -> None:
    counts = {}
    for trained in (("second",), ("first", "second")):
        mod = Sequential([StopGradients(trained), Differentiate(trained), relax.transform.DeadCodeElimination()])(toy())
        counts[len(trained)] = operators(mod["adjoint"]).count("matmul")
    # Forward: 2. The last layer's dW: 1. Its dX and the first layer's dW: 2 more.
    assert counts == {1: 3, 2: 5}


def test_return_gradients_keeps_the_adjoint_and_shares_no_variables() -> None:
    trained = ("first", "second")
    mod = Sequential([StopGradients(trained), Differentiate(trained), ReturnGradients()])(toy())
    assert sorted(v.name_hint for v in mod.get_global_vars()) == ["adjoint", "gradients"]
    gradients = mod["gradients"]
    assert signature.outputs(gradients) == [("loss", "loss"), ("gradient", "first"), ("gradient", "second")]
    assert not set(gradients.params) & set(mod["adjoint"].params)
    np.testing.assert_allclose(run(gradients, *arrays())[1], expected_gradients(*arrays()[:4])[0], rtol=1e-5)


def test_append_optimizer_takes_a_rate_and_returns_state_under_its_names() -> None:
    mod = passes.pipeline(passes.Training(("second",)), SGD(momentum=0.9))(toy())
    step = mod["train_step"]
    momentum = ("optimizer", "optimizer:momentum:second")
    assert signature.inputs(step)[:3] == [("input", "x"), ("target", "y"), ("rate", "rate")]
    assert signature.inputs(step)[-1] == momentum
    assert signature.outputs(step) == [
        ("loss", "loss"),
        ("output", "out"),
        ("buffer", "count"),
        momentum,
        ("parameter", "second"),
    ]
    x, y, first, second, count = arrays()
    old = np.ones_like(second)
    _, _, counted, velocity, new = run(step, x, y, np.array(0.1, "float32"), first, second, count, old)
    wanted = 0.9 * old + expected_gradients(x, y, first, second)[1]
    np.testing.assert_allclose(velocity, wanted, rtol=1e-5)
    np.testing.assert_allclose(new, second - 0.1 * wanted, rtol=1e-5)
    assert counted == count + 1


def test_the_same_pass_twice_is_the_same_module() -> None:
    first, second = (passes.pipeline(passes.Training(("first", "second")), Adam(clip_norm=1.0))(toy()) for _ in range(2))
    tvm.ir.assert_structural_equal(first, second)


def test_a_pass_with_a_misspelt_option() -> None:
    with pytest.raises(TypeError):
        StopGradients(train=("first",))  # type: ignore[call-arg]
