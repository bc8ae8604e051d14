"""What a training step costs, layer by layer: operations, and what the forward keeps for the backward. Tables of it.

Counting rules. Operations: k multiplications and k - 1 additions for each number of a convolution or matrix product over k terms
(taps that fall on padding count), 1 for each number that a sum or mean adds up; elementwise work is left out. Bytes: float
features and masks that the backward reads and the forward made, each as the smallest thing that will do (a mask, summed patches or
gathered channels instead of what they are made from), views counted once; parameters and the step's own inputs are not kept by
the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tvm import relax
from tvm.ir import Op

from tvmtrain import operators, signature
from tvmtrain.costs import LayerCost
from tvmtrain.passes.sides import VIEWS
from tvmtrain.sizes import bytes_of, shape_of

PRODUCTS = ("relax.nn.conv2d", operators.DGRAD, operators.WGRAD, "relax.matmul")
SUMS = ("relax.sum", "relax.mean", "tvmtrain.patch_sum", "tvmtrain.patch_mean")
# What lies between a weight's gradient and the product that makes it.
AFTER_WGRAD = (*VIEWS, "relax.permute_dims", "relax.add", "relax.multiply", "relax.divide")


@dataclass(frozen=True)
class Summary:
    """One training step. Operations, and bytes.

    saved_features, saved_masks: what lies in the arena while the loss is made and is read after it. arena: the one storage of every
    intermediate tensor; lower_bound: the most of them alive at once; workspace: the most that one kernel allocates beside the arena.
    parameters (with buffers) and optimizer_state live as long as the step does.
    """

    forward_flops: int
    backward_flops: int
    saved_features: int
    saved_masks: int
    arena: int
    lower_bound: int
    workspace: int
    parameters: int
    optimizer_state: int
    layers: tuple[LayerCost, ...]
    against: Summary | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        columns = [
            "",
            *(["before"] if self.against else []),
            "after" if self.against else "",
            *(["ratio"] if self.against else []),
        ]
        rows = [self._row(name) for name in FIGURES]
        return "\n".join([*_aligned([columns, *rows]), "", *_aligned(self._layer_rows())])

    def _row(self, name: str) -> list[str]:
        show = _flops if name.endswith("flops") else _bytes
        value = getattr(self, name)
        if self.against is None:
            return [FIGURES[name], show(value)]
        before = getattr(self.against, name)
        return [FIGURES[name], show(before), show(value), _ratio(value / before) if before else ""]

    def _layer_rows(self) -> list[list[str]]:
        rows = [
            [c.name, c.kind, f"{c.trained:,}", _bytes(c.kept), _flops(c.flops)] for c in self.layers if c.trained or c.flops
        ]
        return [["layer", "kind", "trained", "kept", "backward"], *rows]


FIGURES = {
    "forward_flops": "forward",
    "backward_flops": "backward",
    "saved_features": "saved features",
    "saved_masks": "saved masks",
    "arena": "arena",
    "lower_bound": "lower bound of it",
    "workspace": "beside it, each core",
    "parameters": "parameters",
    "optimizer_state": "optimizer state",
}


def _ratio(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:,.0f}"


def _flops(count: int) -> str:
    return f"{count / 1e6:,.2f} MFLOP"


def _bytes(count: int) -> str:
    return f"{count / 1024:,.1f} KB"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines; the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]


# ---- reading a function ----


@dataclass
class Flow:
    """Which bindings of a function with results (loss, gradients ..) are forward, which need a gradient, and which neither.

    ``forward``: what the loss is made of. ``gradient``: what depends on the loss's own gradient. ``early``: the rest, which the
    backward makes of forward values and parameters alone.
    """

    values: dict[relax.Var, relax.Expr]
    forward: set[relax.Var] = field(default_factory=set)
    gradient: set[relax.Var] = field(default_factory=set)
    early: set[relax.Var] = field(default_factory=set)

    def root(self, var: relax.Var) -> relax.Var:
        """The tensor that ``var`` is a view of."""
        value = self.values.get(var)
        if isinstance(value, relax.Call) and _name(value) in VIEWS:
            return self.root(value.args[0])
        return self.root(value) if isinstance(value, relax.Var) else var


def flow(function: relax.Function) -> Flow:
    """Of ``adjoint`` or ``gradients``: all of one dataflow block."""
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    found = Flow({binding.var: binding.value for binding in bindings})
    results = dict(zip(signature.outputs(function), function.body.body.fields, strict=True))
    found.forward = _ancestors(found.values, [value for (role, _), value in results.items() if role != "gradient"])
    for binding in bindings:
        if binding.var not in found.forward:
            read = relax.analysis.free_vars(binding.value)
            # The backward begins with a constant, the loss's gradient with respect to itself.
            late = not read or any(var in found.gradient for var in read)
            (found.gradient if late else found.early).add(binding.var)
    return found


def _ancestors(values: dict[relax.Var, relax.Expr], roots: Iterable[relax.Expr]) -> set[relax.Var]:
    found: set[relax.Var] = set()
    pending = list(roots)
    while pending:
        var = pending.pop()
        if var in values and var not in found:
            found.add(var)
            pending.extend(relax.analysis.free_vars(values[var]))
    return found


def saved(found: Flow) -> set[relax.Var]:
    """What lives from the forward into the backward: forward values, and early ones that are smaller than what they are made of."""
    read = {found.root(var) for late in found.gradient for var in relax.analysis.free_vars(found.values[late])}
    kept = {var for var in read if var in found.forward}
    small: dict[relax.Var, set[relax.Var]] = {}
    made_of: dict[relax.Var, set[relax.Var]] = {}
    for var in (value for value in found.values if value in found.early):
        # Values are in the order in which they are made: those that this one reads are known.
        direct = relax.analysis.free_vars(found.values[var])
        made_of[var] = {*direct}.union(*(made_of[v] for v in direct if v in made_of))
        if var in read:
            sources = {found.root(v) for v in made_of[var] & found.forward}
            if bytes_of(var.ty) < sum(bytes_of(source.ty) for source in sources - kept):
                small[var] = sources
            else:
                kept |= sources
    return kept | {var for var, sources in small.items() if not sources <= kept}


def _name(call: relax.Call) -> str:
    return str(call.op.name) if isinstance(call.op, Op) else ""


def operations(value: relax.Expr, result: relax.Var) -> int:
    """FLOPs of one binding, by the rules above."""
    if not isinstance(value, relax.Call):
        return 0
    name = _name(value)
    if name == "relax.nn.conv2d":
        return _product(math.prod(shape_of(result)), math.prod(shape_of(value.args[1])[1:]))
    if name in (operators.DGRAD, operators.WGRAD):
        gy, w = (value.args[0], value.args[1]) if name == operators.DGRAD else (value.args[1], result)
        terms = math.prod(shape_of(gy)) * math.prod(shape_of(w)[1:])
        numbers = math.prod(shape_of(result))
        return max(2 * terms - numbers, terms)
    if name == "relax.matmul":
        return _product(math.prod(shape_of(result)), shape_of(value.args[0])[-1])
    passes = 2 if name == operators.GRADIENT_SUMS else int(name in SUMS)
    return passes * math.prod(shape_of(value.args[0])) if passes else 0


# ---- layers ----


def layer_costs(function: relax.Function, names: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Layer -> (bytes kept for its weight gradient, FLOPs of its backward), from the entry ``gradients``.

    names: parameter -> layer. A product belongs to the layer whose weight it reads, or whose weight's gradient it makes.
    """
    found = flow(function)
    kept = saved(found)
    owners = _weight_gradients(found, function, names) | _input_gradients(found, function, names)
    costs: dict[str, tuple[int, int]] = {}
    for var, (layer, is_weight) in owners.items():
        value = found.values[var]
        features = {found.root(v) for v in relax.analysis.free_vars(value)} & kept if is_weight else set()
        bytes_kept, flops = costs.get(layer, (0, 0))
        costs[layer] = (bytes_kept + sum(bytes_of(v.ty) for v in features), flops + operations(value, var))
    return costs


