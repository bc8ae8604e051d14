"""Sums of normalizations as loops: every tensor is read once from memory for all that is summed of it.

A tensor is seen as [N, C, P]: sums run over the images n and the places p, one result for each channel c. Channels are the
outermost loop, which the cores share: one of them fits the nearer caches, so that a second look at it costs no memory traffic.
Sums are those of the lanes of vectors, several of which stay in registers; the end of a plane that is no whole number of vectors
(7x7) is one that begins before it, with the lanes that have been added already left out.

The kernels come with their loops as they shall be (``SCHEDULED``), for processors alone. GPUs have the plain operators
(``operators.plain_statistics``), as has a sum over other axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from tvmtrain import operators
from tvmtrain.legalize_once import Legalization
from tvmtrain.schedules import SCHEDULED
from tvmtrain.schedules.tiles import PARALLEL
from tvmtrain.targets import Device

# Vectors of partial sums of one sum.
COLUMNS = 4
# FuseOps of TVM: fuse nothing with this.
OPAQUE = 8

Value = Any  # an expression of TIR


@dataclass(frozen=True)
class Planes:
    """A tensor of ``shape`` as [images, channels, places], summed over all but the channels."""

    shape: tuple[int, ...]
    images: int
    channels: int
    places: int
    # The axes of the channels, the last one left out.
    first: int
    last: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of the sums: summed axes have size 1."""
        return tuple(d if self.first <= a < self.last else 1 for a, d in enumerate(self.shape))

    def index(self, n: Value, c: Value, p: Value) -> list[Value]:
        """Where the number at (n, c, p) is."""
        head, middle, tail = self.shape[: self.first], self.shape[self.first : self.last], self.shape[self.last :]
        return [*_unravelled(n, head), *_unravelled(c, middle), *_unravelled(p, tail)]

    def result(self, c: Value) -> list[Value]:
        """Where a channel's sum is."""
        zero = tirx.const(0, "int64")
        before, after = [zero] * self.first, [zero] * (len(self.shape) - self.last)
        return [*before, *_unravelled(c, self.shape[self.first : self.last]), *after]


def planes(shape: Sequence[int], axes: Sequence[int]) -> Planes | None:
    """What is summed over ``axes`` as planes; None where the other axes are not neighbours."""
    kept = [a for a in range(len(shape)) if a not in axes]
    first, last = (kept[0], kept[-1] + 1) if kept else (0, 0)
    if len(kept) != last - first or not axes:
        return None
    images, channels, places = (prod(part) for part in (shape[:first], shape[first:last], shape[last:]))
    return Planes(tuple(shape), images, channels, places, first, last)


def _unravelled(place: Value, shape: Sequence[int]) -> list[Value]:
    """The index in ``shape`` of a number that counts its places."""
    index: list[Value] = []
    for a, size in enumerate(shape):
        inner = prod(shape[a + 1 :])
        outermost = all(d == 1 for d in shape[:a])
        here = place if inner == 1 else tirx.floordiv(place, inner)
        index.append(tirx.const(0, "int64") if size == 1 else here if outermost else tirx.floormod(here, size))
    return index


# --- Kernels ------------------------------------------------------------------------------------------------------------------


def statistics(view: Planes, dtype: str, eps: float, device: Device) -> tirx.PrimFunc:
    """(mean, var, 1 / sqrt(var + eps)) of x, in two passes, the second of which corrects the rounding of the first one.

    m = sum(x) / n; d = sum(x - m); mean = m + d / n; var = (sum((x - m)^2) - d^2 / n) / n (Chan, Golub and LeVeque, 1983, equation 1.7).
    """
    share, zero, one = (tirx.const(value, dtype) for value in (1 / (view.images * view.places), 0, 1))

    def body(sums: _Sums, tensors: Sequence[Any], results: Sequence[Any]) -> None:
        (x,), (mean,) = tensors, sums.spare
        sums.add(lambda at, lane: [x[at]])
        sums.keep(mean, lambda lane: sums.total(0, lane) * share)

        def centred(at: Index, lane: Value) -> Sequence[Value]:
            off = x[at] - sums.kept(mean, lane)
            return [off, off * off]

        sums.add(centred)

        def values(lane: Value) -> Sequence[Value]:
            off = sums.total(0, lane) * share
            var = sums.total(1, lane) * share - off * off
            # Rounding may have made it less than 0; NaN stays NaN.
            var = tirx.Select(var < zero, zero, var)
            return [sums.kept(mean, lane) + off, var, one / tirx.sqrt(var + tirx.const(eps, dtype))]

        sums.write(results, values)

    return _kernel(_Form.of(view, dtype, device), [view.shape], 3, body)


