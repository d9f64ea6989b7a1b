"""Every layout gives what one process gives: losses, gradients, norms, statistics, state."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.forks import run_forked
from tests.parity.layouts import MODELS, Case, train

CASES: dict[str, Case] = {
    "ddp": Case(2, {"data": "ddp"}, micro_batch=2),
    "zero1": Case(4, {"data": "zero1"}),
    "zero1 uneven": Case(4, {"data": "zero1"}, rows=6, micro_batch=1),
    "zero1 empty": Case(4, {"data": "zero1"}, rows=3),
    "tp": Case(2, {"tp": 2, "sequence_parallel": False}),
    "tp 4": Case(4, {"tp": 4, "sequence_parallel": False}, micro_batch=1),
    "sp": Case(2, {"tp": 2}),
    "sp 4": Case(4, {"tp": 4}, micro_batch=2, recompute="full"),
    "cp": Case(2, {"cp": 2}),
    "cp 4": Case(4, {"cp": 4}, micro_batch=1, recompute="selective"),
    "cp sp": Case(4, {"cp": 2, "tp": 2}),
    "cp tp": Case(4, {"cp": 2, "tp": 2, "sequence_parallel": False}),
    "dp sp": Case(4, {"data": "ddp", "tp": 2}),
    "dp cp sp": Case(8, {"data": "zero1", "cp": 2, "tp": 2}),
}


@cache
def reference(name: str, rows: int) -> dict[str, Any]:
    """One process, the whole batch at once."""
    return run_forked(1, train, name, Case(1, {}, rows, rows))[0]


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", CASES)
def test_equals_one_process(layout: str, name: str) -> None:
    case = CASES[layout]
    results = run_forked(case.processes, train, name, case)
    for result in results:
        assert_equal(result, reference(name, case.rows), 1e-8)
    assert torch.get_num_threads() >= 1
