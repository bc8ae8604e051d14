"""TVM's Python without what takes most of its time in scheduling a training step, and in each trial of tuning.

TVM 0.27 wraps each schedule primitive in a look at each argument's annotation (``tvm.s_tir.schedule._type_checker``). What it refuses,
TVM's C++ refuses, too, but for None in place of a loop or block. And its FFI checks the index of each element of an array that is
gone through (tvm-ffi 0.1, ``container.Array.__iter__``): twice the time of getting it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import tvm_ffi
from tvm.s_tir import Schedule


def without_checks() -> None:
    """Take the wrappers off ``tvm.s_tir.Schedule``, and the checks from arrays, in this process; a second call changes nothing."""
    for name, primitive in vars(Schedule).copy().items():
        if isinstance(primitive, FunctionType) and hasattr(primitive, "__wrapped__"):
            setattr(Schedule, name, primitive.__wrapped__)
    tvm_ffi.Array.__iter__ = _elements  # type: ignore[method-assign]


def _elements(array: tvm_ffi.Array) -> Iterator[Any]:
    """All elements at once: an array never changes."""
    return iter(array[:])
