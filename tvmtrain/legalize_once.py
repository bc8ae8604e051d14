"""Equal calls of operators become the same loops: those of the first one, instead of loops that are made, compared and thrown away.

    a = multiply(x, y); b = multiply(u, v)   -->   a = call_tir(multiply, (x, y)); b = call_tir(multiply, (u, v))

A training step has ten calls of an operator for each kernel that it ends up with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tvm
from tvm import relax
from tvm.ir import Op
from tvm_ffi import StructuralKey

from tvmtrain.schedules.merging import CALL_TIR

# What makes loops of a call of an operator, as ``relax.transform.LegalizeOps`` asks for it.
Legalization = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def legalize_once(ours: Mapping[str, Legalization]) -> tvm.ir.transform.Pass:
    """``LegalizeOps`` with ``ours`` in place of what is registered; for one module."""
    registered = {name: Op.get(name).get_attr("FLegalize") for name in Op.list_op_names() if name not in ours}
    ways = {name: way for name, way in registered.items() if way is not None} | dict(ours)
    return relax.transform.LegalizeOps({name: _once(way) for name, way in ways.items()})


def _once(way: Legalization) -> Legalization:
    made: dict[StructuralKey, tuple[relax.Call, list[int]]] = {}

    def legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        key = _key(call)
        if key not in made:
            result = way(bb, call)
            read = _read(result, call)
            if read is None:
                return result
            made[key] = result, read
        kernel, read = made[key]
        return relax.Call(CALL_TIR, [kernel.args[0], relax.Tuple([call.args[i] for i in read])], None, kernel.ty_args)

    return legalize


def _key(call: relax.Call) -> StructuralKey:
    """What loops depend on: of variables the type, and which of them are the same; numbers, shapes and attributes as they are."""
    first = {arg: i for i, arg in reversed([*enumerate(call.args)]) if isinstance(arg, relax.Var)}
    args = [[first[arg], arg.ty] if isinstance(arg, relax.Var) else [arg] for arg in call.args]
    return StructuralKey([args, call.attrs, call.ty_args])  # type: ignore[call-arg]  # a stub of its C++ fields


def _read(result: relax.Expr, call: relax.Call) -> list[int] | None:
    """Which of the operator's arguments the result's one kernel reads; None if it is anything else.

    Sizes that are found where the step runs (a slice's) come from code that was emitted beside the kernel, for this call.
    """
    if not isinstance(result, relax.Call) or not result.op.same_as(CALL_TIR) or len(result.args) != 2:
        return None
    if any(relax.analysis.tir_vars_in_type(ty) for ty in result.ty_args):
        return None
    read: list[int] = []
    for arg in result.args[1]:
        read += [i for i, own in enumerate(call.args) if own.same_as(arg)][:1]
    return read if len(read) == len(result.args[1]) else None
