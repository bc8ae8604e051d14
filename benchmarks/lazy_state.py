"""What the optimizer's update of a partly trained weight costs: state that waits for its channel, against torch.optim's rule.

    python benchmarks/lazy_state.py [--share 0.25] [--adam] [--repeat 200]

The weights are those of MobileNetV2's last blocks, trained by SGD with momentum or, as compiled, by Adam. "waits": what is not
chosen keeps its value and its state. "decays": a zero gradient for what is not chosen, as torch.optim would have it. Each as this
version compiles it, where a step returns new tensors; and in place, as plain loops over what has to change.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.script import tirx as T
from tvm.target import Target

from tvmtrain import lowering, operators, runtime, targets
from tvmtrain.passes.append_optimizer import _Update
from tvmtrain.spec import SGD, Adam, Optimizer

# Weights of torchvision's mobilenet_v2, features.16 to 18.
WEIGHTS = {
    "16.conv.2": (160, 960, 1, 1),
    "17.conv.0": (960, 160, 1, 1),
    "17.conv.1": (960, 1, 3, 3),
    "17.conv.2": (320, 960, 1, 1),
    "18.0": (1280, 320, 1, 1),
}
MOMENTUM = 0.9


def update(shape: tuple[int, ...], share: float, waits: bool, optimizer: Optimizer) -> tvm.IRModule:
    """(weight, gradient of the chosen channels, channels, rate, state) -> (state, weight)."""
    axis = 0 if shape[1] == 1 else 1
    count = round(share * shape[axis])
    sliced = [count if a == axis else n for a, n in enumerate(shape)]
    w, g = (relax.Var(name, relax.TensorType(list(s), "float32")) for name, s in (("w", shape), ("g", sliced)))
    channels = relax.Var("channels", relax.TensorType([count], "int32"))
    bb = relax.BlockBuilder()
    rule = _Update(bb, optimizer, channels={"w": channels} if waits else {})
    with bb.function("update"):
        with bb.dataflow():
            dense = g if waits else bb.emit(operators.put(bb.emit(R.zeros(shape, "float32")), channels, g, axis))
            rule.run({"w": w}, {"w": dense})
            results = [bb.emit_output(value) for value in rule.results.values()]
        bb.emit_func_output(relax.Tuple(results), [w, g, channels, rule.rate, *rule.state.values()])
    return bb.get()


def waiting(o: int, i: int, taps: int, k: int) -> tirx.PrimFunc:
    """The same in place: [o, i, taps], k of i chosen."""

    @T.prim_func
    def main(
        w: T.Buffer((o, i, taps), "float32"),
        m: T.Buffer((o, i, taps), "float32"),
        g: T.Buffer((o, k, taps), "float32"),
        c: T.Buffer((k,), "int32"),
        rate: T.Buffer((1,), "float32"),
    ):
        for a, b, t in T.grid(o, k, taps):
            m[a, c[b], t] = m[a, c[b], t] * T.float32(MOMENTUM) + g[a, b, t]
            w[a, c[b], t] = w[a, c[b], t] - rate[0] * m[a, c[b], t]

    return main


def decaying(o: int, i: int, taps: int, k: int) -> tirx.PrimFunc:
    """All momentum decays, the chosen channels get their gradient, and all weights move: row by row."""

    @T.prim_func
    def main(
        w: T.Buffer((o, i, taps), "float32"),
        m: T.Buffer((o, i, taps), "float32"),
        g: T.Buffer((o, k, taps), "float32"),
        c: T.Buffer((k,), "int32"),
        rate: T.Buffer((1,), "float32"),
    ):
        for a in T.serial(o):
            for b, t in T.grid(i, taps):
                m[a, b, t] = m[a, b, t] * T.float32(MOMENTUM)
            for b, t in T.grid(k, taps):
                m[a, c[b], t] = m[a, c[b], t] + g[a, b, t]
            for b, t in T.grid(i, taps):
                w[a, b, t] = w[a, b, t] - rate[0] * m[a, b, t]

    return main


def compiled(shape: tuple[int, ...], share: float, waits: bool, optimizer: Optimizer) -> Callable[[], None]:
    module = update(shape, share, waits, optimizer)
    function = relax.VirtualMachine(lowering.compile_module(module, targets.load("host")), tvm.cpu())["update"]
    axis = 0 if shape[1] == 1 else 1
    w, m, *rest = tensors(shape, axis, round(share * shape[axis]), ())
    state = [tvm.runtime.tensor(np.array(1, "int64")), m, m] if isinstance(optimizer, Adam) else [m]
    return lambda: function(w, *rest, *state)


def in_place(shape: tuple[int, ...], share: float, waits: bool) -> Callable[[], None]:
    o, i, taps = (1, shape[0], shape[2] * shape[3]) if shape[1] == 1 else (*shape[:2], shape[2] * shape[3])
    k = round(share * i)
    main = (waiting if waits else decaying)(o, i, taps, k)
    function = tvm.compile(tvm.IRModule({"main": main}), target=Target(dict(targets.load("host").target)))["main"]
    arguments = tensors((o, i, taps), 1, k, (1,))
    return lambda: function(*arguments)


def tensors(shape: tuple[int, ...], axis: int, count: int, rate: tuple[int, ...]) -> list[tvm.runtime.Tensor]:
    random = np.random.default_rng(0)
    channels = np.sort(random.permutation(shape[axis])[:count]).astype("int32")
    w, m = (random.standard_normal(shape).astype("float32") for _ in range(2))
    # So small a rate and gradient that hundreds of steps leave everything a normal number.
    gradient = 1e-3 * np.take(w, channels, axis)
    return [tvm.runtime.tensor(array) for array in (w, m, gradient, channels, np.full(rate, 1e-3, "float32"))]


def milliseconds(call: Callable[[], None], repeat: int) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--adam", action="store_true")
    parser.add_argument("--repeat", type=int, default=200)
    options = parser.parse_args()
    runtime.use_threads(runtime.default_threads())
    optimizer = Adam() if options.adam else SGD(momentum=MOMENTUM)
    titles = [f"{rule}{how}" for how in ("", ", in place") for rule in ("waits", "decays")]
    print(f"{'ms':<12}{'weight':>14}", *(f"{title:>17}" for title in titles))
    rows = []
    for name, shape in WEIGHTS.items():
        made = [compiled(shape, options.share, waits, optimizer) for waits in (True, False)]
        if not options.adam:
            made += [in_place(shape, options.share, waits) for waits in (True, False)]
        rows.append([milliseconds(call, options.repeat) for call in made])
        print(f"{name:<12}{'x'.join(map(str, shape)):>14}", *(f"{value:>17.3f}" for value in rows[-1]))
    print(f"{'all':<26}", *(f"{sum(column):>17.3f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    main()
