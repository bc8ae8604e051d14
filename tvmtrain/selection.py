"""Which channels of a partly trained layer a step trains. NumPy only: this runs on the device, before every step.

    first       0 .. count - 1
    magnitude   those whose weights have the largest 2-norm when the weights are loaded (MCUNetV3's "magnitude+")
    rotate      a window of ``count`` that moves on by its own width every step and wraps around
    random      the same window over the channels in a random order, a new one in every round

A round is the fewest steps after which such a window stands where it began: channels / gcd(channels, count) of them. Within it
no channel is visited again before all others have been, and all are visited equally often. The order of a round is a function of
(seed, layer, round) alone, so that the number of steps taken and the seed are all that resuming needs.

What a choice depends on beside the number of steps is state ("selection:layer"): the seed of "random", the channels of "magnitude".
It is saved with the rest, the seed too: a checkpoint goes on as it would have where it was written, as with Dropout's random state.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tvmtrain.artifact import Selection, TensorSpec
from tvmtrain.errors import InputError


def specs(selections: Iterable[Selection]) -> dict[str, TensorSpec]:
    """The state that the choice of channels needs, by name."""
    shapes = {"magnitude": ("int32", True), "random": ("int64", False)}
    needed = [(key(s), s, *shapes[s.select]) for s in selections if s.select in shapes]
    return {name: TensorSpec("selection", name, (s.count,) if many else (), dtype) for name, s, dtype, many in needed}


def key(selection: Selection) -> str:
    """The name of a layer's state."""
    return f"selection:{selection.layer}"


def seeds(selections: Iterable[Selection]) -> dict[str, np.ndarray]:
    """The state that does not depend on weights."""
    return {key(s): np.array(s.seed, "int64") for s in selections if s.select == "random"}


def largest(selections: Iterable[Selection], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state that does: the channels ([count] int32, ascending) with the largest 2-norms; of equals, the first."""
    return {key(s): _largest(s, weights[s.weight]) for s in selections if s.select == "magnitude"}


def _largest(selection: Selection, weight: np.ndarray) -> np.ndarray:
    squares = np.square(weight.astype("float64"))
    by_channel = squares.swapaxes(0, axis(selection, weight.shape)).reshape(selection.channels, -1)
    return np.sort(np.argsort(-by_channel.sum(axis=1), kind="stable")[: selection.count]).astype("int32")


def channels(selection: Selection, step: int, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """The channels ([count] int32, ascending) that step number ``step`` (from 0) trains."""
    if selection.select == "magnitude":
        return state[key(selection)]
    if selection.select == "first":
        return np.arange(selection.count, dtype="int32")
    window = (step * selection.count + np.arange(selection.count)) % selection.channels
    if selection.select == "random":
        steps = selection.channels // math.gcd(selection.channels, selection.count)
        window = _order(selection.layer, selection.channels, int(state[key(selection)]), step // steps)[window]
    return np.sort(window).astype("int32")


@functools.lru_cache(maxsize=256)  # a round has many steps
def _order(layer: str, channels: int, seed: int, number: int) -> np.ndarray:
    """All channels of a layer in the random order of round ``number``.

    Sorted random words, not ``Generator.permutation``: NumPy promises the words of Philox for all its versions, and no more.
    """
    key = np.array([seed % 2**64, zlib.crc32(layer.encode())], "uint64")
    words = np.random.Philox(key=key, counter=np.array([0, 0, 0, number], "uint64"))
    return np.argsort(words.random_raw(channels), kind="stable")


def axis(selection: Selection, shape: Sequence[int]) -> int:
    """Along which axis of its weight the channels lie: [O, I, ...] has them on axis 1, a depthwise [C * m, 1, Kh, Kw] on axis 0."""
    return 1 if shape[1] == selection.channels else 0


def places(selection: Selection, shape: Sequence[int], chosen: np.ndarray) -> np.ndarray:
    """Where ``chosen`` channels lie along ``axis`` of a weight: m places each in a depthwise one, else one."""
    each = shape[axis(selection, shape)] // selection.channels
    return (chosen[:, None] * each + np.arange(each)).reshape(-1)


def carried(selection: Selection, shape: Sequence[int], values: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Optimizer state of the channels ``old`` as that of ``new`` ones: a channel keeps its own, another starts from zero.

    shape: of the weight, [O, I, ...]. values: the state, which has ``count`` channels where the weight has all.
    """
    where = axis(selection, shape)
    lanes = values.swapaxes(0, where)
    before = lanes.reshape(selection.count, -1, *lanes.shape[1:])
    after = np.zeros_like(before)
    _, source, target = np.intersect1d(old, new, return_indices=True)
    after[target] = before[source]
    return np.ascontiguousarray(after.reshape(lanes.shape).swapaxes(0, where))


def check(selection: Selection, given: np.ndarray, bound: np.ndarray | None = None) -> np.ndarray:
    """``given`` channels as [count] int32. Raises ``InputError`` unless they are so many different ones of the layer's.

    bound: the only ones that are allowed, those that optimizer state exists for; None for any.
    """
    where, last = f"channels of layer {selection.layer!r}", selection.channels - 1
    if given.shape != (selection.count,):
        raise InputError(
            f"{where}: got shape {given.shape}; want ({selection.count},): their number is compiled, their choice is not"
        )
    if given.dtype.kind not in "iu":
        raise InputError(f"{where}: got {given.dtype}; want whole numbers (those of a mask are np.flatnonzero(mask))")
    if outside := [int(c) for c in given if not 0 <= c <= last]:
        raise InputError(f"{where}: got {outside[0]}; want numbers from 0 to {last}")
    if len(np.unique(given)) != len(given):
        twice = next(int(c) for c in given if np.count_nonzero(given == c) > 1)
        raise InputError(f"{where}: got {twice} more than once; want different channels: one of two updates would be lost")
    if bound is None:
        return given.astype("int32")
    if set(given.tolist()) != set(bound.tolist()):
        raise InputError(
            f"{where}: select = {selection.select!r} trains the same ones in every step, and optimizer state exists for those alone: "
            f'{bound.tolist()}; to name others, compile with select = "random" or "rotate", or with an optimizer without state'
        )
    return bound
