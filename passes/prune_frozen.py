"""Compile what a plan freezes as inference: BatchNorm with frozen statistics becomes part of its convolution's weight.

    y = batch_norm(conv2d(x, w), gamma, beta, mean, var)   -->   y = conv2d(x, w') + b'
    prepare: w' = w * s, b' = beta - mean * s, s = gamma / sqrt(var + eps)

A convolution's own bias b becomes part of b', too: b' = beta + (b - mean) * s. w' and b' are made by an entry of their own,
``prepare``, which runs when weights are loaded; the step takes them as arguments of the role "prepared". So weights stay out of the
code, and other ones can be loaded. Where the convolution is trained, or something else reads its result, only the BatchNorm is
prepared: y * s + b'.

That the backward ends at the first trained layer is the work of ``StopGradients``: what no update consumes is never made.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.artifact import MODEL_ROLES

PREPARE = "prepare"
FUNCTIONS = ("forward", "predict")


@module_pass(opt_level=0, name="PruneFrozen")
@dataclass(frozen=True)
class PruneFrozen:
    """trained: parameters that the step updates; all others, and the buffers that ``forward`` leaves alone, are frozen."""

    trained: tuple[str, ...]

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        changing = {port for port in signature.outputs(mod["forward"]) if port[0] == "buffer"}
        prepared = _Prepared(frozenset(changing | {("parameter", name) for name in self.trained}))
        functions = {name: _folded(mod, name, prepared) for name in FUNCTIONS if name in mod}
        mod = tvm.IRModule({**mod.functions}, attrs=mod.attrs)
        for name, function in functions.items():
            mod[name] = function
        if prepared.results:
            mod[PREPARE] = prepared.function()
        return mod


class _Prepared:
    """The entry ``prepare`` while it is being written; both functions share what they have in common."""

    def __init__(self, changing: frozenset[signature.Port]) -> None:
        self.changing = changing
        self.builder = relax.BlockBuilder()
        self.recipes: list[_Fold] = []
        self.results: dict[signature.Port, relax.TensorType] = {}

    def want(self, fold: _Fold) -> tuple[signature.Port, signature.Port]:
        """The ports of (weight or scale, shift) of a frozen BatchNorm."""
        factor, shift = ("prepared", fold.name), ("prepared", f"{fold.name}:shift")
        if factor not in self.results:
            self.recipes.append(fold)
            per_channel = relax.TensorType(fold.per_channel, fold.dtype)
            self.results[factor] = per_channel if fold.weight is None else fold.weight.ty
            self.results[shift] = per_channel
        return factor, shift

    def function(self) -> relax.Function:
        arguments: dict[signature.Port, relax.Var] = {}
        with self.builder.function(PREPARE):
            with self.builder.dataflow():
                fields = [
                    self.builder.emit_output(value) for fold in self.recipes for value in fold.emit(self.builder, arguments)
                ]
            self.builder.emit_func_output(relax.Tuple(fields), list(arguments.values()))
        return signature.with_ports(self.builder.get()[PREPARE], arguments, self.results)


@dataclass(frozen=True)
class _Fold:
    """A frozen BatchNorm, with weight and bias of its convolution where they are folded, too. ``ports`` name the original tensors."""

    ports: dict[relax.Var, signature.Port]
    batch_norm: relax.Call
    weight: relax.Var | None
    bias: relax.Var | None = None

    @property
    def name(self) -> str:
        """ "features.0.0.weight:features.0.1", with ":features.0.0.bias" if that is folded, or "features.0.1:scale"."""
        owner = self.ports[self.batch_norm.args[3]][1].rpartition(".")[0]
        bias = "" if self.bias is None else f":{self.ports[self.bias][1]}"
        return f"{owner}:scale" if self.weight is None else f"{self.ports[self.weight][1]}:{owner}{bias}"

    @property
    def per_channel(self) -> list[int]:
        """A shape that broadcasts along the channels of x."""
        return [1, int(self.batch_norm.args[3].ty.shape[0]), *[1] * (len(self.batch_norm.args[0].ty.shape) - 2)]

    @property
    def dtype(self) -> str:
        return str(self.batch_norm.args[3].ty.dtype)

    def emit(self, builder: relax.BlockBuilder, arguments: dict[signature.Port, relax.Var]) -> list[relax.Expr]:
        """(weight or scale, shift) from the original tensors, which become ``arguments``."""

        def own(value: relax.Expr) -> relax.Expr:
            if not isinstance(value, relax.Var):
                return value  # no affine parameters: constants
            port = self.ports[value]
            return arguments.setdefault(port, relax.Var(port[1], value.ty))

        gamma, beta, mean, var = (own(value) for value in self.batch_norm.args[1:5])
        deviation = R.sqrt(R.add(var, relax.const(float(self.batch_norm.attrs.epsilon), self.dtype)))
        scale = builder.emit(R.divide(gamma, deviation))
        centre = mean if self.bias is None else R.subtract(mean, own(self.bias))
        shift = builder.emit(R.reshape(R.subtract(beta, R.multiply(centre, scale)), self.per_channel))
        if self.weight is None:
            return [builder.emit(R.reshape(scale, self.per_channel)), shift]
        per_filter = R.reshape(scale, [self.per_channel[1], 1, 1, 1])
        return [builder.emit(R.multiply(own(self.weight), per_filter)), shift]


def _folded(mod: tvm.IRModule, name: str, prepared: _Prepared) -> relax.Function:
    """The function ``name`` with every frozen BatchNorm prepared."""
    function = mod[name]
    ports = {var: port for port, var in zip(signature.inputs(function), function.params, strict=True)}
    rewriting = _Rewriting(
        function, {v: p for v, p in ports.items() if p[0] in MODEL_ROLES and p not in prepared.changing}, prepared
    )
    builder = relax.BlockBuilder(mod)
    with builder.function(f"{name}_folded"):
        with builder.dataflow():
            for binding in function.body.blocks[0].bindings:
                value = rewriting.value(builder, binding)
                builder.emit_normalized(relax.VarBinding(binding.var, builder.normalize(value)))
        arguments = {port: var for var, port in ports.items()} | rewriting.added
        builder.emit_func_output(function.body.body, list(arguments.values()))
    folded = builder.get()[f"{name}_folded"].with_attrs(dict(function.attrs))
    return signature.with_ports(folded, arguments, signature.outputs(function))


class _Rewriting:
    """One function's bindings as they go by."""

    def __init__(self, function: relax.Function, frozen: dict[relax.Var, signature.Port], prepared: _Prepared) -> None:
        self.frozen, self.prepared = frozen, prepared
        self.added: dict[signature.Port, relax.Var] = {}
        self.calls: dict[relax.Var, relax.Call] = {}
        bindings = function.body.blocks[0].bindings
        self.reads = Counter(v for b in bindings for v in relax.analysis.free_vars(b.value))
        self.reads.update(relax.analysis.free_vars(function.body.body))

    def value(self, builder: relax.BlockBuilder, binding: relax.VarBinding) -> relax.Expr:
        """The binding's value; in place of the first result of a frozen BatchNorm, its prepared form."""
        value = binding.value
        if isinstance(value, relax.Call):
            self.calls[binding.var] = value
        if isinstance(value, relax.TupleGetItem) and value.index == 0:
            norm = self.calls.get(value.tuple_value)
            if norm is not None and norm.op == Op.get("relax.nn.batch_norm") and self._is_frozen(norm.args[1:5]):
                return self._applied(builder, norm)
        return value

    def _is_frozen(self, tensors: list[relax.Expr]) -> bool:
        return all(not isinstance(t, relax.Var) or t in self.frozen for t in tensors) and isinstance(tensors[2], relax.Var)

    def _applied(self, builder: relax.BlockBuilder, norm: relax.Call) -> relax.Expr:
        x = norm.args[0]
        convolution, bias = self._frozen_convolution(x)
        fold = _Fold(self.frozen, norm, None if convolution is None else convolution.args[1], bias)
        factor, shift = (self._argument(port) for port in self.prepared.want(fold))
        if convolution is None:
            return R.add(builder.emit(R.multiply(x, factor)), shift)
        folded = R.nn.conv2d(convolution.args[0], factor, **operators.geometry_of(convolution))
        return R.add(builder.emit(folded), shift)

    def _frozen_convolution(self, x: relax.Var) -> tuple[relax.Call | None, relax.Var | None]:
        """The convolution with a frozen weight that made x, and the frozen bias added to it, if nothing else reads x."""
        bias = self._frozen_bias(self.calls.get(x))
        source = x if bias is None else self.calls[x].args[0]
        call = self.calls.get(source)
        made = call is not None and call.op == Op.get("relax.nn.conv2d") and call.args[1] in self.frozen
        alone = self.reads[x] == 1 and self.reads[source] == 1
        return (call, bias) if made and alone else (None, None)

    def _frozen_bias(self, added: relax.Call | None) -> relax.Var | None:
        """The frozen parameter [O] that is added as [1, O, 1, 1], the second operand."""
        operand = added.args[1] if added is not None and added.op == Op.get("relax.add") else None
        if added is None or not isinstance(operand, relax.Var):
            return None
        reshaped = self.calls.get(operand)
        if reshaped is None or reshaped.op != Op.get("relax.reshape") or reshaped.args[0] not in self.frozen:
            return None
        bias, channels = reshaped.args[0], int(added.ty.shape[1])
        per_channel = [int(d) for d in operand.ty.shape] == [1, channels, 1, 1] and len(bias.ty.shape) == 1
        return bias if per_channel else None

    def _argument(self, port: signature.Port) -> relax.Var:
        return self.added.setdefault(port, relax.Var(port[1], self.prepared.results[port]))
