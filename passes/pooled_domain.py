"""Keep filtered gradients in patches from one convolution to the next, where that gives the same numbers.

    g1 = patch_mean(where(mask, unpatch(g), 0))   -->   g1 = g * patch_mean(mask)
    db = sum(where(mask, unpatch(g), 0))          -->   db = sum(g * patch_mean(mask) * places)

Between two filtered convolutions nothing then has the full resolution but masks, of which the forward makes the means. What is
pushed through is a sum of terms unpatch(g) * f1 * f2 .., with g in patches and factors f of full resolution:

1. ``unpatch(g)``, and a gradient that is one number per map, broadcast (of a global pooling), are one term without factors;
2. a mask, or a product with any tensor of the same shape, is a factor more (a derivative of an activation, say);
3. a product with one number for each channel, or image and channel, is a product of g (BatchNorm with running statistics);
4. a sum of such gradients is the terms of both, those with equal patches and factors as one.

A mean over patches that lie within those of every term is then the sum of unpatch'(g) * patch_mean(f1 * f2 ..), where unpatch' goes
from patches to finer patches, and to equal ones not at all. Where patches of two layers overlap in part the gradient goes through
the full resolution, as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op
from tvm.ir.expr import Constant
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R
from tvm.relax.analysis import remove_all_unused

from tvmtrain import filtering, operators, signature
from tvmtrain.filtering import Patches

# A residual network adds a term with every block; beyond these the full resolution is cheaper.
MOST_TERMS = 8


@module_pass(opt_level=0, name="PooledDomain")
@dataclass(frozen=True)
class PooledDomain:
    """Rewrites ``adjoint``; a function without filtered gradients stays as it is."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        adjoint = mod["adjoint"]
        bindings = adjoint.body.blocks[0].bindings
        if all(_named(b.value) != filtering.PATCH_MEAN for b in bindings):
            return mod
        builder = relax.BlockBuilder(mod)
        terms = _Terms(builder)
        with builder.function("adjoint_pooled", list(adjoint.params)):
            with builder.dataflow():
                for binding in bindings:
                    value = terms.rewritten(binding.value)
                    builder.emit_normalized(relax.VarBinding(binding.var, builder.normalize(value)))
                    terms.note(binding.var, binding.value)
            builder.emit_func_output(adjoint.body.body)
        built = signature.replaced(builder, "adjoint_pooled", "adjoint", adjoint)
        built["adjoint"] = remove_all_unused(built["adjoint"])
        return built


@dataclass(frozen=True)
class _Term:
    """unpatch(g) times factors; masks are Booleans."""

    g: relax.Expr
    patches: Patches
    factors: tuple[relax.Expr, ...] = ()


