"""Milliseconds of the backward of one convolution: filtered gradients, compiled, beside the exact ones of PyTorch (oneDNN).

    python benchmarks/paper_layers.py [--layers 512] [--patches 2,4] [--threads 1] [--repeat 5] [-o results.json]

The layers are those that the paper measures (Yang, Li and Marculescu, CVPR 2023, arXiv 2301.00330, section 4.4): 3x3 taps, stride 1,
batch 32, as many channels in as out. Both sides begin with the full gradient of y and end with the full gradient of x and all taps of
the weight's. As in the paper, what the forward adds for filtering (x in patches, the taps' sum) belongs to the forward: ``r=2`` is the
backward alone, ``+forward`` has that added. PyTorch computes contiguous or channels-last, whichever is faster, with the allocator
that keeps what it has. The sides take turns; times are medians, of the processor's time where one thread computes.

``of floor``: the least time in which memory as fast as a measured triad reads the gradient of y once and writes that of x once,
over the time taken. ``error``: the largest difference from the paper's equations in double precision (``tvmtrain.oracle``), relative to
the largest value.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import relax
from tvm.relax import op as R

from tvmtrain import artifact, bench, filtering, lowering, operators, roofline, runtime, targets
from tvmtrain.console import Console, percent
from tvmtrain.oracle import Geometry, filtered_gradients
from tvmtrain.passes.sides import substituted

KERNEL = 3
BATCH = 32
# What a call of the authors' benchmark does; here for the gradients of x and w.
WANTED = [True, True, False]


@dataclass(frozen=True)
class Layer:
    """A convolution of 3x3 taps and stride 1, with as many channels in as out."""

    channels: int
    rows: int
    columns: int
    batch: int = BATCH

    @property
    def name(self) -> str:
        return f"{self.channels} at {self.rows}x{self.columns}"

    @property
    def map(self) -> list[int]:
        return [self.batch, self.channels, self.rows, self.columns]

    @property
    def weight(self) -> list[int]:
        return [self.channels, self.channels, KERNEL, KERNEL]

    @property
    def nbytes(self) -> int:
        """Of the gradients of y and of x together."""
        return 2 * 4 * self.batch * self.channels * self.rows * self.columns


LAYERS = (
    Layer(128, 120, 160),
    Layer(256, 60, 80),
    Layer(512, 30, 40),
    Layer(512, 14, 14),
    Layer(256, 14, 14),
    Layer(128, 28, 28),
    Layer(64, 56, 56),
)


@dataclass(frozen=True)
class Filtered:
    """One patch size: milliseconds of the backward and of what the forward adds, and the departure from the paper's equations."""

    patch: int
    ms: float
    forward_ms: float
    error: float


@dataclass(frozen=True)
class Measured:
    """A layer; ``exact_ms``: of PyTorch in its faster ``layout``; ``floor_ms``: of reading and writing the two full gradients."""

    layer: Layer
    layout: str
    exact_ms: float
    floor_ms: float
    filtered: tuple[Filtered, ...]

    def ratio(self, filtered: Filtered, forward: bool) -> float:
        """How many times as long PyTorch's exact backward takes."""
        return self.exact_ms / (filtered.ms + (filtered.forward_ms if forward else 0))


# The compiled side.


