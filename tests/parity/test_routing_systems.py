"""Every system of configs/routing: neither the cut of a batch nor recomputation changes a number.

Each preset's model runs two optimizer steps with its controllers in float64, in the middle of its
schedules, once with unrolled layers and once with layers that tokens pass a routed number of times.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moebius.model.config import ModelConfig
from moebius.model.context import Recompute, StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import ALL_SAMPLES, Ledger
from moebius.model.moe.replay import RoutingTable
from moebius.model.parameters import initialize
from moebius.trainer.config_file import load_config
from tests.model.helpers import batch_of, loss_sum, rows_of
from tests.trainer.helpers import REPOSITORY

PRESETS = sorted(path.stem for path in (REPOSITORY / "configs" / "routing").glob("*.yaml"))
ROWS, LENGTH, VOCABULARY = 4, 20, 64
FIRST_STEP = 20
"""where warm-ups have begun and expert pools are half open"""
DEPTHS = {
    "unrolled": [],
    "routed depth": [
        "model.depth={num_layers: 6, sharing: middle_cycle, num_recursions: 2, router: {}}"
    ],
}
CASES = [
    (name, depth)
    for name in PRESETS
    for depth in DEPTHS
    if (name, depth) != ("hecto", "routed depth")  # refused: tokens would be missing from its order
]


def model_config(name: str, depth: str) -> ModelConfig:
    """A preset's model with a small vocabulary and width."""
    path = REPOSITORY / "configs" / "routing" / f"{name}.yaml"
    small = ["model.vocab_size=4096", "model.hidden_size=32", *DEPTHS[depth]]
    return load_config(path, small).model.model_copy(update={"vocab_size": VOCABULARY})


def whole_batch() -> TokenBatch:
    """Rows of several documents each, as the data room makes them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    begins = torch.rand(ROWS, LENGTH, generator=generator) < 0.15
    batch = batch_of(tokens, begins.cumsum(dim=1))
    batch.sample_ids_B = torch.arange(ROWS) + 7  # type: ignore[misc]
    return batch


@dataclass
class Trained:
    """What two steps left behind."""

    losses: list[Tensor]
    ledgers: list[Ledger]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Tensor]
    initial: dict[str, Tensor]


def train(
    decoder: Decoder, rows: int, recompute: Recompute, replay: dict[str, RoutingTable]
) -> Trained:
    """Two SGD steps on the same batch in micro-batches of so many rows."""
    executor = LocalExecutor(copy.deepcopy(decoder))
    batch = whole_batch()
    parts = [rows_of(batch, start, start + rows) for start in range(0, ROWS, rows)]
    trained = Trained([], [], [], {}, decoder.state_dict())
    for step in (FIRST_STEP, FIRST_STEP + 1):
        context = StepContext(
            "topk",
            Ledger(keep=ALL_SAMPLES),
            step=step,
            seed=3,
            training=True,
            recompute=recompute,
            replay=replay,
        )
        result = executor.accumulate_gradients(parts, context)
        trained.losses.append(result.loss)
        trained.ledgers.append(result.ledger)
        trained.gradients.append({})
        for name, parameter in executor.decoder.named_parameters():
            if parameter.grad is not None:
                trained.gradients[-1][name] = parameter.grad
                parameter.data -= 0.5 * parameter.grad
                parameter.grad = None
        executor.decoder.update_routers(result.ledger, step)
    trained.state = executor.decoder.state_dict()
    return trained


def recorded_routing(depth: str) -> RoutingTable:
    """Decisions for the replay preset, drawn at random."""
    decoder = lively_decoder("duo_llm_random", depth)
    batch, ledger = whole_batch(), Ledger(keep=ALL_SAMPLES)
    context = StepContext("topk", ledger, training=True)
    loss_sum(LocalExecutor(decoder), batch, context)
    return RoutingTable(batch.sample_ids_B, {str(s): t for s, t in ledger.routings.items()})


def lively_decoder(name: str, depth: str) -> Decoder:
    """A preset's model in which decisions differ between tokens."""
    decoder = Decoder(model_config(name, depth))
    initialize(decoder, 0)
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            if "scorer" in parameter_name or "depth_routers" in parameter_name:
                parameter.mul_(3.0)
            if parameter_name.endswith((".residual", ".up")):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return decoder.to(torch.float64)


