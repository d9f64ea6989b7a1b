"""The order of an epoch: a permutation that needs no memory, whole or in blocks."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable

import pytest
from pydantic import TypeAdapter

from moebius.data.order import BlockShuffle, GlobalShuffle, NoShuffle, Shuffle, permuted, sample_at

NUM_CASES = 120


def test_permuted_is_a_bijection_of_every_small_size() -> None:
    for size in range(1, 201):
        images = [permuted(number, size, "key") for number in range(size)]
        assert sorted(images) == list(range(size))


@pytest.mark.parametrize("size", [4095, 4096, 4097])
def test_permuted_is_a_bijection_around_a_power_of_four(size: int) -> None:
    assert len({permuted(number, size, "0/0") for number in range(size)}) == size


@pytest.mark.parametrize("size", [10**12, 2**40, 2**40 + 1])
def test_permuted_keeps_a_large_range_and_merges_no_two(size: int) -> None:
    rng = random.Random(0)
    numbers = {*range(1000), *range(size - 1000, size), *(rng.randrange(size) for _ in range(1000))}
    images = {permuted(number, size, "0/0") for number in numbers}
    assert len(images) == len(numbers)
    assert min(images) >= 0
    assert max(images) < size


def test_permuted_spreads_neighbours_over_the_range() -> None:
    """The first samples of an epoch come from everywhere: each tenth has its share."""
    size, count = 10**6, 2000
    tenths = Counter(permuted(number, size, "0/0") * 10 // size for number in range(count))
    assert set(tenths) == set(range(10))
    assert all(abs(found - count / 10) < 60 for found in tenths.values())  # 4.5 sigma


def test_permuted_is_fixed_for_all_time() -> None:
    """Runs resume by it: these values were computed once and may not change."""
    assert [permuted(number, 10, "0/0") for number in range(10)] == [9, 8, 0, 1, 7, 5, 6, 4, 2, 3]
    large = [permuted(number, 10**9, "1234/5") for number in range(3)]
    assert large == [940322329, 904022569, 93982074]


# Shuffles.


def epoch(size: int, shuffle: Shuffle, key: str = "0/0") -> list[int]:
    return [sample_at(place, size, shuffle, key) for place in range(size)]


def stretches(samples: Iterable[int], size: int) -> int:
    """How many stretches of neighbours some samples are; the last sample is beside the first."""
    found = set(samples)
    return sum((sample - 1) % size not in found for sample in found) or 1


def random_block_case(number: int) -> tuple[int, BlockShuffle]:
    """Sizes below, at and beyond whole runs and blocks; runs that are longer than blocks too."""
    rng = random.Random(number)
    run, block = rng.choice((1, 2, 3, 8, 10, 50)), rng.choice((1, 2, 5, 16, 40, 100, 1000))
    size = rng.choice((1, 2, run, run + 1, block, 3 * block, 7 * run, rng.randint(1, 600)))
    return size, BlockShuffle(kind="blocks", run=run, block=block)


@pytest.mark.parametrize("part", range(4))
def test_a_block_shuffle_is_a_bijection(part: int) -> None:
    for number in range(part, NUM_CASES, 4):
        size, shuffle = random_block_case(number)
        assert sorted(epoch(size, shuffle, str(number))) == list(range(size)), (size, shuffle)


@pytest.mark.parametrize("part", range(4))
def test_samples_of_a_block_come_from_few_places(part: int) -> None:
    """From about block / run of them: the run at either end of a block may be cut, and one more
    where the runs that were shifted begin."""
    for number in range(part, NUM_CASES, 4):
        size, shuffle = random_block_case(number)
        order = epoch(size, shuffle, str(number))
        for first in range(0, size, shuffle.block):
            block = order[first : first + shuffle.block]
            assert stretches(block, size) <= shuffle.block // shuffle.run + 2, (size, shuffle)


def test_neighbours_stay_near_each_other() -> None:
    """Those of a run come in the same block where blocks are whole runs; all but few do."""
    size, shuffle = 10_000, BlockShuffle(kind="blocks", run=50, block=1000)
    place = {sample: n for n, sample in enumerate(epoch(size, shuffle))}
    blocks = [place[sample] // 1000 for sample in range(size)]
    apart = sum(blocks[n] != blocks[n + 1] for n in range(size - 1))
    assert 0.9 * size / 50 < apart <= size / 50  # only where a run ends


def test_runs_of_a_block_come_from_everywhere() -> None:
    """And its samples are mixed: neighbours in time are not neighbours in the corpus."""
    size, shuffle = 10_000, BlockShuffle(kind="blocks", run=50, block=1000)
    order = epoch(size, shuffle)
    for first in range(0, size, 1000):
        block = order[first : first + 1000]
        assert len({sample // 1000 for sample in block}) >= 5  # 20 runs, ten tenths
    steps = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
    assert steps < 0.01 * size


def test_epochs_have_other_runs_and_begin_them_elsewhere() -> None:
    """The samples that fill no run would else always come last."""
    size, shuffle = 1023, BlockShuffle(kind="blocks", run=100, block=200)
    orders = [epoch(size, shuffle, f"7/{number}") for number in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    assert len({frozenset(order[-23:]) for order in orders}) == 20
    assert len({frozenset(order[:200]) for order in orders}) == 20


def test_a_block_larger_than_the_corpus_mixes_all_of_it() -> None:
    order = epoch(1000, BlockShuffle(kind="blocks"))
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 20
    assert sum(sample == place for place, sample in enumerate(order)) < 20


@pytest.mark.parametrize("size", [10**12, 2**40 + 1])
def test_a_block_shuffle_keeps_a_large_range_and_merges_no_two(size: int) -> None:
    rng = random.Random(0)
    places = {*range(1000), *range(size - 1000, size), *(rng.randrange(size) for _ in range(1000))}
    samples = {sample_at(place, size, BlockShuffle(kind="blocks"), "0/0") for place in places}
    assert len(samples) == len(places)
    assert min(samples) >= 0
    assert max(samples) < size


def test_the_other_shuffles_are_the_permutation_and_none() -> None:
    assert epoch(100, NoShuffle(kind="none")) == list(range(100))
    assert epoch(100, GlobalShuffle(), "3/1") == [permuted(n, 100, "3/1") for n in range(100)]


def test_a_block_shuffle_is_fixed_for_all_time() -> None:
    """Runs resume by it: these values were computed once and may not change."""
    order = epoch(23, BlockShuffle(kind="blocks", run=4, block=8), "0/0")
    assert order == [
        6,
        4,
        7,
        5,
        1,
        3,
        2,
        0,
        8,
        16,
        17,
        11,
        18,
        19,
        9,
        10,
        12,
        14,
        15,
        13,
        21,
        20,
        22,
    ]


def test_a_shuffle_is_chosen_by_its_kind() -> None:
    read = TypeAdapter(Shuffle).validate_python
    assert read({"kind": "global"}) == GlobalShuffle()
    assert read({"kind": "none"}) == NoShuffle(kind="none")
    assert read({"kind": "blocks", "run": 3}) == BlockShuffle(kind="blocks", run=3, block=65_536)
    for wrong in ({"kind": "blocks", "run": 0}, {"kind": "blocks", "block": 0}, {"kind": "random"}):
        with pytest.raises(ValueError, match=r"run|block|kind"):
            read(wrong)
