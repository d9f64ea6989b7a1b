"""Every layout gives what one process gives: losses, gradients, norms, statistics, state.

Quick: each layout with one model, in turn. Slow: the others, and every combination of axes. What is
legal and what is refused is listed in docs/layouts.md.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.parity.forks import run_forked
from tests.parity.layouts import (
    COMBINATIONS,
    LAYOUTS,
    Case,
    case_of,
    is_tried,
    refusal,
    train,
)
from tests.parity.models import MODELS

pytestmark = pytest.mark.usefixtures("warm")
TOLERANCE = 1e-7
"""of numbers that routers hold in fp32; everything else is within 1e-11"""
CASES = [
    (layout, model)
    for model in MODELS
    for layout in LAYOUTS
    if is_tried(layout, model) and refusal(layout, model) is None
]
COMBINED = [name for name in COMBINATIONS if refusal(name, "moepp_mor") is None]


@cache
def reference(name: str, rows: int, clips: tuple[float, ...]) -> dict[str, Any]:
    """One process, the whole batch at once."""
    return run_forked(1, train, name, Case(rows=rows, micro_batch=rows, clips=clips))[0]


def assert_equal(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Every array, relative to the largest element of its kind."""
    assert got.keys() == expected.keys()
    wrong = []
    for key, value in expected.items():
        scale = max(float(np.abs(value).max(initial=0.0)), 1e-6)
        error = float(np.abs(got[key] - value).max(initial=0.0)) / scale
        if not error <= tolerance:
            wrong.append(f"{key}: {error:.1e}")
    assert not wrong, wrong[:20]


def check(layout: str, name: str) -> None:
    """All processes of a layout against one."""
    check_case(name, case_of(layout, name))


def check_case(name: str, case: Case) -> None:
    """The same for a layout without a name."""
    for result in run_forked(case.processes, train, name, case):
        assert_equal(result, reference(name, case.rows, case.clips), TOLERANCE)


def is_quick(layout: str, name: str) -> bool:
    """In turn on each layout one of the models that are tried on it."""
    names = [model for la, model in CASES if la == layout]
    return name == names[list(LAYOUTS).index(layout) % len(names)]


@pytest.mark.parametrize(("layout", "name"), [case for case in CASES if is_quick(*case)])
def test_equals_one_process(layout: str, name: str) -> None:
    check(layout, name)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), [case for case in CASES if not is_quick(*case)])
def test_equals_one_process_too(layout: str, name: str) -> None:
    check(layout, name)


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINED)
def test_every_combination(combination: str) -> None:
    """The product's own model on every legal combination of axes."""
    check(combination, "moepp_mor")
