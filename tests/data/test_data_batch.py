"""A batch tells for every token what follows it, which document it is of and where it stands."""

import itertools
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


def batch_of(windows: NDArray[np.int64], first_sample: int = 0) -> Batch:
    """Each window a sample of its own."""
    samples = [[window] for window in windows]
    return make_batch(samples, windows.shape[1] - 1, EOD, first_sample)


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
    batch = batch_of(windows)
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
    batch = batch_of(windows)
    for row in range(rows):
        documents, positions = naive_row(windows[row, :-1].tolist())
        segments = batch.segment_ids_BS[row]
        assert (segments - segments[0]).tolist() == documents
        assert batch.positions_BS[row].tolist() == positions


def test_documents_are_numbered_from_0_where_a_row_starts_inside_one() -> None:
    batch = batch_of(np.array([[5, 6, EOD, 7, 8]]))
    assert batch.segment_ids_BS.tolist() == [[0, 0, 1, 1]]


def test_an_end_of_document_starts_the_next_one() -> None:
    """It is the last label of the one document and the first input of the other."""
    batch = batch_of(np.array([[5, 6, EOD, 7, 8, EOD, EOD, 9, 10]]))
    assert batch.tokens_BS.tolist() == [[5, 6, EOD, 7, 8, EOD, EOD, 9]]
    assert batch.labels_BS.tolist() == [[6, EOD, 7, 8, EOD, EOD, 9, 10]]
    assert batch.segment_ids_BS.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3]]
    assert batch.positions_BS.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]


def test_an_end_of_document_as_the_last_label_ends_no_document_of_the_row() -> None:
    batch = batch_of(np.array([[5, 6, 7, EOD]]))
    assert batch.labels_BS.tolist() == [[6, 7, EOD]]
    assert batch.segment_ids_BS.tolist() == [[0, 0, 0]]


def test_rows_do_not_influence_each_other() -> None:
    windows = random_windows(6, 30, 0.1, seed=5)
    batch = batch_of(windows)
    for row in range(6):
        alone = batch_of(windows[row : row + 1], first_sample=row)
        for field in ALL_FIELDS:
            assert torch.equal(getattr(alone, field)[0], getattr(batch, field)[row]), field


def test_tensors_are_int64_and_count_the_labels() -> None:
    batch = batch_of(random_windows(3, 16, 0.1, seed=0))
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
    batch_of(windows)
    assert np.array_equal(windows, before)


@pytest.mark.parametrize(("start", "end"), [(0, 8), (0, 1), (3, 7), (5, 5), (8, 8)])
def test_rows_are_the_rows(start: int, end: int) -> None:
    batch = batch_of(random_windows(8, 16, 0.2, seed=2))
    part = batch.rows(start, end)
    assert part.num_tokens == (end - start) * 16
    for field in ALL_FIELDS:
        assert torch.equal(getattr(part, field), getattr(batch, field)[start:end]), field


def test_to_moves_every_tensor_to_its_own_place() -> None:
    """Each field keeps its content; on `meta` there is no content, but a device."""
    batch = batch_of(random_windows(4, 16, 0.2, seed=3))
    same: Batch = batch.to(torch.device("cpu"))
    moved = batch.to(torch.device("meta"))
    for field in ALL_FIELDS:
        assert torch.equal(getattr(same, field), getattr(batch, field)), field
        assert getattr(moved, field).device.type == "meta"
        assert getattr(moved, field).shape == getattr(batch, field).shape


# Samples of several parts.


def random_parts(length: int, seed: int) -> list[list[int]]:
    """Windows that have `length` labels together, some with one only."""
    rng = random.Random(seed)
    parts, left = [], length
    while left:
        size = min(left, rng.choice((1, 2, 5, 20)))
        parts.append([rng.choice((EOD, 4, 5, 6)) for _ in range(size + 1)])
        left -= size
    return parts


def naive_sample(parts: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """Token, label, document and position of each column; the parts one after the other."""
    columns: list[tuple[int, int, int, int]] = []
    document = position = 0
    for part in parts:
        for place, (token, label) in enumerate(itertools.pairwise(part)):
            if token == EOD or place == 0:
                position = 0
                document += bool(columns) or token == EOD
            columns.append((token, label, document, position))
            position += 1
    return columns


@pytest.mark.parametrize("seed", range(20))
def test_parts_of_a_sample_fill_its_row_and_do_not_see_each_other(seed: int) -> None:
    samples = [random_parts(50, 100 * seed + row) for row in range(4)]
    assert any(len(parts) > 1 for parts in samples)
    arrays = [[np.array(part) for part in parts] for parts in samples]
    batch = make_batch(arrays, 50, EOD, first_sample=8)
    for row, parts in enumerate(samples):
        found = [getattr(batch, field)[row].tolist() for field in FIELDS]
        assert list(zip(*found, strict=True)) == naive_sample(parts)
    assert batch.sample_ids_B.tolist() == [8, 9, 10, 11]


def test_a_part_without_an_end_of_document_before_it_begins_a_document_too() -> None:
    """It has no past, whatever its first input is."""
    batch = make_batch([[np.array([5, 6, 7]), np.array([8, 9, EOD, 4])]], 5, EOD)
    assert batch.tokens_BS.tolist() == [[5, 6, 8, 9, EOD]]
    assert batch.labels_BS.tolist() == [[6, 7, 9, EOD, 4]]
    assert batch.segment_ids_BS.tolist() == [[0, 0, 1, 1, 2]]
    assert batch.positions_BS.tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_without_masks_a_row_is_one_text(seed: int) -> None:
    """Tokens and labels stay the same."""
    samples = [[np.array(part) for part in random_parts(30, seed + row)] for row in range(3)]
    masked = make_batch(samples, 30, EOD)
    batch = make_batch(samples, 30, EOD, mask_documents=False)
    assert torch.equal(batch.tokens_BS, masked.tokens_BS)
    assert torch.equal(batch.labels_BS, masked.labels_BS)
    assert batch.segment_ids_BS.unique().tolist() == [0]
    assert batch.positions_BS.tolist() == [list(range(30))] * 3


def test_a_batch_may_be_empty() -> None:
    """A process may have no row of a batch."""
    batch = make_batch([], 16, EOD, first_sample=7)
    assert batch.tokens_BS.shape == batch.positions_BS.shape == (0, 16)
    assert batch.num_tokens == 0
    assert batch.sample_ids_B.tolist() == []
