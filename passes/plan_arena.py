"""One arena for all intermediate tensors of a function: its size and every offset are known before it runs.

    a = alloc_tensor(..); f(x, a); b = alloc_tensor(..); g(a, b)
    -->  arena = alloc_storage(size); a = alloc_tensor(arena, 0, ..); f(x, a); b = alloc_tensor(arena, 4096, ..); g(a, b)

Runs after ``CallTIRRewrite``, in place of ``StaticPlanBlockMemory``. What a function returns has a storage of its own: its caller
keeps it while the next call uses the arena. A view (a reshape) is alive as long as what it looks at, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import tvm
from tvm import relax
from tvm.ir import GlobalVar, Op
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op as R

from tvmtrain import arena, signature
from tvmtrain.passes.share_workspace import per_core
from tvmtrain.sizes import size_of

ALLOC = "relax.builtin.alloc_tensor"
# The same in a planned function: (storage, offset, shape, dtype), and its pointer moved to the offset.
PLACED = "relax.memory.alloc_tensor"
MOVED = "relax.memory.ensure_zero_offset"

# Attributes of a planned function, in bytes.
ARENA = "tvmtrain.arena"
LOWER_BOUND = "tvmtrain.lower_bound"
RESULTS = "tvmtrain.results"
WORKSPACE = "tvmtrain.workspace"
SAVED_FEATURES = "tvmtrain.saved_features"
SAVED_MASKS = "tvmtrain.saved_masks"
FIGURES = (ARENA, LOWER_BOUND, RESULTS, WORKSPACE, SAVED_FEATURES, SAVED_MASKS)


@module_pass(opt_level=0, name="PlanArena")
@dataclass(frozen=True)
class PlanArena:
    """Records ``FIGURES`` on each function.

    results: what is returned in storage of its own. workspace: the most that one kernel allocates beside the arena, for each core
    that runs it. saved: what lies in the arena while the loss is made and is read after it, numbers and masks.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: PassContext) -> tvm.IRModule:
        result = mod.clone()
        workspace = per_core(mod)
        for name, function in mod.functions_items():
            if isinstance(function, relax.Function):
                result[name] = _planned(function, workspace)
        return result


def _planned(function: relax.Function, workspace: dict[str, int]) -> relax.Function:
    life = liveness(function)
    inside = [var for var in life.blocks if var not in life.escaping]
    plan = arena.plan([life.blocks[var] for var in inside])
    body = _rewritten(function, dict(zip(inside, plan.offsets, strict=True)), plan.size)
    figures = {
        ARENA: plan.size,
        LOWER_BOUND: arena.lower_bound([life.blocks[var] for var in inside]),
        RESULTS: sum(life.blocks[var].size for var in life.escaping),
        WORKSPACE: max((workspace[gvar.name_hint] for gvar in _kernels(function)), default=0),
        **_saved(function, life),
    }
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs).with_attrs(figures)


def _kernels(function: relax.Function) -> Iterator[GlobalVar]:
    for binding in bindings(function):
        if is_kernel(binding.value):
            yield binding.value.op


def _saved(function: relax.Function, life: Liveness) -> dict[str, int]:
    """What is alive when the loss is made, and needed after it."""
    total = {SAVED_FEATURES: 0, SAVED_MASKS: 0}
    step = loss_step(function, life)
    for var, block in life.blocks.items():
        if step is not None and var not in life.escaping and block.first < step < block.last:
            total[SAVED_MASKS if is_mask(var) else SAVED_FEATURES] += block.size
    return total


def loss_step(function: relax.Function, life: Liveness) -> int | None:
    """The binding that makes the loss; None where a function has none."""
    ports = signature.outputs(function) if signature.has_ports(function) else []
    loss = next((i for i, (role, _) in enumerate(ports) if role == "loss"), None)
    if loss is None:
        return None
    (made,) = life.behind[function.body.body.fields[loss]]
    return life.blocks[made].first


def is_mask(var: relax.Var) -> bool:
    return str(var.ty.dtype) in ("bool", "uint8")


