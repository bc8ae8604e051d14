"""The inner loops of a training step's kernels on Arm cores, without a board: registers, loads, and multiply-adds a cycle.

    python benchmarks/inner_loops.py [device ...] [--network mobilenetv2 resnet18] [--all] [--json] [--mca llvm-mca]

The convolutions and matrix products of a step are compiled for each device. Of each one's assembly, the innermost loop with most
multiply-adds is timed by llvm-mca, which knows how long each instruction takes and what it occupies. The most that a core can do is
what llvm-mca says of multiply-adds that depend on nothing. A line stands for all kernels of a kind: counts, cycles and ``of peak``
are of one iteration of the one with most operations; ``lowest`` is the slowest's share of the peak, ``all`` and ``slots`` are of all
of them, weighted by operations. ``stack``: vectors that the loop stores to the stack; ``sums``: those of them that were sums, and not
operands that were loaded too early.

What llvm-mca leaves out: caches and memory (every load hits the nearest one), prefetching, branch prediction, the fetching of
instructions, and a load's wait for the store before it. How well it knows a core is LLVM's:

- Cortex-A72: no model of its own; LLVM takes the A57's, with one 128-bit multiply-add and one load a cycle.
- Cortex-A76: the Neoverse N1's model, which is the same core, from LLVM 16 on (two multiply-adds and two loads a cycle). An older
  llvm-mca takes the A57's for it too, and the table says so.
- Cortex-A53: llvm-mca lets no result be written before an older one, so that each load waits for the multiply-adds before it, ten
  cycles each. The core does not (measured on a Raspberry Pi 3: github.com/llvm/llvm-project/pull/213238), and LLVM has no way to say
  so: ``of peak`` is too low by far. What the core does have is a narrow path for vectors: loads of 128 bits cost two cycles in which
  no multiply-add starts, narrower ones one (measured: ncnn.readthedocs.io, "arm a53 a55 dual issue"). ``slots`` is the share of
  cycles that this leaves for multiply-adds, if nothing else waits.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import networks
import tvm
from tvm import tirx

import tvmtrain as tt
from tvmtrain import codegen, lowering, targets, workload
from tvmtrain.console import Console, percent
from tvmtrain.targets import Device

# What llvm-mca calls the core of each device.
CORES = {"raspberry-pi-3b": "cortex-a53", "raspberry-pi-4b": "cortex-a72", "raspberry-pi-5": "neoverse-n1"}
# Cores of which ``slots`` is known.
NARROW = ("cortex-a53",)
NETWORKS = ("mobilenetv2", "resnet18")
BATCH, SIZE = 8, 128
# Iterations of a loop after which it runs as it always does, and those that are timed.
WARM, TIMED = 50, 100
# Sums of the loop that gives the peak: more than any core has multiply-adds under way, and registers left for the operands.
INDEPENDENT = 24
# Floats of a NEON register.
LANES = 4

LABEL = re.compile(r"([.\w$]+):")
BRANCH = re.compile(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?([.\w$]+)$")
VECTOR_SUM = re.compile(r"fmla\s+v\d+\.(\d+)s")
SCALAR_SUM = re.compile(r"fmadd\s+s")
LOAD, STORE = re.compile(r"ld[a-z1-4]+\s"), re.compile(r"st[a-z1-4]+\s")
ONLY_READS = re.compile(r"(?:cmp|cmn|tst|ccmp|cbn?z|tbn?z|b|b\.\w+|prfm)\s")
ADDRESS = re.compile(r"\[(sp|x\d+)")
# Registers by their kind: general, vectors of any width, 128 bits of a vector, less.
GENERAL, VECTOR = re.compile(r"\b(x\d+)"), re.compile(r"\b[vqds](\d+)")
WIDE, SHORT = re.compile(r"\bq\d+|\bv\d+\.(?:4s|2d)"), re.compile(r"\b[ds]\d+|\bv\d+\.(?:2s|s|d)\b")


# --- Loops in assembly ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A loop without others in it: its label and its instructions, the branch back among them; which of them address the stack."""

    label: str
    lines: tuple[str, ...]
    stack: frozenset[int] = frozenset()

    @property
    def multiply_adds(self) -> int:
        """Those of one iteration, each lane of a vector as one."""
        return sum(int(m[1]) for line in self.lines if (m := VECTOR_SUM.match(line))) + self.count(SCALAR_SUM)

    @property
    def spills(self) -> tuple[int, int]:
        """Vectors that are stored to the stack, and how many of them are sums."""
        spilled = [(i, r) for i in sorted(self.stack) if STORE.match(self.lines[i]) for r in _operands(self.lines[i], VECTOR)]
        return len(spilled), sum(self._is_sum(i, register) for i, register in spilled)

    @property
    def slots(self) -> int:
        """Cycles of a core that starts one multiply-add, or loads 64 bits of a vector, at a time."""
        loads = (line for line in self.lines if LOAD.match(line))
        return self.multiply_adds // LANES + sum(map(_load_slots, loads))

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(line)) for line in self.lines)

    def _is_sum(self, i: int, register: str) -> bool:
        """Whether a multiply-add was the last to write a register before instruction ``i``, in this iteration or the one before."""
        before = (*self.lines[:i][::-1], *self.lines[i:][::-1])
        writer = next((line for line in before if register in _written(line, VECTOR)), "")
        return bool(VECTOR_SUM.match(writer))


