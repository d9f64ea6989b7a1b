"""Quantities that change with the optimizer step: pure functions of it."""

import itertools
from typing import Annotated

from pydantic import AfterValidator, Field

from moebius.config import LIST, NUMBER, ByShape

Point = Annotated[tuple[int, float], Field(strict=False)]


def _check_order(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if not points:
        raise ValueError("give at least one [step, value] pair")
    steps = [step for step, _ in points]
    if steps != sorted(set(steps)):
        raise ValueError("points must be [step, value] pairs with ascending steps")
    return points


Points = Annotated[tuple[Point, ...], Field(strict=False), AfterValidator(_check_order)]
Scheduled = Annotated[Annotated[float, NUMBER] | Annotated[Points, LIST], ByShape]
"""A number, or points `[[step, value], ...]` between which it is interpolated linearly."""


def _check_sign(
    scheduled: float | tuple[tuple[int, float], ...],
) -> float | tuple[tuple[int, float], ...]:
    values = [v for _, v in scheduled] if isinstance(scheduled, tuple) else [scheduled]
    if min(values) < 0:
        raise ValueError(f"must not be negative, {min(values)} is")
    return scheduled


NonNegativeScheduled = Annotated[Scheduled, AfterValidator(_check_sign)]
"""The same, never below 0."""


def value_at(scheduled: float | tuple[tuple[int, float], ...], step: int) -> float:
    """The value at an optimizer step; before the first and after the last point it is constant."""
    if not isinstance(scheduled, tuple):
        return scheduled
    if step <= scheduled[0][0]:
        return scheduled[0][1]
    for (start, low), (end, high) in itertools.pairwise(scheduled):
        if step < end:
            return low + (high - low) * (step - start) / (end - start)
    return scheduled[-1][1]


def steps_of(scheduled: float | tuple[tuple[int, float], ...]) -> tuple[int, ...]:
    """The steps between which the value changes linearly; 0 for a constant."""
    return tuple(step for step, _ in scheduled) if isinstance(scheduled, tuple) else (0,)
