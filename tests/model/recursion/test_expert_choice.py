"""Expert choice over depth: options against loops over tokens, schedules, losses, predictor."""

from itertools import pairwise
from math import cos, pi
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import Mode, StepContext
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.parameters import Role, named_specs
from moebius.model.program import Site
from tests.model.helpers import random_batch, rows_of
from tests.model.recursion.compare import assert_step_equals
from tests.model.recursion.naive_model import NaiveModel
from tests.model.recursion.systems import (
    COSINE,
    MLP,
    SYSTEMS,
    VOCABULARY,
    depth,
    documents,
    expert,
    system,
)

SCORERS = {"linear": {"kind": "linear"}, "mlp": MLP, "cosine": COSINE}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "none", "constant"])
@pytest.mark.parametrize("gating", ["weighted", "additive"])
def test_gates_and_scorers(scorer: str, activation: str, gating: str) -> None:
    """Hidden states, losses and gradients, with both scopes in turn."""
    router = expert(
        scorer=SCORERS[scorer],
        activation=activation,
        gating=gating,
        alpha=0.6,
        temperature=1.7,
        scope="row" if gating == "weighted" else "document",
    )
    assert_step_equals(system(depth=depth(2, router=router)), documents(2, 9, share=0.3))


def selected(
    executor: LocalExecutor, batch: TokenBatch, mode: Mode = "topk", step: int = 0
) -> list[list[list[int]]]:
    """By pass and row the tokens that made it, of the first loop; from the statistics of each row
    by itself, in which a place is listed once or not at all."""
    passes: list[list[list[int]]] = []
    for b in range(len(batch.tokens_BS)):
        ledger = Ledger()
        with torch.no_grad():
            executor.hidden(rows_of(batch, b, b + 1), StepContext(mode, ledger, step))
        for number in range(executor.decoder.config.depth.num_recursions):
            places = ledger.statistics[Site("depth.0", number + 1)]["places"].tolist()
            if b == 0:
                passes.append([])
            passes[number].append([t for t, count in enumerate(places) if count])
    return passes