def loops(assembly: str) -> Iterator[Loop]:
    """The innermost loops: from a label to the last branch back to it, with no other such pair between."""
    lines = [line for text in assembly.splitlines() if (line := _plain(text))]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := LABEL.match(line))}
    stack = _on_stack(lines)
    branches = ((labels.get(m[1], i), i) for i, line in enumerate(lines) if (m := BRANCH.match(line)))
    spans = {first: last for first, last in branches if first < last}
    for first, last in spans.items():
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans.items()):
            inside = [i for i in range(first, last + 1) if not LABEL.match(lines[i])]
            places = frozenset(n for n, i in enumerate(inside) if i in stack)
            yield Loop(lines[first].rstrip(":"), tuple(lines[i] for i in inside), places)


def hottest(assembly: str) -> Loop | None:
    """The innermost loop with most multiply-adds; None where there are none."""
    found = max(loops(assembly), key=lambda loop: loop.multiply_adds, default=None)
    return found if found is not None and found.multiply_adds else None


def _plain(line: str) -> str:
    """An instruction or a label, without comments; nothing for a directive."""
    text = line.partition("//")[0].strip()
    return "" if text.startswith(".") and not LABEL.match(text) else text


def _on_stack(lines: Sequence[str]) -> set[int]:
    """The instructions that address the stack: by its pointer, or by a register that was last computed from it."""
    pointers, found = {"sp"}, set()
    for i, line in enumerate(lines):
        if LABEL.match(line) and not line.startswith("."):
            pointers = {"sp"}
        if (address := ADDRESS.search(line)) and address[1] in pointers:
            found.add(i)
        computed = re.match(r"(?:add|sub|mov)\s+x\d+, (sp|x\d+)", line)
        written = set(_written(line, GENERAL))
        pointers = pointers | written if computed and computed[1] in pointers else pointers - written
    return found


def _operands(line: str, kind: re.Pattern[str]) -> list[str]:
    """The registers of an instruction before its address."""
    return kind.findall(line.partition("[")[0])


def _written(line: str, kind: re.Pattern[str]) -> list[str]:
    """The registers that an instruction writes: all that a load names, or else the first operand."""
    if STORE.match(line) or ONLY_READS.match(line):
        return []
    return _operands(line if LOAD.match(line) else line.partition(",")[0], kind)


def _load_slots(line: str) -> int:
    head = line.partition("[")[0]
    # ld1r reads one float for all lanes.
    return 1 if line.startswith("ld1r") else 2 * len(WIDE.findall(head)) + len(SHORT.findall(head))


