"""Oracle 10: numbers of experts that change over the layers."""

import math
import random
from typing import Any

import pytest

from moebius.model.moe.config import LayerSchedule

SHAPES = ("uniform", "descending", "ascending", "pyramid", "valley", "wave")
MIRRORED = ("uniform", "pyramid", "valley", "wave")


def counts(shape: str, num_layers: int, **options: Any) -> tuple[int, ...]:
    return LayerSchedule.model_validate({"shape": shape, **options}).counts(num_layers)


def course(shape: str, index: int, num_layers: int, spec: dict[str, int]) -> float:
    """The formula of a shape as the docstring writes it, before rounding."""
    u = index / (num_layers - 1) if num_layers > 1 else 0.0
    smallest, r = spec["smallest"], spec["largest"] - spec["smallest"]
    if shape == "uniform":
        return spec["largest"]
    if shape == "descending":
        return smallest + r * (1 - u)
    if shape == "ascending":
        return smallest + r * u
    if shape == "pyramid":
        return smallest + r * (1 - abs(2 * u - 1))
    if shape == "valley":
        return smallest + r * abs(2 * u - 1)
    return smallest + r * (1 + math.cos(2 * math.pi * spec["cycles"] * u)) / 2


def random_cases(number: int, seed: int, budget: bool) -> list[tuple[int, dict[str, int]]]:
    """Layers and options that the rules of the configuration let through."""
    rng = random.Random(seed)
    cases = []
    while len(cases) < number:
        num_layers, snap = rng.randint(1, 24), rng.choice([1, 1, 2, 3, 4, 8])
        smallest = rng.randint(1, 20)
        largest = rng.randint(smallest, 64)
        high = largest // snap
        if -(-smallest // snap) > high:
            continue
        spec = {"smallest": smallest, "largest": largest, "snap": snap, "cycles": rng.randint(1, 4)}
        if budget:
            spec["budget"] = snap * rng.randint(num_layers, high * num_layers)
        cases.append((num_layers, spec))
    return cases


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("uniform", (9, 9, 9, 9, 9)),
        ("descending", (9, 7, 5, 3, 1)),
        ("ascending", (1, 3, 5, 7, 9)),
        ("pyramid", (1, 5, 9, 5, 1)),
        ("valley", (9, 5, 1, 5, 9)),
        ("wave", (9, 1, 9, 1, 9)),
    ],
)
def test_five_layers_from_1_to_9(shape: str, expected: tuple[int, ...]) -> None:
    """By hand."""
    assert counts(shape, 5, smallest=1, largest=9) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula_to_the_nearest_multiple(shape: str) -> None:
    """Oracle 10: multiples of snap, between smallest and largest, as near as they get."""
    for num_layers, spec in random_cases(300, seed=1, budget=False):
        got = counts(shape, num_layers, **spec)
        assert len(got) == num_layers
        snap = spec["snap"]
        low, high = -(-spec["smallest"] // snap) * snap, spec["largest"] // snap * snap
        for index, count in enumerate(got):
            assert count % snap == 0
            assert spec["smallest"] <= count <= spec["largest"]
            wanted = min(max(course(shape, index, num_layers, spec), low), high)
            assert abs(count - wanted) <= snap / 2 + 1e-9


@pytest.mark.parametrize("snap", [1, 2, 4])
@pytest.mark.parametrize("num_layers", [2, 3, 5, 12])
def test_endpoints(num_layers: int, snap: int) -> None:
    """Oracle 10: where each shape begins, ends and turns."""
    options = {"smallest": 4, "largest": 32, "snap": snap}
    uniform = counts("uniform", num_layers, **options)
    assert uniform == (32,) * num_layers
    descending = counts("descending", num_layers, **options)
    assert (descending[0], descending[-1]) == (32, 4)
    ascending = counts("ascending", num_layers, **options)
    assert (ascending[0], ascending[-1]) == (4, 32)
    pyramid = counts("pyramid", num_layers, **options)
    valley = counts("valley", num_layers, **options)
    assert (pyramid[0], pyramid[-1]) == (4, 4)
    assert (valley[0], valley[-1]) == (32, 32)
    if num_layers % 2:
        assert pyramid[num_layers // 2] == 32
        assert valley[num_layers // 2] == 4
    wave = counts("wave", num_layers, **options)
    assert (wave[0], wave[-1]) == (32, 32)


def test_descending_and_ascending_never_turn() -> None:
    """Oracle 10: monotone, and more than constant where there is room."""
    for num_layers, spec in random_cases(500, seed=2, budget=False):
        descending = counts("descending", num_layers, **spec)
        ascending = counts("ascending", num_layers, **spec)
        assert list(descending) == sorted(descending, reverse=True)
        assert list(ascending) == sorted(ascending)
        if num_layers > 1 and spec["largest"] - spec["smallest"] >= 2 * spec["snap"]:
            assert descending[0] > descending[-1]
            assert ascending[0] < ascending[-1]


@pytest.mark.parametrize("shape", MIRRORED)
def test_symmetric_shapes_read_the_same_from_both_ends(shape: str) -> None:
    """Oracle 10. Places that mirror each other may differ in the last bit: ties must not."""
    for num_layers in range(1, 26):
        for smallest, largest in ((1, 16), (1, 31), (2, 32), (3, 18), (4, 19), (5, 35), (1, 2)):
            for snap in (1, 2, 4):
                if -(-smallest // snap) > largest // snap:
                    continue
                got = counts(shape, num_layers, smallest=smallest, largest=largest, snap=snap)
                assert got == got[::-1], (num_layers, smallest, largest, snap)


def test_ascending_is_descending_from_the_other_end() -> None:
    """Also where a number lies halfway between two multiples."""
    for num_layers, spec in random_cases(2000, seed=3, budget=False):
        if num_layers > 1:
            ascending = counts("ascending", num_layers, **spec)
            assert ascending == counts("descending", num_layers, **spec)[::-1], (num_layers, spec)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_is_spent_exactly(shape: str) -> None:
    """Oracle 10: sum, multiples of snap, at least one multiple, at most largest."""
    for num_layers, spec in random_cases(500, seed=4, budget=True):
        got = counts(shape, num_layers, **spec)
        assert len(got) == num_layers
        assert sum(got) == spec["budget"]
        for count in got:
            assert count % spec["snap"] == 0
            assert spec["snap"] <= count <= spec["largest"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_scales_the_course(shape: str) -> None:
    """Where no limit is in the way each layer is within one multiple of the scaled formula."""
    seen = 0
    for num_layers, spec in random_cases(1500, seed=5, budget=True):
        raw = [course(shape, index, num_layers, spec) for index in range(num_layers)]
        scaled = [value * spec["budget"] / sum(raw) for value in raw]
        if (
            min(scaled) < spec["snap"]
            or max(scaled) > spec["largest"] // spec["snap"] * spec["snap"]
        ):
            continue
        seen += 1
        for count, wanted in zip(counts(shape, num_layers, **spec), scaled, strict=True):
            assert abs(count - wanted) < spec["snap"] + 1e-9
    assert seen > 50


def test_a_budget_keeps_the_direction() -> None:
    """Oracle 10: monotone with a budget too; equal layers differ by one multiple at most."""
    for num_layers, spec in random_cases(1000, seed=6, budget=True):
        if spec["largest"] > spec["smallest"]:
            descending = counts("descending", num_layers, **spec)
            ascending = counts("ascending", num_layers, **spec)
            assert list(descending) == sorted(descending, reverse=True)
            assert list(ascending) == sorted(ascending)
        uniform = counts("uniform", num_layers, **spec)
        assert max(uniform) - min(uniform) <= spec["snap"]


def test_budgets_by_hand() -> None:
    """Scaled to the sum; what rounding leaves over goes to the largest remainder."""
    # 9, 7, 5, 3, 1 times 50 / 25, which exceeds 16 nowhere but in the first layer.
    assert counts("descending", 5, smallest=1, largest=9, budget=25) == (9, 7, 5, 3, 1)
    # times 10 / 25: 3.6, 2.8, 2, 1.2, 0.4; the last is raised to 1.
    assert counts("descending", 5, smallest=1, largest=9, budget=10) == (3, 3, 2, 1, 1)
    assert counts("ascending", 3, smallest=2, largest=6, snap=2, budget=16) == (4, 6, 6)
    assert counts("uniform", 3, largest=8, budget=10) == (4, 3, 3)
    assert counts("uniform", 4, largest=8, budget=32) == (8, 8, 8, 8)
    assert counts("valley", 4, largest=8, budget=4) == (1, 1, 1, 1)


@pytest.mark.parametrize("cycles", [1, 2, 3, 5])
def test_wave_begins_high_and_has_its_periods(cycles: int) -> None:
    """Oracle 10: as many troughs as cycles, peaks at both ends."""
    got = counts("wave", 16 * cycles + 1, smallest=1, largest=65, cycles=cycles)
    assert got[0] == got[-1] == 65
    inner = range(1, len(got) - 1)
    troughs = [i for i in inner if got[i] < got[i - 1] and got[i] < got[i + 1]]
    peaks = [i for i in inner if got[i] > got[i - 1] and got[i] > got[i + 1]]
    assert troughs == [16 * c + 8 for c in range(cycles)]
    assert peaks == [16 * c for c in range(1, cycles)]
    assert all(got[i] == 1 for i in troughs)
    assert all(got[i] == 65 for i in peaks)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("uniform", 12),
        ("descending", 12),
        ("ascending", 4),
        ("pyramid", 4),
        ("valley", 12),
        ("wave", 12),
    ],
)
def test_a_single_layer_is_the_first(shape: str, expected: int) -> None:
    """u is 0; with a budget it gets all of it."""
    assert counts(shape, 1, smallest=4, largest=12) == (expected,)
    assert counts(shape, 1, smallest=4, largest=12, snap=4, budget=8) == (8,)
