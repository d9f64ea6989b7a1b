"""Best-fit packing: which labels of a shard make a sample, so that few documents are cut.

The idea is that of "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830), but without
padding: the bins that best fit leaves with gaps are filled from the emptiest ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """Samples as pieces: ranges of labels, each within one document.

    Samples are in the order of their first labels, and so are the pieces of a sample.
    """

    starts_P: NDArray[np.int64]
    """first label of each piece, within the shard"""
    lengths_P: NDArray[np.int32]
    offsets_N: NDArray[np.int64]
    """`[num_samples + 1]`: the pieces of sample n are `offsets_N[n]:offsets_N[n + 1]`"""

    @property
    def num_samples(self) -> int:
        """Samples, all of them full."""
        return len(self.offsets_N) - 1

    def pieces(self, sample: int) -> list[tuple[int, int]]:
        """First label and length of each piece of a sample."""
        where = slice(self.offsets_N[sample], self.offsets_N[sample + 1])
        return list(zip(self.starts_P[where].tolist(), self.lengths_P[where].tolist(), strict=True))


def pack_best_fit(lengths_D: NDArray[np.integer[Any]], capacity: int) -> Packing:
    """Samples of `capacity` labels from documents of such lengths, which follow one another.

    Documents longer than a sample are cut into chunks of `capacity` labels and a rest. A sample
    holds at most one piece of a document. Of all labels, `sum(lengths_D) % capacity` are in no
    sample, the others in exactly one. A pure function of its arguments.
    """
    return _in_order(_fill(_packed(lengths_D, capacity), capacity))


def best_fit(lengths_P: NDArray[np.int32], capacity: int) -> NDArray[np.int32]:
    """The bin of each piece, bins numbered as they are opened; lengths must not increase.

    Each piece goes to the fullest bin that has room for it, among equals to the one that became as
    full first; where none has room, a bin is opened. Pieces of one length are placed together: a
    bin that takes one is the fullest with room until it takes no more, and bins of equal room
    follow one by one.
    """
    bins_P = np.empty(len(lengths_P), dtype=np.int32)
    bins = _Bins()
    # Best fit takes an empty bin last: one for each piece may be there from the start.
    bins.put(capacity, np.arange(len(lengths_P), dtype=np.int32))
    for length, start, end in _runs(lengths_P):
        while start < end:
            room = bins.tightest(length)
            per_bin = room // length
            taken = bins.take(room, -(-(end - start) // per_bin))
            count = min(end - start, len(taken) * per_bin)
            bins_P[start : start + count] = np.repeat(taken, per_bin)[:count]
            start += count
            num_done, in_last = divmod(count, per_bin)
            bins.put(room - per_bin * length, taken[:num_done])
            bins.put(room - in_last * length, taken[num_done:])
    return bins_P


class _Bins:
    """Bins by the room they have left; bins of equal room queue in the order they came to it."""

    def __init__(self) -> None:
        self.rooms: list[int] = []
        """those that some bin has, ascending"""
        self.queues: dict[int, deque[NDArray[np.int32]]] = {}

    def tightest(self, length: int) -> int:
        """The smallest room that holds a piece."""
        return self.rooms[bisect_left(self.rooms, length)]

    def put(self, room: int, bins: NDArray[np.int32]) -> None:
        """Add bins to the end of a queue."""
        if room == 0 or len(bins) == 0:
            return
        if room not in self.queues:
            insort(self.rooms, room)
            self.queues[room] = deque()
        self.queues[room].append(bins)

    def take(self, room: int, count: int) -> NDArray[np.int32]:
        """Remove up to `count` bins from the front of a queue."""
        queue, taken = self.queues[room], []
        while queue and count > 0:
            bins = queue.popleft()
            if len(bins) > count:
                queue.appendleft(bins[count:])
            taken.append(bins[:count])
            count -= len(bins)
        if not queue:
            del self.queues[room]
            del self.rooms[bisect_left(self.rooms, room)]
        return np.concatenate(taken)


@dataclass(frozen=True)
class _Pieces:
    """Pieces with the bin of each."""

    starts_P: NDArray[np.int64]
    lengths_P: NDArray[np.int32]
    bins_P: NDArray[np.int32]

    def __getitem__(self, which: NDArray[Any]) -> _Pieces:
        return _Pieces(self.starts_P[which], self.lengths_P[which], self.bins_P[which])


def _packed(lengths_D: NDArray[np.integer[Any]], capacity: int) -> _Pieces:
    """Chunks and documents, long ones first and equal ones in their order, and their bins."""
    starts_P, lengths_P = _chunks(lengths_D.astype(np.int64), capacity)
    order = np.argsort(-lengths_P, kind="stable")
    return _Pieces(starts_P[order], lengths_P[order], best_fit(lengths_P[order], capacity))


def _chunks(
    lengths_D: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Starts and lengths of the documents, long ones as chunks and a rest, in their order."""
    ends_D = np.cumsum(lengths_D)
    counts_D = -(-lengths_D // capacity)
    num_before_D = np.cumsum(counts_D) - counts_D
    starts_P = np.repeat(ends_D - lengths_D - capacity * num_before_D, counts_D)
    starts_P += capacity * np.arange(len(starts_P))
    rests_P = np.repeat(ends_D, counts_D) - starts_P
    return starts_P, np.minimum(rests_P, capacity).astype(np.int32)


def _fill(pieces: _Pieces, capacity: int) -> _Pieces:
    """Make bins full: the emptiest are dissolved and their pieces fill the gaps of the others.

    No such piece fits into a gap, best fit would have put it there. So each one used is cut, and
    the long ones come first: few are needed, and what finds no gap is the short ones.
    """
    filled_B = np.bincount(pieces.bins_P, weights=pieces.lengths_P).astype(np.int64)
    num_samples = int(filled_B.sum()) // capacity
    # Of equally full bins the first opened has fewer, longer pieces, so it is dissolved first.
    emptiest_B = np.argsort(filled_B, kind="stable").astype(np.int32)
    kept_N = emptiest_B[len(filled_B) - num_samples :][::-1]
    is_kept_P = np.isin(pieces.bins_P, kept_N)
    kept, loose = pieces[is_kept_P], pieces[~is_kept_P]
    parts = _cut(loose, kept_N, capacity - filled_B[kept_N])
    return _Pieces(
        np.concatenate([kept.starts_P, parts.starts_P]),
        np.concatenate([kept.lengths_P, parts.lengths_P]),
        np.concatenate([kept.bins_P, parts.bins_P]),
    )


def _cut(pieces: _Pieces, bins_N: NDArray[np.int32], rooms_N: NDArray[np.int64]) -> _Pieces:
    """Fill the rooms of bins with pieces laid end to end; what lies beyond the rooms is dropped."""
    ends_N, ends_P = np.cumsum(rooms_N), np.cumsum(pieces.lengths_P, dtype=np.int64)
    borders = np.unique(np.concatenate([ends_N, ends_P]))
    borders = borders[(borders > 0) & (borders <= rooms_N.sum())]
    lengths = np.diff(borders, prepend=0)
    firsts = borders - lengths
    bins = bins_N[np.searchsorted(ends_N, firsts, side="right")]
    source = np.searchsorted(ends_P, firsts, side="right")
    starts = pieces.starts_P[source] + pieces.lengths_P[source] - (ends_P[source] - firsts)
    return _Pieces(starts, lengths.astype(np.int32), bins)


def _in_order(pieces: _Pieces) -> Packing:
    """The samples that the bins are."""
    first_B = np.full(int(pieces.bins_P.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_B, pieces.bins_P, pieces.starts_P)
    first_P = first_B[pieces.bins_P]
    order = np.lexsort((pieces.starts_P, first_P))
    starts_P = pieces.starts_P[order]
    offsets_N = np.flatnonzero(np.append(starts_P == first_P[order], True))
    return Packing(starts_P, pieces.lengths_P[order], offsets_N)


def _runs(values: NDArray[np.int32]) -> Iterator[tuple[int, int, int]]:
    """Each stretch of equal, positive values: the value, its first index, the one past its last."""
    borders = np.flatnonzero(np.diff(values, prepend=0, append=0)).tolist()
    for start, end in pairwise(borders):
        yield int(values[start]), start, end
