"""What packing a frozen weight for its kernel saves: convolutions of MobileNetV2 and ResNet, plain and packed, in turn.

    python benchmarks/packing.py [--repeat 30]

Best time of a call, of so many rounds, in microseconds; the weights of a batch of one are read once, those of eight images again
and again from the cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from tvmtrain import lowering, operators, runtime, targets
from tvmtrain.passes.pack_frozen import TILES

# Channels of x and y, size of a map, kernel.
LAYERS = (
    (16, 96, 64, 1),
    (32, 192, 16, 1),
    (96, 576, 14, 1),
    (160, 960, 7, 1),
    (960, 320, 7, 1),
    (320, 1280, 4, 1),
    (64, 64, 32, 3),
)


def step(batch: int, layer: tuple[int, int, int, int], packed: bool) -> Callable[[], Any]:
    """A convolution with a ReLU6, ready to be called."""
    channels, filters, size, kernel = layer
    shape = [filters, channels, kernel, kernel]
    tile = next(t for t in TILES if filters % t == 0)
    x, plain = (relax.Var(n, relax.TensorType(s, "float32")) for n, s in (("x", [batch, channels, size, size]), ("w", shape)))
    w = relax.Var("w", operators.packed_type(plain.ty, tile)) if packed else plain
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            call = builder.normalize(R.nn.conv2d(x, plain, padding=kernel // 2))
            y = builder.emit(operators.packed_conv2d(call, x, w) if packed else call)
            result = builder.emit_output(R.clip(y, 0.0, 6.0))
        builder.emit_func_output(result)
    values = [np.random.default_rng(0).standard_normal([int(d) for d in v.ty.shape]).astype("float32") for v in (x, w)]
    tensors = [tvm.runtime.tensor(value) for value in values]
    function = relax.VirtualMachine(lowering.compile_module(builder.get(), targets.load("host")), tvm.cpu())["main"]
    return lambda: function(*tensors)


def best(calls: list[Callable[[], Any]], repeat: int) -> list[float]:
    """Microseconds of each, in turn."""
    found = [float("inf")] * len(calls)
    for _ in range(repeat):
        for i, call in enumerate(calls):
            call()
            begin = time.perf_counter()
            for _ in range(10):
                call()
            found[i] = min(found[i], (time.perf_counter() - begin) * 1e5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=30)
    repeat = parser.parse_args().repeat
    runtime.use_threads(runtime.default_threads())
    print(f"{'us':28}{'plain':>10}{'packed':>10}{'ratio':>8}")
    for batch in (1, 8):
        for layer in LAYERS:
            plain, packed = best([step(batch, layer, False), step(batch, layer, True)], repeat)
            channels, filters, size, kernel = layer
            name = f"batch {batch}, {channels}->{filters}, {size} px, {kernel}x{kernel}"
            print(f"{name:28}{plain:10.1f}{packed:10.1f}{plain / packed:8.2f}", flush=True)


if __name__ == "__main__":
    main()
