"""Which ranks share which sequences, where the lengths of a batch have a long tail.

One context-parallel degree for all is the degree the longest sequence needs, and the short ones
then pay for communication that they would not need. FlexSP (arXiv 2412.01523) forms groups of
different degrees side by side, which an integer programme chooses. Here a search over the multisets
of degrees fills the groups longest processing time first and improves the best by exchanges: no
solver is needed, and the plan does not depend on how long one may run.

Nothing here communicates: `plan` is a pure function of the lengths and of a cost model.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

EXTRA_COUNTS = 4
"""numbers of micro-batches that are tried beyond the smallest feasible one"""
BEAM = 4
"""multisets of degrees whose neighbours are looked at; of 32 ranks 202 could be, of 64 1828"""
IMPROVED = 12
"""multisets of degrees whose filled groups are improved"""
EXCHANGES = 1000
"""how many of them at most; many fewer are found"""
GAIN = 1e-9
"""relative gain below which two times count as equal, so that rounding decides nothing"""
ENOUGH = 0.01
"""how near to a time that no groups can beat the search ends"""

Levels = tuple[int, ...]
"""the degrees of the groups of a micro-batch as powers of two, largest first"""


def routed_lengths(length: int, shares: Sequence[float]) -> tuple[float, ...]:
    """The tokens of a sequence that enter each pass, where routing over depth keeps a share of it.

    `shares` are those of `Segment.shares`, by pass, each of the whole sequence (arXiv 2507.10524).
    """
    return tuple(share * length for share in shares)


@dataclass(frozen=True)
class SequenceCost:
    """Time and memory of sequences that a context-parallel group computes (arXiv 2412.01523).

    Coefficients are measured or fitted; any one unit of time does. ValueError on a value that
    describes no machine.
    """

    a2: float
    """time per pair of tokens: attention"""
    a1: float
    """time per token: everything else"""
    token_bytes: float
    """bytes that a token sends in one pass, at any degree above 1"""
    latency: float
    """time that a group with sequences pays once, at any degree above 1"""
    bandwidth: Mapping[int, float]
    """bytes per unit of time that a rank sends, by degree; a degree that is not listed has that of
    the largest listed one below it, or else of the smallest"""
    max_tokens_per_rank: int
    """what the memory of a rank holds, in whole tokens before any routing"""
    shares: tuple[float, ...] = (1.0,)
    """of a sequence that enters each pass; attention's share of the cost falls with the square"""

    def __post_init__(self) -> None:
        named = [("a2", self.a2), ("a1", self.a1), ("latency", self.latency)]
        named += [("token_bytes", self.token_bytes), *(("shares", share) for share in self.shares)]
        for name, value in named:
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: give a finite number that is not negative")
        if not self.bandwidth or min(self.bandwidth) < 1 or not min(self.bandwidth.values()) > 0:
            raise ValueError("bandwidth: give at least one degree, and positive values only")
        if not self.shares:
            raise ValueError("shares: give one for each pass")
        if self.max_tokens_per_rank < 1:
            raise ValueError(f"max_tokens_per_rank is {self.max_tokens_per_rank}: give 1 or more")

    def bandwidth_at(self, degree: int) -> float:
        """Bytes per unit of time that a rank of a group sends."""
        below = [listed for listed in self.bandwidth if listed <= degree]
        return self.bandwidth[max(below) if below else min(self.bandwidth)]

    def marginal(self, length: int, degree: int) -> float:
        """Time that one more sequence adds to a group, apart from the latency of the group."""
        passes = routed_lengths(length, self.shares)
        compute = sum((self.a2 * tokens + self.a1) * tokens for tokens in passes)
        if degree == 1:
            return compute
        return (compute + self.token_bytes * sum(passes) / self.bandwidth_at(degree)) / degree

    def time(self, lengths: Sequence[int], degree: int) -> float:
        """Time of a group of `degree` ranks for its sequences, all passes together.

        The compute of all sequences is divided by the degree, and so are the bytes they send. A
        group without sequences takes no time, as it does not communicate.
        """
        if not lengths:
            return 0.0
        return math.fsum(self.marginal(length, degree) for length in lengths) + self.fixed(degree)

    def fixed(self, degree: int) -> float:
        """Time that a group with sequences takes, however few they are."""
        return self.latency if degree > 1 else 0.0


