"""A mask that the backward reads is kept in bits, eight to a byte.

    m = greater(y, 0); ..; loss; ..; gx = where(m, gy, 0)
    -->  m = greater(y, 0); b = pack_bits(m); ..; loss; ..; gx = where(unpack_bits(b), gy, 0)

Unpacking is part of the kernel that reads the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from tvmtrain import operators, signature
from tvmtrain.passes.sides import Sides, substituted, with_backward

# Masks of fewer numbers stay as they are.
LEAST = 1024


@module_pass(opt_level=0, name="PackMasks")
@dataclass(frozen=True)
class PackMasks:
    """Rewrites the functions that have a loss and a backward after it: ``train_step`` and ``gradients``."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        return with_backward(mod, _packed)


def _packed(function: relax.Function) -> relax.Function:
    sides = Sides(function)
    # What is made after the loss is read at once.
    masks = {i for i in sides.forward | sides.pure if i < max(sides.forward) and _is_kept_mask(sides, i)}
    packing = _Packing(sides, masks)
    bindings = [new for i in range(len(sides.bindings)) for new in packing.bindings(i)]
    return signature.with_bindings(function, bindings) if masks else function


def _is_kept_mask(sides: Sides, i: int) -> bool:
    """Whether a value is a large mask that the backward reads."""
    ty = sides.bindings[i].var.ty
    if not isinstance(ty, relax.TensorType) or str(ty.dtype) != "bool" or i in sides.returned:
        return False
    read = sides.readers[i] - sides.forward - sides.pure
    return bool(read) and prod(int(d) for d in ty.shape) >= LEAST


class _Packing:
    """The bindings of a function as they go by. ``inner``: each mask's variable in its own kernel; ``bits``: what is kept of it."""

    def __init__(self, sides: Sides, masks: set[int]) -> None:
        self.sides, self.masks = sides, masks
        self.builder = relax.BlockBuilder()
        self.inner: dict[relax.Var, relax.Expr] = {}
        self.bits: dict[int, relax.Var] = {}

    def bindings(self, i: int) -> Iterator[relax.Binding]:
        binding = self.sides.bindings[i]
        if i not in self.sides.forward | self.sides.pure:
            yield from self._reading(i, binding)
            return
        value = substituted(binding.value, self.inner)
        if i not in self.masks:
            yield relax.VarBinding(binding.var, value)
            return
        mask = self.inner[binding.var] = relax.DataflowVar(binding.var.name, binding.var.ty)
        packed = self.builder.normalize(operators.pack_bits(mask))
        # An output of the block: no fusion moves it into its readers.
        self.bits[i] = relax.Var(f"bits_{binding.var.name}", packed.ty)
        yield relax.VarBinding(mask, value)
        yield relax.VarBinding(self.bits[i], packed)

    def _reading(self, i: int, binding: relax.Binding) -> Iterator[relax.Binding]:
        """A call of the backward, after what it unpacks."""
        fresh: dict[relax.Var, relax.Expr] = {}
        for k in sorted(self.sides.operands[i] & self.masks):
            var = self.sides.bindings[k].var
            fresh[var] = relax.DataflowVar(f"{var.name}_again", var.ty)
            yield relax.VarBinding(
                fresh[var], self.builder.normalize(operators.unpack_bits(self.bits[k], [int(d) for d in var.ty.shape]))
            )
        yield relax.VarBinding(binding.var, substituted(binding.value, fresh))