def gradient_sums(view: Planes, dtype: str, centred: bool, device: Device) -> tirx.PrimFunc:
    """(sum of gy, sum of gy * (x - mean)); without ``centred``, of gy * x."""

    def body(sums: _Sums, tensors: Sequence[Any], results: Sequence[Any]) -> None:
        gy, x, *given = tensors
        if given:
            sums.keep(sums.spare[0], lambda lane: given[0][tuple(sums.result(lane))])

        def terms(at: Index, lane: Value) -> Sequence[Value]:
            return [gy[at], gy[at] * (x[at] - sums.kept(sums.spare[0], lane) if given else x[at])]

        sums.add(terms)
        sums.write(results, lambda lane: [sums.total(i, lane) for i in (0, 1)])

    shapes = [view.shape, view.shape, *([view.kept] if centred else [])]
    return _kernel(_Form.of(view, dtype, device), shapes, 2, body)


@dataclass(frozen=True)
class _Form:
    """How the sums of ``view`` run: vectors of ``lanes`` along the places or, where there is one place, along the channels."""

    view: Planes
    dtype: str
    lanes: int
    parallel: bool

    @staticmethod
    def of(view: Planes, dtype: str, device: Device) -> _Form:
        most = min(view.channels if view.places == 1 else view.places, device.lanes(tvm.DataType(dtype).bits))
        return _Form(view, dtype, 1 << (most.bit_length() - 1), prod(view.shape) >= PARALLEL)

    @property
    def across(self) -> bool:
        """Whether the lanes are channels."""
        return self.view.places == 1

    @property
    def columns(self) -> int:
        """How many vectors of partial sums one sum has."""
        return 1 if self.across else min(COLUMNS, -(-self.view.places // self.lanes))


def _kernel(form: _Form, shapes: Sequence[Sequence[int]], results: int, body: Body) -> tirx.PrimFunc:
    """A kernel that takes tensors of ``shapes`` and makes ``results`` of one number for each channel."""
    view = form.view
    whole, rest = divmod(view.channels, form.lanes) if form.across else (view.channels, 0)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, SCHEDULED: True})
        tensors = [T.arg(f"x{i}", T.Buffer(_wide(shape), form.dtype)) for i, shape in enumerate(shapes)]
        made = [T.arg(f"y{i}", T.Buffer(_wide(view.kept), form.dtype)) for i in range(results)]
        with T.sblock("root"):
            with (T.parallel if form.parallel else T.serial)(_long(whole)) as c:
                _channels(form, c * form.lanes if form.across else c, "channels", tensors, made, body)
            if rest:
                _channels(form, _long(view.channels - form.lanes), "last_channels", tensors, made, body)
    return builder.get()


def _channels(form: _Form, c: Value, name: str, tensors: Sequence[Any], made: Sequence[Any], body: Body) -> None:
    """The sums of channel c, or of as many channels from c on as there are lanes. Each core has its own partial sums."""
    with T.sblock(name):
        T.reads(*(_everything(tensor) for tensor in tensors))
        T.writes(*(_everything(result) for result in made))
        partial = [T.sblock_alloc_buffer((form.columns * form.lanes,), form.dtype, scope="local") for _ in range(2)]
        spare = [T.sblock_alloc_buffer((form.lanes,), form.dtype, scope="local")]
        body(_Sums(form, c, partial, spare), tensors, made)