# --- What llvm-mca says of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """A core as llvm-mca (the command ``mca``) knows it."""

    name: str
    mca: str = "llvm-mca"

    @cached_property
    def model(self) -> str:
        """The core whose timing is used, as LLVM's description of its units names it: A53, A57, N1."""
        units = self._simulate(["nop"], 1)["TargetInfo"]["Resources"]
        return str(units[0]).partition("Unit")[0]

    @cached_property
    def peak(self) -> float:
        """The most multiply-adds a cycle, each lane of a vector as one: of a loop in which none waits for another."""
        return LANES * INDEPENDENT / self.cycles([f"fmla v{i}.4s, v30.4s, v31.s[0]" for i in range(INDEPENDENT)])

    def cycles(self, lines: Sequence[str]) -> float:
        """Cycles of one iteration of a loop that has been running for a while."""
        views = [self._simulate(lines, count)["CodeRegions"][0]["SummaryView"] for count in (WARM, WARM + TIMED)]
        return (views[1]["TotalCycles"] - views[0]["TotalCycles"]) / TIMED

    def _simulate(self, lines: Sequence[str], iterations: int) -> dict[str, Any]:
        command = [self.mca, "-mtriple=aarch64", f"-mcpu={self.name}", f"-iterations={iterations}", "-json"]
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return dict(json.loads(done.stdout))


@dataclass(frozen=True)
class Row:
    """The hottest loop of one kernel of a step on one device, and how fast it runs.

    share: the kernel's part of the step's operations; fmla: vector multiply-adds of an iteration; of_peak: multiply-adds a cycle, of
    the most that the core can do; slots: the same by the issue slots of loads, on cores where that matters.
    """

    device: str
    network: str
    kernel: str
    kind: str
    share: float
    fmla: float
    loads: int
    stores: int
    spills: int
    spilled_sums: int
    cycles: float
    of_peak: float
    slots: float | None


def measure(device: str, network: str, kernel: Kernel, loop: Loop, core: Core) -> Row:
    """The row of a kernel whose hottest loop is ``loop``."""
    cycles, fmla = core.cycles(loop.lines), loop.multiply_adds / LANES
    slots = fmla / loop.slots if core.name in NARROW else None
    counts = fmla, loop.count(LOAD), loop.count(STORE), *loop.spills
    of_peak = loop.multiply_adds / cycles / core.peak
    return Row(device, network, kernel.name, kernel.kind, kernel.share, *counts, cycles, of_peak, slots)


# --- The kernels of a step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A convolution or matrix product, scheduled; what it computes ("1x1 dgrad") and its share of the step's operations."""

    name: str
    kind: str
    share: float
    function: tirx.PrimFunc


def kernels(mod: tvm.IRModule, device: Device) -> list[Kernel]:
    """Those of ``train_step``, the largest first."""
    fused = lowering.fuse(mod, device)
    work = {name: count * workload.flops(fused[name]) for name, count in workload.calls(fused["train_step"]).items()}
    chosen = {name: fused[name] for name in work if re.search("conv2d|matmul", name)}
    scheduled = lowering.schedule(tvm.IRModule(chosen), device)
    total = sum(work.values())
    found = [Kernel(name, kind_of(name, _shapes(f)), work[name] / total, scheduled[name]) for name, f in chosen.items()]
    return sorted(found, key=lambda kernel: -kernel.share)


def _shapes(function: tirx.PrimFunc) -> list[list[int]]:
    return [[int(d) for d in p.ty.shape] for p in function.params if hasattr(p.ty, "shape")]


def kind_of(name: str, shapes: Iterable[Sequence[int]]) -> str:
    """Kernel size and direction. The weight is what has the smallest maps, but for scales and shifts of channels."""
    if "matmul" in name:
        return "linear"
    _, inputs, *size = min((s for s in shapes if len(s) == 4 and s[0] > 1), key=lambda s: s[2] * s[3])
    direction = next((d for d in ("dgrad", "wgrad") if d in name), "forward")
    return f"{'depthwise ' if inputs == 1 else ''}{'x'.join(map(str, size))} {direction}"


