"""Reverse-mode differentiation of ``forward`` with respect to the trained parameters, by Relax's own Gradient pass."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import autodiff, signature


@module_pass(opt_level=0, name="Differentiate")
@dataclass(frozen=True)
class Differentiate:
    """``forward`` -> ``adjoint``: results (loss, outputs, new state, gradients), gradients in the order of ``trained``."""

    trained: tuple[str, ...]

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        forward = mod["forward"]
        variables = signature.parameters(forward)
        wrt = [variables[name] for name in self.trained]
        mod = relax.transform.Gradient("forward", wrt, target_index=0)(mod)
        function = _flat(_Unmark().visit_expr(mod["forward_adjoint"]))
        ports = signature.outputs(forward) + [("gradient", name) for name in self.trained]
        function = signature.with_ports(function, signature.inputs(forward), ports)
        for name in ("forward", "forward_adjoint"):
            del mod[mod.get_global_var(name)]
        mod["adjoint"] = function.with_attr("global_symbol", "adjoint")
        return mod


@relax.expr_functor.mutator
class _Unmark(relax.PyExprMutator):
    """The marks of StopGradients have done their work: ``no_grad(x)`` is x."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        return self.visit_expr(call.args[0]) if autodiff.stops(call) else super().visit_call_(call)


def _flat(function: relax.Function) -> relax.Function:
    """((results), (gradients)) as one tuple."""
    results, gradients = function.body.body.fields
    return signature.returning(function, [*results.fields, *gradients.fields])
