"""What a kernel needs for itself lies in the arena, too: a padded copy of its input, partial sums.

    f(x, y): local = alloc_buffer(..); ..    -->   ws = alloc_tensor(..); f(x, y, ws)

Runs after ``CallTIRRewrite`` and before ``PlanArena``, on kernels whose buffers have their places (``place_buffers``). A buffer
that each core has for itself, inside of a parallel loop, stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir import GlobalVar
from tvm.ir.transform import PassContext, Sequential, module_pass
from tvm.relax import op as R

from tvmtrain.sizes import buffer_bytes

GLOBAL = "global"


def place_buffers() -> Sequential:
    """TVM's passes that move each buffer to the innermost loop around all of its uses; they begin TVM's own lowering, too."""
    return Sequential(
        [
            s_tir.transform.CanonicalizeLoop(),
            s_tir.transform.LowerCrossThreadReduction(),
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        ]
    )


@module_pass(opt_level=0, name="ShareWorkspace")
@dataclass(frozen=True)
class ShareWorkspace:
    """Gives every kernel the buffers of its outermost block as arguments after its results."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        wanting = {gvar: f for gvar, f in mod.functions_items() if isinstance(f, tirx.PrimFunc) and workspace(f)}
        builder = relax.BlockBuilder(
            tvm.IRModule({g: f for g, f in mod.functions_items() if g not in wanting}, attrs=mod.attrs)
        )
        # The type of a kernel's variable has its parameters: those with more of them are new variables.
        shared = {gvar: _Shared.of(builder, gvar.name_hint, kernel) for gvar, kernel in wanting.items()}
        result = builder.get()
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function):
                result[name] = _giving(function, shared)
        return result


@dataclass(frozen=True)
class _Shared:
    """A kernel whose ``buffers`` are its last arguments."""

    kernel: GlobalVar
    buffers: tuple[tirx.Var, ...]

    @staticmethod
    def of(builder: relax.BlockBuilder, name: str, kernel: tirx.PrimFunc) -> _Shared:
        buffers = workspace(kernel)
        return _Shared(builder.add_func(_taking(kernel, buffers), name), tuple(buffers))


def workspace(kernel: tirx.PrimFunc) -> list[tirx.Var]:
    """The buffers in memory, not in registers, that live as long as a call of the kernel."""
    if not isinstance(kernel.body, s_tir.SBlockRealize):
        return []
    return [buffer for buffer in kernel.body.block.alloc_buffers if buffer.ty.storage_scope == GLOBAL]


def per_core(mod: tvm.IRModule) -> dict[str, int]:
    """Kernel -> bytes that each core allocates for itself while it runs, once TVM has made its buffers as small as they are used."""
    kernels = tvm.IRModule({gvar: f for gvar, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)})
    small = Sequential([place_buffers(), s_tir.transform.ConvertBlocksToOpaque(), s_tir.transform.CompactBufferAllocation()])
    return {gvar.name_hint: sum(map(_own_bytes, _blocks(kernel.body))) for gvar, kernel in small(kernels).functions_items()}


def _own_bytes(block: s_tir.SBlock) -> int:
    return sum(buffer_bytes(buffer) for buffer in block.alloc_buffers if buffer.ty.storage_scope == GLOBAL)


def _blocks(node: Any) -> Iterator[s_tir.SBlock]:
    """Every block in a statement."""
    if isinstance(node, s_tir.SBlock):
        yield node
    for name in ("block", "body", "then_case", "else_case"):
        if (child := getattr(node, name, None)) is not None:
            yield from _blocks(child)
    for child in getattr(node, "seq", ()):
        yield from _blocks(child)


def _taking(kernel: tirx.PrimFunc, buffers: Sequence[tirx.Var]) -> tirx.PrimFunc:
    realize = kernel.body
    block = realize.block
    kept = [buffer for buffer in block.alloc_buffers if buffer.ty.storage_scope != GLOBAL]
    fields: list[Any] = [block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init]
    root = s_tir.SBlock(*fields, kept, block.match_buffers, block.annotations)
    body = s_tir.SBlockRealize(realize.iter_values, realize.predicate, root)
    return tirx.PrimFunc([*kernel.params, *buffers], body, kernel.ret_type, kernel.attrs)


def _giving(function: relax.Function, shared: dict[GlobalVar, _Shared]) -> relax.Function:
    blocks = [
        relax.BindingBlock([new for binding in block.bindings for new in _bindings(binding, shared)])
        for block in function.body.blocks
    ]
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _bindings(binding: relax.VarBinding, shared: dict[GlobalVar, _Shared]) -> Iterator[relax.Binding]:
    call = binding.value
    found = shared.get(call.op) if isinstance(call, relax.Call) and isinstance(call.op, GlobalVar) else None
    if found is None:
        yield binding
        return
    given = [relax.VarBinding(*_allocated(buffer)) for buffer in found.buffers]
    yield from given
    called = relax.Call(found.kernel, [*call.args, *(each.var for each in given)], call.attrs, call.ty_args)
    yield relax.VarBinding(binding.var, relax.BlockBuilder().normalize(called))


def _allocated(buffer: tirx.Var) -> tuple[relax.Var, relax.Expr]:
    shape, dtype = [int(d) for d in buffer.ty.shape], str(buffer.ty.dtype)
    call = relax.BlockBuilder().normalize(R.builtin.alloc_tensor(relax.ShapeExpr(shape), dtype, 0))
    return relax.Var(f"workspace_{buffer.name}", call.ty), call
