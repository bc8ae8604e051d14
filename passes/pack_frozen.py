"""Frozen weights that ``prepare`` makes, in the order in which their kernel reads them.

    y = conv2d(x, w')   -->   y = packed_conv2d(x, p)
    prepare: p[i, c, ky, kx, j] = w'[b*i + j, c, ky, kx]

A kernel multiplies one number of x with the weights of b filters at a time; packed, these lie side by side. Packing what a BatchNorm
was folded into costs no memory, since nothing else reads that tensor; a frozen weight as it is would be there twice, and is left
alone, like one that a gradient of x is computed with. It saves little, as a processor reads a few rows of weights nearly as well as one:
``benchmarks/packing.py`` has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import operators, signature
from tvmtrain.passes.prune_frozen import PREPARE

# Filters whose weights lie side by side: the rows of a tile of results in registers, on processors with 16 or 32 vector registers.
TILES = (6, 5, 4)


@module_pass(opt_level=0, name="PackFrozen")
class PackFrozen:
    """For processors: GPUs load weights by other tiles."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        if PREPARE not in [name.name_hint for name in mod.get_global_vars()]:
            return mod
        packed = _packable(mod)
        for name, function in list(_functions(mod)):
            if name != PREPARE and any(port in packed for port in signature.inputs(function)):
                mod = _reading(mod, name, packed)
        return _preparing(mod, packed) if packed else mod


def _functions(mod: tvm.IRModule) -> Iterator[tuple[str, relax.Function]]:
    for name, function in mod.functions_items():
        if isinstance(function, relax.Function) and signature.has_ports(function):
            yield name.name_hint, function


def _packable(mod: tvm.IRModule) -> dict[signature.Port, int]:
    """Prepared weight -> how many filters lie side by side, of those that dense convolutions alone read."""
    found: dict[signature.Port, int] = {}
    others: set[signature.Port] = set()
    for name, function in _functions(mod):
        if name == PREPARE:
            continue
        ports = {
            var: port for port, var in zip(signature.inputs(function), function.params, strict=True) if port[0] == "prepared"
        }
        for value in [binding.value for block in function.body.blocks for binding in block.bindings] + [function.body.body]:
            own = _packing(value)
            for var in relax.analysis.free_vars(value):
                if var not in ports:
                    continue
                if own is not None and var.same_as(value.args[1]):
                    found[ports[var]] = own
                else:
                    others.add(ports[var])
    return {port: tile for port, tile in found.items() if port not in others}


def _packing(value: relax.Expr) -> int | None:
    """How many filters of a convolution lie side by side; None for anything else."""
    if not isinstance(value, relax.Call) or value.op != Op.get("relax.nn.conv2d") or int(value.attrs.groups) != 1:
        return None
    filters = int(value.args[1].ty.shape[0])
    return next((tile for tile in TILES if filters % tile == 0), None)


def _reading(mod: tvm.IRModule, name: str, packed: dict[signature.Port, int]) -> tvm.IRModule:
    """The function ``name`` with packed weights as arguments."""
    function = mod[name]
    tiles = [packed.get(port) for port in signature.inputs(function)]
    arguments = [_argument(var, tile) for var, tile in zip(function.params, tiles, strict=True)]
    weights = {old: new for old, new, tile in zip(function.params, arguments, tiles, strict=True) if tile is not None}
    builder = relax.BlockBuilder(mod)
    with builder.function("reading", arguments):
        with builder.dataflow():
            for binding in function.body.blocks[0].bindings:
                value = binding.value
                if _packing(value) is not None and value.args[1] in weights:
                    value = operators.packed_conv2d(value, value.args[0], weights[value.args[1]])
                builder.emit_normalized(relax.VarBinding(binding.var, builder.normalize(value)))
        builder.emit_func_output(function.body.body)
    return signature.replaced(builder, "reading", name, function)


def _argument(var: relax.Var, tile: int | None) -> relax.Var:
    return var if tile is None else relax.Var(var.name, operators.packed_type(var.ty, tile))


def _preparing(mod: tvm.IRModule, packed: dict[signature.Port, int]) -> tvm.IRModule:
    """``prepare`` with packed weights as results."""
    function = mod[PREPARE]
    tiles = [packed.get(port) for port in signature.outputs(function)]
    builder = relax.BlockBuilder(mod)
    with builder.function("preparing", list(function.params)):
        with builder.dataflow():
            for binding in function.body.blocks[0].bindings:
                builder.emit_normalized(binding)
            fields = [
                field if tile is None else builder.emit_output(_packed(builder, field, tile))
                for field, tile in zip(function.body.body.fields, tiles, strict=True)
            ]
        builder.emit_func_output(relax.Tuple(fields))
    return signature.replaced(builder, "preparing", PREPARE, function)


def _packed(builder: relax.BlockBuilder, weight: relax.Expr, tile: int) -> relax.Expr:
    filters, *rest = (int(d) for d in weight.ty.shape)
    tiles = builder.emit(R.reshape(weight, [filters // tile, tile, *rest]))
    return R.permute_dims(tiles, [0, 2, 3, 4, 1])
