"""What each argument and result of a compiled function is, carried as attributes of the function itself.

``tvmtrain.inputs`` and ``tvmtrain.outputs`` are lists of "role name", one per parameter and per element of the returned tuple
(roles: ``artifact.TensorSpec``). A pass that adds or removes parameters keeps them in step, and so finds a layer's weight by
its PyTorch name. ``tvmtrain.trained`` lists the parameters that the step updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import tvm
from tvm import relax

from tvmtrain.artifact import Entry, TensorSpec

INPUTS = "tvmtrain.inputs"
OUTPUTS = "tvmtrain.outputs"

Port = tuple[str, str]  # (role, name)


def with_ports(function: relax.Function, inputs: Iterable[Port], outputs: Iterable[Port]) -> relax.Function:
    """``function`` with its ports recorded."""
    return function.with_attrs({INPUTS: [" ".join(port) for port in inputs], OUTPUTS: [" ".join(port) for port in outputs]})


def has_ports(function: relax.Function) -> bool:
    return function.attrs is not None and INPUTS in function.attrs


def inputs(function: relax.Function) -> list[Port]:
    return _ports(function.attrs[INPUTS])


def outputs(function: relax.Function) -> list[Port]:
    return _ports(function.attrs[OUTPUTS])


def _ports(texts: Sequence[str]) -> list[Port]:
    return [(role, name) for role, _, name in (str(text).partition(" ") for text in texts)]


def parameters(function: relax.Function) -> dict[str, relax.Var]:
    """PyTorch name -> Relax variable of each model parameter."""
    return {name: var for (role, name), var in zip(inputs(function), function.params, strict=True) if role == "parameter"}


def differentiable(function: relax.Function) -> dict[str, relax.Var]:
    """PyTorch name -> the variable towards which a parameter is differentiated: its view (``passes.views``), else itself."""
    views = {name: var for (role, name), var in zip(inputs(function), function.params, strict=True) if role == "view"}
    return parameters(function) | views


def channels(function: relax.Function) -> dict[str, relax.Var]:
    """Weight name -> the variable that says which of its channels are trained in this step."""
    return {name: var for (role, name), var in zip(inputs(function), function.params, strict=True) if role == "channels"}


def entry(name: str, function: relax.Function) -> Entry:
    """The manifest's description of a function."""
    results = function.ret_ty.fields
    return Entry(
        name,
        tuple(_tensor(port, var.ty) for port, var in zip(inputs(function), function.params, strict=True)),
        tuple(_tensor(port, ty) for port, ty in zip(outputs(function), results, strict=True)),
    )


def _tensor(port: Port, ty: relax.TensorType) -> TensorSpec:
    return TensorSpec(port[0], port[1], tuple(int(d) for d in ty.shape), str(ty.dtype))


def with_bindings(function: relax.Function, bindings: Sequence[relax.Binding]) -> relax.Function:
    """``function`` with ``bindings`` as its one dataflow block."""
    body = relax.BlockBuilder().normalize(relax.SeqExpr([relax.DataflowBlock(list(bindings))], function.body.body))
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def keeping(function: relax.Function, kept: Callable[[Port, relax.Var], bool]) -> relax.Function:
    """``function`` with those of its arguments alone for which ``kept(port, variable)``; nothing reads the others."""
    pairs = [pair for pair in zip(inputs(function), function.params, strict=True) if kept(*pair)]
    fewer = relax.Function([var for _, var in pairs], function.body, function.ret_ty, function.is_pure, function.attrs)
    return with_ports(fewer, [port for port, _ in pairs], outputs(function))


def replaced(builder: relax.BlockBuilder, temporary: str, name: str, like: relax.Function) -> tvm.IRModule:
    """The module of ``builder`` with its function ``temporary``, and the attributes of ``like``, as the function ``name``."""
    mod = builder.get()
    function = mod[temporary].with_attrs(dict(like.attrs))
    del mod[mod.get_global_var(temporary)]
    mod[name] = function
    return mod


def returning(function: relax.Function, fields: Sequence[relax.Expr]) -> relax.Function:
    """``function`` with the tuple of ``fields``, variables that it binds, as its result."""
    body = relax.BlockBuilder().normalize(relax.SeqExpr(function.body.blocks, relax.Tuple(list(fields))))
    return relax.Function(function.params, body, body.ty, function.is_pure, function.attrs)
