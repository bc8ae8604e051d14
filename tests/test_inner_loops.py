"""The inner loops that LLVM makes for Arm cores: sums stay in registers, and multiply-adds follow each other as the core allows."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from relax_cases import module
from tvm import tirx
from tvm.relax import op as R

from tvmtrain import lowering, targets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import inner_loops
from inner_loops import CORES, Core, Kernel, hottest, loops

# An outer loop with two inner ones: the second has most multiply-adds. It keeps one sum in v1; v0 goes to the stack and back.
ASSEMBLY = """
kernel:
	sub	sp, sp, #64
	add	x9, sp, #16
.LBB0_1:                                // =>This Loop Header: Depth=1
	movi	v0.2d, #0000000000000000
.LBB0_2:
	ldr	q2, [x1], #16
	fmla	v0.4s, v2.4s, v3.s[0]
	subs	x2, x2, #1
	b.ne	.LBB0_2
	.p2align	4
.LBB0_3:
	ldp	q4, q5, [x1]
	str	q4, [x9]
	ldr	q0, [sp]
	fmla	v0.4s, v4.4s, v3.s[0]
	fmla	v1.4s, v5.4s, v3.s[1]
	str	q0, [sp]                        // 16-byte Folded Spill
	mov	x9, x1
	str	q1, [x9]
	add	x9, sp, #16
	cbnz	x4, .LBB0_3
	str	q1, [x0]
	cbz	x6, .LBB0_4
	b	.LBB0_1
.LBB0_4:
	ret
"""


def test_the_innermost_loop_with_most_multiply_adds_is_found() -> None:
    assert [loop.label for loop in loops(ASSEMBLY)] == [".LBB0_2", ".LBB0_3"]
    loop = hottest(ASSEMBLY)
    assert loop is not None
    assert (loop.label, loop.multiply_adds, len(loop.lines)) == (".LBB0_3", 8, 10)
    assert (loop.count(inner_loops.LOAD), loop.count(inner_loops.STORE)) == (2, 3)
    assert hottest("f:\n\tret\n") is None


def test_what_goes_to_the_stack_is_seen_also_through_another_pointer() -> None:
    loop = hottest(ASSEMBLY)
    assert loop is not None
    # q4 was loaded; q0 is a sum; q1 goes to memory.
    assert loop.spills == (2, 1)
    clean = hottest(ASSEMBLY.replace("str	q0, [sp]", "nop").replace("str	q4, [x9]", "nop"))
    assert clean is not None
    assert clean.spills == (0, 0)


def test_wide_loads_take_two_slots_of_a_narrow_core() -> None:
    loop = inner_loops.Loop(
        "", ("ldp q0, q1, [x0]", "ldr s2, [x1]", "ld1r { v3.4s }, [x2]", "ldr x5, [x6]", "fmla v8.4s, v0.4s, v2.s[0]")
    )
    assert loop.slots == 4 + 1 + 1 + 1


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("conv2d", ([8, 3, 64, 64], [16, 3, 3, 3], [8, 16, 64, 64]), "3x3 forward"),
        ("fused_conv2d_dgrad_add", ([8, 16, 8, 8], [16, 1, 3, 3], [1, 16, 1, 1], [8, 16, 8, 8]), "depthwise 3x3 dgrad"),
        ("fused_conv2d_wgrad_multiply", ([8, 16, 4, 4], [8, 32, 4, 4], [16, 32, 1, 1]), "1x1 wgrad"),
        ("fused_matmul_add", ([8, 16], [16, 10]), "linear"),
    ],
)
def test_kernels_are_told_apart_by_their_weights(name: str, shapes: tuple[list[int], ...], kind: str) -> None:
    assert inner_loops.kind_of(name, shapes) == kind


needs_llvm_mca = pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="llvm-mca is not installed (Debian: llvm)")


@needs_llvm_mca
def test_a_chain_of_multiply_adds_is_far_from_the_peak() -> None:
    core = Core("cortex-a72")
    assert core.peak == 4
    assert 4 / core.cycles(["fmla v0.4s, v30.4s, v31.s[0]"]) < core.peak / 2


# The least share of the peak, some way below what LLVM 14 says; for the A53, whose loads llvm-mca delays, that of issue slots.
@needs_llvm_mca
@pytest.mark.parametrize(("device", "least"), [("raspberry-pi-3b", 0.5), ("raspberry-pi-4b", 0.9), ("raspberry-pi-5", 0.9)])
def test_a_pointwise_convolution_runs_at_the_cores_peak(device: str, least: float) -> None:
    arrays = [np.zeros(shape, "float32") for shape in ((8, 96, 8, 8), (576, 96, 1, 1))]
    lowered = lowering.lower(module(lambda x, w: R.nn.conv2d(x, w), *arrays), targets.load(device))
    (function,) = [f for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]
    kernel = Kernel("conv2d", "1x1 forward", 1.0, function)
    loop = hottest(inner_loops.assembly(kernel, targets.load(device)))
    assert loop is not None
    row = inner_loops.measure(device, "", kernel, loop, Core(CORES[device]))
    assert row.spilled_sums == 0
    assert (row.of_peak if row.slots is None else row.slots) > least
