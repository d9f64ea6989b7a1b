"""Recursion parallelism gives what one process gives."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.forks import run_forked
from tests.parity.layouts import CLIPS, Case, has_state
from tests.parity.models import PASSES, RING_MODELS, ring_name
from tests.parity.rings import ROWS, local_gradients, ring_gradients
from tests.parity.test_layouts import check_case

pytestmark = pytest.mark.usefixtures("warm")
TOLERANCE = 1e-6
"""absolute, of gradients in fp32"""
GRID = list(product((2, 3, 4), PASSES, (False, True), ("dense", "moepp")))


def check_gradients(
    name: str,
    processes: int,
    options: dict[str, Any],
    rings: list[dict[str, Any]],
    rows: int = ROWS,
    distils: bool = False,
) -> None:
    """Those of every process against those of one alone, in fp32."""
    expected, args = local_gradients(name, rows, distils), (rings, rows, distils)
    for results in run_forked(processes, ring_gradients, name, options, *args, timeout=240.0):
        for ring, got in zip(rings, results, strict=True):
            assert got.keys() == expected.keys()
            errors = {key: np.abs(got[key] - value).max() for key, value in expected.items()}
            assert max(errors.values()) <= TOLERANCE, (ring, errors)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "passes", "is_routed", "block"), GRID)
def test_gradients(num_ranks: int, passes: int, is_routed: bool, block: str) -> None:
    """One micro-batch more than twice as many as processes; few, some and all of them live, every
    second time with recomputation, the other ones for another number of passes."""
    rows, size = 2 * num_ranks + 1, num_ranks
    rings = [
        {"live": live, "recompute": (number + passes) % 2 == 0}
        for number, live in enumerate(sorted({2, size, 2 * size, rows}))
    ]
    check_gradients(ring_name(block, passes, is_routed), size, {"rp": size}, rings, rows)


BESIDE: dict[str, dict[str, Any]] = {"dp": {}, "tp": {"tp": 2}, "ep": {"ep": 2}}
"""what two processes for each slice do"""
MERGED: list[dict[str, Any]] = [
    {"merge": True, "live": 2, "recompute": False},
    {"merge": True},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "axis", "is_routed", "block"),
    [
        (num_ranks, axis, is_routed, block)
        for num_ranks, axis, is_routed, block in product(
            (2, 3, 4), BESIDE, (False, True), ("dense", "moepp")
        )
        if (axis != "ep" or block == "moepp")
        and (num_ranks == 2 or (is_routed and block == "moepp"))
    ],
)
def test_gradients_beside_another_axis(
    num_ranks: int, axis: str, is_routed: bool, block: str
) -> None:
    name, options = ring_name(block, 3, is_routed), BESIDE[axis] | {"rp": num_ranks}
    ways = [{"live": num_ranks}, {"live": ROWS, "recompute": False}, *MERGED[: int(is_routed)]]
    check_gradients(name, 2 * num_ranks, options, ways)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gradients_of_merged_chunks(num_ranks: int) -> None:
    """Three micro-batches go home together, and in three, two and one chunks through the passes."""
    check_gradients(ring_name("moepp", 3, True), num_ranks, {"rp": num_ranks}, MERGED)


def test_gradients_of_distillation() -> None:
    name = ring_name("dense", 2, True)
    assert "distillation_loss" in local_gradients(name, ROWS, True)
    check_gradients(name, 2, {"rp": 2}, [{}], ROWS, distils=True)


def test_a_visit_in_bf16_is_computed_again_alike() -> None:
    """But for the order in which fp32 sums are added up, which is the plan's; and the gradients
    are those of one process but for bf16."""
    name, ways = ring_name("moepp", 3, True), [{"recompute": True}, {"recompute": False}]
    expected = local_gradients(name, ROWS, False, torch.bfloat16)
    args = ({"rp": 2}, ways, ROWS, False, torch.bfloat16)
    for again, kept in run_forked(2, ring_gradients, name, *args):
        assert again.keys() == kept.keys() == expected.keys()
        for key, value in expected.items():
            scale = np.abs(value).max()
            assert np.abs(again[key] - kept[key]).max() <= 1e-5 * scale, key
            assert np.abs(kept[key] - value).max() <= 0.05 * scale, key


STEPS: dict[str, tuple[str, Case]] = {
    "moepp": ("ring-moepp-2-routed", Case(2, {"rp": 2}, rows=5, micro_batch=1)),
    "unrouted": ("ring-moepp-2", Case(3, {"rp": 3}, rows=4, micro_batch=1)),
    "few": ("ring-dense-3-routed", Case(3, {"rp": 3, "data": "ddp"}, rows=2, micro_batch=1)),
    "zero1": ("ring-moepp-2-routed", Case(4, {"rp": 2}, rows=5, micro_batch=1)),
    "sp": ("ring-moepp-2-routed", Case(4, {"rp": 2, "tp": 2}, rows=3, micro_batch=1)),
    "cp": ("ring-moepp-2-routed", Case(4, {"rp": 2, "cp": 2}, rows=3, micro_batch=1)),
    "tp": (
        "ring-dense-2-routed",
        Case(4, {"rp": 2, "tp": 2, "sequence_parallel": False}, rows=3, micro_batch=1),
    ),
    "ep": ("ring-token", Case(4, {"rp": 2, "ep": 2}, rows=5, micro_batch=1)),
    "ep-sp": ("ring-moepp-2-routed", Case(8, {"rp": 2, "tp": 2, "ep": 2}, rows=5, micro_batch=1)),
    "recompute": (
        "ring-moepp-2-routed",
        Case(2, {"rp": 2}, rows=3, micro_batch=1, recompute="full"),
    ),
} | {
    name: (name, Case(3, {"rp": 3}, rows=4, micro_batch=1))
    for name in RING_MODELS
    if name.count("-") == 1 or name == "ring-prev_depth-unrouted"
}
QUICK = ("moepp", "sp", "ring-token", "ring-prev_depth", "ring-hybrid")


def check_steps(name: str) -> None:
    model, case = STEPS[name]
    clips = CLIPS if has_state(model) else CLIPS[1:]
    check_case(model, Case(**vars(case) | {"clips": clips}))


@pytest.mark.parametrize("name", QUICK)
def test_steps(name: str) -> None:
    """Losses, updates, norms, statistics, controllers' state and evaluation, in fp64."""
    check_steps(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STEPS if name not in QUICK])
def test_steps_too(name: str) -> None:
    check_steps(name)
