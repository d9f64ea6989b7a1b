"""A batch tells for every token what follows it, which document it is of and where it stands."""

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moebius.data.batch import Batch, make_batch

EOD = 3
FIELDS = ("tokens_BS", "labels_BS", "segment_ids_BS", "positions_BS")
ALL_FIELDS = (*FIELDS, "sample_ids_B")


def random_windows(rows: int, length: int, share: float, seed: int) -> NDArray[np.int64]:
    """Windows in which about such a share of the tokens ends a document."""
    rng = random.Random(seed)
    others = [token for token in range(20) if token != EOD]
    values = [
        [EOD if rng.random() < share else rng.choice(others) for _ in range(length + 1)]
        for _ in range(rows)
    ]
    return np.array(values, dtype=np.int64)


def naive_row(tokens: list[int]) -> tuple[list[int], list[int]]:
    """Documents and positions of a row, one token after the other."""
    documents, positions = [], []
    document = position = 0
    for column, token in enumerate(tokens):
        if token == EOD:
            position = 0
            if column > 0:
                document += 1
        documents.append(document)
        positions.append(position)
        position += 1
    return documents, positions


CASES = [(8, 40, share, seed) for seed, share in enumerate((0.0, 0.02, 0.2, 0.5, 0.9, 1.0))]


@pytest.mark.parametrize(("rows", "length", "share", "seed"), [*CASES, (1, 1, 0.5, 9)])
def test_labels_are_the_tokens_that_follow(rows: int, length: int, share: float, seed: int) -> None:
    windows = random_windows(rows, length, share, seed)
    batch = make_batch(windows, EOD)
    for row in range(rows):
        for column in range(length):
            assert batch.tokens_BS[row, column] == windows[row, column]
            assert batch.labels_BS[row, column] == windows[row, column + 1]


@pytest.mark.parametrize(("rows", "length", "share", "seed"), [*CASES, (1, 1, 0.5, 9)])
def test_documents_and_positions_equal_those_counted_token_by_token(
    rows: int, length: int, share: float, seed: int
) -> None:
    """Documents up to the number of the first: what counts is which tokens share one."""
    windows = random_windows(rows, length, share, seed)
    batch = make_batch(windows, EOD)
    for row in range(rows):
        documents, positions = naive_row(windows[row, :-1].tolist())
        segments = batch.segment_ids_BS[row]
        assert (segments - segments[0]).tolist() == documents
        assert batch.positions_BS[row].tolist() == positions


def test_documents_are_numbered_from_0_where_a_row_starts_inside_one() -> None:
    batch = make_batch(np.array([[5, 6, EOD, 7, 8]]), EOD)
    assert batch.segment_ids_BS.tolist() == [[0, 0, 1, 1]]


def test_an_end_of_document_starts_the_next_one() -> None:
    """It is the last label of the one document and the first input of the other."""
    batch = make_batch(np.array([[5, 6, EOD, 7, 8, EOD, EOD, 9, 10]]), EOD)
    assert batch.tokens_BS.tolist() == [[5, 6, EOD, 7, 8, EOD, EOD, 9]]
    assert batch.labels_BS.tolist() == [[6, EOD, 7, 8, EOD, EOD, 9, 10]]
    assert batch.segment_ids_BS.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3]]
    assert batch.positions_BS.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]


def test_an_end_of_document_as_the_last_label_ends_no_document_of_the_row() -> None:
    batch = make_batch(np.array([[5, 6, 7, EOD]]), EOD)
    assert batch.labels_BS.tolist() == [[6, 7, EOD]]
    assert batch.segment_ids_BS.tolist() == [[0, 0, 0]]


def test_rows_do_not_influence_each_other() -> None:
    windows = random_windows(6, 30, 0.1, seed=5)
    batch = make_batch(windows, EOD)
    for row in range(6):
        alone = make_batch(windows[row : row + 1], EOD, first_sample=row)
        for field in ALL_FIELDS:
            assert torch.equal(getattr(alone, field)[0], getattr(batch, field)[row]), field


def test_tensors_are_int64_and_count_the_labels() -> None:
    batch = make_batch(random_windows(3, 16, 0.1, seed=0), EOD)
    for field in FIELDS:
        tensor = getattr(batch, field)
        assert tensor.shape == (3, 16)
        assert tensor.dtype == torch.int64
    assert batch.sample_ids_B.shape == (3,)
    assert batch.sample_ids_B.dtype == torch.int64
    assert batch.num_tokens == 48


def test_making_a_batch_leaves_the_windows_unchanged() -> None:
    windows = random_windows(3, 16, 0.3, seed=1)
    before = windows.copy()
    make_batch(windows, EOD)
    assert np.array_equal(windows, before)


@pytest.mark.parametrize(("start", "end"), [(0, 8), (0, 1), (3, 7), (5, 5), (8, 8)])
def test_rows_are_the_rows(start: int, end: int) -> None:
    batch = make_batch(random_windows(8, 16, 0.2, seed=2), EOD)
    part = batch.rows(start, end)
    assert part.num_tokens == (end - start) * 16
    for field in ALL_FIELDS:
        assert torch.equal(getattr(part, field), getattr(batch, field)[start:end]), field


def test_to_moves_every_tensor_to_its_own_place() -> None:
    """Each field keeps its content; on `meta` there is no content, but a device."""
    batch = make_batch(random_windows(4, 16, 0.2, seed=3), EOD)
    same: Batch = batch.to(torch.device("cpu"))
    moved = batch.to(torch.device("meta"))
    for field in ALL_FIELDS:
        assert torch.equal(getattr(same, field), getattr(batch, field)), field
        assert getattr(moved, field).device.type == "meta"
        assert getattr(moved, field).shape == getattr(batch, field).shape
