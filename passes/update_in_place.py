"""New state takes the place of the old: what a function returns as a parameter, buffer or optimizer state is its own argument.

    new = call_tir(update, (old, ..))   -->   new = call_tir_inplace(update, (old, .., old), inplace)

The kernel that makes the new value writes into the old one's tensor, where each of its elements depends on the old element at
the same place and no other, and everybody else who reads the old value can do so before. Where that is not so, the kernel keeps a
tensor of its own, which is copied at the end. Runs on lowered functions: kernels with their schedules, called by ``call_tir``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, s_tir, te, tirx
from tvm.ir import GlobalVar
from tvm.ir.transform import PassContext, module_pass
from tvm_ffi import structural_equal

from tvmtrain import signature
from tvmtrain.artifact import STATE_ROLES
from tvmtrain.passes.dependences import CALL_TIR, Dependences, ordered

NOALIAS = "tirx.noalias"


@module_pass(opt_level=0, name="UpdateInPlace")
@dataclass(frozen=True)
class UpdateInPlace:
    """Rewrites every function that returns new state; the others stay as they are."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        builder = relax.BlockBuilder(mod)
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function) and (pairs := _pairs(function)):
                builder.update_func(name, _Rewriter(mod, builder, function).run(pairs))
        return builder.get()


def _pairs(function: relax.Function) -> dict[int, relax.Var]:
    """Which results, by number, have to be in the tensors of which arguments."""
    if not signature.has_ports(function):
        return {}
    arguments = dict(zip(signature.inputs(function), function.params, strict=True))
    fields = function.body.body.fields
    return {
        i: arguments[port]
        for i, port in enumerate(signature.outputs(function))
        if port[0] in STATE_ROLES and not fields[i].same_as(arguments[port])
    }


class _Rewriter:
    """One function: its bindings, and the kernels that it calls."""

    def __init__(self, mod: tvm.IRModule, builder: relax.BlockBuilder, function: relax.Function) -> None:
        self.mod = mod
        self.function = function
        (block,) = function.body.blocks
        self.bindings = list(block.bindings)
        self.number = {binding.var: i for i, binding in enumerate(self.bindings)}
        self.builder = builder
        # Of the bindings as they were, with the orders that overwriting adds.
        self.seen = Dependences(tuple(self.bindings))

    def run(self, pairs: dict[int, relax.Var]) -> relax.Function:
        fields = list(self.function.body.body.fields)
        for i, value in enumerate(fields):
            # What is returned beside new state must not change with it.
            if i not in pairs and any((old, False) in self.seen.of(value) for old in pairs.values()):
                fields[i] = self._copied(value)
        for i, old in pairs.items():
            shared = sum(value.same_as(fields[i]) for value in fields) > 1
            if shared or not self._overwrites(fields[i], old):
                fields[i] = self._copied(fields[i], old)
        order = ordered(Dependences(self.bindings).before)
        assert order is not None, "every overwriting kernel was checked against a circle"
        block = relax.DataflowBlock([self.bindings[i] for i in order])
        body = self.builder.normalize(relax.SeqExpr([block], relax.Tuple(fields)))
        return relax.Function(self.function.params, body, self.function.ret_ty, self.function.is_pure, self.function.attrs)

    def _overwrites(self, new: relax.Expr, old: relax.Var) -> bool:
        """Let the kernel that makes ``new`` write into ``old``, if it may."""
        place = self.number.get(new)
        call = self.bindings[place].value if place is not None else None
        if place is None or not isinstance(call, relax.Call) or call.op != CALL_TIR or len(call.ty_args) != 1:
            return False
        gvar, args = call.args[0], list(call.args[1].fields)
        same = tuple(i for i, arg in enumerate(args) if (old, False) in self.seen.of(arg))
        # A view has other indices.
        views = any(not args[i].same_as(old) for i in same)
        if isinstance(new.ty, relax.TupleType) or views or not overwritable(self.mod[gvar], same):
            return False
        readers = set(self.seen.reads.get((old, False), [])) - {place}
        if readers & self.seen.reaches(place):
            return False
        inplace = relax.op.call_tir_inplace(self._aliasing(gvar, same), relax.Tuple([*args, old]), len(args), new.ty)
        self.bindings[place] = relax.VarBinding(new, self.builder.normalize(inplace))
        self.seen.delay(place, readers)
        return True

    def _aliasing(self, gvar: GlobalVar, same: tuple[int, ...]) -> GlobalVar:
        """The kernel without the promise that its arguments are different tensors."""
        if not same:
            return gvar
        return self.builder.add_func(self.mod[gvar].without_attr(NOALIAS), f"{gvar.name_hint}_in_place")

    def _copied(self, value: relax.Expr, into: relax.Var | None = None) -> relax.Var:
        """A binding that copies ``value``: into a tensor of its own, or into one that everybody has read before."""
        source = te.placeholder([int(d) for d in value.ty.shape], str(value.ty.dtype), "source")
        copy = te.create_prim_func([source, te.compute(source.shape, lambda *i: source(*i), name="copy")])
        gvar = self.builder.add_func(copy, "copy")
        if into is None:
            call = relax.call_tir(gvar, relax.Tuple([value]), value.ty)
        else:
            call = relax.op.call_tir_inplace(gvar, relax.Tuple([value, into]), 1, into.ty)
        result = relax.Var("copied", value.ty)
        self.number[result] = len(self.bindings)
        self.bindings.append(relax.VarBinding(result, self.builder.normalize(call)))
        return result


