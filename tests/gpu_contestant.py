"""The process of a contestant on an NVIDIA GPU; where there is none, ours computes on the emulated one and PyTorch on the processor."""

from __future__ import annotations

from dataclasses import replace

import emulator

from tvmtrain import contestant, cuda_compiler, targets
from tvmtrain.contestant import OURS, Order, Started


def main() -> None:
    if emulator.needed():
        _emulate()
    contestant.main()


def _emulate() -> None:
    building, starting = contestant.build, contestant._start

    def build(order: Order) -> contestant.Built:
        emulator.start()
        emulated = cuda_compiler.Compiler("emulator", "0.0", emulator.compile_source)
        cuda_compiler.find = lambda *_: emulated
        device = targets.load("cuda")
        quick = replace(device, target={**device.target, "host": {**device.target["host"], "opt-level": 0}})
        targets.load = lambda _: quick
        return building(order)

    def start(order: Order) -> Started:
        if order.name == OURS:
            emulator.start()
        else:
            import cuda_graphs

            cuda_graphs.emulate(setattr)
        return starting(order)

    contestant.build, contestant._start = build, start
