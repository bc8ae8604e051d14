"""Equal calls share loops; what makes loops different makes others. The numbers of whole steps are the other tests'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from tvmtrain import lowering, targets
from tvmtrain.legalize_once import legalize_once

rng = np.random.default_rng(0)
ARRAYS = [rng.standard_normal(shape).astype("float32") for shape in ((4, 6), (4, 6), (6, 4))]
NAMES = "abc"


def step(*makes: Callable[..., relax.Expr]) -> tvm.IRModule:
    """Each of ``makes`` applied to a [4, 6], b [4, 6] and c [6, 4]; all results are returned."""
    variables = [relax.Var(n, relax.TensorType(list(a.shape), "float32")) for n, a in zip(NAMES, ARRAYS, strict=True)]
    builder = relax.BlockBuilder()
    with builder.function("main", variables):
        with builder.dataflow():
            outputs = [builder.emit_output(builder.normalize(make(*variables))) for make in makes]
        builder.emit_func_output(relax.Tuple(outputs))
    return builder.get()


def results(mod: tvm.IRModule, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    return [result.numpy() for result in vm["main"](*map(tvm.runtime.tensor, arrays))]


def legalized(name: str, *makes: Callable[..., relax.Expr]) -> tuple[int, list[np.ndarray]]:
    """How often loops of an operator were made, and the results that they compute."""
    way, asked = tvm.ir.Op.get(name).get_attr("FLegalize"), []

    def counted(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        asked.append(call)
        return way(bb, call)

    found = results(legalize_once({name: counted})(step(*makes)), ARRAYS)
    return len(asked), found


A, B, C = ARRAYS


@pytest.mark.parametrize(
    ("name", "makes", "times", "wanted"),
    [
        ("relax.subtract", [lambda a, b, c: R.subtract(a, b), lambda a, b, c: R.subtract(b, a)], 1, [A - B, B - A]),
        ("relax.subtract", [lambda a, b, c: R.subtract(a, b), lambda a, b, c: R.subtract(a, a)], 2, [A - B, A - A]),
        (
            "relax.add",
            [lambda a, b, c, k=k: R.add(a, relax.const(k, "float32")) for k in (1.0, 2.0, 1.0)],
            2,
            [A + 1, A + 2, A + 1],
        ),
        (
            "relax.reshape",
            [lambda a, b, c, s=s: R.reshape(b, s) for s in ([24], [3, 8], [24])],
            2,
            [B.reshape(s) for s in (24, (3, 8), 24)],
        ),
        (
            "relax.sum",
            [lambda a, b, c: R.sum(a, 0), lambda a, b, c: R.sum(b, 0), lambda a, b, c: R.sum(b, 1)],
            2,
            [A.sum(0), B.sum(0), B.sum(1)],
        ),
        (
            "relax.multiply",
            [lambda a, b, c, k=k: R.multiply(a, relax.const(k, "float32")) for k in (B, B.copy(), A)],
            2,
            [A * B, A * B, A * A],
        ),
        ("relax.exp", [lambda a, b, c: R.exp(a), lambda a, b, c: R.exp(c)], 2, [np.exp(A), np.exp(C)]),
        (
            "relax.concat",
            [lambda a, b, c: R.concat([a, b]), lambda a, b, c: R.concat([b, a])],
            2,
            [np.concatenate(x) for x in ((A, B), (B, A))],
        ),
    ],
    ids=["other variables", "one variable twice", "numbers", "shapes", "attributes", "arrays", "types", "tuples"],
)
def test_loops_are_made_once_for_equal_calls(name, makes, times, wanted):
    made, found = legalized(name, *makes)
    assert made == times
    for got, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-6, atol=1e-6)


def test_what_needs_code_beside_its_kernel_gets_it_each_time():
    """Sizes of a slice are known where it runs."""
    x = relax.Var("x", relax.TensorType([8, 9], "float32"))
    bounds = [relax.Var(n, relax.TensorType([2], "int64")) for n in ("begin", "end", "step", "other")]
    builder = relax.BlockBuilder()
    with builder.function("main", [x, *bounds]):
        with builder.dataflow():
            slices = [R.dynamic_strided_slice(x, bounds[0], end, bounds[2]) for end in (bounds[1], bounds[3])]
            outputs = [builder.emit_output(builder.normalize(each)) for each in slices]
        builder.emit_func_output(relax.Tuple(outputs))
    values = np.arange(72, dtype="float32").reshape(8, 9)
    given = [np.array(b, "int64") for b in ([1, 2], [5, 9], [2, 3], [8, 4])]
    found = results(legalize_once({})(builder.get()), [values, *given])
    np.testing.assert_array_equal(found[0], values[1:5:2, 2:9:3])
    np.testing.assert_array_equal(found[1], values[1:8:2, 2:4:3])


def test_lowering_legalizes_once(monkeypatch):
    asked = []
    monkeypatch.setattr(lowering, "legalize_once", lambda ours: asked.append(ours) or legalize_once(ours))
    lowering.lower(step(lambda a, b, c: R.add(a, b)), targets.load("x86-64-v3"))
    assert len(asked) == 1
