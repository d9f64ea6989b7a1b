"""Several corpora in one stream: whose turn it is, as a pure function of the position."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Turns:
    """Whose turn it is: the corpus of each sample of a mixture, and which of its samples.

    The samples of a phase are dealt in rounds of `ROUND`. In each, every corpus has its share of
    the turns, in an order of the round's own; so shares hold at every time, each corpus is read
    without gaps, and what comes when depends on the seed and the position alone.
    """

    ROUND = 10_000

    def __init__(self, phases: list[tuple[int, list[float]]], seed: int) -> None:
        """`phases`: first sample and weights `[C]` of each, the first from sample 0 on."""
        self.seed = seed
        self.firsts = [first for first, _ in phases]
        self.quotas = [_quotas(weights, self.ROUND) for _, weights in phases]
        self._round = lru_cache(maxsize=8)(self._dealt)
        self.taken: list[NDArray[np.int64]] = [np.zeros(len(phases[0][1]), dtype=np.int64)]
        """samples of each corpus before each phase"""
        for number, following in enumerate(self.firsts[1:]):
            length = following - self.firsts[number]
            self.taken.append(self.taken[-1] + self._taken_inside(number, length))

    def counts(self, position: int) -> NDArray[np.int64]:
        """Samples of each corpus, `[C]`, among the first `position` of the run."""
        phase = self._phase(position)
        return self.taken[phase] + self._taken_inside(phase, position - self.firsts[phase])

    def weights(self, position: int) -> NDArray[np.float64]:
        """Share of each corpus, `[C]`, at a position."""
        return self.quotas[self._phase(position)] / self.ROUND

    def turn(self, position: int) -> tuple[int, int]:
        """Corpus of the sample at a position, and how many of that corpus came before it."""
        phase = self._phase(position)
        rounds, place = divmod(position - self.firsts[phase], self.ROUND)
        order = self._round(phase, rounds)
        corpus = int(order[place])
        before = int(np.count_nonzero(order[:place] == corpus))
        return corpus, int(self.taken[phase][corpus] + rounds * self.quotas[phase][corpus]) + before

    def _phase(self, position: int) -> int:
        return max(n for n, first in enumerate(self.firsts) if first <= position)

    def _taken_inside(self, phase: int, length: int) -> NDArray[np.int64]:
        rounds, rest = divmod(length, self.ROUND)
        counts = np.bincount(self._round(phase, rounds)[:rest], minlength=len(self.quotas[phase]))
        return rounds * self.quotas[phase] + counts

    def _dealt(self, phase: int, number: int) -> NDArray[np.int64]:
        """The corpus of each turn of a round."""
        quotas = self.quotas[phase]
        turns = np.repeat(np.arange(len(quotas)), quotas)
        return turns[
            np.argsort(_hashes(f"{self.seed}/{phase}/{number}", len(turns)), kind="stable")
        ]


def _quotas(weights: list[float], size: int) -> NDArray[np.int64]:
    """Turns of a round for each corpus, by the largest remainder; at least one for any weight."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * size
    quotas = np.floor(shares).astype(np.int64)
    quotas[(quotas == 0) & (shares > 0)] = 1
    by_remainder = np.argsort(quotas - shares, kind="stable")
    missing = size - int(quotas.sum())
    if missing >= 0:
        quotas[by_remainder[:missing]] += 1
    else:
        quotas[np.argmax(quotas)] += missing
    return quotas


def _hashes(key: str, count: int) -> NDArray[np.uint64]:
    """Pseudo-random numbers `[count]` that are the same for all time: SplitMix64 from a hash."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    step, first = np.uint64(0x9E3779B97F4A7C15), np.uint64(int.from_bytes(digest, "big"))
    with np.errstate(over="ignore"):
        mixed = first + step * np.arange(1, count + 1, dtype=np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