@dataclass
class _Terms:
    """The gradients that are sums of terms, as the bindings go by."""

    builder: relax.BlockBuilder
    known: dict[relax.Var, tuple[_Term, ...]] = field(default_factory=dict)
    tuples: dict[relax.Var, relax.Tuple] = field(default_factory=dict)
    means: dict[tuple, relax.Expr] = field(default_factory=dict)

    # ---- what is a sum of terms ----

    def note(self, var: relax.Var, value: relax.Expr) -> None:
        """Remember ``var`` if its value is a sum of terms."""
        if isinstance(value, relax.Tuple):
            self.tuples[var] = value
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.tuples:
            value = self.tuples[value.tuple_value].fields[value.index]
        terms = self.known.get(value) if isinstance(value, relax.Var) else self._terms(value)
        if terms and len(terms) <= MOST_TERMS:
            self.known[var] = terms

    def _terms(self, value: relax.Expr) -> tuple[_Term, ...] | None:
        name = _named(value)
        args = list(value.args) if name else []
        if name == filtering.UNPATCH:
            return (_Term(args[0], filtering.patches_of(value)),)
        if name == "relax.broadcast_to" and len(_shape(value)) == 4 and _shape(args[0]) == [*_shape(value)[:2], 1, 1]:
            rows, columns = _shape(value)[2:]
            return (_Term(args[0], filtering.whole((rows, columns))),)
        if name == "relax.where" and _is_zero(args[2]) and _shape(args[0]) == _shape(args[1]):
            return self._times(args[1], args[0])
        if name == "relax.negative":
            return self._each(args[0], R.negative)
        if name in ("relax.multiply", "relax.divide"):
            return self._product(value, name, args)
        if name == "relax.add" and all(arg in self.known for arg in args) and _shape(args[0]) == _shape(args[1]):
            return self._sum((*self.known[args[0]], *self.known[args[1]]))
        return None

    def _product(self, value: relax.Call, name: str, args: Sequence[relax.Expr]) -> tuple[_Term, ...] | None:
        a, b = args if args[0] in self.known or name == "relax.divide" else (args[1], args[0])
        if a not in self.known or _shape(a) != _shape(value):
            return None
        if _per_channel(b):
            return self._each(a, lambda g: (R.multiply if name == "relax.multiply" else R.divide)(g, b))
        return self._times(a, b) if name == "relax.multiply" and _shape(a) == _shape(b) else None

    def _each(self, var: relax.Expr, change: Callable[[relax.Expr], relax.Expr]) -> tuple[_Term, ...] | None:
        if var not in self.known:
            return None
        return tuple(replace(term, g=self._emit(change(term.g))) for term in self.known[var])

    def _times(self, var: relax.Expr, factor: relax.Expr) -> tuple[_Term, ...] | None:
        """A factor more; a mask twice is a mask once."""
        if var not in self.known:
            return None
        terms = self.known[var]
        return tuple(
            term if _is_mask(factor) and factor in term.factors else replace(term, factors=(*term.factors, factor))
            for term in terms
        )

    def _sum(self, terms: Iterable[_Term]) -> tuple[_Term, ...]:
        merged: dict[tuple, _Term] = {}
        for term in terms:
            key = (term.patches, term.factors)
            if key in merged:
                term = replace(term, g=self._emit(R.add(merged[key].g, term.g)))
            merged[key] = term
        return tuple(merged.values())

    # ---- what is made of it ----

    def rewritten(self, value: relax.Expr) -> relax.Expr:
        """``value``; for a mean over patches or a sum of known terms, the same without the full resolution."""
        terms = self.known.get(value.args[0]) if _named(value) and len(value.args) else None
        if not terms:
            return value
        if _named(value) == filtering.PATCH_MEAN:
            mean = self._mean(terms, filtering.patches_of(value))
            return value if mean is None else mean
        if _sums_maps(value):
            return self._total(terms, value)
        if _named(value) == operators.GRADIENT_SUMS and {int(a) for a in value.attrs["axes"]} >= {2, 3}:
            return self._gradient_sums(terms, value)
        return value

    def _gradient_sums(self, terms: Sequence[_Term], value: relax.Call) -> relax.Expr:
        """The sums of g and of g * (x - mean), where g is those terms."""
        g, x, *mean = value.args
        axes = [int(a) for a in value.attrs["axes"]]
        total = R.sum(g, axes, keepdims=True)
        along = self._times(g, self._emit(R.subtract(x, mean[0])) if mean else x)
        assert along is not None
        return relax.Tuple([self._emit(self._total(terms, total)), self._emit(self._total(along, total))])

    def _mean(self, terms: Sequence[_Term], patches: Patches) -> relax.Expr | None:
        within = [inner for term in terms if (inner := patches.within(term.patches)) is not None]
        if len(within) < len(terms):
            return None
        parts = []
        for term, inner in zip(terms, within, strict=True):
            # One number per map is broadcast by the product with the mean.
            spread = not inner.trivial and (inner.places != (1, 1) or not term.factors)
            g = self._emit(filtering.unpatch(term.g, inner)) if spread else term.g
            parts.append(self._weighted(g, term.factors, patches))
        return self._added(parts)

    def _total(self, terms: Sequence[_Term], value: relax.Call) -> relax.Expr:
        """The sum over places is the sum over patches of the mean times the number of places."""
        parts = []
        for term in terms:
            counts = term.patches.counts().astype(np.dtype(str(term.g.ty.dtype)))
            number = relax.const(counts[None, None]) if counts.min() < counts.max() else relax.const(counts.flat[0])
            weighted = self._emit(R.multiply(self._weighted(term.g, term.factors, term.patches), number))
            parts.append(self._emit(relax.Call(value.op, [weighted, *value.args[1:]], value.attrs)))
        return self._added(parts)

    def _weighted(self, g: relax.Expr, factors: tuple[relax.Expr, ...], patches: Patches) -> relax.Expr:
        """g times the mean of the factors' product over each patch."""
        if not factors:
            return g
        key = (factors, patches)
        if key not in self.means:
            self.means[key] = self._emit(filtering.patch_mean(self._factor(factors, str(g.ty.dtype)), patches))
        return self._emit(R.multiply(g, self.means[key]))

    def _factor(self, factors: Sequence[relax.Expr], dtype: str) -> relax.Expr:
        masks, numbers = [f for f in factors if _is_mask(f)], [f for f in factors if not _is_mask(f)]
        product: relax.Expr | None = None
        for mask in masks:
            product = mask if product is None else self._emit(R.logical_and(product, mask))
        if product is not None:
            product = self._emit(R.astype(product, dtype))
        for number in numbers:
            product = number if product is None else self._emit(R.multiply(product, number))
        assert product is not None
        return product

    def _added(self, parts: Sequence[relax.Expr]) -> relax.Expr:
        total = parts[0]
        for part in parts[1:]:
            total = self._emit(R.add(total, part))
        return total

    def _emit(self, value: relax.Expr) -> relax.Var:
        return self.builder.emit(value)


def _named(value: relax.Expr) -> str:
    """The name of the operator that is called; empty for anything else."""
    return str(value.op.name) if isinstance(value, relax.Call) and isinstance(value.op, Op) else ""


def _shape(expr: relax.Expr) -> list[int]:
    """Its sizes; none of what is no tensor of fixed shape."""
    ty = expr.ty
    return [int(d) for d in ty.shape] if isinstance(ty, relax.TensorType) and ty.shape is not None else []


def _per_channel(expr: relax.Expr) -> bool:
    """Whether it has one number for each channel, for each image and channel, or one at all."""
    shape = _shape(expr)
    return isinstance(expr.ty, relax.TensorType) and (not shape or (2 < len(shape) <= 4 and shape[-2:] == [1, 1]))


def _is_mask(expr: relax.Expr) -> bool:
    return str(expr.ty.dtype) == "bool"


def _is_zero(expr: relax.Expr) -> bool:
    return isinstance(expr, Constant) and not np.any(np.asarray(expr.value.numpy()))


def _sums_maps(value: relax.Call) -> bool:
    """A sum over all places of [N, C, H, W], maybe over more: ``R.sum`` over these axes, or ``collapse_sum_to`` one place."""
    if _named(value) == "relax.sum":
        axes = value.attrs.axis
        return axes is None or {int(a) % 4 for a in axes} >= {2, 3}
    target = _shape(value)
    return _named(value) == "relax.collapse_sum_to" and target[-2:] == [1, 1]