@dataclass(frozen=True)
class SequenceGroup:
    """Neighbouring ranks that share sequences.

    The degree is a power of two and divides `first_rank`, so each rank is in one of log2(P) + 1
    possible groups, and their communicators can be made once.
    """

    first_rank: int
    degree: int
    sequences: tuple[int, ...]
    """places in the list of lengths, ascending; there may be none"""


@dataclass(frozen=True)
class SequencePlan:
    """What every rank does in a step. All ranks take part in each micro-batch."""

    micro_batches: tuple[tuple[SequenceGroup, ...], ...]
    """groups in the order of their ranks; those of a micro-batch cover all ranks"""

    def time(self, lengths: Sequence[int], cost: SequenceCost) -> float:
        """Time of a step: each micro-batch takes as long as its slowest group."""
        return math.fsum(
            max(cost.time([lengths[index] for index in g.sequences], g.degree) for g in groups)
            for groups in self.micro_batches
        )


def plan(
    lengths: Sequence[int],
    num_ranks: int,
    cost: SequenceCost,
    num_micro_batches: int | None = None,
) -> SequencePlan:
    """Assign sequences to micro-batches, and within each to groups of ranks of different degrees.

    Sequences are cut into micro-batches in descending order of length, so that alike ones meet, and
    so that the largest number of tokens is as small as it can be (arXiv 2412.01523). Without
    `num_micro_batches` the smallest feasible number and a few more are tried, and the fastest plan
    is taken. With it, the plan has exactly that many; those beyond the number of sequences are
    empty. The same arguments give the same plan, in which every sequence occurs once and no group
    exceeds its memory.

    ValueError if `num_ranks` is not a power of two, a length or the number of micro-batches is not
    positive, a sequence is too long for all ranks together, or the micro-batches are too few.
    """
    _check(lengths, num_ranks, cost, num_micro_batches)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ends = list(accumulate((lengths[index] for index in order), initial=0))
    room = num_ranks * cost.max_tokens_per_rank
    fewest = len(_cuts(ends, room)) - 1
    if num_micro_batches is not None and num_micro_batches < fewest:
        raise ValueError(
            f"{num_micro_batches} micro-batches are too few for {sum(lengths)} tokens, as each "
            f"holds {room} at most: set num_micro_batches to {fewest} or more"
        )

    @cache
    def solve(start: int, stop: int) -> tuple[SequenceGroup, ...]:
        return _Problem(order[start:stop], lengths, num_ranks, cost).solve()

    most = min(fewest + EXTRA_COUNTS, len(order))
    plans = []
    for count in range(fewest, most + 1) if num_micro_batches is None else (num_micro_batches,):
        cuts = _even_cuts(ends, min(count, len(order)))
        cuts += cuts[-1:] * (count + 1 - len(cuts))
        plans.append(SequencePlan(tuple(solve(start, stop) for start, stop in pairwise(cuts))))
    times = [made.time(lengths, cost) for made in plans]
    # of equal times the fewest micro-batches
    return next(
        made for made, time in zip(plans, times, strict=True) if time <= min(times) * (1 + GAIN)
    )


def _check(
    lengths: Sequence[int], num_ranks: int, cost: SequenceCost, num_micro_batches: int | None
) -> None:
    """Raise ValueError on arguments for which there is no plan."""
    if num_ranks < 1 or num_ranks & (num_ranks - 1):
        raise ValueError(f"num_ranks is {num_ranks}: give a power of two")
    if num_micro_batches is not None and num_micro_batches < 1:
        raise ValueError(f"num_micro_batches is {num_micro_batches}: give 1 or more, or None")
    if lengths and min(lengths) < 1:
        raise ValueError(f"a sequence of {min(lengths)} tokens: leave out empty sequences")
    room = num_ranks * cost.max_tokens_per_rank
    if lengths and max(lengths) > room:
        raise ValueError(
            f"a sequence of {max(lengths)} tokens fits no group, as {num_ranks} ranks of "
            f"{cost.max_tokens_per_rank} tokens hold {room}: cut it, use more ranks or raise "
            "max_tokens_per_rank"
        )


