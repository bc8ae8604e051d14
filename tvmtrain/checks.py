"""Whether arrays are what a compiled step takes: dtypes, finite values, labels. One batch of them, or all samples of a file."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvmtrain.artifact import LossSpec, TensorSpec
from tvmtrain.errors import InputError


def check(spec: TensorSpec, array: np.ndarray, loss: LossSpec, first: int | None = None) -> None:
    """Raise ``InputError`` for NaN, infinite values and labels that ``loss`` does not know.

    first: the number, in its data set, of the first sample in ``array``; None: positions in ``array`` are told.
    """
    if array.dtype.kind == "f":
        _check_finite(spec, array, first)
    elif spec.role == "target" and loss.name == "cross_entropy":
        _check_labels(spec, array, loss, first)


def cast(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """``array`` in the compiled dtype: floats from floats and integers from integers, nothing else silently."""
    wanted = np.dtype(spec.dtype)
    if array.dtype == wanted:
        return array
    if array.dtype.kind == "f" and wanted.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(wanted)
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        _check_range(array, spec, wanted)
        return array.astype(wanted)
    raise InputError(
        f"{spec.role} {spec.name!r} has dtype {array.dtype}; want {spec.dtype}; {_dtype_hint(array.dtype, wanted)}"
    )


def _check_range(array: np.ndarray, spec: TensorSpec, wanted: np.dtype[Any]) -> None:
    limits = np.iinfo(wanted)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise InputError(f"{spec.role} {spec.name!r} has values {array.min()}..{array.max()}, which do not fit {spec.dtype}")


def _dtype_hint(got: np.dtype[Any], wanted: np.dtype[Any]) -> str:
    if wanted.kind == "f" and got == np.uint8:
        return "scale images first: x.astype('float32') / 255, then the mean and deviation that the model was trained with"
    if wanted.kind in "iu" and got.kind == "f":
        return "want class numbers or indices, not probabilities: y.astype('int64')"
    return f"convert it: .astype({wanted.name!r})"


def _check_finite(spec: TensorSpec, array: np.ndarray, first: int | None) -> None:
    # The sum is finite only if every value is; it needs no second array. A sum that overflows is looked at again.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum()):
            return
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise InputError(
            f"{spec.role} {spec.name!r} has {len(bad)} NaN or infinite values, the first {array[where]} {_place(where, first)}"
        )


def _check_labels(spec: TensorSpec, labels: np.ndarray, loss: LossSpec, first: int | None) -> None:
    if loss.classes is None:
        return
    wrong = (labels < 0) | (labels >= loss.classes)
    if loss.ignore_index is not None:
        wrong &= labels != loss.ignore_index
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        ignored = "" if loss.ignore_index is None else f", or {loss.ignore_index} to be ignored"
        raise InputError(
            f"{spec.role} {spec.name!r} has the label {labels[where]} {_place(where, first)}; want 0..{loss.classes - 1}{ignored}"
        )


def _place(where: tuple[int, ...], first: int | None) -> str:
    """Where in an array, or in which sample of a data set."""
    if first is None:
        return f"at {where}"
    inside = f" at {where[1:]}" if where[1:] else ""
    return f"in sample {first + where[0]}{inside} (counted from 0)"
