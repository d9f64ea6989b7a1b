"""Cutting units into stages, against all cuts there are."""

import random
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest

from moebius.parallel.cut import cut


def all_cuts(num_units: int, num_stages: int) -> Iterator[tuple[range, ...]]:
    for inner in combinations(range(1, num_units), num_stages - 1):
        yield tuple(range(a, b) for a, b in pairwise((0, *inner, num_units)))


def stage_costs(costs: Sequence[float], stages: tuple[range, ...], last: float) -> list[float]:
    totals = [sum(costs[unit] for unit in stage) for stage in stages]
    totals[-1] += last
    return totals


def test_cut_is_the_best_of_all_cuts() -> None:
    rng = random.Random(0)
    for case in range(300):
        num_units = rng.randint(1, 9)
        num_stages = rng.randint(1, num_units)
        # Small whole numbers, so that many cuts are equal and sums are exact.
        costs = [rng.randint(0, 6) for _ in range(num_units)]
        last = rng.choice([0, 4, 9])

        def key(
            stages: tuple[range, ...],
            costs: Sequence[float] = costs,
            last: float = last,
        ) -> tuple[list[float], list[int]]:
            totals = stage_costs(costs, stages, last)
            return sorted(totals, reverse=True), [-len(stage) for stage in stages]

        expected = min(all_cuts(num_units, num_stages), key=key)
        assert cut(costs, num_stages, last) == expected, case


def test_costliest_stage_of_measured_times() -> None:
    rng = random.Random(1)
    for _ in range(100):
        num_stages = rng.randint(1, 5)
        costs = [rng.random() for _ in range(rng.randint(num_stages, 9))]
        last = 2 * rng.random()
        best = min(
            max(stage_costs(costs, stages, last)) for stages in all_cuts(len(costs), num_stages)
        )
        stages = cut(costs, num_stages, last)
        assert max(stage_costs(costs, stages, last)) == pytest.approx(best, rel=1e-12)


def lengths(stages: tuple[range, ...]) -> list[int]:
    return [len(stage) for stage in stages]


def test_ties() -> None:
    """As even as can be, then longer stages first; sums of 0.1 must not round to unequal costs."""
    assert lengths(cut([0.1] * 9, 4)) == [3, 2, 2, 2]
    assert lengths(cut([0.1] * 12, 4)) == [3, 3, 3, 3]
    assert lengths(cut([0.0] * 5, 3)) == [3, 1, 1]


def test_the_head_takes_the_place_of_units() -> None:
    assert lengths(cut([1.0] * 8, 4, fixed_last=2.0)) == [3, 2, 2, 1]
    assert lengths(cut([2.0] + [1.0] * 7, 4, fixed_last=1.0)) == [2, 3, 2, 1]
    assert lengths(cut([2.0] + [1.0] * 9, 4, fixed_last=1.0)) == [2, 3, 3, 2]
    assert cut([1.0] * 3, 1, fixed_last=5.0) == (range(3),)


def test_large_cuts_are_quick() -> None:
    rng = random.Random(2)
    start = time.perf_counter()
    stages = cut([rng.random() for _ in range(256)], 32)
    assert time.perf_counter() - start < 5
    assert [unit for stage in stages for unit in stage] == list(range(256))


@pytest.mark.parametrize(
    ("costs", "num_stages", "message"),
    [
        ([1.0, 2.0], 3, "2 units cannot fill 3 stages"),
        ([1.0, 2.0], 0, "num_stages is 0: it must be at least 1"),
        ([1.0, -2.0], 2, "cost -2.0: it must be finite and not negative"),
        ([1.0, float("nan")], 2, "cost nan: it must be finite and not negative"),
        ([float("inf")], 1, "cost inf: it must be finite and not negative"),
    ],
)
def test_what_cannot_be_cut(costs: list[float], num_stages: int, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        cut(costs, num_stages)
    assert str(error.value) == message
