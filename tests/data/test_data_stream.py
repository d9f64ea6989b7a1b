"""Which sample comes when depends on the seed and the position alone."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.data.batch import Batch
from moebius.data.config import DataConfig
from moebius.data.manifest import Manifest, Split, TokenizerEntry
from moebius.data.shards import ShardWriter
from moebius.data.stream import SplitReader, TrainStream, permuted, validation_batches
from moebius.errors import DataError

EOD = 0
LENGTH = 32


@pytest.fixture(scope="module")
def reader(data_config: DataConfig, manifest: Manifest) -> SplitReader:
    """The validation split of the prepared corpus: real text, some hundred windows."""
    return SplitReader(Path(data_config.dir), manifest, "validation", LENGTH)


def write_split(folder: Path, sizes: list[int], vocab_size: int = 300) -> Manifest:
    """A corpus of numbered tokens: shards of such sizes, one document each."""
    shards, tokens = [], itertools.cycle(range(1, 251))
    for number, size in enumerate(sizes):
        writer = ShardWriter(folder / f"train-{number:05}", vocab_size)
        writer.write([next(tokens) for _ in range(size - 1)] + [EOD])
        shards.append(writer.close())
    split = Split.model_validate({"bytes": 3 * sum(sizes), "shards": shards})
    return Manifest(
        recipe={},
        tokenizer=TokenizerEntry(sha256="", vocab_size=vocab_size, eod_id=EOD),
        splits={"train": split, "validation": split},
    )


def plant(folder: Path, shard: int, position: int, token: int, dtype: str) -> None:
    """Overwrite one token of a shard."""
    path = folder / f"train-{shard:05}.bin"
    tokens = np.fromfile(path, dtype)
    tokens[position] = token
    tokens.tofile(path)


def samples(stream: TrainStream, num_batches: int) -> list[bytes]:
    """Rows of the next batches, as values to compare."""
    batches = [next(stream) for _ in range(num_batches)]
    return [row for batch in batches for row in rows(batch)]


def rows(batch: Batch) -> list[bytes]:
    """Tokens and labels of each row."""
    joined = torch.cat([batch.tokens_BS, batch.labels_BS], dim=1)
    return [row.numpy().tobytes() for row in joined]


def all_windows(reader: SplitReader) -> list[bytes]:
    windows = [reader.window(number) for number in range(reader.num_windows)]
    return [np.concatenate([window[:-1], window[1:]]).tobytes() for window in windows]


# Windows.


def test_windows_cover_the_split_and_share_one_token(
    data_config: DataConfig, manifest: Manifest, reader: SplitReader
) -> None:
    """Every token but the first is a label once; less than a window is left over."""
    shards = manifest.splits["validation"].shards
    files = [Path(data_config.dir) / f"{shard.name}.bin" for shard in shards]
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in files]).astype(np.int64)
    windows = [reader.window(number) for number in range(reader.num_windows)]
    assert all(len(window) == LENGTH + 1 for window in windows)
    labels = np.concatenate([window[1:] for window in windows])
    assert np.array_equal(labels, tokens[1 : len(labels) + 1])
    assert np.array_equal(windows[0], tokens[: LENGTH + 1])
    for before, after in itertools.pairwise(windows):
        assert before[-1] == after[0]
    assert len(tokens) - 1 - len(labels) < LENGTH


@pytest.mark.parametrize("sizes", [[200], [100, 100], [1, 199], [199, 1], [50] * 4, [7] * 30])
def test_windows_do_not_depend_on_the_borders_of_shards(tmp_path: Path, sizes: list[int]) -> None:
    """Shards smaller than a window too: one window may span many."""
    manifest = write_split(tmp_path, sizes)
    reader = SplitReader(tmp_path, manifest, "train", 16)
    files = sorted(tmp_path.glob("*.bin"))
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in files]).astype(np.int64)
    assert reader.num_windows == (sum(sizes) - 1) // 16
    for number in range(reader.num_windows):
        assert np.array_equal(reader.window(number), tokens[16 * number : 16 * number + 17])


@pytest.mark.parametrize(("length", "windows"), [(1, 99), (33, 3), (34, 2), (98, 1), (99, 1)])
def test_a_sequence_may_be_as_long_as_the_split_allows(
    tmp_path: Path, length: int, windows: int
) -> None:
    reader = SplitReader(tmp_path, write_split(tmp_path, [60, 40]), "train", length)
    assert reader.num_windows == windows
    assert len(reader.window(windows - 1)) == length + 1


@pytest.mark.parametrize("length", [100, 101, 10_000])
def test_a_sequence_longer_than_the_split_is_refused(tmp_path: Path, length: int) -> None:
    manifest = write_split(tmp_path, [60, 40])
    with pytest.raises(DataError, match=rf"data\.sequence_length: {length},") as caught:
        SplitReader(tmp_path, manifest, "train", length)
    message = str(caught.value)
    assert "train" in message
    assert "100 tokens" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "token"),
    [
        (300, "<u2", 300),
        (300, "<u2", 65535),
        (70_000, "<i4", 70_000),
        (70_000, "<i4", -1),
    ],
)
@pytest.mark.parametrize(("shard", "position"), [(0, 0), (0, 59), (1, 0), (1, 17), (2, 35)])
def test_an_id_outside_the_vocabulary_is_refused_where_it_lies(
    tmp_path: Path, vocab_size: int, dtype: str, token: int, shard: int, position: int
) -> None:
    """Only the windows that hold it fail, and they name shard, id and position."""
    manifest = write_split(tmp_path, [60, 40, 45], vocab_size)
    plant(tmp_path, shard, position, token, dtype)
    reader = SplitReader(tmp_path, manifest, "train", 16)
    at = sum([60, 40, 45][:shard]) + position
    failed = 0
    for number in range(reader.num_windows):
        if 16 * number <= at <= 16 * number + 16:
            with pytest.raises(DataError) as caught:
                reader.window(number)
            message = str(caught.value)
            assert (
                f"train-{shard:05}.bin' holds token id {token} at position {position}," in message
            )
            assert str(vocab_size - 1) in message
            assert "\n" not in message
            failed += 1
        else:
            reader.window(number)
    assert failed in (1, 2)


def test_the_largest_id_of_the_vocabulary_is_allowed(tmp_path: Path) -> None:
    manifest = write_split(tmp_path, [60])
    plant(tmp_path, 0, 5, 299, "<u2")
    assert SplitReader(tmp_path, manifest, "train", 16).window(0)[5] == 299


def test_the_stream_stops_at_an_id_outside_the_vocabulary(tmp_path: Path) -> None:
    """Also as the last label of a window, which is no input of it."""
    manifest = write_split(tmp_path, [17])
    plant(tmp_path, 0, 16, 300, "<u2")
    stream = TrainStream(SplitReader(tmp_path, manifest, "train", 16), batch_size=1, seed=0)
    with pytest.raises(DataError, match="token id 300 at position 16"):
        next(stream)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_shard_that_is_missing_is_found_when_the_split_is_opened(
    tmp_path: Path, suffix: str
) -> None:
    manifest = write_split(tmp_path, [60, 40])
    (tmp_path / f"train-00001{suffix}").unlink()
    with pytest.raises(DataError, match=f"train-00001{suffix}"):
        SplitReader(tmp_path, manifest, "train", 16)


# Order.


def test_two_streams_of_one_seed_agree(data_config: DataConfig, manifest: Manifest) -> None:
    """With readers of their own."""
    folder = Path(data_config.dir)
    first, second = (
        TrainStream(SplitReader(folder, manifest, "train", LENGTH), batch_size=4, seed=7)
        for _ in range(2)
    )
    assert samples(first, 50) == samples(second, 50)


def test_two_streams_of_one_reader_do_not_disturb_each_other(reader: SplitReader) -> None:
    alone = samples(TrainStream(reader, batch_size=2, seed=7), 20)
    first, second = (TrainStream(reader, batch_size=2, seed=7) for _ in range(2))
    interleaved = [(samples(first, 1), samples(second, 1)) for _ in range(20)]
    assert [row for rows, _ in interleaved for row in rows] == alone
    assert [row for _, rows in interleaved for row in rows] == alone


def test_a_stream_resumed_anywhere_gives_the_continuation(reader: SplitReader) -> None:
    """In an epoch, at its borders and after it."""
    epoch = reader.num_windows
    whole = samples(TrainStream(reader, batch_size=1, seed=3), 2 * epoch + 20)
    for position in (0, 1, 2, 17, epoch - 4, epoch - 1, epoch, epoch + 1, 2 * epoch, 2 * epoch + 5):
        resumed = TrainStream(reader, batch_size=3, seed=3, position=position)
        assert samples(resumed, 5) == whole[position : position + 15]


def test_position_counts_the_samples_given_out(reader: SplitReader) -> None:
    """It is the state to save: a stream built from it goes on."""
    stream = TrainStream(reader, batch_size=5, seed=3)
    assert stream.position == 0
    samples(stream, 3)
    assert stream.position == 15
    resumed = TrainStream(reader, batch_size=5, seed=3, position=stream.position)
    assert samples(resumed, 4) == samples(stream, 4)
    assert resumed.position == stream.position == 35
    assert next(resumed).sample_ids_B.tolist() == [35, 36, 37, 38, 39]


def test_another_batch_size_goes_on_with_the_same_samples(reader: SplitReader) -> None:
    wanted = samples(TrainStream(reader, batch_size=1, seed=3), 60)
    stream, found = TrainStream(reader, batch_size=4, seed=3), []
    for size, num_batches in ((4, 5), (7, 4), (1, 2), (10, 1)):
        stream = TrainStream(reader, batch_size=size, seed=3, position=stream.position)
        found += samples(stream, num_batches)
    assert found == wanted


def test_a_batch_larger_than_an_epoch_runs_into_the_next(tmp_path: Path) -> None:
    reader = SplitReader(tmp_path, write_split(tmp_path, [81]), "train", 16)
    assert reader.num_windows == 5
    one = samples(TrainStream(reader, batch_size=1, seed=0), 12)
    assert samples(TrainStream(reader, batch_size=12, seed=0), 1) == one
    assert Counter(one[:5]) == Counter(one[5:10]) == Counter(all_windows(reader))


def test_an_epoch_visits_each_window_once(reader: SplitReader) -> None:
    windows = Counter(all_windows(reader))
    stream = TrainStream(reader, batch_size=1, seed=11)
    for _ in range(3):
        assert Counter(samples(stream, reader.num_windows)) == windows


def moved(first: list[bytes], second: list[bytes]) -> float:
    """Share of the places that hold different samples."""
    pairs = list(zip(first, second, strict=True))
    return sum(one != other for one, other in pairs) / len(pairs)


def test_epochs_and_seeds_have_orders_of_their_own(reader: SplitReader) -> None:
    """Nearly every place holds another sample: neither a shift of windows nor their own order."""
    size = reader.num_windows
    assert size > 100
    stream = TrainStream(reader, batch_size=1, seed=0)
    orders = [samples(stream, size) for _ in range(3)]
    orders += [samples(TrainStream(reader, 1, seed=seed), size) for seed in (1, 2, 10)]
    orders += [all_windows(reader)]
    for first, second in itertools.combinations(orders, 2):
        assert moved(first, second) > 0.9


def test_seed_and_epoch_are_not_confused(reader: SplitReader) -> None:
    """Epoch 1 of seed 0 is not epoch 0 of seed 1, nor that of seed 1 the second of seed 11."""
    size = reader.num_windows

    def epoch(seed: int, number: int) -> list[bytes]:
        return samples(TrainStream(reader, 1, seed=seed, position=number * size), size)

    assert moved(epoch(0, 1), epoch(1, 0)) > 0.9
    assert moved(epoch(1, 11), epoch(11, 1)) > 0.9


# The permutation.


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


# Validation.


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 1), (4, 3), (7, 10), (10, 1)])
def test_validation_gives_the_first_windows_in_order(
    reader: SplitReader, batch_size: int, num_batches: int
) -> None:
    batches = list(validation_batches(reader, batch_size, num_batches))
    assert [batch.tokens_BS.shape[0] for batch in batches] == [batch_size] * num_batches
    found = [row for batch in batches for row in rows(batch)]
    assert found == all_windows(reader)[: batch_size * num_batches]


def test_validation_ends_with_the_split(reader: SplitReader) -> None:
    """No window twice, none left out; the last batch is what remains."""
    size = next(size for size in range(5, 50) if reader.num_windows % size)
    batches = list(validation_batches(reader, size, 10**6))
    sizes = [batch.tokens_BS.shape[0] for batch in batches]
    assert sizes[:-1] == [size] * (reader.num_windows // size)
    assert sizes[-1] == reader.num_windows % size
    assert [row for batch in batches for row in rows(batch)] == all_windows(reader)


def test_validation_of_a_split_smaller_than_a_batch_is_one_batch(tmp_path: Path) -> None:
    reader = SplitReader(tmp_path, write_split(tmp_path, [49]), "train", 16)
    batches = list(validation_batches(reader, 8, 4))
    assert [batch.tokens_BS.shape[0] for batch in batches] == [3]


def test_validation_is_the_same_each_time(reader: SplitReader) -> None:
    first, second = (
        [row for batch in validation_batches(reader, 4, 5) for row in rows(batch)] for _ in range(2)
    )
    assert first == second


def test_batches_know_their_documents(reader: SplitReader) -> None:
    """The reader's end-of-document token is the one that batches split at."""
    starts = 0
    for batch in validation_batches(reader, 8, 10**6):
        inside = batch.tokens_BS[:, 1:] == reader.eod_id
        steps = batch.segment_ids_BS.diff(dim=1) == 1
        assert torch.equal(inside, steps)
        starts += int(inside.sum())
    assert starts > 10
