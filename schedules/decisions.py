"""What a template decides, and what else it could: the defaults are the untuned schedule, all of them together what is tuned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tvm.s_tir import Schedule

# Another number when an option comes to mean something else: records made before are not used then.
VERSION = 8


@dataclass(frozen=True)
class Decisions:
    """Each is the number of an option; 0 is the default. Where a block has fewer options, counting starts anew.

    template: of those that fit a block, which one. tile: of the register tiles that fit: those of neighbours that share lines first,
    then from the one with most arithmetic for each value loaded. order: of the loops over tiles. grain: how finely the cores share
    the work (of a chain 1 finer, 2 coarser; of one with its projection both finer). taps: how far the reduction is written out.
    """

    template: int = 0
    tile: int = 0
    order: int = 0
    grain: int = 0
    taps: int = 0


DEFAULT = Decisions()
# How many options there are of each, in the order of the fields.
OPTIONS = (2, 16, 3, 3, 3)


def sample(sch: Schedule, given: Iterable[int] | None = None) -> Decisions:
    """Decisions as MetaSchedule's: at random, or those that are ``given``."""
    chosen = [None] * len(OPTIONS) if given is None else list(given)
    drawn = [sch.sample_categorical(list(range(n)), [1 / n] * n, decision=d) for n, d in zip(OPTIONS, chosen, strict=True)]
    return Decisions(*(int(sch.get(d)) for d in drawn))


def valid(chosen: Sequence[int]) -> bool:
    """Whether these numbers, read from outside, are decisions."""
    return len(chosen) == len(OPTIONS) and all(type(d) is int and 0 <= d < n for d, n in zip(chosen, OPTIONS, strict=True))