def overwritable(kernel: tirx.PrimFunc, arguments: tuple[int, ...]) -> bool:
    """Whether a kernel's result, its last parameter, may be in the same memory as these arguments of it.

    It may if every element of them is read before that element of the result is written: by the same step of the one block
    that writes the result, or by loops that have ended before.
    """
    buffers = list(kernel.params)
    result = buffers[-1]
    blocks = list(_blocks(kernel))
    writers = [(top, block) for top, block in blocks if _regions(block.writes, result)]
    if len(writers) != 1:
        return not arguments
    (last, writer), same = writers[0], [buffers[i] for i in arguments]
    (written,) = _regions(writer.writes, result)
    return all(
        top < last or (block.same_as(writer) and _point(region) and _same(region, written))
        for buffer in same
        for top, block in blocks
        for region in _regions(block.reads, buffer)
    )


def _regions(accesses: Any, buffer: tirx.Var) -> list[Any]:
    """The regions of a buffer among what a block reads or writes."""
    return [a.region for a in accesses if a.source.same_as(buffer)]


def _point(region: Any) -> bool:
    return all(isinstance(axis.extent, tirx.IntImm) and int(axis.extent) == 1 for axis in region)


def _same(region: Any, other: Any) -> bool:
    pairs = zip(region, other, strict=True)
    return all(structural_equal(a.min, b.min, map_free_vars=False) for a, b in pairs)


def _blocks(kernel: tirx.PrimFunc) -> Iterator[tuple[int, Any]]:
    """The innermost blocks, each with the number of the outermost loop nest that it is in."""
    body = kernel.body.block.body if isinstance(kernel.body, s_tir.SBlockRealize) else kernel.body
    for top, nest in enumerate(body.seq if isinstance(body, tirx.SeqStmt) else [body]):
        for block in _innermost(nest):
            yield top, block


def _innermost(node: Any) -> Iterator[Any]:
    if isinstance(node, s_tir.SBlockRealize):
        inner = list(_innermost(node.block.body))
        yield from inner or [node.block]
        return
    children = [getattr(node, name, None) for name in ("body", "then_case", "else_case")]
    for child in (*children, *getattr(node, "seq", ())):
        if child is not None:
            yield from _innermost(child)
