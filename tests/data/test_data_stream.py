"""Which sample comes when depends on the seed and the position alone."""

import hashlib
import itertools
import random
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moebius.data import shards as shards_module
from moebius.data.batch import Batch
from moebius.data.config import DataConfig
from moebius.data.corpus import Corpora, Corpus, SplitReader
from moebius.data.manifest import Manifest, ShardEntry, Split, TokenizerEntry
from moebius.data.mixture import Turns
from moebius.data.order import BlockShuffle, NoShuffle
from moebius.data.shards import ShardWriter
from moebius.data.storage import CacheConfig, open_storage
from moebius.data.stream import TrainStream, validation_batches
from moebius.errors import DataError

EOD = 0
LENGTH = 32


@pytest.fixture(scope="module")
def reader(corpora: Corpora) -> SplitReader:
    """The validation split of the prepared corpus: real text, some hundred windows."""
    return SplitReader(corpora.first, "validation", LENGTH)


def write_split(folder: Path, sizes: list[int], vocab_size: int = 300) -> Corpus:
    """A corpus of numbered tokens: shards of such sizes, one document each."""
    shards, tokens = [], itertools.cycle(range(1, 251))
    for number, size in enumerate(sizes):
        writer = ShardWriter(folder / f"train-{number:05}", vocab_size)
        writer.write(np.array([next(tokens) for _ in range(size - 1)] + [EOD]))
        shards.append(writer.close())
    return corpus_of(folder, shards, vocab_size)


def corpus_of(folder: Path, shards: list[ShardEntry], vocab_size: int) -> Corpus:
    split = Split(bytes=3 * sum(shard.tokens for shard in shards), shards=shards)
    manifest = Manifest(
        recipe={},
        tokenizer=TokenizerEntry(sha256="0" * 64, vocab_size=vocab_size, eod_id=EOD),
        dtype="uint16" if vocab_size <= 2**16 else "int32",
        splits={"train": split, "validation": split},
    )
    return Corpus(open_storage(str(folder), CacheConfig()), manifest)


def plant(folder: Path, shard: int, position: int, token: int, dtype: str) -> None:
    """Overwrite one token of a shard."""
    path = folder / f"train-{shard:05}.bin"
    tokens = np.fromfile(path, dtype)
    tokens[position] = token
    tokens.tofile(path)


def sealed(corpus: Corpus, piece: int = 2**20) -> Corpus:
    """The corpus with the hashes of the tokens that it has now: sound, but made for others."""
    folder, shards = corpus.storage.folder, []
    for entry in corpus.manifest.splits["train"].shards:
        content = (folder / f"{entry.name}.bin").read_bytes()
        pieces = [content[start : start + piece] for start in range(0, len(content), piece)]
        sums = b"".join(hashlib.sha256(part).digest() for part in pieces)
        (folder / f"{entry.name}.sums").write_bytes(sums)
        changed = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "sums_sha256": hashlib.sha256(sums).hexdigest(),
        }
        shards.append(entry.model_copy(update=changed))
    return corpus_of(folder, shards, corpus.manifest.tokenizer.vocab_size)


def tokens_of(folder: Path) -> NDArray[np.int64]:
    """All tokens of a corpus that `write_split` wrote."""
    parts = [np.fromfile(path, "<u2") for path in sorted(folder.glob("*.bin"))]
    return np.concatenate(parts).astype(np.int64)


def window_of(reader: SplitReader, number: int) -> NDArray[np.int64]:
    """The one window of a sample."""
    (window,) = reader.sample(number)
    return window


def stream_at(reader: SplitReader, batch_size: int, seed: int, position: int) -> TrainStream:
    """A stream that goes on at a position."""
    stream = TrainStream([reader], batch_size, seed)
    stream.position = position
    return stream


def samples(stream: TrainStream, num_batches: int) -> list[bytes]:
    """Rows of the next batches, as values to compare."""
    batches = [next(stream) for _ in range(num_batches)]
    return [row for batch in batches for row in rows(batch)]


