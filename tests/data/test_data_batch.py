"""Batches against a loop over tokens."""

import numpy as np
import torch

from moebius.data.batch import make_batch

EOD = 0


def test_documents_and_positions_equal_a_loop_over_tokens() -> None:
    """An end-of-document token opens the next document at position 0."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        windows = generator.integers(0, 5, (3, 18))
        batch = make_batch(windows, EOD)
        for row, window in enumerate(windows.tolist()):
            segment, position = 0, -1
            for column, token in enumerate(window[:-1]):
                position += 1
                if token == EOD:
                    segment, position = segment + 1, 0
                assert batch.tokens_BS[row, column] == token
                assert batch.labels_BS[row, column] == window[column + 1]
                assert batch.segment_ids_BS[row, column] == segment
                assert batch.positions_BS[row, column] == position


def test_micro_batches_are_the_rows_in_order() -> None:
    batch = make_batch(np.arange(1, 51).reshape(5, 10), EOD)
    parts = batch.split(2)
    assert [len(part.tokens_BS) for part in parts] == [2, 2, 1]
    for name in ("tokens_BS", "labels_BS", "segment_ids_BS", "positions_BS"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch, name))
    assert batch.num_tokens == 45
    assert torch.equal(batch.to(torch.device("cpu")).labels_BS, batch.labels_BS)
