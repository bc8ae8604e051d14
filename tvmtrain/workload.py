"""What each kernel of a training step has to do: operations, and the bytes of its arguments."""

from __future__ import annotations

import re
from collections import Counter

import tvm
from tvm import relax, tirx
from tvm.s_tir.analysis import estimate_tir_flops

from tvmtrain.costs import Kernel
from tvmtrain.passes.dependences import CALL_TIR
from tvmtrain.passes.plan_arena import bindings, is_kernel
from tvmtrain.sizes import buffer_bytes

# ``passes.update_in_place`` makes another kernel of one that overwrites its own argument.
REWRITTEN = re.compile(r"_in_place\d*$")


def kernels(planned: tvm.IRModule, fused: tvm.IRModule) -> tuple[Kernel, ...]:
    """Those of ``train_step`` in ``planned``, in the order of their first calls.

    fused: the same module before it was scheduled. What a kernel is counted by there: afterwards there are padded tiles, partial sums
    and workspace. A kernel that came later (a copy) is counted as it is.
    """
    calls = Counter(b.value.op.name_hint for b in bindings(planned["train_step"]) if is_kernel(b.value))
    formulas = {gvar.name_hint: f for gvar, f in fused.functions_items() if isinstance(f, tirx.PrimFunc)}
    return tuple(_kernel(name, count, formulas.get(REWRITTEN.sub("", name), planned[name])) for name, count in calls.items())


def _kernel(name: str, calls: int, function: tirx.PrimFunc) -> Kernel:
    return Kernel(name, calls, flops(function), nbytes(function))


def nbytes(function: tirx.PrimFunc) -> int:
    """Bytes of all arguments, results among them."""
    return sum(buffer_bytes(param) for param in function.params if hasattr(param.ty, "shape"))


def calls(function: relax.Function) -> Counter[str]:
    """How often a function calls each kernel, before ``lowering.plan``."""
    values = (binding.value for block in function.body.blocks for binding in block.bindings)
    return Counter(v.args[0].name_hint for v in values if isinstance(v, relax.Call) and v.op == CALL_TIR)


def flops(function: tirx.PrimFunc) -> int:
    """Arithmetic operations of one call, a multiplication and an addition as two; 0 where TVM cannot count them."""
    try:
        return int(estimate_tir_flops(tvm.IRModule({"main": function})))
    except (RuntimeError, ValueError, TypeError):  # loops whose lengths are not constants, as in searches
        return 0