def rows(batch: Batch) -> list[bytes]:
    """Tokens and labels of each row."""
    joined = torch.cat([batch.tokens_BS, batch.labels_BS], dim=1)
    return [row.numpy().tobytes() for row in joined]


def all_windows(reader: SplitReader) -> list[bytes]:
    windows = [window_of(reader, number) for number in range(reader.num_samples)]
    return [np.concatenate([window[:-1], window[1:]]).tobytes() for window in windows]


# Windows.


def test_windows_cover_the_split_and_share_one_token(
    data_config: DataConfig, manifest: Manifest, reader: SplitReader
) -> None:
    """Every token but the first is a label once; less than a window is left over."""
    shards = manifest.splits["validation"].shards
    files = [Path(data_config.dir) / f"{shard.name}.bin" for shard in shards]
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in files]).astype(np.int64)
    windows = [window_of(reader, number) for number in range(reader.num_samples)]
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
    reader = SplitReader(write_split(tmp_path, sizes), "train", 16)
    tokens = tokens_of(tmp_path)
    assert reader.num_samples == (sum(sizes) - 1) // 16
    for number in range(reader.num_samples):
        assert np.array_equal(window_of(reader, number), tokens[16 * number : 16 * number + 17])


@pytest.mark.parametrize(("length", "windows"), [(1, 99), (33, 3), (34, 2), (98, 1), (99, 1)])
def test_a_sequence_may_be_as_long_as_the_split_allows(
    tmp_path: Path, length: int, windows: int
) -> None:
    reader = SplitReader(write_split(tmp_path, [60, 40]), "train", length)
    assert reader.num_samples == windows
    assert len(window_of(reader, windows - 1)) == length + 1


