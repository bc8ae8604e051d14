"""Any number of samples as batches of the compiled size, and back.

A tensor has a fixed number of rows per sample: 1, or more where samples were flattened, as [N * length, classes].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvmtrain.artifact import TensorSpec
from tvmtrain.errors import InputError


def rows_per_sample(spec: TensorSpec, batch: int) -> int:
    """Rows of axis 0 per sample; 0 for a tensor that all samples share."""
    if not spec.shape or spec.shape[0] % batch or (spec.role == "input" and spec.shape[0] != batch):
        return 0
    return spec.shape[0] // batch


def piece(spec: TensorSpec, array: np.ndarray, start: int, size: int, batch: int) -> np.ndarray:
    """``size`` samples from number ``start`` on, filled up to ``batch`` with the last of them; what all samples share is whole."""
    rows = rows_per_sample(spec, batch)
    if not rows:
        return array
    part = array[start * rows : (start + size) * rows]
    filling = np.tile(part[-rows:], (batch - size, *(1,) * (array.ndim - 1)))
    return np.concatenate([part, filling]) if size < batch else part


def trim(array: np.ndarray, spec: TensorSpec, size: int, batch: int) -> np.ndarray:
    """The first ``size`` samples of a batch. Raises ``InputError`` where all samples share ``array`` and not all of them count."""
    rows = rows_per_sample(spec, batch)
    if not rows and size < batch:
        raise InputError(
            f"{spec.role} {spec.name!r} of shape {spec.shape} is one for a whole batch; give multiples of {batch} samples"
        )
    return array[: size * rows] if rows else array


def join(parts: Sequence[np.ndarray], spec: TensorSpec, batch: int) -> np.ndarray:
    """The samples of several batches. Raises ``InputError`` for several of what a whole batch shares."""
    if not rows_per_sample(spec, batch) and len(parts) > 1:
        raise InputError(
            f"{spec.role} {spec.name!r} of shape {spec.shape} is one for a whole batch; give exactly {batch} samples"
        )
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def wrong_shape(spec: TensorSpec, got: tuple[int, ...], batch: int) -> str:
    """The message for a training batch of shape ``got``."""
    message = f"{spec.role} {spec.name!r} has shape {got}; want {spec.shape}"
    if rows_per_sample(spec, batch) and got[1:] == spec.shape[1:] and len(got) == len(spec.shape):
        message += (
            f": training needs batches of exactly {batch} samples, the compiled size; predict and evaluate take any number"
        )
    return message


def per_epoch(count: int, batch: int) -> int:
    """Training steps in an epoch of ``count`` samples. Raises ``InputError`` where they are no whole batch."""
    if count < batch:
        raise InputError(f"{count} samples to train on, and the step was compiled for {batch} at a time; give more")
    return count // batch


def left_out(count: int, batch: int) -> str:
    """What to tell where an epoch does not take all of ``count`` samples; "" where it does."""
    if not (rest := count % batch):
        return ""
    return f"{rest} of {count} samples are left out of every epoch: training needs whole batches of {batch}"
