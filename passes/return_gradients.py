"""``adjoint`` as an entry of its own: the loss and the gradients, without an update."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.ir.transform import PassContext, module_pass
from tvm.relax.utils import copy_with_new_vars

from tvmtrain import signature


@module_pass(opt_level=0, name="ReturnGradients")
@dataclass(frozen=True)
class ReturnGradients:
    """Adds ``gradients`` with results (loss, gradients) beside ``adjoint``."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        adjoint = mod["adjoint"]
        ports = signature.outputs(adjoint)
        kept = [i for i, (role, _) in enumerate(ports) if role in ("loss", "gradient")]
        copy = copy_with_new_vars(adjoint)
        function = signature.returning(copy, [copy.body.body.fields[i] for i in kept])
        function = signature.with_ports(function, signature.inputs(adjoint), [ports[i] for i in kept])
        mod["gradients"] = function.with_attr("global_symbol", "gradients")
        return mod
