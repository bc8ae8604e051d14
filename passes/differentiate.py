"""Reverse-mode differentiation of ``forward`` with respect to the trained parameters, by Relax's own Gradient pass."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.ir.transform import PassContext, module_pass
from tvm.relax.analysis import remove_all_unused

from tvmtrain import autodiff, operators, signature


@module_pass(opt_level=0, name="Differentiate")
@dataclass(frozen=True)
class Differentiate:
    """``forward`` -> ``adjoint``: results (loss, outputs, new state, gradients), gradients in the order of ``trained``."""

    trained: tuple[str, ...]

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        forward = mod["forward"]
        variables = signature.differentiable(forward)
        wrt = [variables[name] for name in self.trained]
        mod = relax.transform.Gradient("forward", wrt, target_index=0)(mod)
        function = _flat(_Unmark().visit_expr(mod["forward_adjoint"]))
        ports = signature.outputs(forward) + [("gradient", name) for name in self.trained]
        function = _without_views(function, signature.inputs(forward), ports)
        for name in ("forward", "forward_adjoint"):
            del mod[mod.get_global_var(name)]
        mod["adjoint"] = function.with_attr("global_symbol", "adjoint")
        return mod


@relax.expr_functor.mutator
class _Unmark(relax.PyExprMutator):
    """The marks of StopGradients and the views have done their work: ``no_grad(x)`` is x, a viewed layer a plain one."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if autodiff.stops(call):
            return self.visit_expr(call.args[0])
        if call.op == Op.get(operators.VIEWED_CONV):
            return self.visit_expr(operators.plain_conv2d(call))
        if call.op == Op.get(operators.VIEWED_LINEAR):
            return self.visit_expr(operators.plain_linear(call))
        return super().visit_call_(call)


def _without_views(function: relax.Function, inputs: list[signature.Port], outputs: list[signature.Port]) -> relax.Function:
    """``function`` without the parameters that only had a gradient.

    A view of which no gradient is asked for has a mark that stopped it; it goes first.
    """
    function = signature.with_ports(remove_all_unused(function), inputs, outputs)
    return signature.keeping(function, lambda port, _: port[0] != "view")


def _flat(function: relax.Function) -> relax.Function:
    """((results), (gradients)) as one tuple."""
    results, gradients = function.body.body.fields
    return signature.returning(function, [*results.fields, *gradients.fields])
