"""Random numbers for Dropout and stochastic depth: Philox-2x32-10, a counter-based generator.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Element i of stream s at step t is a function of
(seed, s, t, i) alone: no order of evaluation, thread count or device changes it. The state is int64[2] = (seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

MULTIPLIER = 0xD256D193
WEYL = 0x9E3779B9
ROUNDS = 10
STREAM_STRIDE = 0x85EBCA6B  # odd, so that streams of one seed have distinct keys


def uniform(state: te.Tensor, shape: Sequence[int], stream: int) -> te.Tensor:
    """float32 numbers in [0, 1) of ``shape``; 24 bits each, so that 1.0 cannot come out."""
    strides = [math.prod(shape[a + 1 :]) for a in range(len(shape))]

    def u64(value: Any) -> Any:
        return tirx.const(value, "uint64") if isinstance(value, int) else tirx.Cast("uint64", value)

    def element(*index: Any) -> Any:
        flat = sum((i * s for i, s in zip(index, strides, strict=True)), start=tirx.const(0, "int64"))
        # 32-bit words kept in 64 bits: TVM 0.27's interval analysis refuses casts to uint32 that could wrap.
        word = u64(0xFFFFFFFF)
        low, high = u64(flat) & word, u64(state[1]) & word
        key = (u64(state[0]) + u64(stream * STREAM_STRIDE)) & word
        for _ in range(ROUNDS):
            product = low * u64(MULTIPLIER)
            low, high = (product >> u64(32)) ^ key ^ high, product & word
            key = (key + u64(WEYL)) & word
        return tirx.Cast("float32", low >> u64(8)) * tirx.const(2.0**-24, "float32")

    return te.compute(tuple(shape), element, name="philox_uniform")


def bits(counter: np.ndarray, step: int, key: int) -> np.ndarray:
    """The same generator in NumPy: the first 32-bit word for each counter (used to give PyTorch the same masks)."""
    low = counter.astype(np.uint32)
    high = np.full_like(low, step & 0xFFFFFFFF)
    key &= 0xFFFFFFFF
    for _ in range(ROUNDS):
        product = low.astype(np.uint64) * np.uint64(MULTIPLIER)
        low, high = (product >> np.uint64(32)).astype(np.uint32) ^ np.uint32(key) ^ high, product.astype(np.uint32)
        key = (key + WEYL) & 0xFFFFFFFF
    return low


def uniform_numpy(seed: int, step: int, shape: Sequence[int], stream: int) -> np.ndarray:
    """What ``uniform`` gives for the state (seed, step)."""
    counter = np.arange(math.prod(shape), dtype=np.uint64)
    words = bits(counter, step, seed + stream * STREAM_STRIDE)
    return ((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