def count_of(share: float, size: int, multiple: int = 1) -> int:
    """max(1, floor(c n)), rounded up."""
    k = max(1, int(share * size + 1e-9))
    return min(-(-k // multiple) * multiple, size)


@pytest.mark.parametrize("step", [0, 1, 7, 10, 19, 20, 500])
def test_capacity_warm_up_is_half_a_cosine_in_the_optimizer_step(step: int) -> None:
    """c + (1 - c) (1 + cos(pi n / T)) / 2, whatever was run before."""
    executor = system(depth=depth(3, router=expert(warmup_steps=20)))
    batch = documents(2, 23)
    first = selected(executor, batch, step=step)
    for number, c in enumerate((1, 2 / 3, 1 / 3)):
        share = c + (1 - c) * (1 + cos(pi * min(1, step / 20))) / 2
        assert [len(row) for row in first[number]] == [count_of(share, 23)] * 2
    for _ in range(3):  # forward passes do not count
        assert selected(executor, batch, step=step) == first


@pytest.mark.parametrize(("step", "shares"), [(0, (1, 0.9)), (10, (0.8, 0.7)), (99, (0.6, 0.5))])
def test_capacities_between_points(step: int, shares: tuple[float, float]) -> None:
    """Straight lines between the points, and what they were at the ends."""
    points = [[[0, 1.0], [20, 0.6]], [[0, 0.9], [20, 0.5]]]
    executor = system(depth=depth(2, router=expert(capacities=points)))
    lengths = [
        [len(row) for row in rows] for rows in selected(executor, documents(2, 20), step=step)
    ]
    assert lengths == [[count_of(share, 20)] * 2 for share in shares]


@pytest.mark.parametrize("multiple", [1, 3, 4, 5, 32])
@pytest.mark.parametrize("length", [6, 11, 16])
def test_multiples(multiple: int, length: int) -> None:
    """Rounded up from the share of the full row, and never more than the row."""
    executor = system(depth=depth(3, router=expert(multiple_of=multiple)))
    rows = selected(executor, documents(1, length))
    lengths = [len(row[0]) for row in rows]
    assert lengths == [count_of(c, length, multiple) for c in (1, 2 / 3, 1 / 3)]


def test_each_document_keeps_its_share() -> None:
    """max(1, floor(c n)) of its tokens, the best among those that were there before."""
    executor = system(depth=depth(3, router=expert(scope="document")))
    batch = documents(4, 24, share=0.2)
    previous = [list(range(24))] * 4
    assert max(len(set(row)) for row in batch.segment_ids_BS.tolist()) > 3
    for share, rows in zip((1, 2 / 3, 1 / 3), selected(executor, batch), strict=True):
        for b, row in enumerate(rows):
            segments = batch.segment_ids_BS[b].tolist()
            for document in set(segments):
                mine = [t for t in row if segments[t] == document]
                assert len(mine) == count_of(share, segments.count(document))
            assert set(row) <= set(previous[b])
        previous = rows


LOOPED = [
    name for name in SYSTEMS if name.startswith(("expert", "gain", "stick", "mixture expert"))
]


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("name", LOOPED)
def test_who_leaves_does_not_come_back(name: str, mode: Mode) -> None:
    """I_r is a subset of I_(r-1), a proper one somewhere."""
    executor = system(**SYSTEMS[name])
    passes = selected(executor, documents(4, 16), mode, step=20)
    dropped = 0
    for before, after in pairwise(passes):
        for row, later in zip(before, after, strict=True):
            assert set(later) <= set(row)
            dropped += len(row) - len(later)
    assert dropped > 0


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("scope", ["row", "document"])
def test_the_block_sees_survivors_in_ascending_order(scope: str, mode: Mode) -> None:
    """Places ascend, empty slots are at the end, each token keeps its position and document."""
    executor = system(depth=depth(3, router=expert(scope=scope)))
    batch = documents(4, 16)
    cos_BSC, sin_BSC = executor.decoder.rope(batch.positions_BS)
    contexts = []
    handle = executor.decoder.layers["1"].register_forward_pre_hook(
        lambda module, inputs: contexts.append(inputs[2].tokens)
    )
    with torch.no_grad():
        executor.hidden(batch, StepContext(mode, Ledger()))
    handle.remove()
    assert len(contexts) == 3
    for tokens in contexts:
        for b, places in enumerate(tokens.place_BS.tolist()):
            kept = [t for t in places if t >= 0]
            assert kept == sorted(set(kept))
            assert places == kept + [-1] * (len(places) - len(kept))
            assert tokens.valid_BS[b].tolist() == [t >= 0 for t in places]
            for slot, t in enumerate(kept):
                assert tokens.segment_ids_BS[b, slot] == batch.segment_ids_BS[b, t]
                assert torch.equal(tokens.cos_BSC[b, slot], cos_BSC[b, t])
                assert torch.equal(tokens.sin_BSC[b, slot], sin_BSC[b, t])


def losses_and_gradients(
    router: dict[str, Any], batch: TokenBatch, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], LocalExecutor]:
    """Of a step on one model whose router has such options."""
    executor = system(depth=depth(3, router=router), **changes)
    result = executor.accumulate_gradients([batch])
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in executor.decoder.named_parameters()
        if parameter.grad is not None
    }
    return result.ledger.losses | result.losses, gradients, executor


def test_a_published_coefficient_is_multiplied_by_its_accumulation() -> None:
    """Theirs is not divided by the steps, ours is a mean over the batch: 0.02 with 16 acts as 0.32
    does, in the loss and in every gradient."""
    batch = documents(2, 12)
    theirs = {"causal": {"coefficient": 0.02, "published_accumulation": 16}}
    first = losses_and_gradients(expert(**theirs), batch)
    second = losses_and_gradients(expert(causal={"coefficient": 0.32}), batch)
    once = losses_and_gradients(expert(causal={"coefficient": 0.02}), batch)
    for name in ("depth", "depth_z", "loss"):
        torch.testing.assert_close(first[0][name], second[0][name], rtol=1e-12, atol=0)
    for name, gradient in second[1].items():
        torch.testing.assert_close(first[1][name], gradient, rtol=1e-10, atol=1e-13)
    assert float(first[0]["depth"] / once[0]["depth"]) == pytest.approx(16, rel=1e-12)