@dataclass(frozen=True)
class _Sums:
    """Writes the code of sums of one channel c, or of ``lanes`` from c on. ``partial``: vectors of each sum; ``spare``: one vector."""

    form: _Form
    c: Value
    partial: Sequence[Any]
    spare: Sequence[Any]

    def add(self, terms: Terms) -> None:
        """Sums up ``terms`` over all images and places."""
        form, view = self.form, self.form.view
        with T.vectorized(_long(form.columns * form.lanes)) as lane:
            for partial in self.partial:
                T.buffer_store(partial, tirx.const(0, form.dtype), [lane])
        with T.serial(_long(view.images)) as n:
            if form.across:
                self._step(terms, n, 0, 0, 0)
            else:
                self._plane(terms, n)
        self._fold()

    def _plane(self, terms: Terms, n: Value) -> None:
        """The places of one image: whole rounds of vectors, the vectors that are left, and one for the places that are left."""
        lanes, columns = self.form.lanes, self.form.columns
        vectors, rest = divmod(self.form.view.places, lanes)
        rounds = vectors // columns
        if rounds:
            with T.serial(_long(rounds)) as i:
                for k in range(columns):
                    self._step(terms, n, (i * columns + k) * lanes, k, 0)
        for k in range(vectors % columns):
            self._step(terms, n, (rounds * columns + k) * lanes, k, 0)
        if rest:
            self._step(terms, n, self.form.view.places - lanes, vectors % columns, lanes - rest)

    def _step(self, terms: Terms, n: Value, first: Value, column: int, skipped: int) -> None:
        """One vector of terms, without the lanes that are ``skipped``."""
        with T.vectorized(_long(self.form.lanes)) as lane:
            c, p = (self.c + lane, 0) if self.form.across else (self.c, first + lane)
            values = terms(tuple(self.form.view.index(n, c, p)), lane)
            for partial, value in zip(self.partial, values, strict=False):
                if skipped:
                    value = tirx.Select(lane >= skipped, value, tirx.const(0, self.form.dtype))
                at = column * self.form.lanes + lane
                T.buffer_store(partial, partial[at] + value, [at])

    def _fold(self) -> None:
        """All partial sums of a channel into the first one."""
        lanes = self.form.lanes
        steps = [(column * lanes, lanes) for column in range(1, self.form.columns)]
        if not self.form.across:
            steps += [(half, half) for half in (lanes >> i for i in range(1, lanes.bit_length()))]
        for first, width in steps:
            with T.vectorized(_long(width)) as lane:
                for partial in self.partial:
                    T.buffer_store(partial, partial[lane] + partial[first + lane], [lane])

    def _own(self, lane: Value) -> Value:
        return lane if self.form.across else _long(0)

    def total(self, i: int, lane: Value) -> Value:
        """The sum number i, of the channel of a lane."""
        return self.partial[i][self._own(lane)]

    def kept(self, spare: Any, lane: Value) -> Value:
        """What ``keep`` put there, of the channel of a lane."""
        return spare[self._own(lane)]

    def keep(self, spare: Any, value: Callable[[Value], Value]) -> None:
        """Puts a number of each channel there."""
        with T.vectorized(_long(self.form.lanes if self.form.across else 1)) as lane:
            T.buffer_store(spare, value(lane), [self._own(lane)])

    def result(self, lane: Value) -> list[Value]:
        """Where the number of a lane's channel is in a tensor of such numbers."""
        return self.form.view.result(self.c + lane if self.form.across else self.c)

    def write(self, results: Sequence[Any], values: Callable[[Value], Sequence[Value]]) -> None:
        """Writes one number of each channel to each of the results."""
        with T.vectorized(_long(self.form.lanes if self.form.across else 1)) as lane:
            for result, value in zip(results, values(lane), strict=True):
                T.buffer_store(result, value, self.result(lane))


Index = tuple[Value, ...]
Terms = Callable[[Index, Value], Sequence[Value]]  # (where the number is, lane) -> what is added to each sum
Body = Callable[[_Sums, Sequence[Any], Sequence[Any]], None]


def _long(value: int) -> tirx.IntImm:
    return tirx.const(value, "int64")


def _wide(shape: Sequence[int]) -> list[tirx.IntImm]:
    return [_long(d) for d in shape]


def _everything(buffer: Any) -> Any:
    return buffer[tuple(slice(0, int(d)) for d in buffer.ty.shape)]


# --- Legalization -------------------------------------------------------------------------------------------------------------


def legalization(device: Device) -> dict[str, Legalization]:
    """How ``LegalizeOps`` lowers the sums for a processor."""

    def statistics_of(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        view = _view(call)
        if view is None:
            return operators.plain_statistics(bb, call)
        return _called(bb, call, "statistics", statistics(view, _dtype(call), float(call.attrs["eps"]), device))

    def gradient_sums_of(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        view = _view(call)
        if view is None:
            return operators.plain_gradient_sums(bb, call)
        return _called(bb, call, "gradient_sums", gradient_sums(view, _dtype(call), len(call.args) > 2, device))

    return {operators.STATISTICS: statistics_of, operators.GRADIENT_SUMS: gradient_sums_of}


def _view(call: relax.Call) -> Planes | None:
    return planes([int(d) for d in call.args[0].ty.shape], [int(a) for a in call.attrs["axes"]])


def _dtype(call: relax.Call) -> str:
    return str(call.args[0].ty.dtype)


def _called(bb: relax.BlockBuilder, call: relax.Call, name: str, kernel: tirx.PrimFunc) -> relax.Expr:
    return relax.call_tir(bb.add_func(kernel, name), list(call.args), list(call.ty.fields))
