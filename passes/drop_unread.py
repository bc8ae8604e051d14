"""Drop the state that a function does not read from its arguments: folded weights, counters, statistics of a frozen front."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import signature
from tvmtrain.artifact import STATE_ROLES


@module_pass(opt_level=0, name="DropUnread")
@dataclass(frozen=True)
class DropUnread:
    """Of every function with ports; inputs, targets and the rate stay, whether read or not."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        mod = tvm.IRModule({**mod.functions}, attrs=mod.attrs)
        for name, function in list(mod.functions.items()):
            if isinstance(function, relax.Function) and signature.has_ports(function):
                mod[name] = _read_only(function)
        return mod


def _read_only(function: relax.Function) -> relax.Function:
    ports = signature.inputs(function)
    read = set(relax.analysis.free_vars(function.body))
    # State that is replaced without being read stays: what a step returns as state, it takes.
    needed = {port for port in ports if port[0] not in STATE_ROLES} | set(signature.outputs(function))
    kept = [i for i, (port, var) in enumerate(zip(ports, function.params, strict=True)) if port in needed or var in read]
    params = [function.params[i] for i in kept]
    fewer = relax.Function(params, function.body, function.ret_ty, function.is_pure, function.attrs)
    return signature.with_ports(fewer, [ports[i] for i in kept], signature.outputs(function))
