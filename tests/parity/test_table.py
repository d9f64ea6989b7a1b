"""docs/layouts.md says of every combination whether it is legal, and names a test that exists."""

import re

from tests.parity import test_layouts
from tests.parity.layouts import COMBINATIONS, LAYOUTS, MAIN, refusal
from tests.parity.models import MODELS
from tests.parity.table import PATH, lines


def test_the_table_is_that_of_the_rules() -> None:
    assert PATH.read_text() == "\n".join(lines()) + "\n", "run python -m tests.parity.table"


def test_every_combination_is_tested_or_refused() -> None:
    """Nothing is in both lists or in none."""
    tested = set(test_layouts.COMBINED)
    refused = {name for name in COMBINATIONS if refusal(name, "moepp_mor")}
    assert tested | refused == set(COMBINATIONS)
    assert not tested & refused
    named = re.findall(r"`test_every_combination\[(.*?)\]`", PATH.read_text())
    assert named == [name for name in COMBINATIONS if name in tested]


def test_every_yes_is_a_test() -> None:
    table = PATH.read_text().split("## Models on layouts")[1]
    found = set()
    for line in table.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in LAYOUTS:
            found |= {(name, m) for m, cell in zip(MODELS, cells, strict=True) if cell == "yes"}
    assert found == set(test_layouts.CASES)
    combined = [(name, "moepp_mor") for name in test_layouts.COMBINED]
    for model in MAIN:
        assert sum(name == model for _, name in {*found, *combined}) >= 40, model