@pytest.mark.parametrize("scope", ["row", "document"])
def test_losses_are_means_over_candidates_or_tokens(scope: str) -> None:
    """A row that is there twice changes no loss; a coefficient of 0 leaves none behind."""
    batch = documents(1, 12, share=0.3)
    twice = documents(1, 12, share=0.3)
    for name, value in vars(twice).items():
        setattr(twice, name, torch.cat([value, value]))
    one = losses_and_gradients(expert(scope=scope), batch)
    two = losses_and_gradients(expert(scope=scope), twice)
    assert set(one[0]) == {"depth", "depth_z", "loss"}
    for name, value in one[0].items():
        torch.testing.assert_close(two[0][name], value, rtol=1e-12, atol=0)
    quiet = expert(scope=scope, causal={"kind": "none"}, z_coefficient=0.0)
    assert set(losses_and_gradients(quiet, batch)[0]) == {"loss"}


@pytest.mark.parametrize("scope", ["row", "document"])
def test_a_predictor_leaves_the_model_alone(scope: str) -> None:
    """The same loss and the same gradients as without one, to the last bit, and gradients of its
    own, which are those of its loss alone."""
    batch = documents(3, 12)
    router = {"scope": scope, "z_coefficient": 0.1}
    without = losses_and_gradients(expert(causal={"kind": "none"}, **router), batch)
    causal = {"kind": "router", "scorer": MLP}
    losses, gradients, executor = losses_and_gradients(expert(causal=causal, **router), batch)
    own = {name for name in gradients if ".predictors." in name}
    assert set(gradients) - own == set(without[1])
    for name, gradient in without[1].items():
        assert torch.equal(gradients[name], gradient), name
    assert torch.equal(losses["loss"], without[0]["loss"])
    roles = {name: spec.role for name, _, spec in named_specs(executor.decoder)}
    assert {name for name, role in roles.items() if role is Role.AUX_ROUTER} == own
    assert len(own) == 3 * 2
    assert all(float(gradients[name].abs().max()) > 1e-6 for name in own)


def test_thresholds_follow_the_predictor_and_selection_does_not() -> None:
    """Other weights of the predictor change who passes a threshold and nothing of the k best."""
    executor = system(depth=depth(3, router=expert(causal={"kind": "router"})))
    batch = documents(4, 16)
    before = {mode: selected(executor, batch, mode) for mode in ("topk", "threshold")}
    with torch.no_grad():
        for name, parameter in executor.decoder.named_parameters():
            if ".predictors." in name:
                parameter.neg_()
    after = {mode: selected(executor, batch, mode) for mode in ("topk", "threshold")}
    assert after["topk"] == before["topk"]
    # The first pass's candidates are everyone: there negation turns each decision round.
    for row, other in zip(before["threshold"][0], after["threshold"][0], strict=True):
        assert sorted(row + other) == list(range(16))
        assert 0 < len(row) < 16


def test_agreement_compares_the_threshold_with_the_selection() -> None:
    """Counted over all candidates in topk mode, by a loop over the logits."""
    executor = system(depth=depth(3, router=expert()))
    batch, ledger = documents(2, 12), Ledger()
    naive = NaiveModel(executor)
    with torch.no_grad():
        naive.hidden(batch)
        executor.hidden(batch, StepContext("topk", ledger))
    for number in (1, 2, 3):
        judged = naive.terms.judged["depth.0", number]
        assert 0 < sum(judged) < len(judged)
        agreement = ledger.statistics[Site("depth.0", number)]["agreement"]
        assert int(agreement) == sum(judged)


def test_ties_go_to_the_earlier_token() -> None:
    """With equal scores everywhere, the first k tokens of each row are selected."""
    executor = system(depth=depth(3, router=expert(scorer={"kind": "linear"})))
    with torch.no_grad():
        for name, parameter in executor.decoder.named_parameters():
            if "scorers" in name:
                parameter.zero_()
    passes = selected(executor, random_batch(2, 12, vocab_size=VOCABULARY))
    assert passes == [[list(range(k))] * 2 for k in (12, 8, 4)]
