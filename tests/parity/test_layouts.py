"""Every layout gives what one process gives: losses, gradients, norms, statistics, state.

Quick: the product's own model and a few others on each layout. Full (slow): every model on every
layout that is legal for it.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.forks import run_forked
from tests.parity.layouts import LAYOUTS, MODELS, Case, case_of, refusal, train

TOLERANCE = 1e-7
"""of numbers that routers hold in fp32; everything else is within 1e-11"""
QUICK = ("dense", "mor_token", "v3", "moepp_mor")
LEGAL = [
    (layout, model) for layout in LAYOUTS for model in MODELS if refusal(layout, model) is None
]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    """Import in this process, once, what an optimizer step imports when it first needs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train("dense", Case())
    yield
    torch.set_num_threads(threads)


@cache
def reference(name: str, rows: int) -> dict[str, Any]:
    """One process, the whole batch at once."""
    return run_forked(1, train, name, Case(rows=rows, micro_batch=rows))[0]


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
    case = case_of(layout, name)
    for result in run_forked(case.processes, train, name, case):
        assert_equal(result, reference(name, case.rows), TOLERANCE)


def is_quick(number: int, name: str) -> bool:
    """Each layout with the product's own model and, in turn, another one."""
    return name == "moepp_mor" or QUICK[number % 3] == name


@pytest.mark.parametrize(
    ("layout", "name"),
    [(la, m) for la, m in LEGAL if is_quick(list(LAYOUTS).index(la), m)],
)
def test_equals_one_process(layout: str, name: str) -> None:
    check(layout, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "name"),
    [(la, m) for la, m in LEGAL if not is_quick(list(LAYOUTS).index(la), m)],
)
def test_equals_one_process_too(layout: str, name: str) -> None:
    check(layout, name)