def _cuts(ends: Sequence[int], room: int, count: int = 0) -> list[int]:
    """Where runs of a row begin and end if each takes what `room` holds, `count` runs at least.

    `ends` are the running sums of the row, from 0. No element exceeds the room.
    """
    cuts, last = [0], len(ends) - 1
    while cuts[-1] < last:
        full = bisect_right(ends, ends[cuts[-1]] + room) - 1
        cuts.append(min(full, last - (count - len(cuts))))  # one is left for each run to come
    return cuts


def _even_cuts(ends: Sequence[int], count: int) -> list[int]:
    """Where `count` runs begin and end whose largest sum is as small as it can be."""
    largest = max((stop - start for start, stop in pairwise(ends)), default=0)
    rooms = range(largest, ends[-1] + 1)
    enough = bisect_left(rooms, True, key=lambda room: len(_cuts(ends, room)) - 1 <= count)
    return _cuts(ends, rooms[enough], count)


@dataclass
class _Layout:
    """Groups of a micro-batch being filled. Sequences are named by their places in its problem."""

    levels: Levels
    members: list[list[int]]
    times: list[float]
    room: list[int]
    """tokens that each group can still take; negative where its memory is too small"""

    @property
    def time(self) -> float:
        """Time of the slowest group."""
        return max(self.times)

    @property
    def excess(self) -> int:
        """Tokens that the fullest group has too many."""
        return max(0, -min(self.room))

    def badness(self, group: int) -> tuple[int, float]:
        """What exchanges lower: first the tokens that do not fit, then the time."""
        return max(0, -self.room[group]), self.times[group]


def _neighbours(levels: Levels) -> Iterator[Levels]:
    """Levels with two equal groups merged, or one group split into two."""
    for level in sorted(set(levels)):
        place = levels.index(level)
        if level:
            rest = levels[:place] + levels[place + 1 :]
            yield tuple(sorted((*rest, level - 1, level - 1), reverse=True))
        if levels.count(level) > 1:
            rest = levels[:place] + levels[place + 2 :]
            yield tuple(sorted((*rest, level + 1), reverse=True))


