"""Frozen weights that ``prepare`` makes, in the order in which their kernel reads them.

    y = conv2d(x, w')   -->   y = packed_conv2d(x, p)
    prepare: p[i, c, ky, kx, j] = w'[b*i + j, c, ky, kx]

A kernel multiplies one number of x with the weights of b filters at a time; packed, these lie side by side. Packing what a BatchNorm
was folded into costs no memory, since nothing else reads that tensor; a frozen weight as it is would be there twice, and is left
alone, like one that a gradient of x is computed with. Measured (``benchmarks/packing.py``): up to a seventh less time at batch 1,
where each weight is read once, and nothing at batch 8.
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
from tvmtrain.passes.sides import substituted

# Filters whose weights lie side by side: the rows of a tile of results in registers, on processors with 16 or 32 vector registers.
TILES = (6, 5, 4)


@module_pass(opt_level=0, name="PackFrozen")
class PackFrozen:
    """For processors: GPUs load weights by other tiles."""

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        if PREPARE not in [name.name_hint for name in mod.get_global_vars()]:
            return mod
        packed = _packable(mod)
        result = mod.clone()
        for name, function in _functions(mod):
            ports = signature.outputs(function) if name == PREPARE else signature.inputs(function)
            if any(port in packed for port in ports):
                result[name] = _preparing(function, packed) if name == PREPARE else _reading(function, packed)
        return result


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


def _reading(function: relax.Function, packed: dict[signature.Port, int]) -> relax.Function:
    """``function`` with packed weights as arguments."""
    (block,), ports = function.body.blocks, signature.inputs(function)
    arguments = {var: _argument(var, packed.get(port)) for port, var in zip(ports, function.params, strict=True)}
    weights = {var for port, var in zip(ports, function.params, strict=True) if port in packed}
    builder, fresh = relax.BlockBuilder(), dict[relax.Var, relax.Expr](arguments)
    with builder.function("reading", list(arguments.values())):
        with builder.dataflow():
            for binding in block.bindings:
                value = substituted(binding.value, fresh)
                if _packing(binding.value) is not None and binding.value.args[1] in weights:
                    value = operators.packed_conv2d(binding.value, *value.args)
                fresh[binding.var] = _emitted(builder, binding, value)
        builder.emit_func_output(substituted(function.body.body, fresh))
    reading = builder.get()["reading"].with_attrs(dict(function.attrs))
    return signature.with_ports(reading, ports, signature.outputs(function))


def _argument(var: relax.Var, tile: int | None) -> relax.Var:
    return var if tile is None else relax.Var(var.name, operators.packed_type(var.ty, tile))


def _emitted(builder: relax.BlockBuilder, binding: relax.Binding, value: relax.Expr) -> relax.Var:
    """The variable of the same kind as the binding's."""
    if isinstance(binding.var, relax.DataflowVar):
        return builder.emit(value, binding.var.name)
    return builder.emit_output(value, binding.var.name)


def _preparing(function: relax.Function, packed: dict[signature.Port, int]) -> relax.Function:
    """``prepare`` with packed weights as results."""
    (block,), ports = function.body.blocks, signature.outputs(function)
    builder, fresh = relax.BlockBuilder(), dict[relax.Var, relax.Expr]()
    with builder.function("preparing", list(function.params)):
        with builder.dataflow():
            for binding in block.bindings:
                fresh[binding.var] = builder.emit(substituted(binding.value, fresh), binding.var.name)
            fields = []
            for port, field in zip(ports, function.body.body.fields, strict=True):
                value, tile = substituted(field, fresh), packed.get(port)
                fields.append(builder.emit_output(value if tile is None else _packed(builder, value, tile)))
        builder.emit_func_output(relax.Tuple(fields))
    prepared = builder.get()["preparing"].with_attrs(dict(function.attrs))
    return signature.with_ports(prepared, signature.inputs(function), ports)


def _packed(builder: relax.BlockBuilder, weight: relax.Expr, tile: int) -> relax.Expr:
    filters, *rest = (int(d) for d in weight.ty.shape)
    tiles = builder.emit(R.reshape(weight, [filters // tile, tile, *rest]))
    return R.permute_dims(tiles, [0, 2, 3, 4, 1])
