"""Gradient filtering: the backward of a convolution on patches (Yang, Li and Marculescu, CVPR 2023, arXiv 2301.00330).

    y = conv(x, w)      gy: gradient of y, in patches of r_h x r_w      x: in patches of r_h*s_h x r_w*s_w

    g[p]  = mean of gy over the places of patch p                           (equation 2; places outside of the map do not count)
    xs[p] = sum of x over the places of patch p
    dX    = unpatch(sum over o of wsum[o, i] * g[o, p]), wsum: w summed over its taps
    dW    = sum over n and p of xs[i, p] * g[o, p], the same number for every tap

As many patches as cover y; both maps lie in the middle of theirs, with the odd place of the border before them. Where an axis is
dilated by at least a patch, its taps are not summed: they reach g from ``dilation // r`` patches apart. This is the rule of the
authors' code for kernels of 3 taps, at every stride; here it is applied to any odd number of taps.

The authors' dX and dW are s_h*s_w times too large where stride is more than 1 (scaling "paper"): each place of y stands for s_h*s_w
places of x in the patch of x, and is a mean, not a sum. Scaling "unbiased" divides both by s_h*s_w.

This file has the three operators, their kernels and the gradients; ``passes.gradient_filter`` decides where they are used.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Op
from tvm.relax import op as R
from tvm.relax.transform.legalize_ops.common import register_legalize

from tvmtrain import operators
from tvmtrain.schedules.blocks import STRIDES
from tvmtrain.sizes import shape_of

PATCH_SUM = "tvmtrain.patch_sum"
PATCH_MEAN = "tvmtrain.patch_mean"
UNPATCH = "tvmtrain.unpatch"

Pair = tuple[int, int]  # rows, columns

# Rows and columns of a patch up to which its sum is written out.
LARGEST_WINDOW = 16


# ---- patches of a map ----


@dataclass(frozen=True)
class Patches:
    """A map of ``shape`` (H, W) in ``places`` (P, Q) patches of ``size``; the first begins ``before`` places before the map."""

    size: Pair
    before: Pair
    shape: Pair
    places: Pair

    def counts(self) -> np.ndarray:
        """How many places of the map each patch has: [P, Q] int64, none of them 0 in what ``of_output`` and ``of_input`` give."""
        rows, columns = (_covered(*axis) for axis in zip(self.size, self.before, self.shape, self.places, strict=True))
        return rows[:, None] * columns[None, :]

    def within(self, coarse: Patches) -> Patches | None:
        """The patches of ``coarse`` as patches of these patches: each of them lies in one of those. None where one does not."""
        if self.shape != coarse.shape:
            return None
        axes = [
            _axis_within(*axis)
            for axis in zip(self.size, self.before, self.places, coarse.size, coarse.before, coarse.places, strict=True)
        ]
        rows, columns = axes
        if rows is None or columns is None:
            return None
        return Patches((rows[0], columns[0]), (rows[1], columns[1]), self.places, coarse.places)

    @property
    def trivial(self) -> bool:
        """Whether each patch is the place of its own number."""
        return self.size == (1, 1) and self.before == (0, 0) and self.places == self.shape


def _covered(size: int, before: int, extent: int, places: int) -> np.ndarray:
    edges = np.clip(np.arange(places + 1) * size - before, 0, extent)
    return np.diff(edges)


def _axis_within(size: int, before: int, places: int, coarse: int, coarse_before: int, coarse_places: int) -> Pair | None:
    """(size, before) in patches, along one axis."""
    if coarse_places == 1:
        return places, 0
    offset = coarse_before - before
    return (coarse // size, offset // size) if coarse % size == 0 and offset % size == 0 else None


def of_output(shape: Pair, patch: Pair) -> Patches:
    """The patches of y, of ``shape``."""
    rows, columns = (-(-extent // r) for extent, r in zip(shape, patch, strict=True))
    return _centred(shape, patch, (rows, columns))


def of_input(shape: Pair, strides: Pair, output: Patches) -> Patches:
    """The patches of x, of ``shape``, that belong to those of y."""
    return _centred(shape, (output.size[0] * strides[0], output.size[1] * strides[1]), output.places)


def whole(shape: Pair) -> Patches:
    """A map of ``shape`` as one patch."""
    return Patches(shape, (0, 0), shape, (1, 1))


def _centred(shape: Pair, size: Pair, places: Pair) -> Patches:
    rows, columns = (-((n - p * r) // 2) for n, r, p in zip(shape, size, places, strict=True))
    return Patches(size, (rows, columns), shape, places)


# ---- operators ----


def patch_sum(x: relax.Expr, patches: Patches) -> relax.Call:
    """Sums of x [N, C, H, W] over patches: [N, C, P, Q]."""
    return _call(PATCH_SUM, x, patches)


def patch_mean(x: relax.Expr, patches: Patches) -> relax.Call:
    """Means of x [N, C, H, W] over the places that patches have of the map: [N, C, P, Q]."""
    return _call(PATCH_MEAN, x, patches)


def unpatch(g: relax.Expr, patches: Patches) -> relax.Call:
    """g [N, C, P, Q] in every place of its patch: [N, C, H, W]."""
    return _call(UNPATCH, g, patches)


def patches_of(call: relax.Call) -> Patches:
    """The patches of a call of one of these operators."""
    pairs: list[Pair] = []
    for key in ("size", "before", "shape", "places"):
        rows, columns = (int(v) for v in call.attrs[key])
        pairs.append((rows, columns))
    return Patches(*pairs)


def _call(name: str, x: relax.Expr, patches: Patches) -> relax.Call:
    fields = {key: list(getattr(patches, key)) for key in ("size", "before", "shape", "places")}
    return relax.Call(Op.get(name), [x], operators.dict_attrs(**fields))


def _type(key: str) -> Any:
    def infer(call: relax.Call, _ctx: relax.BlockBuilder) -> relax.TensorType:
        x = call.args[0].ty
        return relax.TensorType([*list(x.shape)[:2], *(int(v) for v in call.attrs[key])], x.dtype)

    return infer


operators.register(PATCH_SUM, "sums over patches", _type("places"))
operators.register(PATCH_MEAN, "means over the places of patches", _type("places"))
operators.register(UNPATCH, "every place of a patch has its number", _type("shape"))


# ---- gradients ----


def gradients(call: relax.Call, gy: relax.Expr, bb: relax.BlockBuilder) -> tuple[relax.Expr, relax.Expr]:
    """(dX, gradient of the view) of a ``viewed_conv2d`` with patches, for the gradient ``gy`` [N, O, Ho, Wo] of its result."""
    x, w, view, *channels = call.args
    geometry = operators.geometry_of(call)
    patch, groups = _pair(call.attrs["patch"]), geometry["groups"]
    output = of_output(_map(gy), patch)
    source = of_input(_map(x), _pair(geometry["strides"]), output)
    g = bb.emit(patch_mean(gy, output))
    stride = geometry["strides"][0] * geometry["strides"][1]
    if str(call.attrs["scaling"]) == "unbiased" and stride > 1:
        g = bb.emit(R.multiply(g, relax.const(1 / stride, gy.ty.dtype)))
    dx = unpatch(bb.emit(_pooled_dx(g, w, shape_of(x), patch, geometry, bb)), source)
    if channels:
        x, g, groups = operators.chosen(x, g, channels[0], groups, bb)
    pooled = bb.emit(patch_sum(x, source))
    point = {"strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": groups}
    return dx, operators.wgrad(pooled, g, point, shape_of(view))


def _pooled_dx(
    g: relax.Expr, w: relax.Expr, shape: list[int], patch: Pair, geometry: dict[str, Any], bb: relax.BlockBuilder
) -> relax.Call:
    """dX in patches: the dgrad of a convolution of one tap, or of one whose taps are whole patches apart."""
    apart = steps(_pair(geometry["dilation"]), patch)
    summed = [a for a in (2, 3) if apart[a - 2] == 0 and shape_of(w)[a] > 1]
    kernel = bb.emit(R.sum(w, summed, keepdims=True)) if summed else w
    border = [(n - 1) // 2 * step for n, step in zip(shape_of(kernel)[2:], apart, strict=True)]
    dilation = [max(step, 1) for step in apart]
    pooled = [*shape[:2], *_map(g)]
    return operators.transposed_conv2d(g, kernel, pooled, [1, 1], [*border, *border], dilation, geometry["groups"])


def steps(dilation: Pair, patch: Pair) -> Pair:
    """How many patches apart the taps of a kernel are, by axis; 0 where they are summed."""
    rows, columns = (d // r if d > 1 and d >= r else 0 for d, r in zip(dilation, patch, strict=True))
    return rows, columns


def _map(expr: relax.Expr) -> Pair:
    return _pair(shape_of(expr)[2:])


def _pair(values: Sequence[Any]) -> Pair:
    rows, columns = (int(v) for v in values)
    return rows, columns


# ---- kernels ----


def _summed(x: te.Tensor, patches: Patches, by_rows: bool) -> te.Tensor:
    across = patches.size[1]
    if by_rows and 1 < across <= LARGEST_WINDOW and patches.size[0] <= LARGEST_WINDOW and patches.places[1] > 1:
        return _summed_by_rows(x, patches)
    (down, across), (top, left), (height, width), (rows, columns) = patches.size, patches.before, patches.shape, patches.places
    i, j = te.reduce_axis((0, down), "i"), te.reduce_axis((0, across), "j")
    inside = (top, left) == (0, 0) and rows * down <= height and columns * across <= width

    def place(n: tirx.Var, c: tirx.Var, p: tirx.Var, q: tirx.Var) -> tirx.PrimExpr:
        y, v = p * down + i - top, q * across + j - left
        if inside:
            return te.sum(x[n, c, y, v], axis=[i, j])
        valid = tirx.all(y >= 0, y < height, v >= 0, v < width)
        return te.sum(tirx.if_then_else(valid, x[n, c, y, v], tirx.const(0, x.dtype)), axis=[i, j])

    return te.compute((*x.shape[:2], rows, columns), place, name="patch_sum")


def _summed_by_rows(x: te.Tensor, patches: Patches) -> te.Tensor:
    """First the rows of a patch, whole rows at a time; then neighbours of what that gives (``schedules.pooled``)."""
    (down, across), (top, left), (height, width), (places, columns) = (
        patches.size,
        patches.before,
        patches.shape,
        patches.places,
    )
    i = te.reduce_axis((0, down), "i")

    def inside(value: tirx.PrimExpr, at: tirx.PrimExpr, extent: int, covered: int) -> tirx.PrimExpr:
        return value if covered == extent else tirx.if_then_else(tirx.all(at >= 0, at < extent), value, tirx.const(0, x.dtype))

    def row(n: tirx.Var, c: tirx.Var, p: tirx.Var, v: tirx.Var) -> tirx.PrimExpr:
        y = p * down + i - top
        return te.sum(inside(x[n, c, y, v], y, height, places * down), axis=[i])

    rows = te.compute((*x.shape[:2], places, width), row, name="patch_rows")

    def place(n: tirx.Var, c: tirx.Var, p: tirx.Var, q: tirx.Var) -> tirx.PrimExpr:
        at = [q * across + j - left for j in range(across)]
        return reduce(operator.add, [inside(rows[n, c, p, v], v, width, columns * across) for v in at])

    return te.compute((*x.shape[:2], places, columns), place, name="patch_sum")


def _averaged(x: te.Tensor, patches: Patches, by_rows: bool) -> te.Tensor:
    (down, across), (top, left), (height, width), _ = patches.size, patches.before, patches.shape, patches.places
    total = _summed(x, patches, by_rows)
    counts = patches.counts()
    if counts.min() == counts.max():
        share = tirx.const(1 / int(counts.max()), x.dtype)
        return te.compute(total.shape, lambda *place: total(*place) * share, name="patch_mean")

    def count(p: tirx.Var, size: int, before: int, extent: int) -> tirx.PrimExpr:
        return tirx.min((p + 1) * size - before, extent) - tirx.max(p * size - before, 0)

    def mean(n: tirx.Var, c: tirx.Var, p: tirx.Var, q: tirx.Var) -> tirx.PrimExpr:
        return total[n, c, p, q] / tirx.Cast(x.dtype, count(p, down, top, height) * count(q, across, left, width))

    return te.compute(total.shape, mean, name="patch_mean")


def _spread(g: te.Tensor, patches: Patches) -> te.Tensor:
    (down, across), (top, left) = patches.size, patches.before

    def place(n: Any, c: Any, y: Any, v: Any) -> Any:
        return g[n, c, (y + top) // down, (v + left) // across]

    # Pairs are interleaved in registers; of four, LLVM makes no better code than of single places.
    pairs = across == 2 and all(length % size == 0 for length, size in zip(patches.shape, patches.size, strict=True))
    attrs = {STRIDES: [down, across]} if pairs else {}
    return te.compute((*g.shape[:2], *patches.shape), place, name="unpatch", attrs=attrs)


def _legalize(kernel: Any, hint: str) -> Any:
    return lambda bb, call: bb.call_te(lambda x: kernel(x, patches_of(call)), call.args[0], primfunc_name_hint=hint)


def _pooling(by_rows: bool) -> dict[str, Any]:
    return {
        PATCH_SUM: _legalize(partial(_summed, by_rows=by_rows), "patch_sum"),
        PATCH_MEAN: _legalize(partial(_averaged, by_rows=by_rows), "patch_mean"),
    }


for _name, _rule in _pooling(by_rows=True).items():
    register_legalize(_name, _rule)
register_legalize(UNPATCH, _legalize(_spread, "unpatch"))

# On GPUs each thread reads its patch: sums of rows would be a kernel of their own.
FOR_GPUS = _pooling(by_rows=False)