class _Problem:
    """One micro-batch: sequences, in descending order of length, that ranks compute together."""

    def __init__(
        self, indices: Sequence[int], lengths: Sequence[int], num_ranks: int, cost: SequenceCost
    ) -> None:
        self.indices = indices
        self.num_ranks = num_ranks
        self.tokens = [lengths[index] for index in indices]
        degrees = [1 << level for level in range(num_ranks.bit_length())]
        self.shares = [
            [cost.marginal(tokens, degree) for tokens in self.tokens] for degree in degrees
        ]
        self.fixed = [cost.fixed(degree) for degree in degrees]
        self.room = [degree * cost.max_tokens_per_rank for degree in degrees]
        self.enough = math.fsum(self.shares[0]) / num_ranks * (1 + ENOUGH)
        """nearly the time of all compute, shared evenly, without communication"""

    def solve(self) -> tuple[SequenceGroup, ...]:
        """The best groups that were found."""
        apart = self._filled((0,) * self.num_ranks)
        if not self._improved(apart).excess and apart.time <= self.enough:
            return self._groups(apart)
        layouts = sorted(self._filled_layouts(), key=lambda layout: layout.time)
        # a group of all ranks always fits; exchanges may make room where the filling found none
        fitting = [layout for layout in layouts if not layout.excess][:IMPROVED]
        exceeding = [layout for layout in layouts if layout.excess][:IMPROVED]
        improved = [self._improved(layout) for layout in fitting + exceeding]
        fitting = [layout for layout in improved if not layout.excess]
        limit = min(layout.time for layout in fitting) * (1 + GAIN)
        # of equal times the most groups, as they communicate least
        fastest = [layout for layout in fitting if layout.time <= limit]
        return self._groups(max(fastest, key=lambda layout: len(layout.levels)))

    def _filled_layouts(self) -> list[_Layout]:
        """Uniform degrees, and what merging and splitting groups of the best ones leads to."""
        filled: dict[Levels, _Layout] = {}
        expanded = set()
        fresh = [(level,) * (self.num_ranks >> level) for level in range(len(self.room))]
        while fresh:
            for levels in fresh:
                if levels not in filled and self.room[levels[0]] >= max(self.tokens, default=0):
                    filled[levels] = self._filled(levels)
            beam = sorted(filled.values(), key=lambda layout: (layout.excess, layout.time))[:BEAM]
            expand = [layout.levels for layout in beam if layout.levels not in expanded]
            expanded.update(expand)
            fresh = [near for levels in expand for near in _neighbours(levels)]
        return list(filled.values())

    def _filled(self, levels: Levels) -> _Layout:
        """Each sequence, longest first, goes where it ends first among the groups that hold it.

        One that no group holds goes where the most room is, for exchanges to repair.
        """
        members: list[list[int]] = [[] for _ in levels]
        times = [self.fixed[level] for level in levels]
        room = [self.room[level] for level in levels]
        # of groups of one degree only the first to end matters, if it is not full
        queues: dict[int, list[tuple[float, int]]] = {level: [] for level in levels}
        for group, level in enumerate(levels):
            queues[level].append((times[group], group))
        for item, tokens in enumerate(self.tokens):
            ends = []
            for level, queue in queues.items():
                group = next((group for _, group in queue if room[group] >= tokens), -1)
                if group >= 0:
                    ends.append((times[group] + self.shares[level][item], level, group))
            group = min(ends)[-1] if ends else max(range(len(room)), key=room.__getitem__)
            level = levels[group]
            queues[level].remove((times[group], group))
            times[group] += self.shares[level][item]
            insort(queues[level], (times[group], group))
            members[group].append(item)
            room[group] -= tokens
        times = [time if items else 0.0 for time, items in zip(times, members, strict=True)]
        return _Layout(levels, members, times, room)

    def _improved(self, layout: _Layout) -> _Layout:
        """The layout after exchanges with its worst group, until none of them helps."""
        for _ in range(EXCHANGES):
            if not layout.excess and layout.time <= self.enough:
                break
            ranked = sorted(range(len(layout.levels)), key=layout.badness)
            worst = ranked.pop()
            if not any(self._exchanged(layout, worst, other) for other in ranked):
                break
        return layout

    def _exchanged(self, layout: _Layout, worst: int, other: int) -> bool:
        """Move a sequence of the worst group, or swap it, if both groups are then better than it.

        Exchanges between two other groups cannot shorten the makespan.
        """
        here, there = (self.shares[layout.levels[group]] for group in (worst, other))
        back: list[int | None] = [None, *layout.members[other]]
        excess, time = layout.badness(worst)
        best, found = (excess, time * (1 - GAIN)), None
        for give in layout.members[worst]:
            for take in back:
                moved, time, others_time = (
                    self.tokens[give],
                    layout.times[worst],
                    layout.times[other],
                )
                if take is None:
                    time -= here[give] if len(layout.members[worst]) > 1 else time
                    others_time += self.fixed[layout.levels[other]] if len(back) == 1 else 0.0
                else:
                    moved -= self.tokens[take]
                    time += here[take] - here[give]
                    others_time -= there[take]
                full = max(0, -layout.room[worst] - moved, moved - layout.room[other])
                after = full, max(time, others_time + there[give])
                if after < best:
                    best, found = after, (give, take)
        if found is not None:
            self._move(layout, worst, other, found[0])
            if found[1] is not None:
                self._move(layout, other, worst, found[1])
        return found is not None

    def _move(self, layout: _Layout, source: int, target: int, item: int) -> None:
        layout.members[source].remove(item)
        layout.members[target].append(item)
        layout.room[source] += self.tokens[item]
        layout.room[target] -= self.tokens[item]
        for group in (source, target):  # summed anew, so that rounding errors do not add up
            level, items = layout.levels[group], layout.members[group]
            work = math.fsum(self.shares[level][item] for item in items)
            layout.times[group] = work + self.fixed[level] if items else 0.0

    def _groups(self, layout: _Layout) -> tuple[SequenceGroup, ...]:
        """Groups in the order of their ranks; as degrees fall, each is aligned to its own."""
        ranks = accumulate((1 << level for level in layout.levels), initial=0)
        return tuple(
            SequenceGroup(rank, 1 << level, tuple(sorted(self.indices[item] for item in items)))
            for rank, level, items in zip(ranks, layout.levels, layout.members, strict=False)
        )
