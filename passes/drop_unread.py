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
    read = set(relax.analysis.free_vars(function.body))
    # State that is replaced without being read stays: what a step returns as state, it takes.
    returned = set(signature.outputs(function))
    return signature.keeping(function, lambda port, var: port[0] not in STATE_ROLES or port in returned or var in read)
