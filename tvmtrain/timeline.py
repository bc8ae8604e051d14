"""Which bytes are alive while each kernel of a planned training step runs, and what they are for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import tvm
from tvm import relax
from tvm.ir import GlobalVar

from tvmtrain import signature
from tvmtrain.arena import Block
from tvmtrain.costs import Timeline
from tvmtrain.passes import plan_arena
from tvmtrain.passes.plan_arena import Liveness
from tvmtrain.passes.share_workspace import per_core
from tvmtrain.sizes import shape_of


def timeline(planned: tvm.IRModule) -> Timeline:
    """Of the function ``train_step`` that ``lowering.plan`` made."""
    function = planned["train_step"]
    life = plan_arena.liveness(function)
    calls = {step: binding.value for step, binding in enumerate(plan_arena.bindings(function)) if _is_call(binding.value)}
    loss = plan_arena.loss_step(function, life)
    assert loss is not None, "a training step returns its loss"
    gradients = _gradients(function, life, list(calls.values()))
    rows: dict[str, dict[int, int]] = {kind: dict.fromkeys(calls, 0) for kind in (*KINDS, "allocated")}
    for var, block in life.blocks.items():
        # The caller holds what is returned.
        last = max(calls) if var in life.escaping else block.last
        row = rows[_kind(var, block, life, loss, gradients)]
        for step in calls.keys() & range(block.first, last + 1):
            row[step] += block.size
    own = per_core(planned)
    for step, call in calls.items():
        rows["allocated"][step] = own[call.op.name_hint] if isinstance(call.op, GlobalVar) else 0
    return Timeline(loss=list(calls).index(loss), **{kind: tuple(row.values()) for kind, row in rows.items()})


KINDS = ("features", "masks", "gradients", "temporary", "workspace", "results")


def _kind(var: relax.Var, block: Block, life: Liveness, loss: int, gradients: set[relax.Var]) -> str:
    if var in life.escaping:
        return "results"
    if block.first < loss < block.last:
        return "masks" if plan_arena.is_mask(var) else "features"
    if var in gradients and block.first > loss:
        return "gradients"
    return "workspace" if block.first == block.last else "temporary"


def _is_call(value: relax.Expr) -> bool:
    """Whether something runs: a kernel of ours or a function of TVM's runtime, not an allocation or a view."""
    return isinstance(value, relax.Call) and isinstance(value.op, (GlobalVar, relax.ExternFunc))


def _gradients(function: relax.Function, life: Liveness, calls: Sequence[relax.Call]) -> set[relax.Var]:
    """What becomes a new value of a parameter or of its optimizer state, kernel by kernel, as long as it is like it."""
    ports = list(zip(signature.inputs(function), function.params, strict=True))
    state = {var for (role, _), var in ports if role in ("parameter", "optimizer")}
    channels = {var for (role, _), var in ports if role == "channels"}
    found: set[relax.Var] = set()
    for call in reversed(calls):
        written = _written(call, life)
        if written in state or life.behind.get(written, set()) & found:
            read = set().union(*(life.behind.get(arg, set()) for arg in call.args))
            shared = written in state and any(arg in channels for arg in call.args)
            found |= {var for var in read if _like(shape_of(var), shape_of(written), shared)}
    return found


def _written(call: relax.Call, life: Liveness) -> relax.Expr:
    """A kernel's last argument (``passes.update_in_place``), or the last before its workspace."""
    for arg in reversed(call.args):
        blocks = [life.blocks[var] for var in life.behind.get(arg, ())]
        if not blocks or any(block.first != block.last for block in blocks):
            return arg
    return call.args[-1]


def _like(value: list[int], state: list[int], shared: bool) -> bool:
    """Whether a value has the shape of what it moves: but for axes of length 1 and their order, for taps, or for channels."""
    if sorted(_long(value)) == sorted(_long(state)):
        return True
    if len(value) != len(state) or len(state) < 2:
        return False
    same_channels = value[:2] == state[:2] or (
        shared and all(own <= whole for own, whole in zip(value[:2], state[:2], strict=True))
    )
    return same_channels and (value[2:] == state[2:] or set(value[2:]) == {1})


def _long(shape: list[int]) -> Iterator[int]:
    return (size for size in shape if size != 1)
