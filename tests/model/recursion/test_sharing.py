"""Which unique layer runs where, for every sharing, shape and number of groups."""

import itertools

import pytest
import torch

from moebius.model.context import Mode, StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.program import Program, build_program
from moebius.model.recursion.config import DepthConfig, ExpertChoiceConfig, TokenChoiceConfig
from tests.model.recursion.systems import CYCLE, SYSTEMS, depth, documents, expert, system, token

SHAPES = [
    (sharing, unique, recursions, groups)
    for sharing in ("cycle", "sequence", "middle_cycle", "middle_sequence")
    for unique, recursions, groups in itertools.product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4))
    if unique % groups == 0 and not (groups > 1 and sharing.endswith("sequence"))
]
"""sharing, unique layers that are looped, N_r, groups"""


def layer_at(sharing: str, index: int, num_layers: int, recursions: int, groups: int) -> int:
    """u(l) of the published table; a group is a cycle of its own."""
    if sharing.startswith("middle"):
        if index == 0:
            return 0
        inside = (num_layers - 2) // recursions
        if index == num_layers - 1:
            return 1 + inside
        sharing = sharing.removeprefix("middle_")
        return 1 + layer_at(sharing, index - 1, num_layers - 2, recursions, groups)
    if sharing == "sequence":
        return index // recursions
    size = num_layers // recursions // groups
    group, inside = divmod(index, size * recursions)
    return group * size + inside % size


def program_of(sharing: str, unique: int, recursions: int, groups: int) -> Program:
    """The program of so many unique looped layers."""
    ends = 2 if sharing.startswith("middle") else 0
    config = DepthConfig.model_validate(
        {
            "num_layers": ends + unique * recursions,
            "sharing": sharing,
            "num_recursions": recursions,
            "groups": groups,
        }
    )
    return build_program(config)


@pytest.mark.parametrize(("sharing", "unique", "recursions", "groups"), SHAPES)
def test_the_published_table(sharing: str, unique: int, recursions: int, groups: int) -> None:
    """u(l) of every unrolled layer, how many are unique, and which use of its layer it is."""
    program = program_of(sharing, unique, recursions, groups)
    ends = 2 if sharing.startswith("middle") else 0
    length = ends + unique * recursions
    expected = [layer_at(sharing, index, length, recursions, groups) for index in range(length)]
    assert [int(visit.layer) for visit in program.visits] == expected
    assert [visit.index for visit in program.visits] == list(range(length))
    assert len(program.layers) == len(set(expected)) == unique + ends
    for index, visit in enumerate(program.visits):
        assert visit.depth == expected[: index + 1].count(expected[index])


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_the_stored_model_does_not_grow_with_the_number_of_recursions(sharing: str) -> None:
    """Names and shapes of the whole state; a loop without a router has nothing of its own."""
    states = []
    for recursions in (1, 2, 3):
        ends = 2 if sharing.startswith("middle") else 0
        shape = {"num_layers": ends + 2 * recursions, "sharing": sharing}
        decoder = system(depth=shape | {"num_recursions": recursions}).decoder
        states.append({name: tensor.shape for name, tensor in decoder.state_dict().items()})
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("router", [expert(), token()])
def test_depth_routers_are_all_that_a_routed_loop_adds(router: dict[str, object]) -> None:
    """A scorer for each pass, or one with a score for each number of passes; for each group."""
    plain = system(depth=depth(3, 1, groups=2)).decoder.state_dict()
    routed = system(depth=depth(3, 1, groups=2, router=router)).decoder.state_dict()
    added = {name: tuple(routed[name].shape) for name in routed if name not in plain}
    assert set(plain) <= set(routed)
    if router["kind"] == "expert_choice":
        names = [f"depth_routers.{g}.scorers.{r}.weight" for g in range(2) for r in range(3)]
        assert added == dict.fromkeys(names, (1, 16))
    else:
        names = [f"depth_routers.{g}.router.scorer.weight" for g in range(2)]
        assert added == dict.fromkeys(names, (3, 16))


