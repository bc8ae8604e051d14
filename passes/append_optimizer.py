"""The optimizer's update inside the step: ``adjoint`` with gradients becomes ``train_step`` with new parameters.

Rules are those of ``torch.optim`` (2.13), term for term; the learning rate is an input. Gradients are clipped by their common
2-norm first, as ``torch.nn.utils.clip_grad_norm_`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import signature
from tvmtrain.spec import SGD, Adam, AdamW, Optimizer

Rule = Callable[[str, relax.Var, relax.Expr], relax.Expr]  # (name, parameter, gradient) -> new parameter

RATE: signature.Port = ("rate", "rate")
STEP: signature.Port = ("optimizer", "optimizer:step")
CLIP_EPSILON = 1e-6  # clip_grad_norm_'s own


@module_pass(opt_level=0, name="AppendOptimizer")
@dataclass(frozen=True)
class AppendOptimizer:
    """optimizer: which rule, with its constants. Its state becomes arguments and results, named ``optimizer:kind:parameter``."""

    optimizer: Optimizer

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        adjoint = mod["adjoint"]
        builder = relax.BlockBuilder(mod)
        update = _Update(builder, self.optimizer)
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
    rate: relax.Var = field(default_factory=lambda: relax.Var("rate", relax.TensorType([], "float32")))
    state: dict[signature.Port, relax.Var] = field(default_factory=dict)
    results: dict[signature.Port, relax.Expr] = field(default_factory=dict)
    converted: dict[tuple[relax.Expr, str], relax.Var] = field(default_factory=dict)

    def run(self, parameters: dict[str, relax.Var], gradients: dict[str, relax.Expr]) -> None:
        if self.optimizer.clip_norm is not None:
            gradients = self._clipped(gradients, self.optimizer.clip_norm)
        rule = self._sgd(self.optimizer) if isinstance(self.optimizer, SGD) else self._adam(self.optimizer)
        for name, gradient in gradients.items():
            self.results[("parameter", name)] = rule(name, parameters[name], gradient)

    def emit(self, value: relax.Expr) -> relax.Var:
        return self.builder.emit(value)

    def _state(self, kind: str, name: str, like: relax.Var) -> tuple[signature.Port, relax.Var]:
        port = ("optimizer", f"optimizer:{kind}:{name}")
        self.state[port] = relax.Var(port[1], like.ty)
        return port, self.state[port]

    def _clipped(self, gradients: dict[str, relax.Expr], limit: float) -> dict[str, relax.Expr]:
        squares = [self.emit(R.sum(self.emit(R.multiply(g, g)))) for g in gradients.values()]
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
                port, old = self._state("momentum", name, p)
                buffer = self.emit(R.add(self.emit(R.multiply(old, _const(o.momentum, p))), g))
                self.results[port] = buffer
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
            mean = self._moving("mean", name, p, g, beta1)
            square = self._moving("square", name, p, self.emit(R.multiply(g, g)), beta2)
            denominator = self.emit(R.add(self.emit(R.divide(self.emit(R.sqrt(square)), self._as(root, p))), _const(eps, p)))
            step = self.emit(R.multiply(self.emit(R.divide(mean, denominator)), self._as(size, p)))
            return self.emit(R.subtract(p_decayed, step))

        return rule

    def _moving(self, kind: str, name: str, p: relax.Var, value: relax.Expr, beta: float) -> relax.Expr:
        port, old = self._state(kind, name, p)
        kept = self.emit(R.multiply(old, _const(beta, old)))
        self.results[port] = self.emit(R.add(kept, self.emit(R.multiply(value, _const(1.0 - beta, old)))))
        return self.results[port]

    def _bias_corrections(self, beta1: float, beta2: float) -> tuple[relax.Expr, relax.Expr]:
        """(lr / (1 - beta1^t), sqrt(1 - beta2^t)) in double precision: in single, 1 - 0.999 has lost four digits."""
        self.state[STEP] = relax.Var(STEP[1], relax.TensorType([], "int64"))
        self.results[STEP] = self.emit(R.add(self.state[STEP], relax.const(1, "int64")))
        step = self.emit(R.astype(self.results[STEP], "float64"))
        first, second = (self.emit(R.subtract(_f64(1.0), self.emit(R.power(_f64(beta), step)))) for beta in (beta1, beta2))
        size = self.emit(R.divide(self.emit(R.astype(self.rate, "float64")), first))
        root = self.emit(R.sqrt(second))
        return size, root


def _const(value: float, like: relax.Expr) -> relax.Constant:
    return relax.const(value, like.ty.dtype)


def _f64(value: float) -> relax.Constant:
    return relax.const(value, "float64")
