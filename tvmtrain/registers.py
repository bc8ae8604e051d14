"""Small buffers of a kernel are registers, or at worst places on the stack of the core that runs it.

    acc = alloc_buffer(96, scope="local")   -->   the same, marked so that TVM leaves it to LLVM

TVM 0.27 knows only when a kernel runs that it runs on a processor, and takes memory for such buffers from a pool then: two calls for
each tile of a convolution, some hundred cycles. Runs on the last form that a kernel has before its code is generated.
"""

from __future__ import annotations

from math import prod

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir.transform import Sequential, module_pass
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

# The name of TVM's own lowering of kernels with this pass in it.
PIPELINE = "tvmtrain"
# An annotation of TVM's: leave this buffer to LLVM.
LEFT_ALONE = "disable_lower_builtin"
# Bytes of results in registers (AVX-512 has 32 of 64 bytes), and of copies that a core makes for itself; what is larger stays in the pool.
LARGEST = {"local": 2048, "global": 16384}


@module_pass(opt_level=0, name="KeepInRegisters")
class KeepInRegisters:
    """Marks every buffer of up to ``LARGEST`` bytes."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        result = mod.clone()
        for name, function in mod.functions_items():
            if isinstance(function, tirx.PrimFunc):
                body = tvm_ffi.structural_map(function.body, (tirx.AllocBuffer, _marked))
                result[name] = function.with_body(body)
        return result


def _marked(alloc: tirx.AllocBuffer) -> tirx.AllocBuffer:
    ty = alloc.buffer.ty
    small = all(isinstance(d, tirx.IntImm) for d in ty.shape)
    if not small or _bytes(ty) > LARGEST.get(ty.storage_scope, 0):
        return alloc
    return tirx.AllocBuffer(alloc.buffer, {**alloc.annotations, LEFT_ALONE: tirx.IntImm("bool", 1)})


def _bytes(ty: tvm.ir.Type) -> int:
    dtype = tvm.DataType(str(ty.dtype))
    return prod(int(d) for d in ty.shape) * dtype.lanes * dtype.bits // 8


def _pipeline() -> tuple:
    lowering, finish_host, finish_device = get_tir_pipeline("default")
    return lowering, lambda: Sequential([KeepInRegisters(), finish_host()]), finish_device


register_tir_pipeline(PIPELINE, _pipeline)
