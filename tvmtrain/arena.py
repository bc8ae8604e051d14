"""Where each tensor of a function lies in one arena, given when it is alive: plain arithmetic, without TVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

# What TVM's kernels assume of every tensor's address.
ALIGNMENT = 64
# How many ways of ordering the blocks are tried to the end, how often they are changed together, and how many placings that
# may be in all: a second or so.
STARTS = 4
ROUNDS = 1000
PLACEMENTS = 80_000


@dataclass(frozen=True)
class Block:
    """A tensor of ``size`` bytes, alive from the step ``first`` that makes it to the step ``last`` that reads it last, inclusive."""

    size: int
    first: int
    last: int

    @property
    def padded(self) -> int:
        """``size`` rounded up to whole alignments."""
        return -(-self.size // ALIGNMENT) * ALIGNMENT

    def meets(self, other: Block) -> bool:
        """Whether both are alive at one step, so that they must not share a byte."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """``offsets`` of the blocks, in their order, in an arena of ``size`` bytes."""

    offsets: tuple[int, ...]
    size: int


def lower_bound(blocks: Sequence[Block]) -> int:
    """The largest sum of bytes alive at any step: no plan for this order of steps can be smaller."""
    changes: dict[int, int] = {}
    for block in blocks:
        changes[block.first] = changes.get(block.first, 0) + block.size
        changes[block.last + 1] = changes.get(block.last + 1, 0) - block.size
    peak = alive = 0
    for step in sorted(changes):
        alive += changes[step]
        peak = max(peak, alive)
    return peak


def plan(blocks: Sequence[Block]) -> Plan:
    """Offsets such that blocks that meet share no byte, in an arena near the lower bound.

    Greedy by size (Pisarchyk and Lee, 2020, arXiv 2001.03288), by area and by time; the best few are improved by placing blocks at
    the top of the arena, or those below that hold them up, earlier, and keeping the order if it is no worse. Deterministic.
    """
    if not blocks:
        return Plan((), 0)
    puzzle = _Puzzle(blocks)
    starts = sorted(puzzle.starts(_orders(blocks)), key=_size)
    rounds = min(ROUNDS, PLACEMENTS // len(blocks)) // STARTS
    best = starts[0]
    for start in starts[:STARTS]:
        best = min(best, puzzle.improved(start, rounds), key=_size)
        if puzzle.solved(best):
            break
    return Plan(best.offsets, best.size)


# Where a block of a size goes among those placed before, (start, end) sorted.
Gap = Callable[[Sequence[tuple[int, int]], int], int]


@dataclass(frozen=True)
class _Attempt:
    """The offsets that placing blocks in ``order`` gives, by block, and the size of that arena."""

    order: list[int]
    gap: Gap
    offsets: tuple[int, ...]
    size: int


def _size(attempt: _Attempt) -> int:
    return attempt.size


class _Puzzle:
    """The blocks, which of them meet, and what there is to reach."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.sizes = [block.padded for block in blocks]
        self.meeting = [[j for j, other in enumerate(blocks) if j != i and other.meets(b)] for i, b in enumerate(blocks)]
        self.target = lower_bound([Block(b.padded, b.first, b.last) for b in blocks])

    def solved(self, attempt: _Attempt) -> bool:
        """Whether no plan is smaller by more than a thousandth of the lower bound."""
        return attempt.size - self.target <= self.target // 1000

    def starts(self, orders: Sequence[list[int]]) -> list[_Attempt]:
        """An attempt with each order and way to choose a gap; none after one that cannot be smaller: it would be first."""
        made: list[_Attempt] = []
        for order, gap in product(orders, (_first_gap, _best_gap)):
            made.append(self.attempt(order, gap))
            if made[-1].size == self.target:
                break
        return made

    def attempt(self, order: list[int], gap: Gap) -> _Attempt:
        offsets = [-1] * len(order)
        top = 0
        for i in order:
            taken = sorted((offsets[j], offsets[j] + self.sizes[j]) for j in self.meeting[i] if offsets[j] >= 0)
            offsets[i] = gap(taken, self.sizes[i])
            top = max(top, offsets[i] + self.sizes[i])
        return _Attempt(order, gap, tuple(offsets), top)

    def improved(self, best: _Attempt, rounds: int) -> _Attempt:
        choice = Random(0)
        for _ in range(rounds):
            if self.solved(best):
                break
            trial = self.attempt(self._changed(best, choice), best.gap)
            # An equal plan is another place to go on from.
            best = trial if trial.size <= best.size else best
        return best

    def _changed(self, best: _Attempt, choice: Random) -> list[int]:
        order = best.order
        place = choice.choice([k for k, i in enumerate(order) if best.offsets[i] + self.sizes[i] == best.size])
        if choice.random() < 0.5:
            below = set(self.meeting[order[place]])
            place = choice.choice([k for k in range(place) if order[k] in below] or [place])
        if place:
            to = choice.randrange(place)
            return [*order[:to], order[place], *order[to:place], *order[place + 1 :]]
        a, b = choice.randrange(len(order)), choice.randrange(len(order))
        swapped = {a: order[b], b: order[a]}
        return [swapped.get(k, i) for k, i in enumerate(order)]


def _orders(blocks: Sequence[Block]) -> list[list[int]]:
    """Orders in which to place the blocks: large ones first, by area, long-lived ones first, and as they are made."""
    every = range(len(blocks))
    return [
        sorted(every, key=lambda i: (-blocks[i].padded, blocks[i].first, i)),
        sorted(every, key=lambda i: (-blocks[i].padded * (blocks[i].last - blocks[i].first + 1), i)),
        sorted(every, key=lambda i: (blocks[i].first - blocks[i].last, -blocks[i].padded, i)),
        sorted(every, key=lambda i: (blocks[i].first, -blocks[i].padded, i)),
    ]


def _first_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The lowest place that holds ``size``."""
    end = 0
    for start, stop in taken:
        if start - end >= size:
            return end
        end = max(end, stop)
    return end


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The start of the smallest gap that holds ``size``; the end of all if there is none."""
    best: tuple[int, int] | None = None
    end = 0
    for start, stop in taken:
        if start - end >= size and (best is None or start - end < best[0]):
            best = (start - end, end)
        end = max(end, stop)
    return best[1] if best is not None else end