def assert_same(got: Trained, expected: Trained) -> None:
    """Losses, gradients, statistics, decisions, parameters and controllers."""
    for a, b in zip(got.losses, expected.losses, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for a_ledger, b_ledger in zip(got.ledgers, expected.ledgers, strict=True):
        assert a_ledger.losses.keys() == b_ledger.losses.keys()
        for name, loss in b_ledger.losses.items():
            torch.testing.assert_close(a_ledger.losses[name], loss, rtol=1e-5, atol=1e-7)
        assert a_ledger.statistics.keys() == b_ledger.statistics.keys()
        for site, sums in b_ledger.statistics.items():
            for name, value in sums.items():
                got_value = a_ledger.statistics[site][name]
                if name in ("prob_sums", "entropy", "logsumexp_squares", "gates"):
                    torch.testing.assert_close(got_value, value, rtol=1e-6, atol=1e-9)
                else:
                    assert torch.equal(got_value, value), (site, name)
            if site in b_ledger.routings:
                assert torch.equal(a_ledger.routings[site], b_ledger.routings[site])
    for a_grads, b_grads in zip(got.gradients, expected.gradients, strict=True):
        assert a_grads.keys() == b_grads.keys()
        for name, gradient in b_grads.items():
            torch.testing.assert_close(a_grads[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    assert_same_state(got.state, expected.state)


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize(("name", "depth"), CASES)
def test_cut_and_recomputation_change_nothing(name: str, depth: str) -> None:
    """1 x 4 against 4 x 1 rows, with and without recomputation."""
    decoder = lively_decoder(name, depth)
    replay = {}
    if name == "duo_llm_replay":
        replay = {"runs/routing/duo_llm_random/routing": recorded_routing(depth)}
    expected = train(decoder, ROWS, recompute="none", replay=replay)
    for rows, recompute in [(1, "none"), (ROWS, "full"), (2, "selective")]:
        assert_same(train(decoder, rows, recompute, replay), expected)
    assert_exercised(expected, name)


def assert_exercised(trained: Trained, name: str) -> None:
    """The comparison was of something: experts got tokens, controllers moved."""
    for site, sums in trained.ledgers[-1].statistics.items():
        if "expert_tokens" in sums and name != "hecto":
            assert int((sums["expert_tokens"] > 0).sum()) >= 2, site
    remembered = [key for key in trained.state if "controllers" in key or ".last_" in key]
    for key in remembered:
        assert not torch.equal(trained.state[key], trained.initial[key]), key


FORCED = ("duo_llm_random", "duo_llm_random_budget", "duo_llm_replay", "forced_balance")
"""whose decisions are those of a place or a draw, not of a document"""


def evaluated(decoder: Decoder, batch: TokenBatch) -> Tensor:
    """Final hidden states as in evaluation and generation."""
    with torch.no_grad():
        step = StepContext("threshold", Ledger(), step=FIRST_STEP + 20, seed=3)
        return LocalExecutor(decoder).hidden(batch, step)


@pytest.mark.parametrize(("name", "depth"), [case for case in CASES if case[0] not in FORCED])
def test_a_token_depends_on_its_documents_past_alone(name: str, depth: str) -> None:
    """A document in a packed row equals the document alone, and changing later tokens changes no
    earlier one."""
    decoder = lively_decoder(name, depth)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (1, 18), generator=generator)
    segments = torch.tensor([[0] * 7 + [1] * 11])
    packed = batch_of(tokens, segments)
    packed.positions_BS[:, 7:] -= 7
    both = evaluated(decoder, packed)
    alone = evaluated(decoder, batch_of(tokens[:, 7:]))
    torch.testing.assert_close(both[:, 7:], alone, rtol=0, atol=1e-6)

    changed = tokens.clone()
    changed[:, 14:] = (changed[:, 14:] + 1) % VOCABULARY
    other = batch_of(changed, segments)
    other.positions_BS[:, 7:] -= 7
    again = evaluated(decoder, other)
    torch.testing.assert_close(again[:, :14], both[:, :14], rtol=0, atol=1e-9)
    assert not torch.equal(again[:, 14:], both[:, 14:])
