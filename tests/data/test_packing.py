"""Packed samples are full, use every label once and cut few documents."""

import ast
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moebius.data.packing import Packing, best_fit, pack_best_fit

Lengths = NDArray[np.int64]


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, piece by piece; `bins` are in the order of their last change."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        with_room = [content for content in bins if sum(content) + length <= capacity]
        fullest = max(with_room, key=sum, default=[])
        bins = [content for content in bins if content is not fullest]
        bins.append([*fullest, length])
    return bins


def contents(lengths: Lengths, bins: NDArray[np.int32]) -> list[list[int]]:
    return [lengths[bins == number].tolist() for number in range(bins.max(initial=-1) + 1)]


def multiset(bins: list[list[int]]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(sorted(content)) for content in bins)


def random_lengths(rng: random.Random, capacity: int) -> list[int]:
    """Documents of one of several kinds: any length, about half a sample, few lengths, short."""
    count = rng.randrange(60)
    few = [rng.randint(0, 2 * capacity) for _ in range(3)]
    kinds = [
        [rng.randint(0, 3 * capacity) for _ in range(count)],
        [rng.randint(capacity // 3, capacity * 2 // 3 + 1) for _ in range(count)],
        [rng.choice(few) for _ in range(count)],
        [int(rng.expovariate(8 / capacity)) for _ in range(count)],
    ]
    return rng.choice(kinds)


BLOCKS = pytest.mark.parametrize("block", range(8))


def cases(block: int) -> Iterator[tuple[Lengths, int]]:
    """Lengths and a capacity, 50 times."""
    rng = random.Random(block)
    for _ in range(50):
        capacity = rng.choice([1, 2, 3, 7, 10, 32, 100])
        yield np.array(random_lengths(rng, capacity), dtype=np.int64), capacity


def fitting(lengths: Lengths, capacity: int) -> Lengths:
    """Those that are one piece, the longest first."""
    return -np.sort(-lengths[(lengths > 0) & (lengths <= capacity)])


def documents_of_labels(lengths: Lengths) -> list[int]:
    return [document for document, length in enumerate(lengths.tolist()) for _ in range(length)]


def check(packing: Packing, lengths: Lengths, capacity: int) -> None:
    """Everything a packing promises of itself, label by label."""
    assert packing.starts_P.dtype == packing.offsets_N.dtype == np.int64
    assert packing.lengths_P.dtype == np.int32
    document_of = documents_of_labels(lengths)
    assert packing.num_samples == len(document_of) // capacity
    assert packing.offsets_N[0] == 0
    assert packing.offsets_N[-1] == len(packing.starts_P) == len(packing.lengths_P)
    samples = [packing.pieces(number) for number in range(packing.num_samples)]
    assert samples == sorted(samples)
    used: Counter[int] = Counter()
    for pieces in samples:
        assert sum(length for _, length in pieces) == capacity
        assert pieces == sorted(pieces)
        owners = []
        for start, length in pieces:
            labels = range(start, start + length)
            used.update(labels)
            (owner,) = {document_of[label] for label in labels}
            owners.append(owner)
        assert len(set(owners)) == len(owners)
    assert set(used.values()) <= {1}
    assert set(used) <= set(range(len(document_of)))
    assert 0 <= len(document_of) - len(used) < capacity


def whole_pieces(packing: Packing) -> set[tuple[int, int]]:
    return set(zip(packing.starts_P.tolist(), packing.lengths_P.tolist(), strict=True))


def count_cut(packing: Packing, lengths: Lengths, capacity: int) -> int:
    """Documents that fit into a sample, yet are in several or only in part in one."""
    pieces = whole_pieces(packing)
    touched = np.zeros(lengths.sum(), dtype=bool)
    for start, length in pieces:
        touched[start : start + length] = True
    starts = np.cumsum(lengths) - lengths
    return sum(
        0 < length <= capacity
        and (start, length) not in pieces
        and bool(touched[start : start + length].any())
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    )


def count_cut_by_windows(lengths: Lengths, capacity: int) -> int:
    """The same where samples are consecutive windows of the shard."""
    ends = np.cumsum(lengths)
    crosses = (ends - lengths) // capacity != (ends - 1) // capacity
    return int(np.sum(crosses & (lengths > 0) & (lengths <= capacity)))


def log_normal(count: int, mean: float, sigma: float) -> Lengths:
    rng = random.Random(count)
    mu = float(np.log(mean)) - sigma**2 / 2
    lengths = [max(1, round(rng.lognormvariate(mu, sigma))) for _ in range(count)]
    return np.array(lengths, dtype=np.int64)


def stdlib_functions() -> Lengths:
    """Words, and one for the end, of each function of some modules."""
    lengths = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                text = " ".join(lines[node.lineno - 1 : node.end_lineno])
                lengths.append(len(text.split()) + 1)
    return np.array(lengths, dtype=np.int64)


@BLOCKS
def test_every_label_is_in_one_full_sample_but_for_the_remainder(block: int) -> None:
    for lengths, capacity in cases(block):
        check(pack_best_fit(lengths, capacity), lengths, capacity)


@BLOCKS
def test_bins_are_those_of_best_fit_piece_by_piece(block: int) -> None:
    for lengths, capacity in cases(block):
        pieces = fitting(lengths, capacity)
        bins = contents(pieces, best_fit(pieces.astype(np.int32), capacity))
        expected = naive_best_fit(pieces.tolist(), capacity)
        assert len(bins) == len(expected)
        assert multiset(bins) == multiset(expected)


@pytest.mark.parametrize(("count", "capacity"), [(600, 2048), (600, 500), (900, 97)])
def test_bins_are_those_of_best_fit_also_where_lengths_vary_widely(
    count: int, capacity: int
) -> None:
    pieces = fitting(log_normal(count, 0.3 * capacity, 0.9), capacity)
    bins = contents(pieces, best_fit(pieces.astype(np.int32), capacity))
    assert multiset(bins) == multiset(naive_best_fit(pieces.tolist(), capacity))


@BLOCKS
def test_no_piece_fits_into_the_gap_of_a_fuller_bin(block: int) -> None:
    """So that the pieces of dissolved bins cannot be moved without a cut."""
    for lengths, capacity in cases(block):
        pieces = fitting(lengths, capacity)
        bins = contents(pieces, best_fit(pieces.astype(np.int32), capacity))
        bins.sort(key=sum)
        for number, content in enumerate(bins):
            for fuller in bins[number + 1 :]:
                assert min(content) > capacity - sum(fuller)


@BLOCKS
def test_only_documents_of_the_emptiest_bins_are_cut_or_dropped(block: int) -> None:
    for lengths, capacity in cases(block):
        lengths = lengths[(lengths > 0) & (lengths <= capacity)]
        packing = pack_best_fit(lengths, capacity)
        order = np.argsort(-lengths, kind="stable")
        bins = best_fit(lengths[order].astype(np.int32), capacity)
        starts = (np.cumsum(lengths) - lengths)[order]
        documents = zip(starts.tolist(), lengths[order].tolist(), strict=True)
        pieces = whole_pieces(packing)
        broken = {
            number
            for number, document in zip(bins.tolist(), documents, strict=True)
            if document not in pieces
        }
        fills = [sum(content) for content in contents(lengths[order], bins)]
        emptiest = sorted(fills)[: len(fills) - packing.num_samples]
        assert len(broken) <= len(emptiest)
        assert all(fills[number] <= emptiest[-1] for number in broken)


@pytest.mark.parametrize(
    ("sigma", "capacity", "factor"), [(1.0, 2048, 100), (1.0, 256, 400), (0.5, 2048, 25)]
)
def test_fewer_log_normal_documents_are_cut_than_by_windows(
    sigma: float, capacity: int, factor: int
) -> None:
    lengths = log_normal(20_000, 400, sigma)
    packing = pack_best_fit(lengths, capacity)
    by_windows = count_cut_by_windows(lengths, capacity)
    assert by_windows > 3000
    assert count_cut(packing, lengths, capacity) * factor < by_windows


@pytest.mark.parametrize(("capacity", "factor"), [(128, 10), (512, 8)])
def test_fewer_functions_of_the_standard_library_are_cut_than_by_windows(
    capacity: int, factor: int
) -> None:
    lengths = stdlib_functions()
    packing = pack_best_fit(lengths, capacity)
    check(packing, lengths, capacity)
    by_windows = count_cut_by_windows(lengths, capacity)
    assert by_windows > 50
    assert count_cut(packing, lengths, capacity) * factor < by_windows


def test_documents_that_complete_each_other_share_a_sample() -> None:
    packing = pack_best_fit(np.array([6, 5, 3, 5, 0, 1]), 10)
    assert packing.num_samples == 2
    assert packing.pieces(0) == [(0, 6), (11, 3), (19, 1)]
    assert packing.pieces(1) == [(6, 5), (14, 5)]


def test_a_dissolved_document_fills_the_gaps_of_the_others() -> None:
    packing = pack_best_fit(np.array([3, 3, 3, 3]), 4)
    assert [packing.pieces(number) for number in range(packing.num_samples)] == [
        [(0, 1), (9, 3)],
        [(1, 1), (6, 3)],
        [(2, 1), (3, 3)],
    ]


def test_the_remainder_is_the_shortest_piece_where_one_is_too_many() -> None:
    packing = pack_best_fit(np.array([2, 10, 10]), 10)
    assert [packing.pieces(number) for number in range(packing.num_samples)] == [
        [(2, 10)],
        [(12, 10)],
    ]


@pytest.mark.parametrize("length", [21, 29, 30, 1007])
def test_a_long_document_is_chunks_and_a_rest(length: int) -> None:
    lengths = np.array([4, length, 3, 1, 8])
    packing = pack_best_fit(lengths, 10)
    check(packing, lengths, 10)
    chunks = {(4 + 10 * number, 10) for number in range(length // 10)}
    assert chunks <= whole_pieces(packing)
    assert max(packing.lengths_P) == 10


@pytest.mark.parametrize(
    ("lengths", "capacity"),
    [
        ([], 5),
        ([0, 0], 5),
        ([4], 5),
        ([5], 5),
        ([23], 5),
        ([1] * 23, 5),
        ([5] * 7, 5),
        ([3] * 50, 5),
        ([3, 0, 7, 1], 1),
        ([1, 1], 1),
        ([1000, 1, 3000], 7),
    ],
)
def test_extremes_hold_too(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    check(pack_best_fit(array, capacity), array, capacity)


@pytest.mark.parametrize("dtype", ["<i4", "<u2", ">i4"])
def test_a_packing_depends_on_the_lengths_alone(dtype: str) -> None:
    """Not on their type, on an earlier call or on numpy's random numbers, which it leaves."""
    lengths = log_normal(500, 300, 1.0)
    given = lengths.astype(dtype)
    given.setflags(write=False)
    np.random.seed(1)
    first = pack_best_fit(lengths, 512)
    assert np.random.random() == np.random.RandomState(1).random_sample()
    second = pack_best_fit(given, 512)
    for name in ("starts_P", "lengths_P", "offsets_N"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
