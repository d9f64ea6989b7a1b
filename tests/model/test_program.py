"""Sharing maps, names and capacities of the unrolled program."""

import pytest

from moebius.model.program import FINAL_STEP, build_program, kept_tokens
from moebius.model.recursion.config import DepthConfig, ExpertChoiceConfig, Sharing
from tests.model.helpers import build


@pytest.mark.parametrize(
    ("sharing", "num_layers", "num_recursions", "layers"),
    [
        ("none", 4, 1, "0 1 2 3"),
        ("cycle", 6, 2, "0 1 2 0 1 2"),
        ("cycle", 6, 3, "0 1 0 1 0 1"),
        ("sequence", 6, 2, "0 0 1 1 2 2"),
        ("sequence", 6, 3, "0 0 0 1 1 1"),
        ("middle_cycle", 8, 2, "0 1 2 3 1 2 3 4"),
        ("middle_cycle", 8, 3, "0 1 2 1 2 1 2 3"),
        ("middle_sequence", 8, 2, "0 1 1 2 2 3 3 4"),
        ("middle_sequence", 8, 3, "0 1 1 1 2 2 2 3"),
    ],
)
def test_unrolled_layers(
    sharing: Sharing, num_layers: int, num_recursions: int, layers: str
) -> None:
    """The table of arXiv 2507.10524; indices count up, depths count the uses of each layer."""
    program = build_program(
        DepthConfig(num_layers=num_layers, sharing=sharing, num_recursions=num_recursions)
    )
    assert [visit.layer for visit in program.visits] == layers.split()
    assert [visit.index for visit in program.visits] == list(range(num_layers))
    uses: dict[str, int] = {}
    for visit in program.visits:
        uses[visit.layer] = uses.get(visit.layer, 0) + 1
        assert visit.depth == uses[visit.layer]


@pytest.mark.parametrize("num_recursions", [1, 2, 4])
def test_the_number_of_recursions_adds_no_layer(num_recursions: int) -> None:
    """Parameter names but for the depth routers are those of the unique layers."""
    depth = {
        "num_layers": 2 + 2 * num_recursions,
        "sharing": "middle_cycle",
        "num_recursions": num_recursions,
    }
    names = {name for name, _ in build(depth=depth).decoder.named_parameters()}
    baseline = {"num_layers": 4, "sharing": "middle_cycle", "num_recursions": 1}
    assert names == {name for name, _ in build(depth=baseline).decoder.named_parameters()}


def test_default_capacities_fall_linearly() -> None:
    depth = DepthConfig(
        num_layers=8, sharing="middle_cycle", num_recursions=3, router=ExpertChoiceConfig()
    )
    segments = build_program(depth).segments
    for step in (0, FINAL_STEP):
        assert segments[1].shares(step) == (1.0, 2 / 3, 1 / 3)
        assert segments[0].shares(step) == segments[2].shares(step) == (1.0,)


@pytest.mark.parametrize(
    ("capacity", "length", "kept"), [(1.0, 7, 7), (1 / 3, 1536, 512), (2 / 3, 9, 6), (0.01, 7, 1)]
)
def test_kept_tokens_are_counted_from_the_full_row(capacity: float, length: int, kept: int) -> None:
    assert kept_tokens(capacity, length) == kept
