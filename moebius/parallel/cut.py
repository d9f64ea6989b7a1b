"""How the units of a model are cut into the stages of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TypeAlias

_Cut: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""what cuts are compared by: the costs of the stages, costliest first; their lengths, negated"""


def cut(costs: Sequence[float], num_stages: int, fixed_last: float = 0.0) -> tuple[range, ...]:
    """Consecutive, non-empty runs of units, one per stage, whose costliest is as cheap as can be.

    `costs` holds the cost of each unit in any unit of measure, `fixed_last` what the last stage
    carries besides (the head). Among cuts with equal costliest stages the next costliest decides,
    and so on; where all costs are equal, the first stage, then the second and so on, has as many
    units as it can.

    Exact, by dynamic programming over stages and units. Raises ValueError for fewer units than
    stages, for less than one stage and for costs that are negative or not finite.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages is {num_stages}: it must be at least 1")
    if len(costs) < num_stages:
        raise ValueError(f"{len(costs)} units cannot fill {num_stages} stages")
    *units, last = _as_integers((*costs, fixed_last))
    sums = list(accumulate(units, initial=0))
    extras = [0] * num_stages
    extras[-1] += last

    best: list[_Cut | None] = [((), ())] + [None] * len(units)
    for extra in extras:
        best = [_with_stage(best, sums, end, extra) for end in range(len(sums))]
    found = best[-1]
    assert found is not None, "there are as many units as stages"
    ends = list(accumulate((-length for length in found[1]), initial=0))
    return tuple(range(start, end) for start, end in pairwise(ends))


def _as_integers(costs: Sequence[float]) -> list[int]:
    """The costs times a common factor, without rounding: equal stages must compare as equal."""
    for cost in costs:
        if not 0 <= cost < math.inf:
            raise ValueError(f"cost {cost}: it must be finite and not negative")
    ratios = [cost.as_integer_ratio() for cost in costs]
    scale = math.lcm(*(denominator for _, denominator in ratios))
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def _with_stage(shorter: list[_Cut | None], sums: list[int], end: int, extra: int) -> _Cut | None:
    """The best cut of the first `end` units whose last stage follows one of the `shorter` cuts.

    `shorter` holds the best cut into one stage less by its number of units, None where there are
    too few. The best of those is part of the best here, as one more stage leaves the order of two
    cuts as it is.
    """
    found: _Cut | None = None
    for start in reversed(range(end)):
        cost = sums[end] - sums[start] + extra
        before = shorter[start]
        if before is None:
            continue
        if found is not None and cost > found[0][0]:
            break  # so are all longer stages
        stage_costs = tuple(sorted((*before[0], cost), reverse=True))
        candidate = (stage_costs, (*before[1], start - end))
        if found is None or candidate < found:
            found = candidate
    return found
