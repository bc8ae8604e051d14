"""The optimizer's update inside the step: ``adjoint`` with gradients becomes ``train_step`` with new parameters.

Rules are those of ``torch.optim`` (2.13), term for term; the learning rate is an input. Gradients are clipped by their common
2-norm first, as ``torch.nn.utils.clip_grad_norm_`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.spec import SGD, Adam, AdamW, Optimizer

Rule = Callable[[str, relax.Var, relax.Expr], relax.Expr]  # (name, parameter, gradient) -> new parameter

RATE: signature.Port = ("rate", "rate")
STEP: signature.Port = ("optimizer", "optimizer:step")
CLIP_EPSILON = 1e-6  # clip_grad_norm_'s own


@module_pass(opt_level=0, name="AppendOptimizer")
@dataclass(frozen=True)
class AppendOptimizer:
    """optimizer: which rule, with its constants. Its state becomes arguments and results, named ``optimizer:kind:parameter``.

    A gradient of some channels (``passes.views``) updates them and their state, and nothing else. The state of a channel that is
    not chosen waits, as in ``torch.optim.SparseAdam``; a zero gradient in ``torch.optim`` would let it decay and go on moving the
    weight, and weight decay would shrink it. fixed: weights whose channels never change; they have state for those alone.

    Time does not decide this. One update of MobileNetV2's last five weights, a quarter of the channels, one busy core of a server
    (``python benchmarks/lazy_state.py``): 2.0 ms waiting and 1.4 ms decaying where new tensors are returned (``put`` copies the rest);
    0.4 and 0.3 ms in place, as chosen channels lie in nearly every cache line; 0.25 ms each at an eighth. What decides: fixed channels
    need only their share of the state's memory, and what a step does not train keeps its bits and can lie in slower memory.
    """

    optimizer: Optimizer
    fixed: frozenset[str] = frozenset()

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        adjoint = mod["adjoint"]
        builder = relax.BlockBuilder(mod)
        update = _Update(builder, self.optimizer, self.fixed, signature.channels(adjoint))
        ports = signature.outputs(adjoint)
        with builder.function("train_step"):
            with builder.dataflow():
                for binding in adjoint.body.blocks[0].bindings:
                    builder.emit_normalized(binding)
                results = dict(zip(ports, adjoint.body.body.fields, strict=True))
                gradients = {name: results.pop(("gradient", name)) for role, name in ports if role == "gradient"}
                update.run(signature.parameters(adjoint), gradients)
                fields = [builder.emit_output(value) for value in [*results.values(), *update.results.values()]]
            arguments = _arguments(adjoint, update)
            builder.emit_func_output(relax.Tuple(fields), list(arguments.values()))
        return _finished(builder.get(), arguments, [*results, *update.results])


def _arguments(adjoint: relax.Function, update: _Update) -> dict[signature.Port, relax.Var]:
    """Inputs and targets, the rate, then all state."""
    given = dict(zip(signature.inputs(adjoint), adjoint.params, strict=True))
    data = {port: var for port, var in given.items() if port[0] in ("input", "target")}
    rest = {port: var for port, var in given.items() if port not in data}
    return {**data, RATE: update.rate, **rest, **update.state}


def _finished(mod: tvm.IRModule, arguments: dict, results: list) -> tvm.IRModule:
    function = signature.with_ports(mod["train_step"], arguments, results)
    del mod[mod.get_global_var("adjoint")]
    mod["train_step"] = function
    return mod


@dataclass
class _Update:
    """Emits one update. ``state``: arguments it needs; ``results``: new values by port."""

    builder: relax.BlockBuilder
    optimizer: Optimizer
    fixed: frozenset[str] = frozenset()
    channels: dict[str, relax.Var] = field(default_factory=dict)
    rate: relax.Var = field(default_factory=lambda: relax.Var("rate", relax.TensorType([], "float32")))
    state: dict[signature.Port, relax.Var] = field(default_factory=dict)
    results: dict[signature.Port, relax.Expr] = field(default_factory=dict)
    slices: dict[str, tuple[relax.Expr, int]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    converted: dict[tuple[relax.Expr, str], relax.Var] = field(default_factory=dict)

    def run(self, parameters: dict[str, relax.Var], gradients: dict[str, relax.Expr]) -> None:
        if self.optimizer.clip_norm is not None:
            gradients = self._clipped(gradients, parameters, self.optimizer.clip_norm)
        rule = self._sgd(self.optimizer) if isinstance(self.optimizer, SGD) else self._adam(self.optimizer)
        self.sizes = {name: [int(d) for d in p.ty.shape] for name, p in parameters.items()}
        for name, gradient in gradients.items():
            self.results[("parameter", name)] = self._updated(rule, name, parameters[name], gradient)

    def _updated(self, rule: Rule, name: str, p: relax.Var, gradient: relax.Expr) -> relax.Expr:
        """The whole parameter after the update of what ``gradient`` is the gradient of."""
        if name not in self.channels:
            return rule(name, p, gradient)
        self.slices[name] = _slice(self.builder, self.channels[name], p, gradient)
        return self._put(name, p, rule(name, self._taken(name, p), gradient))

    def emit(self, value: relax.Expr) -> relax.Var:
        return self.builder.emit(value)

    def _taken(self, name: str, whole: relax.Expr) -> relax.Expr:
        index, axis = self.slices[name]
        return self.emit(R.take(whole, index, axis=axis, mode="clip"))

    def _put(self, name: str, whole: relax.Expr, values: relax.Expr) -> relax.Expr:
        index, axis = self.slices[name]
        return self.emit(operators.put(whole, index, values, axis))

    def _moved(self, kind: str, name: str, p: relax.Expr, g: relax.Expr, rule: Callable) -> relax.Expr:
        """rule(old) of a state of p's gradient; the new state becomes a result."""
        port = ("optimizer", f"optimizer:{kind}:{name}")
        like = self._state_shape(name, p, g)
        self.state[port] = old = relax.Var(port[1], relax.TensorType(like, p.ty.dtype))
        if name not in self.slices or name in self.fixed:
            self.results[port] = new = rule(old)
            return new
        new = rule(self._taken(name, old))
        self.results[port] = self._put(name, old, new)
        return new

    def _state_shape(self, name: str, p: relax.Expr, g: relax.Expr) -> list[int]:
        """That of the gradient, which may be one number for all taps of a kernel; all channels, where they take turns."""
        shape = [int(d) for d in g.ty.shape]
        if name in self.slices and name not in self.fixed:
            axis = self.slices[name][1]
            shape[axis] = self.sizes[name][axis]
        return shape

    def _square_sum(self, g: relax.Expr, p: relax.Var) -> relax.Expr:
        """The sum of squares of a gradient that may be one number for all taps of a kernel."""
        total = self.emit(R.sum(self.emit(R.multiply(g, g))))
        taps = math.prod(int(n) for n, m in zip(list(p.ty.shape)[2:], list(g.ty.shape)[2:], strict=True) if int(m) == 1)
        return total if taps == 1 else self.emit(R.multiply(total, _const(float(taps), total)))

    def _clipped(
        self, gradients: dict[str, relax.Expr], parameters: dict[str, relax.Var], limit: float
    ) -> dict[str, relax.Expr]:
        squares = [self._square_sum(g, parameters[name]) for name, g in gradients.items()]
        total = squares[0]
        for square in squares[1:]:
            total = self.emit(R.add(total, self._as(square, total)))
        norm = self.emit(R.add(self.emit(R.sqrt(total)), _const(CLIP_EPSILON, total)))
        factor = self.emit(R.minimum(self.emit(R.divide(_const(limit, norm), norm)), _const(1.0, norm)))
        return {name: self.emit(R.multiply(g, self._as(factor, g))) for name, g in gradients.items()}

    def _as(self, scalar: relax.Expr, like: relax.Expr) -> relax.Expr:
        """``scalar`` in the precision of ``like``, converted once."""
        if scalar.ty.dtype == like.ty.dtype:
            return scalar
        key = (scalar, str(like.ty.dtype))
        if key not in self.converted:
            self.converted[key] = self.emit(R.astype(scalar, like.ty.dtype))
        return self.converted[key]

    def _sgd(self, o: SGD) -> Rule:
        """d = g + wd p; b = m b + d; p -= lr (d + m b if nesterov else b)."""

        def rule(name: str, p: relax.Var, g: relax.Expr) -> relax.Expr:
            if o.weight_decay:
                g = self.emit(R.add(g, self.emit(R.multiply(p, _const(o.weight_decay, p)))))
            if o.momentum:
                buffer = self._moved("momentum", name, p, g, lambda old: self._sum(old, o.momentum, g))
                g = self.emit(R.add(g, self.emit(R.multiply(buffer, _const(o.momentum, p))))) if o.nesterov else buffer
            return self.emit(R.subtract(p, self.emit(R.multiply(g, self._as(self.rate, p)))))

        return rule

    def _adam(self, o: Adam | AdamW) -> Rule:
        """m, v: moving means of g and g^2; p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)."""
        (beta1, beta2), eps = o.betas, o.eps
        size, root = self._bias_corrections(beta1, beta2)

        def rule(name: str, p: relax.Var, g: relax.Expr) -> relax.Expr:
            if o.weight_decay and isinstance(o, Adam):
                g = self.emit(R.add(g, self.emit(R.multiply(p, _const(o.weight_decay, p)))))
            if o.weight_decay and isinstance(o, AdamW):
                rate = self._as(self.rate, p)
                keep = self.emit(R.subtract(_const(1.0, p), self.emit(R.multiply(rate, _const(o.weight_decay, p)))))
                p_decayed = self.emit(R.multiply(p, keep))
            else:
                p_decayed = p
            mean = self._moved("mean", name, p, g, lambda old: self._blend(old, beta1, g))
            squared = self.emit(R.multiply(g, g))
            square = self._moved("square", name, p, g, lambda old: self._blend(old, beta2, squared))
            denominator = self.emit(R.add(self.emit(R.divide(self.emit(R.sqrt(square)), self._as(root, p))), _const(eps, p)))
            step = self.emit(R.multiply(self.emit(R.divide(mean, denominator)), self._as(size, p)))
            return self.emit(R.subtract(p_decayed, step))

        return rule

    def _sum(self, old: relax.Expr, factor: float, value: relax.Expr) -> relax.Expr:
        return self.emit(R.add(self.emit(R.multiply(old, _const(factor, old))), value))

    def _blend(self, old: relax.Expr, beta: float, value: relax.Expr) -> relax.Expr:
        return self._sum(old, beta, self.emit(R.multiply(value, _const(1.0 - beta, old))))

    def _bias_corrections(self, beta1: float, beta2: float) -> tuple[relax.Expr, relax.Expr]:
        """(lr / (1 - beta1^t), sqrt(1 - beta2^t)) in double precision: in single, 1 - 0.999 has lost four digits."""
        self.state[STEP] = relax.Var(STEP[1], relax.TensorType([], "int64"))
        self.results[STEP] = self.emit(R.add(self.state[STEP], relax.const(1, "int64")))
        step = self.emit(R.astype(self.results[STEP], "float64"))
        first, second = (self.emit(R.subtract(_f64(1.0), self.emit(R.power(_f64(beta), step)))) for beta in (beta1, beta2))
        size = self.emit(R.divide(self.emit(R.astype(self.rate, "float64")), first))
        root = self.emit(R.sqrt(second))
        return size, root


def _slice(builder: relax.BlockBuilder, channels: relax.Var, p: relax.Var, gradient: relax.Expr) -> tuple[relax.Expr, int]:
    """(places, axis) of the chosen channels in a weight: axis 1, or the outputs on axis 0 of a depthwise convolution."""
    if len(p.ty.shape) < 4 or int(p.ty.shape[1]) != 1:
        return channels, 1
    each = int(gradient.ty.shape[0]) // int(channels.ty.shape[0])
    return operators.outputs_of(channels, each, builder), 0


def _const(value: float, like: relax.Expr) -> relax.Constant:
    return relax.const(value, like.ty.dtype)


def _f64(value: float) -> relax.Constant:
    return relax.const(value, "float64")