def module(layer: Layer, patch: int) -> tvm.IRModule:
    """``forward`` (x, w) -> what the backward reads of them, and ``backward`` (that, gradient of y) -> gradients of x and w.

    The operators are those that ``passes.gradient_filter`` and the gradient of its convolution put into a training step.
    """
    x, gy = (relax.Var(name, relax.TensorType(layer.map, "float32")) for name in ("x", "gy"))
    w = relax.Var("w", relax.TensorType(layer.weight, "float32"))
    view = relax.Var("view", relax.TensorType([*layer.weight[:2], 1, 1], "float32"))
    geometry = {"strides": [1, 1], "padding": [KERNEL // 2] * 4, "dilation": [1, 1], "groups": 1}
    builder = relax.BlockBuilder()
    with builder.function("whole", [x, w, gy]):
        with builder.dataflow():
            call = builder.normalize(operators.viewed_conv2d(x, w, view, None, geometry, (patch, patch)))
            gx, gview = (builder.emit(g) for g in filtering.gradients(call, gy, builder))
            gw = builder.emit(R.broadcast_to(gview, layer.weight))
            results = relax.Tuple([builder.emit_output(g) for g in (gx, gw)])
        builder.emit_func_output(results)
    return split(builder.get()["whole"])


def split(whole: relax.Function) -> tvm.IRModule:
    """``forward``: the bindings that need no gradient of y; ``backward``: the others, for what they read of these."""
    *inputs, gy = whole.params
    (block,) = whole.body.blocks
    late, early = {gy}, []
    for binding in block.bindings:
        if late.isdisjoint(relax.analysis.free_vars(binding.value)):
            early.append(binding)
        else:
            late.add(binding.var)
    after = [binding for binding in block.bindings if binding.var in late]
    read = {var for binding in after for var in relax.analysis.free_vars(binding.value)}
    kept = [binding.var for binding in early if binding.var in read]
    backward = function("backward", [*kept, gy], after, list(whole.body.body.fields))
    return tvm.IRModule({"forward": function("forward", inputs, early, kept), "backward": backward})


def function(
    name: str, inputs: Sequence[relax.Var], bindings: Sequence[relax.VarBinding], outputs: Sequence[relax.Var]
) -> relax.Function:
    """A function of these bindings, with variables of its own."""
    builder = relax.BlockBuilder()
    fresh = {var: relax.Var(var.name, var.ty) for var in inputs}
    with builder.function(name, list(fresh.values())):
        with builder.dataflow():
            for binding in bindings:
                fresh[binding.var] = builder.emit(substituted(binding.value, fresh))
            results = relax.Tuple([builder.emit_output(fresh[var]) for var in outputs])
        builder.emit_func_output(results)
    return builder.get()[name]


@dataclass(frozen=True)
class Data:
    """A layer's tensors."""

    x: torch.Tensor
    w: torch.Tensor
    gy: torch.Tensor

    @classmethod
    def of(cls, layer: Layer) -> Data:
        random = torch.Generator().manual_seed(0)
        x, w, gy = (torch.randn(shape, generator=random) for shape in (layer.map, layer.weight, layer.map))
        return cls(x, w, gy)


@dataclass(frozen=True)
class Compiled:
    """The two parts of one patch size, ready to be called."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]


def compiled(layer: Layer, patch: int, data: Data) -> Compiled:
    machine = relax.VirtualMachine(lowering.compile_module(module(layer, patch), targets.load("host")), tvm.cpu())
    x, w, gy = (tvm.runtime.tensor(t.numpy()) for t in (data.x, data.w, data.gy))
    forward, backward = machine["forward"], machine["backward"]
    kept = forward(x, w)
    return Compiled(lambda: forward(x, w), lambda: backward(*kept, gy))


def departure(patch: int, data: Data, gradients: Sequence[Any]) -> float:
    """The largest difference from the paper's equations, relative to the largest value; image by image, for memory's sake."""
    got_x, got_w = (torch.from_numpy(g.numpy()) for g in gradients)
    geometry, total = Geometry(patch=(patch, patch)), torch.zeros(got_w.shape, dtype=torch.float64)
    worst = largest = 0.0
    for x, gy, got in zip(data.x.split(1), data.gy.split(1), got_x.split(1), strict=True):
        gx, gw = filtered_gradients(x.double(), data.w.double(), gy.double(), geometry)
        total += gw
        worst, largest = max(worst, float((gx - got).abs().max())), max(largest, float(gx.abs().max()))
    return max(worst / largest, float((total - got_w).abs().max() / total.abs().max()))


# PyTorch's side.


def exact(data: Data, layout: torch.memory_format) -> Callable[[], Any]:
    """Both exact gradients of one convolution, whose tensors lie in ``layout``."""
    x, w, gy = (t.contiguous(memory_format=layout) for t in (data.x, data.w, data.gy))
    backward = torch.ops.aten.convolution_backward
    one, border = [1, 1], [KERNEL // 2] * 2
    return lambda: backward(gy, x, w, None, one, border, one, False, [0, 0], 1, WANTED)


LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


# Both.


def clock(threads: int) -> Callable[[], float]:
    """What others on the machine take away counts where several threads wait for each other, and cannot be told apart there."""
    return time.process_time if threads == 1 else time.perf_counter


def seconds(call: Callable[[], Any], now: Callable[[], float]) -> float:
    start = now()
    call()
    return now() - start


def medians(calls: Sequence[Callable[[], Any]], repeat: int, now: Callable[[], float]) -> list[float]:
    """Milliseconds of each, in turns."""
    for call in calls:
        call()
    times = [[seconds(call, now) for call in calls] for _ in range(repeat)]
    return [1e3 * statistics.median(column) for column in zip(*times, strict=True)]


def measure(layer: Layer, patches: Sequence[int], repeat: int, ceiling: roofline.Roofline) -> Measured:
    """One layer, on as many threads as ``ceiling`` was measured on."""
    now, data = clock(ceiling.threads), Data.of(layer)
    ours = [compiled(layer, patch, data) for patch in patches]
    errors = [departure(patch, data, each.backward()) for patch, each in zip(patches, ours, strict=True)]
    layout = min(LAYOUTS, key=lambda name: medians([exact(data, LAYOUTS[name])], 1, now))
    calls = [call for each in ours for call in (each.backward, each.forward)]
    rival, *times = medians([exact(data, LAYOUTS[layout]), *calls], repeat, now)
    found = [Filtered(*each) for each in zip(patches, times[::2], times[1::2], errors, strict=True)]
    return Measured(layer, layout, rival, 1e3 * ceiling.seconds(0, layer.nbytes), tuple(found))


# Results.


def show(results: Sequence[Measured], out: Console) -> None:
    patches = [f.patch for f in results[0].filtered]
    heads = [(f">r={r}", ">ratio", ">+forward", ">ratio", ">of floor", ">error") for r in patches]
    rows = [_row(result) for result in results]
    means = [f"{mean:.1f}" for mean in geometric_means(results)]
    cells = [cell for a, b in zip(means[::2], means[1::2], strict=True) for cell in ("", a, "", b, "", "")]
    out.table(("ms", "layout", ">oneDNN", *(h for head in heads for h in head)), [*rows, ("geometric mean", "", "", *cells)])


def _row(result: Measured) -> tuple[str, ...]:
    cells = [result.layer.name, result.layout, f"{result.exact_ms:.1f}"]
    for f in result.filtered:
        both = f.ms + f.forward_ms
        cells += [f"{f.ms:.2f}", f"{result.ratio(f, False):.1f}", f"{both:.2f}", f"{result.ratio(f, True):.1f}"]
        cells += [percent(result.floor_ms / f.ms), f"{f.error:.0e}"]
    return tuple(cells)


def geometric_means(results: Sequence[Measured]) -> list[float]:
    """Of the ratios over all layers: for each patch without and with the forward's part."""
    rows = [[result.ratio(f, forward) for f in result.filtered for forward in (False, True)] for result in results]
    return [statistics.geometric_mean(column) for column in zip(*rows, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="", metavar="SUBSTRING", help="only layers with this in their names")
    parser.add_argument("--patches", default="2,4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write all results as JSON")
    options = parser.parse_args()
    if not (layers := [layer for layer in LAYERS if options.layers in layer.name]):
        parser.error(f"--layers: got {options.layers!r}, wanted a part of one of: {'; '.join(layer.name for layer in LAYERS)}")
    results = run(layers, [int(r) for r in options.patches.split(",")], options.threads, options.repeat, Console())
    if options.output is not None:
        artifact.write_file(options.output, json.dumps([asdict(result) for result in results], indent=1).encode())
    return 0


def run(layers: Sequence[Layer], patches: Sequence[int], threads: int, repeat: int, out: Console) -> list[Measured]:
    """Measure and show."""
    torch.set_num_threads(threads)
    runtime.use_threads(threads)
    ceiling = roofline.measure(threads)
    results = []
    with out.progress("measuring", len(layers)) as bar:
        for layer in layers:
            results.append(measure(layer, patches, repeat, ceiling))
            bar.advance(1, layer.name)
    show(results, out)
    out.line(f"{threads} threads; {ceiling.flops / 1e9:.0f} GFLOP/s, {ceiling.bandwidth / 1e9:.1f} GB/s at best")
    return results


if __name__ == "__main__":
    # glibc reads how to keep memory when a process begins.
    if not bench.STRONGEST.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | bench.STRONGEST)
    sys.exit(main())
