"""What of a weight is trained: a view of it, towards which the backward differentiates.

A pass that trains less than a whole weight, or trains it by another gradient, gives ``forward`` a parameter more, the view, with
the shape of the gradient it wants; nothing reads it. The layer's operator becomes one that knows its view
(``tvmtrain.viewed_conv2d``, ``tvmtrain.viewed_linear``) and differentiates towards it. ``Differentiate`` takes the views away again:
what is left of them is the shape of ("gradient", name).

Ports: ("view", weight name) for a view, ("channels", weight name) for the input channels that it holds, a run-time input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import Op

from tvmtrain import autodiff, operators, signature
from tvmtrain.errors import PlanError

CONVOLUTIONS = ("relax.nn.conv2d", operators.VIEWED_CONV)


@dataclass(frozen=True)
class Reader:
    """The call that reads a weight: ``kind`` "conv2d" or "linear", its operands, and the view and channels it may already have."""

    name: str
    kind: str
    call: relax.Call
    x: relax.Expr
    weight: relax.Var
    view: relax.Var | None = None
    channels: relax.Var | None = None


# What a pass makes of a reader; the arguments it adds are found among the free variables of the result.
Rewrite = Callable[[Reader], relax.Call]


def rewrite(mod: tvm.IRModule, names: Collection[str], change: Rewrite) -> tvm.IRModule:
    """``mod`` with ``change(reader)`` in place of each convolution and linear product in ``forward`` that reads a weight of ``names``.

    Raises PlanError for a weight that anything else reads too, or nothing of the kind: its gradient there would be lost.
    """
    forward = mod["forward"]
    arguments = dict(zip(signature.inputs(forward), forward.params, strict=True))
    found = _Found(arguments, frozenset(names))
    # A refusal comes before anything is built.
    changed: dict[relax.Var, relax.Call] = {}
    for binding in _bindings(forward):
        found.check(binding)
        if (reader := found.reader(binding)) is not None:
            changed[binding.var] = found.changed(reader, change)
    found.check_all_read()
    builder = relax.BlockBuilder(mod)
    with builder.function("forward_viewed"):
        with builder.dataflow():
            for binding in _bindings(forward):
                value = changed.get(binding.var)
                value = binding.value if value is None else builder.normalize(value)
                builder.emit_normalized(relax.VarBinding(binding.var, value))
        builder.emit_func_output(forward.body.body, list(found.arguments.values()))
    built = signature.replaced(builder, "forward_viewed", "forward", forward)
    built["forward"] = signature.with_ports(built["forward"], found.arguments, signature.outputs(forward))
    return built


def _bindings(function: relax.Function) -> list[relax.VarBinding]:
    return list(function.body.blocks[0].bindings)


class _Found:
    """Weights and their transposes, as the bindings go by."""

    def __init__(self, arguments: dict[signature.Port, relax.Var], names: frozenset[str]) -> None:
        self.names = names
        self.weights = {var: name for (role, name), var in arguments.items() if role == "parameter" and name in names}
        self.transposes: dict[relax.Var, relax.Var] = {}
        self.read: set[str] = set()
        self.dropped: set[relax.Var] = set()
        self.all = arguments

    @property
    def arguments(self) -> dict[signature.Port, relax.Var]:
        return {port: var for port, var in self.all.items() if var not in self.dropped}

    def check(self, binding: relax.VarBinding) -> None:
        """Refuse a binding that reads one of the weights, or a transpose of it, in another way than ``reader`` knows."""
        value = binding.value
        used = [var for var in relax.analysis.free_vars(value) if self.transposes.get(var, var) in self.weights]
        if not used or autodiff.stops(value):
            return
        reader = self.reader(binding)
        if binding.var in self.transposes or (reader is not None and len(used) == 1 and reader.x not in used):
            self.read |= {reader.name} if reader is not None else set()
            return
        name = self.weights[self.transposes.get(used[0], used[0])]
        by = str(value.op.name) if isinstance(value, relax.Call) and isinstance(value.op, Op) else type(value).__name__
        raise _not_trainable(name, f"{by.removeprefix('relax.')} reads it, too, and its gradient there would be lost")

    def check_all_read(self) -> None:
        """Refuse weights that no convolution or linear product reads."""
        for name in sorted(self.names - self.read):
            raise _not_trainable(name, "no convolution or linear layer reads it as it is")

    def reader(self, binding: relax.VarBinding) -> Reader | None:
        call = binding.value
        if not isinstance(call, relax.Call) or not isinstance(call.op, Op):
            return None
        name, args = call.op.name, list(call.args)
        if name == "relax.permute_dims" and args[0] in self.weights and len(args[0].ty.shape) == 2:
            self.transposes[binding.var] = args[0]
        if name == "relax.matmul" and args[1] in self.transposes:
            weight = self.transposes[args[1]]
            return self._reader("linear", call, args[0], weight)
        if name in (*CONVOLUTIONS, operators.VIEWED_LINEAR) and args[1] in self.weights:
            return self._reader("conv2d" if name in CONVOLUTIONS else "linear", call, args[0], args[1])
        return None

    def _reader(self, kind: str, call: relax.Call, x: relax.Expr, weight: relax.Var) -> Reader:
        """A layer that is used twice has one view: its gradients add up there."""
        name = self.weights[weight]
        return Reader(name, kind, call, x, weight, self.all.get(("view", name)), self.all.get(("channels", name)))

    def changed(self, reader: Reader, change: Rewrite) -> relax.Call:
        """The new call. Its view and channels become arguments; a view that it has replaced is dropped."""
        value = change(reader)
        for role, var in zip(("view", "channels"), value.args[2:], strict=False):
            old = self.all.get((role, reader.name))
            if old is not None and not old.same_as(var):
                self.dropped.add(old)
            self.all[(role, reader.name)] = var
        return value


def _not_trainable(name: str, why: str) -> PlanError:
    return PlanError(
        f"update plan, weight {name!r}: {why}; a share of it, or gradient filtering, is not possible: use weight = 0 or 1"
    )
