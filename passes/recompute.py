"""What the backward can make again from what it keeps anyway is not kept: the activation after a BatchNorm.

    xhat = normalize(x); y = relu(xhat * gamma + beta); z = conv2d(y, w); ..; dw = wgrad(y, gz); gx = f(xhat, ..)
    -->  ..; y2 = relu(xhat * gamma + beta); dw = wgrad(y2, gz); gx = f(xhat, ..)

Elementwise operations alone are done again (Chen et al., 2016, arXiv 1604.06174, section 3: what is cheap to recompute), from at most
two large tensors that the backward reads for something else, too. The copy stands before its first reader and dies after its last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import operators, signature
from tvmtrain.passes.sides import Sides, name_of, substituted, with_backward
from tvmtrain.sizes import bytes_of

# Operations to do again for one value (a BatchNorm is four), and large tensors to read for it.
LONGEST = 16
SOURCES = 2
# A tensor is small beside one of so many times its bytes: statistics and parameters of channels.
SMALL = 8


@module_pass(opt_level=0, name="Recompute")
@dataclass(frozen=True)
class Recompute:
    """Rewrites the functions that have a loss and a backward after it: ``train_step`` and ``gradients``."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        return with_backward(mod, _recomputing)


@dataclass
class _Recipe:
    """How a value is made again: the bindings to repeat. ``large``: the tensors of its own size that they read."""

    steps: set[int] = field(default_factory=set)
    large: set[int] = field(default_factory=set)


def _recomputing(function: relax.Function) -> relax.Function:
    sides = Sides(function)
    waiting = _recipes(sides)
    fresh: dict[relax.Var, relax.Expr] = {}
    bindings: list[relax.Binding] = []
    for i, binding in enumerate(sides.bindings):
        if i in sides.forward:
            bindings.append(binding)
            continue
        for k in sorted(sides.operands[i] & waiting.keys()):
            copied = _copied(sides, waiting.pop(k).steps)
            bindings += copied
            fresh[sides.bindings[k].var] = copied[-1].var
        bindings.append(relax.VarBinding(binding.var, substituted(binding.value, fresh)))
    return signature.with_bindings(function, bindings) if fresh else function


def _copied(sides: Sides, steps: set[int]) -> list[relax.VarBinding]:
    """The bindings once more, with variables of their own."""
    own: dict[relax.Var, relax.Expr] = {}
    copied = []
    for k in sorted(steps):
        binding = sides.bindings[k]
        var = relax.DataflowVar(f"again_{binding.var.name}", binding.var.ty)
        copied.append(relax.VarBinding(var, substituted(binding.value, own)))
        own[binding.var] = var
    return copied


def _recipes(sides: Sides) -> dict[int, _Recipe]:
    """Of each forward value that need not be kept."""
    kept = {i for i in sides.forward if sides.later(i)}
    recipes: dict[int, _Recipe] = {}
    for i in sorted(kept):
        found = _recipe(sides, i, kept) if _is_elementwise(sides, i) and i not in sides.returned else None
        if found is not None:
            recipes[i] = found
            kept.discard(i)
    return recipes


def _recipe(sides: Sides, i: int, kept: set[int]) -> _Recipe | None:
    size = bytes_of(sides.bindings[i].var.ty)
    recipe = _Recipe()
    waiting = [i]
    while waiting:
        k = waiting.pop()
        recipe.steps.add(k)
        for operand in sides.operands[k] - recipe.steps:
            if bytes_of(sides.bindings[operand].var.ty) * SMALL <= size:
                continue
            if operand in kept:
                recipe.large.add(operand)
            elif operand in sides.forward and _is_elementwise(sides, operand):
                waiting.append(operand)
            else:
                return None
    return recipe if len(recipe.steps) <= LONGEST and 0 < len(recipe.large) <= SOURCES else None


def _is_elementwise(sides: Sides, i: int) -> bool:
    return name_of(sides.bindings[i].value) in operators.ELEMENTWISE
