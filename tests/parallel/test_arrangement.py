"""Documents placed on as few processes as need be: who gets what, and what that saves."""

import random

import pytest
import torch

from moebius.model.context import StepContext
from moebius.model.cost import forward_flops, planned_work
from moebius.model.ledger import Ledger
from moebius.parallel.adaptive import SequenceCost
from moebius.parallel.arrangement import arrange, document_lengths, sequence_cost
from moebius.parallel.layout import Layout
from tests.model.helpers import batch_of
from tests.parity.forks import run_forked
from tests.parity.layouts import LENGTH, Case, decoder_of, sgd
from tests.parity.models import ATTENTION, VOCABULARY

ROOM = 1.25
LAYERS = 4


def cost(length: int, num_ranks: int, a2: float = 1.0, token_bytes: float = 100.0) -> SequenceCost:
    most = max(int(ROOM * length / num_ranks), -(-length // num_ranks))
    return SequenceCost(a2, 10.0, token_bytes, 0.0, {1: 1.0}, most)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_every_token_has_one_place_beside_its_document(num_ranks: int, seed: int) -> None:
    """In order inside documents, never more than there is room for, on aligned groups."""
    draw = random.Random(seed)
    lengths = [min(60, int(draw.paretovariate(0.9) * 3)) for _ in range(draw.randint(1, 12))]
    found = arrange(lengths, num_ranks, cost(sum(lengths), num_ranks))
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert sorted(p for places in found.places for p in places) == list(range(sum(lengths)))
    assert max(map(len, found.places)) <= cost(sum(lengths), num_ranks).max_tokens_per_rank
    for number in range(len(lengths)):
        has = [
            r for r, places in enumerate(found.places) if any(document[p] == number for p in places)
        ]
        assert set(has) <= set(found.groups[has[0]])
        in_order = [p for r in has for p in found.places[r] if document[p] == number]
        assert in_order == sorted(in_order)
    for rank, group in enumerate(found.groups):
        assert rank in group
        assert group.start % len(group) == 0
        held = [len(found.places[member]) for member in group]
        assert sum(held) == 0 or max(held) - min(held) < len(group)


def test_short_documents_stay_apart_and_a_long_one_is_shared() -> None:
    assert [len(g) for g in arrange([6] * 8, 4, cost(48, 4)).groups] == [1, 1, 1, 1]
    whole = arrange([48], 4, cost(48, 4))
    assert [len(places) for places in whole.places] == [12] * 4
    linear = cost(48, 4, a2=0.0)
    assert [len(g) for g in arrange([24, 12, 12], 4, linear).groups] == [2, 2, 1, 1]


def test_more_documents_than_a_process_needs_may_leave_one_without() -> None:
    """What is dear to send stays together, though others wait."""
    dear = SequenceCost(0.0, 1.0, 1e6, 0.0, {1: 1.0}, 100)
    found = arrange([40], 2, dear)
    assert sorted(len(places) for places in found.places) == [0, 40]


def test_documents_of_rows() -> None:
    segments_BS = torch.tensor([[0, 0, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5]])
    assert document_lengths(segments_BS) == [[2, 1, 3], [6]]


def test_cost_of_a_document_is_the_models() -> None:
    """FLOPs of a row of one document, three times for training; keys and values twice."""
    decoder = decoder_of("dense")
    found = sequence_cost(decoder, 4, LENGTH, 50.0, torch.bfloat16)
    for length in (LENGTH, LENGTH // 2, LENGTH // 4):
        work = planned_work(decoder, 1, length)
        assert found.time([length], 1) == pytest.approx(3 * forward_flops(decoder, work), rel=1e-9)
    width = ATTENTION["num_kv_heads"] * ATTENTION["head_dim"]
    sent = 2 * LAYERS * 2 * width * 2  # layers; keys and values; bytes; there and back
    assert found.token_bytes == sent
    for degree in (2, 4):  # each has its share of the tokens, and sends it to all others
        sending = LENGTH * sent * (degree - 1) * 50.0
        assert found.time([LENGTH], degree) == pytest.approx(
            (found.time([LENGTH], 1) + sending) / degree, rel=1e-9
        )


ROWS = {
    "apart": ([[6] * 4, [6] * 4], [[1] * 4, [1] * 4]),
    "halves": ([[12, 6, 6], [6] * 4], [[2, 2, 1, 1], [1] * 4]),
    "whole": ([[24], [6] * 4], [[4] * 4, [1] * 4]),
}
"""two rows: lengths of documents, and the degree of each process's group"""


def joined_by(lengths: list[list[int]], adaptive: bool) -> tuple[dict[str, int], set[int]]:
    """Bytes that this process sends along cp in a forward and a backward pass, and the pairs of
    query and key that a visit is booked with."""
    case = Case(4, {"cp": 4, "context": {"adaptive": adaptive}})
    layout = Layout(decoder_of("dense"), case.config, sgd, LENGTH)
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(VOCABULARY, (len(lengths), LENGTH), generator=generator)
    segments_BS = torch.tensor(
        [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    )
    batch = batch_of(tokens_BS, segments_BS)
    layout.mesh.traffic.take()
    result = layout.executor.accumulate_gradients(
        [batch], StepContext("topk", Ledger(), training=True), None, batch.labels_BS.numel()
    )
    sent = layout.mesh.traffic.take().sent
    pairs = {extent.pairs for extent in result.ledger.work.visits.values()}
    return {operation: n for (axis, operation), n in sent.items() if axis == "cp"}, pairs


@pytest.mark.parametrize("name", ROWS)
def test_keys_travel_inside_groups_only(name: str) -> None:
    """To the byte: for each row the own slots' keys and values to the others of the group, in every
    layer, and gradients back; cut where they are, rows go to all."""
    lengths, degrees = ROWS[name]
    part = LENGTH // 4
    slot = 2 * ATTENTION["num_kv_heads"] * ATTENTION["head_dim"] * 8  # keys, values; float64
    largest = [max(of_rank) for of_rank in zip(*degrees, strict=True)]
    for rank, (sent, pairs) in enumerate(run_forked(4, joined_by, lengths, True)):
        others = sum(row[rank] - 1 for row in degrees)
        assert sent.get("all_to_all", 0) == LAYERS * 2 * others * part * slot  # there and back
        assert "all_gather" not in sent
        assert pairs == {len(lengths) * part * part * sum(largest)}
    sent, pairs = run_forked(4, joined_by, lengths, False)[0]
    assert sent["all_gather"] == LAYERS * len(lengths) * part * slot  # handed over once, for all
    assert pairs == {len(lengths) * LENGTH**2}