Owner = tuple[str, bool]  # layer, and whether the product makes its weight's gradient


def _weight_gradients(found: Flow, function: relax.Function, names: dict[str, str]) -> dict[relax.Var, Owner]:
    """The products and sums that make each parameter's gradient."""
    owners: dict[relax.Var, Owner] = {}
    for (role, name), var in zip(signature.outputs(function), function.body.body.fields, strict=True):
        pending = [var] if role == "gradient" else []
        while pending:
            value = found.values.get(var := pending.pop())
            if not isinstance(value, relax.Call) or var not in found.gradient:
                continue
            if _name(value) in PRODUCTS:
                owners[var] = (names[name], True)
            elif _name(value) in AFTER_WGRAD:
                pending.extend(relax.analysis.free_vars(value))
    return owners


def _input_gradients(found: Flow, function: relax.Function, names: dict[str, str]) -> dict[relax.Var, Owner]:
    """The products of a gradient with a weight, or with what is made of a weight alone."""
    weights = {}
    for (role, name), var in zip(signature.inputs(function), function.params, strict=True):
        parameter = name.partition(":")[0] if role == "prepared" else name
        if role in ("parameter", "prepared") and parameter in names:
            weights[var] = names[parameter]
    owners: dict[relax.Var, Owner] = {}
    for var in found.gradient:
        value = found.values[var]
        if isinstance(value, relax.Call) and _name(value) in PRODUCTS:
            for layer in _owner(found, value, weights):
                owners[var] = (layer, False)
    return owners


def _owner(found: Flow, value: relax.Call, weights: dict[relax.Var, str]) -> set[str]:
    layers: set[str] = set()
    pending = [var for var in relax.analysis.free_vars(value) if var not in found.gradient]
    while pending:
        var = pending.pop()
        if var in weights:
            layers.add(weights[var])
        elif var in found.early:
            pending.extend(relax.analysis.free_vars(found.values[var]))
    return layers


def flops(function: relax.Function) -> tuple[int, int]:
    """(forward, backward) of the entry ``gradients``."""
    found = flow(function)
    counts = {var: operations(value, var) for var, value in found.values.items()}
    forward = sum(count for var, count in counts.items() if var in found.forward)
    return forward, sum(counts.values()) - forward


def compared(summary: Summary, against: Summary | None) -> Summary:
    """``summary`` beside another one."""
    return replace(summary, against=None if against is None else replace(against, against=None))


def _product(numbers: int, terms: int) -> int:
    return numbers * (2 * terms - 1)