def assembly(kernel: Kernel, device: Device) -> str:
    """What LLVM makes of a kernel in a step."""
    function = kernel.function.with_attr("global_symbol", kernel.name)
    built = codegen.compiled(tvm.IRModule({kernel.name: function}), codegen.processor(device))
    return str(built.inspect_source("asm"))


def rows(network: str, mod: tvm.IRModule, device: Device, core: Core) -> Iterator[Row]:
    """One for each kernel of the step that multiplies and adds in a loop."""
    for kernel in kernels(mod, device):
        if loop := hottest(assembly(kernel, device)):
            yield measure(device.name, network, kernel, loop, core)


# --- What is printed --------------------------------------------------------------------------------------------------------


def together(found: Sequence[Row], by_slots: bool = False) -> float | None:
    """The share of the peak of all these loops, by the operations of their kernels."""
    shares = [r.slots if by_slots else r.of_peak for r in found]
    if None in shares:
        return None
    return sum(r.share for r in found) / sum(r.share / share for r, share in zip(found, shares, strict=True))


def show(found: Sequence[Row], every: bool, out: Console) -> None:
    """A line for each kind of kernel, or for each kernel."""
    groups = defaultdict(list)
    for r in found:
        groups[r.kernel if every else r.kind].append(r)
    counts = (">of step", ">kernels", ">fmla", ">loads", ">stores", ">stack", ">sums", ">cycles", ">fmla/cycle")
    columns = ("kernel", *counts, ">of peak", ">lowest", ">all", ">slots")
    out.table(columns, [_cells(name, members) for name, members in groups.items()])


def _cells(name: str, members: Sequence[Row]) -> tuple[str, ...]:
    r = members[0]
    counts = f"{r.fmla:g}", str(r.loads), str(r.stores), str(r.spills), str(r.spilled_sums), f"{r.cycles:g}"
    shares = r.of_peak, min(m.of_peak for m in members), together(members), together(members, by_slots=True)
    part = percent(sum(m.share for m in members))
    return (name, part, str(len(members)), *counts, f"{r.fmla / r.cycles:.2f}", *map(percent, shares))


def summary(found: Sequence[Row], core: Core) -> str:
    """One sentence about all kernels of a step on a device."""
    share, slots = sum(r.share for r in found), together(found, by_slots=True)
    by_slots = "" if slots is None else f" ({percent(slots)} by slots)"
    without = sum(r.share for r in found if not r.spilled_sums) / share
    return (
        f"{found[0].network} on {found[0].device}: {percent(together(found))} of the peak of {core.peak / LANES:g} fmla a cycle"
        f"{by_slots}, model {core.model}; {percent(without)} of the operations keep their sums in registers; "
        f"{percent(share)} of the step's operations"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", default=list(CORES), metavar="device", help=f"of {', '.join(CORES)}; all")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--all", action="store_true", help="a line for each kernel")
    parser.add_argument("--json", action="store_true", help="print every kernel as JSON, the tables to standard error")
    parser.add_argument("--mca", default="llvm-mca", help="which llvm-mca; 16 or newer knows the Cortex-A76")
    options = parser.parse_args()
    if shutil.which(options.mca) is None:
        sys.exit(f"this asks {options.mca}, which is not installed; Debian's package is llvm")
    if unknown := set(options.devices) - set(CORES):
        sys.exit(f"no core is known of {', '.join(sorted(unknown))}; choose from {', '.join(CORES)}")
    out, everything = Console(sys.stderr if options.json else sys.stdout), []
    for network in options.network:
        mod = tt.trace(*getattr(networks, network)(BATCH, SIZE)).module()
        for name in options.devices:
            core = Core(CORES[name], options.mca)
            found = list(rows(network, mod, targets.load(name), core))
            out.line(summary(found, core))
            show(found, options.all, out)
            everything += [asdict(r) | {"model": core.model, "peak": core.peak} for r in found]
    if options.json:
        print(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
