"""A step whose loss is NaN or infinite changes nothing, even where state is overwritten: every new value is chosen or refused.

    new = update(old, ..)   -->   fine = isfinite(loss); new = where(fine, update(old, ..), old)

The choice is elementwise and becomes part of the kernel that makes the value: one number more to read, nothing more to write.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.artifact import STATE_ROLES


@module_pass(opt_level=0, name="GuardState")
@dataclass(frozen=True)
class GuardState:
    """Guards every new state that ``train_step`` returns."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        function = mod["train_step"]
        guard = _Guard(relax.BlockBuilder(mod), function)
        with guard.builder.function("guarded", list(function.params)):
            with guard.builder.dataflow():
                for binding in function.body.blocks[0].bindings:
                    guard.emit(binding)
                fields = [guard.builder.emit_output(value) for value in guard.results()]
            guard.builder.emit_func_output(relax.Tuple(fields))
        return signature.replaced(guard.builder, "guarded", "train_step", function)


@dataclass
class _Guard:
    """Emits the bindings of ``function``; ``fine`` is there once the loss is."""

    builder: relax.BlockBuilder
    function: relax.Function
    old: dict[relax.Var, relax.Var] = field(default_factory=dict)
    fine: relax.Var | None = None
    done: set[relax.Var] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ports = dict(zip(signature.outputs(self.function), self.function.body.body.fields, strict=True))
        arguments = dict(zip(signature.inputs(self.function), self.function.params, strict=True))
        given = set(arguments.values())
        for port, new in self.ports.items():
            if port[0] in STATE_ROLES and new not in given:
                self.old[new] = arguments[port]
        self.loss = next(var for (role, _), var in self.ports.items() if role == "loss")

    def emit(self, binding: relax.Binding) -> None:
        """``binding``; what comes after the loss and is new state, guarded, so that all who read it read one value."""
        if self.fine is not None and binding.var in self.old:
            guarded = self._guarded(binding.value, self.old[binding.var])
            self.builder.emit_normalized(relax.VarBinding(binding.var, self.builder.normalize(guarded)))
            self.done.add(binding.var)
            return
        self.builder.emit_normalized(binding)
        if binding.var.same_as(self.loss):
            self.fine = self.builder.emit(R.isfinite(self.loss))

    def _guarded(self, value: relax.Expr, old: relax.Var) -> relax.Expr:
        if isinstance(value, relax.Call) and value.op == Op.get(operators.PUT) and value.args[0].same_as(old):
            # Of a weight of which a part is trained, that part alone has to be chosen.
            _, index, part = value.args
            axis = int(value.attrs["axis"])
            kept = self.builder.emit(R.take(old, index, axis=axis, mode="clip"))
            return operators.put(old, index, self.builder.emit(R.where(self.fine, part, kept)), axis)
        return R.where(self.fine, self.builder.emit(value), old)

    def results(self) -> list[relax.Expr]:
        """What the function returns; state that was made before the loss is guarded here."""
        return [
            self.builder.emit(R.where(self.fine, value, self.old[value]))
            if value in self.old and value not in self.done
            else value
            for value in self.ports.values()
        ]