@pytest.mark.parametrize("length", [100, 101, 10_000])
def test_a_sequence_longer_than_the_split_is_refused(tmp_path: Path, length: int) -> None:
    corpus = write_split(tmp_path, [60, 40])
    with pytest.raises(DataError, match=rf"data\.sequence_length: {length},") as caught:
        SplitReader(corpus, "train", length)
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
    tmp_path: Path,
    vocab_size: int,
    dtype: str,
    token: int,
    shard: int,
    position: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the windows that touch its piece of the shard fail, and they name shard, id and
    position."""
    monkeypatch.setattr(shards_module, "PIECE", 32)
    sizes = [60, 40, 45]
    corpus = write_split(tmp_path, sizes, vocab_size)
    plant(tmp_path, shard, position, token, dtype)
    reader = SplitReader(sealed(corpus, 32), "train", 16)
    per_piece = 32 // np.dtype(dtype).itemsize
    before, piece = sum(sizes[:shard]), position // per_piece
    first = before + piece * per_piece
    end = before + min((piece + 1) * per_piece, sizes[shard])
    failed = 0
    for number in range(reader.num_samples):
        if 16 * number < end and first <= 16 * number + 16:
            with pytest.raises(DataError) as caught:
                reader.sample(number)
            message = str(caught.value)
            assert (
                f"train-{shard:05}.bin' holds token id {token} at position {position}," in message
            )
            assert str(vocab_size - 1) in message
            assert "\n" not in message
            failed += 1
        else:
            reader.sample(number)
    assert failed in (1, 2, 3)


def test_the_largest_id_of_the_vocabulary_is_allowed(tmp_path: Path) -> None:
    corpus = write_split(tmp_path, [60])
    plant(tmp_path, 0, 5, 299, "<u2")
    assert window_of(SplitReader(sealed(corpus), "train", 16), 0)[5] == 299


def test_the_stream_stops_at_an_id_outside_the_vocabulary(tmp_path: Path) -> None:
    """Also as the last label of a window, which is no input of it."""
    corpus = write_split(tmp_path, [17])
    plant(tmp_path, 0, 16, 300, "<u2")
    stream = TrainStream([SplitReader(sealed(corpus), "train", 16)], batch_size=1, seed=0)
    for _ in range(2):  # it does not go on after it
        with pytest.raises(DataError, match="token id 300 at position 16"):
            next(stream)
    assert stream.position == 0


@pytest.mark.parametrize("token", [1, 300])
def test_a_token_that_was_not_prepared_is_refused_inside_the_vocabulary_too(
    tmp_path: Path, token: int
) -> None:
    """Only the windows that touch its shard fail, and they name it."""
    corpus = write_split(tmp_path, [60, 40, 45])
    plant(tmp_path, 1, 17, token, "<u2")
    reader = SplitReader(corpus, "train", 16)
    for number in range(reader.num_samples):
        if 16 * number + 16 >= 60 and 16 * number < 100:
            with pytest.raises(DataError, match=r"train-00001.bin' is damaged") as caught:
                reader.sample(number)
            assert "\n" not in str(caught.value)
        else:
            reader.sample(number)
    stream = TrainStream([reader], batch_size=reader.num_samples, seed=0)
    with pytest.raises(DataError, match=r"train-00001.bin' is damaged"):
        next(stream)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".sums"])
def test_a_shard_that_is_missing_is_found_when_the_split_is_opened(
    tmp_path: Path, suffix: str
) -> None:
    corpus = write_split(tmp_path, [60, 40])
    (tmp_path / f"train-00001{suffix}").unlink()
    with pytest.raises(DataError, match=f"train-00001{suffix}"):
        SplitReader(corpus, "train", 16)


# Packed samples.


def write_documents(folder: Path, seed: int) -> Corpus:
    """Documents of random tokens, from an end of document alone to several samples, in shards."""
    rng, shards = random.Random(seed), []
    for number in range(rng.randint(1, 3)):
        writer = ShardWriter(folder / f"train-{number:05}", 300)
        for _ in range(rng.randint(3, 15)):
            size = rng.choice((0, 1, 5, 15, 16, 30, 50))
            writer.write(np.array([*rng.choices(range(1, 300), k=size), EOD]))
        shards.append(writer.close())
    return corpus_of(folder, shards, 300)


@pytest.mark.parametrize("seed", range(20))
def test_packed_samples_are_parts_of_documents_with_the_token_before_them(
    tmp_path: Path, seed: int
) -> None:
    """Each window is found in the text of its shard, after an end of document; all samples are
    full, no label is in two, and few are in none."""
    corpus = write_documents(tmp_path, seed)
    reader = SplitReader(corpus, "train", 16, packing="best_fit")
    used = []
    for number in range(reader.num_samples):
        windows = reader.sample(number)
        assert sum(len(window) - 1 for window in windows) == 16
        place = max(n for n, first in enumerate(reader.samples[:-1]) if first <= number)
        text = np.fromfile(tmp_path / f"train-{place:05}.bin", "<u2")
        text = np.concatenate([[EOD], text])  # what the first document follows
        pieces = reader.packings[place].pieces(number - reader.samples[place])
        for window, (start, length) in zip(windows, pieces, strict=True):
            assert window.tolist() == text[start : start + length + 1].tolist()
            assert EOD not in window[1:-1]  # one document
            used += [(place, label) for label in range(start, start + length)]
    assert len(set(used)) == len(used) == 16 * reader.num_samples
    sizes = [shard.tokens for shard in corpus.manifest.splits["train"].shards]
    assert reader.num_samples == sum(size // 16 for size in sizes)


def test_packed_batches_hold_the_samples(tmp_path: Path) -> None:
    reader = SplitReader(write_documents(tmp_path, 5), "train", 16, packing="best_fit")
    (batch,) = validation_batches(reader, reader.num_samples, 1)
    for number in range(reader.num_samples):
        windows = reader.sample(number)
        labels = np.concatenate([window[1:] for window in windows])
        assert batch.labels_BS[number].tolist() == labels.tolist()


# Order.


def test_two_streams_of_one_seed_agree(corpora: Corpora) -> None:
    """With readers of their own."""
    first, second = (
        TrainStream([SplitReader(corpora.first, "train", LENGTH)], batch_size=4, seed=7)
        for _ in range(2)
    )
    assert samples(first, 50) == samples(second, 50)


def test_two_streams_of_one_reader_do_not_disturb_each_other(reader: SplitReader) -> None:
    alone = samples(TrainStream([reader], batch_size=2, seed=7), 20)
    first, second = (TrainStream([reader], batch_size=2, seed=7) for _ in range(2))
    interleaved = [(samples(first, 1), samples(second, 1)) for _ in range(20)]
    assert [row for rows, _ in interleaved for row in rows] == alone
    assert [row for _, rows in interleaved for row in rows] == alone


def test_a_stream_resumed_anywhere_gives_the_continuation(reader: SplitReader) -> None:
    """In an epoch, at its borders and after it."""
    epoch = reader.num_samples
    whole = samples(TrainStream([reader], batch_size=1, seed=3), 2 * epoch + 20)
    for position in (0, 1, 2, 17, epoch - 4, epoch - 1, epoch, epoch + 1, 2 * epoch, 2 * epoch + 5):
        resumed = stream_at(reader, 3, 3, position)
        assert samples(resumed, 5) == whole[position : position + 15]


def test_position_counts_the_samples_given_out(reader: SplitReader) -> None:
    """It is the state to save: a stream built from it goes on."""
    stream = TrainStream([reader], batch_size=5, seed=3)
    assert stream.position == 0
    samples(stream, 3)
    assert stream.position == 15
    resumed = stream_at(reader, 5, 3, stream.position)
    assert samples(resumed, 4) == samples(stream, 4)
    assert resumed.position == stream.position == 35
    assert next(resumed).sample_ids_B.tolist() == [35, 36, 37, 38, 39]


def test_another_batch_size_goes_on_with_the_same_samples(reader: SplitReader) -> None:
    wanted = samples(TrainStream([reader], batch_size=1, seed=3), 60)
    stream, found = TrainStream([reader], batch_size=4, seed=3), []
    for size, num_batches in ((4, 5), (7, 4), (1, 2), (10, 1)):
        stream = stream_at(reader, size, 3, stream.position)
        found += samples(stream, num_batches)
    assert found == wanted


def test_a_batch_larger_than_an_epoch_runs_into_the_next(tmp_path: Path) -> None:
    reader = SplitReader(write_split(tmp_path, [81]), "train", 16)
    assert reader.num_samples == 5
    one = samples(TrainStream([reader], batch_size=1, seed=0), 12)
    assert samples(TrainStream([reader], batch_size=12, seed=0), 1) == one
    assert Counter(one[:5]) == Counter(one[5:10]) == Counter(all_windows(reader))


def test_an_epoch_visits_each_window_once(reader: SplitReader) -> None:
    windows = Counter(all_windows(reader))
    stream = TrainStream([reader], batch_size=1, seed=11)
    for _ in range(3):
        assert Counter(samples(stream, reader.num_samples)) == windows


def moved(first: list[bytes], second: list[bytes]) -> float:
    """Share of the places that hold different samples."""
    pairs = list(zip(first, second, strict=True))
    return sum(one != other for one, other in pairs) / len(pairs)


def test_epochs_and_seeds_have_orders_of_their_own(reader: SplitReader) -> None:
    """Nearly every place holds another sample: neither a shift of windows nor their own order."""
    size = reader.num_samples
    assert size > 100
    stream = TrainStream([reader], batch_size=1, seed=0)
    orders = [samples(stream, size) for _ in range(3)]
    orders += [samples(TrainStream([reader], 1, seed=seed), size) for seed in (1, 2, 10)]
    orders += [all_windows(reader)]
    for first, second in itertools.combinations(orders, 2):
        assert moved(first, second) > 0.9


def test_seed_and_epoch_are_not_confused(reader: SplitReader) -> None:
    """Epoch 1 of seed 0 is not epoch 0 of seed 1, nor that of seed 1 the second of seed 11."""
    size = reader.num_samples

    def epoch(seed: int, number: int) -> list[bytes]:
        return samples(stream_at(reader, 1, seed, number * size), size)

    assert moved(epoch(0, 1), epoch(1, 0)) > 0.9
    assert moved(epoch(1, 11), epoch(11, 1)) > 0.9


# Threads.


@pytest.mark.parametrize(("prefetch", "workers"), [(0, 1), (1, 1), (2, 3), (7, 2), (3, 8)])
def test_threads_and_batches_made_ahead_change_nothing(
    reader: SplitReader, prefetch: int, workers: int
) -> None:
    wanted = samples(TrainStream([reader], 4, seed=3, prefetch=0), 40)
    stream = TrainStream([reader], 4, seed=3, prefetch=prefetch, workers=workers)
    assert samples(stream, 40) == wanted
    assert stream.position == 160  # what was made ahead was not given out
    stream.close()


def test_a_position_that_is_set_counts_more_than_what_was_made_ahead(reader: SplitReader) -> None:
    wanted = samples(TrainStream([reader], 1, seed=3, prefetch=0), 100)
    stream = TrainStream([reader], 4, seed=3, prefetch=3)
    for position in (0, 8, 4, 50, 50, 13):
        stream.position = position
        assert samples(stream, 2) == wanted[position : position + 8]
    stream.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ranges_of_a_batch_are_its_rows(reader: SplitReader, prefetch: int) -> None:
    """What the processes of a run take; empty ranges and other ones than before, too."""
    stream = TrainStream([reader], 10, seed=3, prefetch=prefetch)
    whole = TrainStream([reader], 10, seed=3, prefetch=0)
    for ranges in ([(0, 3), (3, 10)], [(0, 3), (3, 10)], [(9, 10)], [(4, 4), (2, 6)], []):
        batch, parts = next(whole), stream.take(ranges)
        assert len(parts) == len(ranges)
        for (start, end), part in zip(ranges, parts, strict=True):
            assert rows(part) == rows(batch)[start:end]
            assert part.sample_ids_B.tolist() == batch.sample_ids_B[start:end].tolist()
    assert stream.position == whole.position == 50
    stream.close()


def test_an_error_in_a_thread_comes_with_the_batch_that_it_belongs_to(tmp_path: Path) -> None:
    """Not earlier; and the batches before it are whole."""
    corpus = write_split(tmp_path, [160, 161])
    plant(tmp_path, 1, 100, 7, "<u2")
    reader = SplitReader(corpus, "train", 16)
    stream = TrainStream([reader], 2, seed=0, shuffle=NoShuffle(kind="none"), prefetch=8)
    for number in range(4):  # samples 0 to 7; sample 9 reaches into the second shard
        assert next(stream).sample_ids_B.tolist() == [2 * number, 2 * number + 1]
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-00001.bin"):
            next(stream)
    assert stream.position == 8
    stream.close()


def test_a_closed_stream_has_no_threads_and_goes_on_when_it_is_asked(reader: SplitReader) -> None:
    before = set(threading.enumerate())
    stream = TrainStream([reader], 4, seed=3, workers=3)
    first = samples(stream, 5)
    mine = set(threading.enumerate()) - before
    assert mine
    stream.close()
    assert not any(thread.is_alive() for thread in mine)
    assert first + samples(stream, 5) == samples(TrainStream([reader], 4, seed=3), 10)
    stream.close()


# Orders and mixtures.


def test_without_a_shuffle_samples_come_as_they_lie(reader: SplitReader) -> None:
    size = reader.num_samples
    stream = TrainStream([reader], 1, seed=5, shuffle=NoShuffle(kind="none"))
    assert samples(stream, 2 * size) == 2 * all_windows(reader)


def test_a_block_shuffle_visits_each_window_once_in_an_epoch(reader: SplitReader) -> None:
    size = reader.num_samples
    shuffle = BlockShuffle(kind="blocks", run=7, block=40)
    stream = TrainStream([reader], 1, seed=5, shuffle=shuffle)
    first, second = samples(stream, size), samples(stream, size)
    assert Counter(first) == Counter(second) == Counter(all_windows(reader))
    assert moved(first, second) > 0.9
    assert moved(first, all_windows(reader)) > 0.9


def test_a_mixture_gives_each_corpus_its_turns(tmp_path: Path) -> None:
    """Each corpus in an order of its own, epoch after epoch, wherever the stream begins."""
    readers = []
    for name, size in (("a", 81), ("b", 241), ("c", 17)):
        (tmp_path / name).mkdir()
        readers.append(SplitReader(write_split(tmp_path / name, [size]), "train", 16))
    turns = Turns([(0, [1, 2, 0]), (100, [1, 1, 2])], seed=4)
    stream = TrainStream(readers, 3, seed=4, turns=turns)
    places = [stream.place(position) for position in range(300)]
    batches = [next(stream) for _ in range(100)]
    found = torch.cat([batch.tokens_BS for batch in batches])
    for number in range(3):
        mine = [place for place in places if place.corpus == number]
        assert len(mine) == turns.counts(300)[number]
        size = readers[number].num_samples
        for before, place in enumerate(mine):
            assert place.epoch == before // size
        for epoch in range(len(mine) // size):
            part = mine[epoch * size : (epoch + 1) * size]
            assert sorted(place.number for place in part) == list(range(size))
    for row, place in zip(found.numpy(), places, strict=True):
        window = window_of(readers[place.corpus], place.number)
        assert row.tolist() == window[:-1].tolist()
    orders = [[p.number for p in places if (p.corpus, p.epoch) == (n, 0)] for n in (0, 1)]
    assert orders[0] != [number for number in orders[1] if number < readers[0].num_samples]
    stream.position = 123
    assert torch.equal(next(stream).tokens_BS, found[123:126])
    stream.close()


def test_a_transform_is_given_every_window_and_a_number_of_its_own(tmp_path: Path) -> None:
    reader = SplitReader(write_documents(tmp_path, 5), "train", 16, packing="best_fit")
    stream = TrainStream([reader], 4, seed=0, prefetch=0)
    seen: list[tuple[int, list[int]]] = []

    def transform(window: NDArray[np.int64], sample: int) -> NDArray[np.int64]:
        seen.append((sample, window.tolist()))
        return window + 300

    stream.transform = transform  # type: ignore[assignment]
    batches = [next(stream) for _ in range(3)]
    expected = [stream.sample(position) for position in range(12)]
    assert [window for _, window in seen] == [w.tolist() for windows in expected for w in windows]
    assert len({number for number, _ in seen}) == len(seen)
    assert [number for number, _ in seen] == [
        16 * position + place
        for position, windows in enumerate(expected)
        for place in range(len(windows))
    ]
    assert min(int(batch.tokens_BS.min()) for batch in batches) >= 300


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
    size = next(size for size in range(5, 50) if reader.num_samples % size)
    batches = list(validation_batches(reader, size, 10**6))
    sizes = [batch.tokens_BS.shape[0] for batch in batches]
    assert sizes[:-1] == [size] * (reader.num_samples // size)
    assert sizes[-1] == reader.num_samples % size
    assert [row for batch in batches for row in rows(batch)] == all_windows(reader)


def test_validation_of_a_split_smaller_than_a_batch_is_one_batch(tmp_path: Path) -> None:
    reader = SplitReader(write_split(tmp_path, [49]), "train", 16)
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
