"""What a token may depend on: its document's past, in every system, where selection is causal."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import Mode, StepContext
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from tests.model.helpers import rows_of
from tests.model.recursion.systems import (
    NAIVE,
    SYSTEMS,
    VOCABULARY,
    depth,
    documents,
    expert,
    packed,
    system,
    token,
)

ROWS, LENGTH, STEP = 4, 16, 30
EVERY = NAIVE | SYSTEMS
"""with each kind of keys, and with each reach of depth attention, both kinds of routers"""


def hidden(executor: LocalExecutor, batch: TokenBatch, mode: Mode = "threshold") -> Tensor:
    """Final hidden states as in evaluation."""
    with torch.no_grad():
        return executor.hidden(batch, StepContext(mode, Ledger(), STEP))


def replaced(batch: TokenBatch, where: Tensor) -> TokenBatch:
    """The batch with other tokens at some places."""
    tokens = torch.where(where, (batch.tokens_BS + 11) % VOCABULARY, batch.tokens_BS)
    return packed(tokens, batch.segment_ids_BS)


def assert_same_at(got: Tensor, expected: Tensor, where: Tensor) -> None:
    """Equal at some places, different in some other one of every row."""
    torch.testing.assert_close(got[where], expected[where], rtol=0, atol=1e-10)
    for b in range(ROWS):
        if not bool(where[b].all()):
            assert float((got[b] - expected[b]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_later_tokens_change_nothing(name: str) -> None:
    """Whatever follows a place, what stands before it stays."""
    executor = system(**EVERY[name])
    batch = documents(ROWS, LENGTH)
    before = hidden(executor, batch)
    for position in (1, 6, 11, 15):
        later = (torch.arange(LENGTH) >= position).expand(ROWS, -1)
        after = hidden(executor, replaced(batch, later))
        assert_same_at(after, before, ~later)


@pytest.mark.parametrize("name", EVERY)
def test_other_documents_change_nothing(name: str) -> None:
    """Replacing every second document of each row leaves the others as they were, and one that is
    alone in a row is what it is between others."""
    executor = system(**EVERY[name])
    batch = documents(ROWS, LENGTH, share=0.25)
    before = hidden(executor, batch)
    odd = batch.segment_ids_BS % 2 == 1
    after = hidden(executor, replaced(batch, odd))
    assert bool(odd.any(dim=1).all())
    assert_same_at(after, before, ~odd)

    segments = batch.segment_ids_BS[0]
    for number in segments.unique():
        (places,) = (segments == number).nonzero(as_tuple=True)
        alone = packed(batch.tokens_BS[:1, places], torch.zeros(1, len(places), dtype=torch.int64))
        torch.testing.assert_close(hidden(executor, alone), before[:1, places], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_rows_change_nothing_of_each_other(name: str) -> None:
    """However many empty slots the other rows cause, in both modes."""
    executor = system(**EVERY[name])
    batch = documents(ROWS, LENGTH)
    mode: Mode
    for mode in ("topk", "threshold"):
        together = hidden(executor, batch, mode)
        for b in range(ROWS):
            alone = hidden(executor, rows_of(batch, b, b + 1), mode)
            torch.testing.assert_close(alone, together[b : b + 1], rtol=0, atol=1e-10)


def leak(router: dict[str, Any], where: Tensor, kv: str = "per_depth") -> float:
    """How much other places change in topk mode when the tokens at some are replaced."""
    executor = system(depth=depth(3, kv=kv, router=router))
    batch = documents(ROWS, LENGTH, share=0.25)
    before = hidden(executor, batch, "topk")
    after = hidden(executor, replaced(batch, where), "topk")
    return float((after - before)[~where].abs().max())


LATER = (torch.arange(LENGTH) >= 8).expand(ROWS, -1)
ODD = documents(ROWS, LENGTH, share=0.25).segment_ids_BS % 2 == 1


@pytest.mark.parametrize("kv", ["per_depth", "shared_first", "hybrid"])
def test_the_best_of_a_row_are_known_at_its_end(kv: str) -> None:
    """The published selection compares a token with later ones and with other documents. This is a
    fact about it, not a wish."""
    assert leak(expert(), LATER, kv) > 1e-3
    assert leak(expert(), ODD, kv) > 1e-3


@pytest.mark.parametrize("kv", ["per_depth", "shared_first", "hybrid"])
def test_the_best_of_a_document_are_known_at_its_end(kv: str) -> None:
    """Documents that compete by themselves do not see each other, but each sees its own end."""
    assert leak(expert(scope="document"), LATER, kv) > 1e-3
    assert leak(expert(scope="document"), ODD, kv) < 1e-10


@pytest.mark.parametrize("kv", ["per_depth", "shared_first", "hybrid"])
def test_choosing_a_depth_never_leaks(kv: str) -> None:
    """Token choice looks at the token alone, in training too."""
    assert leak(token(), LATER, kv) < 1e-10
    assert leak(token(), ODD, kv) < 1e-10
