"""Packing documents into rows changes nothing for each of them."""

import gc
import weakref
from types import SimpleNamespace

import torch

from tests.model.helpers import batch_of, build, hidden, random_batch, scale_parameters


def test_a_packed_document_equals_the_document_alone() -> None:
    """Attention stays inside documents and positions start anew."""
    executor = build(torch.float64, depth={"num_layers": 3})
    scale_parameters(executor, "attention", 5.0)
    first, second = random_batch(1, 7, seed=1), random_batch(1, 9, seed=2)
    packed = SimpleNamespace(
        tokens_BS=torch.cat([first.tokens_BS, second.tokens_BS], dim=1),
        labels_BS=torch.cat([first.labels_BS, second.labels_BS], dim=1),
        segment_ids_BS=torch.tensor([[0] * 7 + [1] * 9]),
        positions_BS=torch.cat([first.positions_BS, second.positions_BS], dim=1),
        sample_ids_B=torch.arange(1),
    )
    together = hidden(executor, packed)
    torch.testing.assert_close(together[:, :7], hidden(executor, first), rtol=0, atol=1e-9)
    torch.testing.assert_close(together[:, 7:], hidden(executor, second), rtol=0, atol=1e-9)


def test_absolute_position_does_not_matter() -> None:
    """Rotary scores depend on distances: the same document counted from 0 or from 1000."""
    executor = build(torch.float64, depth={"num_layers": 2})
    scale_parameters(executor, "attention", 5.0)
    batch = random_batch(2, 12)
    shifted = batch_of(batch.tokens_BS)
    shifted.positions_BS = shifted.positions_BS + 1000
    # The tables are fp32: at angle 1000 their rounding is about 1e-4.
    torch.testing.assert_close(
        hidden(executor, shifted), hidden(executor, batch), atol=5e-3, rtol=0
    )


def test_masks_go_with_their_context() -> None:
    """Without waiting for the collector: one of long rows is hundreds of megabytes."""
    executor = build(torch.float64, depth={"num_layers": 1})
    tokens = executor.tokens(random_batch(2, 12))
    mask = weakref.ref(tokens.sight.mask_BSJ)
    assert tokens.attention_mask_BQS is mask()
    gc.disable()
    try:
        del tokens
        assert mask() is None
    finally:
        gc.enable()
