"""TVM's schedule primitives without a look at each argument's annotation.

TVM 0.27 wraps each of them in a check in Python (``tvm.s_tir.schedule._type_checker``), which is much of the time that scheduling a
training step takes, and each trial of tuning. What it refuses, TVM's C++ refuses, too, but for None in place of a loop or block.
"""

from __future__ import annotations

from types import FunctionType

from tvm.s_tir import Schedule


def without_checks() -> None:
    """Take the wrappers off ``tvm.s_tir.Schedule``, in this process; a second call finds none."""
    for name, primitive in vars(Schedule).copy().items():
        if isinstance(primitive, FunctionType) and hasattr(primitive, "__wrapped__"):
            setattr(Schedule, name, primitive.__wrapped__)