def routed_program(router: object, groups: int = 1) -> Program:
    """Two looped layers, three passes, between two layers of their own."""
    size = 2 if groups == 1 else 1
    config = DepthConfig(
        num_layers=2 + size * groups * 3,
        sharing="middle_cycle",
        num_recursions=3,
        groups=groups,
        router=router,
    )
    return build_program(config)


def test_exits_stand_where_the_stream_of_all_tokens_is_whole() -> None:
    assert program_of("middle_cycle", 2, 3, 1).exits == (1, 2, 3, 4, 5, 6, 7, 8)
    assert program_of("sequence", 2, 2, 1).exits == (1, 2, 3, 4)
    assert routed_program(ExpertChoiceConfig()).exits == (1, 3, 5, 7, 8)
    assert routed_program(ExpertChoiceConfig(), groups=2).exits == (1, 2, 3, 4, 5, 6, 7, 8)
    # Where tokens choose, a token is in the stream only after its last pass.
    assert routed_program(TokenChoiceConfig()).exits == (1, 7, 8)
    assert routed_program(TokenChoiceConfig(), groups=2).exits == (1, 4, 7, 8)


@pytest.mark.parametrize(("sharing", "unique", "recursions", "groups"), SHAPES)
def test_until_is_the_beginning(sharing: str, unique: int, recursions: int, groups: int) -> None:
    program = program_of(sharing, unique, recursions, groups)
    for number in range(1, len(program.visits) + 1):
        assert program.until(number).visits == program.visits[:number]
    assert program.until(len(program.visits)) == program


@pytest.mark.parametrize("router", [ExpertChoiceConfig(warmup_steps=9), TokenChoiceConfig()])
def test_until_keeps_loops_and_their_shares(router: object) -> None:
    program = routed_program(router, groups=2)
    for number in program.exits:
        shorter = program.until(number)
        assert shorter.visits == program.visits[:number]
        for step in (0, 4, 9):
            for mine, whole in zip(shorter.segments, program.segments, strict=False):
                assert (mine.router, mine.number) == (whole.router, whole.number)
                assert mine.shares(step) == whole.shares(step)[: len(mine.passes)]


PREFIXES = [
    name for name in SYSTEMS if name.startswith(("expert", "token", "gain", "exits", "bdh"))
]


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("name", PREFIXES)
def test_a_shorter_program_gives_what_an_exit_reads(name: str, mode: Mode) -> None:
    """A sub-model is the beginning of the whole one, with the same shares: what is trained at an
    exit is what a shorter program runs."""
    executor = system(**SYSTEMS[name])
    batch = documents(rows=2, length=10)
    exits = executor.program.exits
    with torch.no_grad():
        tokens, step = executor.tokens(batch), StepContext(mode, Ledger(), 20)
        together = executor.exit_hiddens(batch, tokens, step, exits)
        for number in exits:
            shorter = LocalExecutor(executor.decoder, program=executor.program.until(number))
            alone = shorter.hidden(batch, StepContext(mode, Ledger(), 20))
            torch.testing.assert_close(alone, together[number], rtol=0, atol=1e-12)


@pytest.mark.parametrize("routed", [False, True])
def test_depths_of_a_cycle_differ_in_the_state_alone(routed: bool) -> None:
    """A cycle of one layer runs that layer N_r times: nothing else is in between."""
    router = {"activation": "constant", "alpha": 1.0, "gating": "additive"} | {
        "capacities": [1.0, 1.0, 1.0]
    }
    executor = system(depth=CYCLE | ({"router": router} if routed else {}))
    thrice = system(depth={"num_layers": 3})
    state = executor.decoder.state_dict()
    with torch.no_grad():
        for name, value in thrice.decoder.state_dict().items():
            layer = name.split(".")[1] if name.startswith("layers.") else ""
            value.copy_(state[name.replace(f"layers.{layer}.", "layers.0.") if layer else name])
    batch = documents(rows=2, length=8)
    expected = thrice.hidden(batch, StepContext("topk", Ledger()))
    got = executor.hidden(batch, StepContext("topk", Ledger()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
