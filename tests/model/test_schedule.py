"""Quantities that change with the optimizer step, against numpy's interpolation."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from moebius.config import ConfigNode
from moebius.model.schedule import Scheduled, value_at


class Node(ConfigNode):
    """A configuration with one scheduled option."""

    amount: Scheduled = 0.5
    """a number or points"""


def test_a_number_holds_at_every_step() -> None:
    for step in (0, 1, 10**9):
        assert value_at(0.25, step) == 0.25
        assert value_at(Node(amount=2).amount, step) == 2.0
    assert value_at(Node().amount, 3) == 0.5


@pytest.mark.parametrize(
    "points",
    [
        ((0, 1.0), (10, 0.0)),
        ((5, 1.0), (10, 3.0), (11, -2.0), (40, -2.0)),
        ((3, 0.1), (4, 0.7)),
        ((7, 2.5),),
        ((0, 0.0), (1000, 1e-3), (3000, 1.0)),
    ],
)
def test_points_are_interpolated_like_numpy(points: tuple[tuple[int, float], ...]) -> None:
    """Linear between points, constant before the first and after the last."""
    steps, values = zip(*points, strict=True)
    for step in [*range(60), *(s + d for s in steps for d in (-1, 0, 1)), 10**9]:
        expected = float(np.interp(step, steps, values))
        assert value_at(points, step) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_points_are_hit_exactly() -> None:
    points = ((2, 0.1), (5, 0.7), (9, 0.3))
    for step, value in points:
        assert value_at(points, step) == value
    assert value_at(points, 0) == 0.1
    assert value_at(points, 10) == 0.3
    assert value_at(points, 7) == pytest.approx(0.5)


def test_a_file_writes_points_as_lists() -> None:
    """As YAML and JSON give them; whole numbers become floats, and the dump reads back."""
    node = Node.model_validate({"amount": [[0, 1], [10, 0.5]]})
    assert node.amount == ((0, 1.0), (10, 0.5))
    assert value_at(node.amount, 5) == pytest.approx(0.75)
    assert Node.model_validate(node.model_dump()) == node
    assert Node.model_validate(node.model_dump(mode="json")) == node


@pytest.mark.parametrize(
    ("amount", "part"),
    [
        ([[5, 1.0], [3, 2.0]], "ascending steps"),
        ([[0, 1.0], [5, 2.0], [5, 3.0]], "ascending steps"),
        ([[0, 1.0], [7, 2.0], [6, 3.0], [9, 1.0]], "ascending steps"),
        ([], "at least"),
        ([[1, 2, 3]], "at most 2 items"),
        ([[1]], "required"),
        ([5], "valid tuple"),
        ([["a", 1.0]], "valid integer"),
        ([[1.5, 1.0]], "valid integer"),
        ([[True, 1.0]], "valid integer"),
        ([[1, "x"]], "valid number"),
        ([[1, float("nan")]], "finite"),
        ([[0, 1.0], [1, float("inf")]], "finite"),
        ([[0, 1.0], [1, None]], "valid number"),
        ("fast", "valid number"),
        ("0.5", "valid number"),
        (True, "valid number"),
        (None, "valid number"),
        (float("inf"), "finite"),
        ({"0": 1.0}, "mapping"),
    ],
)
def test_what_is_no_schedule_is_one_error(amount: Any, part: str) -> None:
    """Not one for each way to write the option; the message says what is wrong."""
    with pytest.raises(ValidationError) as caught:
        Node(amount=amount)
    errors = caught.value.errors()
    assert [error["loc"][0] for error in errors] == ["amount"]
    assert part in errors[0]["msg"]