@dataclass
class Liveness:
    """``blocks``: each allocated variable with the first and last binding that touches it; ``escaping``: those that are returned.

    ``behind``: the allocated variables that any variable may be, or look at.
    """

    blocks: dict[relax.Var, arena.Block] = field(default_factory=dict)
    escaping: set[relax.Var] = field(default_factory=set)
    behind: dict[relax.Var, set[relax.Var]] = field(default_factory=dict)


def liveness(function: relax.Function) -> Liveness:
    """Of every tensor that a function of plain bindings allocates, planned or not; steps are numbers of bindings."""
    sizes: dict[relax.Var, int] = {}
    touched: dict[relax.Var, list[int]] = {}
    behind: dict[relax.Var, set[relax.Var]] = {}
    for step, binding in enumerate(bindings(function)):
        if allocates(binding.value):
            behind[binding.var] = {binding.var}
            sizes[binding.var] = nbytes(binding.value)
            continue
        used = _behind(binding.value, behind)
        for var in used if not _calls(binding.value, MOVED) else ():
            touched.setdefault(var, []).append(step)
        behind[binding.var] = set() if is_kernel(binding.value) else used
    blocks = {var: arena.Block(sizes[var], steps[0], steps[-1]) for var, steps in touched.items()}
    return Liveness(blocks, _behind(function.body.body, behind), behind)


def _behind(value: relax.Expr, behind: dict[relax.Var, set[relax.Var]]) -> set[relax.Var]:
    return set().union(*(behind.get(var, set()) for var in relax.analysis.free_vars(value)))


def bindings(function: relax.Function) -> Iterator[relax.VarBinding]:
    for block in function.body.blocks:
        yield from block.bindings


def allocates(value: relax.Expr) -> bool:
    return _calls(value, ALLOC) or _calls(value, PLACED)


def _calls(value: relax.Expr, name: str) -> bool:
    return isinstance(value, relax.Call) and value.op == Op.get(name)


def is_kernel(value: relax.Expr) -> bool:
    """Whether a call writes into its arguments and returns nothing; all else may return a view of them."""
    return isinstance(value, relax.Call) and isinstance(value.op, GlobalVar)


def nbytes(alloc: relax.Call) -> int:
    shape, dtype = alloc.args[2:4] if _calls(alloc, PLACED) else alloc.args[:2]
    return size_of([int(d) for d in shape.values], str(dtype.value))


def _rewritten(function: relax.Function, offsets: dict[relax.Var, int], size: int) -> relax.SeqExpr:
    """The body with each variable of ``offsets`` in the arena."""
    if not offsets:
        return function.body
    builder = relax.BlockBuilder()
    storage = builder.normalize(R.memory.alloc_storage(relax.ShapeExpr([size]), 0, "global", "uint8"))
    whole = relax.Var("arena", storage.ty)
    blocks = [relax.BindingBlock([relax.VarBinding(whole, storage)])]
    for block in function.body.blocks:
        pairs = [_placed(builder, whole, binding, offsets.get(binding.var)) for binding in block.bindings]
        blocks.append(relax.BindingBlock([binding for pair in pairs for binding in pair]))
    return relax.SeqExpr(blocks, function.body.body)


def _placed(
    builder: relax.BlockBuilder, whole: relax.Var, binding: relax.Binding, offset: int | None
) -> list[relax.VarBinding]:
    if offset is None:
        return [binding]
    shape, dtype = binding.value.args[:2]
    tensor = builder.normalize(R.memory.alloc_tensor(whole, offset, shape, str(dtype.value)))
    if not offset:
        return [relax.VarBinding(binding.var, tensor)]
    # Kernels take no offset beside their pointer. This moves it into the pointer; nothing is copied where offsets are aligned.
    part = relax.Var("part", tensor.ty)
    moved = builder.normalize(R.memory.ensure_zero_offset(part))
    return [relax.VarBinding(part, tensor), relax.VarBinding(binding.var, moved)]
