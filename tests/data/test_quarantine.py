"""Damaged shards are found before training, and their samples are others of the same corpus."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moebius.data.corpus import Corpora, Corpus, SplitReader
from moebius.data.manifest import Manifest, Split, TokenizerEntry
from moebius.data.order import permuted
from moebius.data.quarantine import find_bad_shards
from moebius.data.shards import Shard, ShardWriter
from moebius.data.storage import CacheConfig, open_storage
from moebius.data.stream import TrainStream
from moebius.errors import DataError

EOD = 0
PACKINGS = ("concat", "best_fit")


def write_corpus(folder: Path, sizes: list[int], seed: int = 0) -> Corpus:
    """Shards of such sizes; documents of up to 30 random tokens."""
    folder.mkdir(exist_ok=True)
    rng, shards = random.Random(seed), []
    for number, size in enumerate(sizes):
        writer = ShardWriter(folder / f"train-{number:05}", 300)
        while size:
            length = min(size, rng.randint(1, 30))
            writer.write(np.array([*rng.choices(range(1, 300), k=length - 1), EOD]))
            size -= length
        shards.append(writer.close())
    writer = ShardWriter(folder / "validation-00000", 300)
    writer.write(np.array([1, 2, 3] * 20 + [EOD]))
    manifest = Manifest(
        recipe={},
        tokenizer=TokenizerEntry(sha256="0" * 64, vocab_size=300, eod_id=EOD),
        dtype="uint16",
        splits={
            "train": Split(bytes=1, shards=shards),
            "validation": Split(bytes=1, shards=[writer.close()]),
        },
    )
    return Corpus(open_storage(str(folder), CacheConfig()), manifest)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def content_of(reader: SplitReader, number: int) -> list[list[int]]:
    return [window.tolist() for window in reader.sample(number)]


def shards_of(reader: SplitReader, number: int) -> set[str]:
    """Names of the shards with a token of a sample, found token by token."""
    names = [shard.entry.name for shard in reader.shards]
    if reader.packed:
        counts = [len(shard) // reader.sequence_length for shard in reader.shards]
        owners = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        return {owners[number]}
    owners = [shard.entry.name for shard in reader.shards for _ in range(len(shard))]
    start = number * reader.sequence_length
    return set(owners[start : start + reader.sequence_length + 1])


def random_sizes(rng: random.Random) -> list[int]:
    """Some shards are smaller than a sample; one at least is large."""
    sizes = [rng.choice((1, 5, 15, 16, 17, 33, 100, 160, 161)) for _ in range(rng.randint(1, 5))]
    sizes.insert(rng.randint(0, len(sizes)), 200)
    return sizes


# Finding.


@pytest.mark.parametrize("kind", ["bin", "idx", "sums"])
@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_flipped_bit_in_one_shard_of_several_is_found(
    tmp_path: Path, kind: str, position: int
) -> None:
    position = min(position, 31) if kind == "sums" else position
    one = write_corpus(tmp_path / "one", [100, 90, 80])
    other = write_corpus(tmp_path / "other", [100])
    flip(tmp_path / "one" / f"train-00001.{kind}", position)
    said: list[str] = []
    found = find_bad_shards(Corpora({"one": one, "other": other}, {}), said.append)
    assert found == {"one": ["train-00001"]}
    assert len(said) == 1
    assert f"train-00001.{kind}" in said[0]


def test_shards_that_are_missing_or_cut_are_found_too(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [100, 90, 80, 70])
    (tmp_path / "train-00000.bin").unlink()
    (tmp_path / "train-00002.idx").unlink()
    path = tmp_path / "train-00003.bin"
    path.write_bytes(path.read_bytes()[:-2])
    flip(tmp_path / "validation-00000.bin", 7)
    said: list[str] = []
    found = find_bad_shards(Corpora({"": corpus}, {}), said.append)
    bad = ["train-00000", "train-00002", "train-00003", "validation-00000"]
    assert found == {"": bad}
    assert [name in line for name, line in zip(bad, said, strict=True)] == [True] * 4


def test_sound_shards_are_not_found(tmp_path: Path, corpora: Corpora) -> None:
    said: list[str] = []
    assert find_bad_shards(corpora, said.append) == {}
    assert find_bad_shards(Corpora({"": write_corpus(tmp_path, [60, 5])}, {}), said.append) == {}
    assert said == []


# Reading without them.


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seed", range(15))
def test_only_samples_of_bad_shards_are_others(tmp_path: Path, packing: str, seed: int) -> None:
    """Their files may be gone: nothing of them is touched. `count_substituted` counts them."""
    rng = random.Random(seed)
    sizes = random_sizes(rng)
    corpus = write_corpus(tmp_path, sizes, seed)
    names = [f"train-{number:05}" for number in range(len(sizes))]
    bad = {
        name for name, size in zip(names, sizes, strict=True) if size < 200 and rng.random() < 0.5
    }
    whole = SplitReader(corpus, "train", 16, packing)
    wanted = [content_of(whole, number) for number in range(whole.num_samples)]
    affected = [n for n in range(whole.num_samples) if shards_of(whole, n) & bad]
    for name in bad:
        for path in tmp_path.glob(f"{name}.*"):
            path.unlink()
    reader = SplitReader(corpus, "train", 16, packing, quarantined=bad)
    assert reader.num_samples == whole.num_samples
    assert reader.count_substituted() == len(affected)
    for number in range(reader.num_samples):
        stand_in = reader.substitute(number)
        assert content_of(reader, number) == wanted[stand_in]
        if number in affected:
            assert stand_in not in affected
        else:
            assert stand_in == number


@pytest.mark.parametrize("packing", PACKINGS)
def test_bad_shards_are_never_opened(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path, [100, 60, 100])
    touched: set[str] = set()
    reading, measuring = Shard.tokens, Shard.lengths

    def tokens(self: Shard, start: int, end: int) -> object:
        touched.add(self.entry.name)
        return reading(self, start, end)

    def lengths(self: Shard) -> object:
        touched.add(self.entry.name)
        return measuring(self)

    monkeypatch.setattr(Shard, "tokens", tokens)
    monkeypatch.setattr(Shard, "lengths", lengths)
    reader = SplitReader(corpus, "train", 16, packing, quarantined=["train-00001"])
    for number in range(reader.num_samples):
        reader.sample(number)
    assert touched == {"train-00000", "train-00002"}


@pytest.mark.parametrize("packing", PACKINGS)
def test_stand_ins_come_from_everywhere(tmp_path: Path, packing: str) -> None:
    """No sound sample stands in for all: half of the corpus is bad, few come more than thrice."""
    corpus = write_corpus(tmp_path, [1600, 1600])
    reader = SplitReader(corpus, "train", 16, packing, quarantined=["train-00000"])
    found = Counter(reader.substitute(number) for number in range(100))
    assert len(found) > 50
    assert max(found.values()) <= 6


def test_stand_ins_are_fixed_for_all_time(tmp_path: Path) -> None:
    """A run that goes on has the same ones: the first sound one of a row of permutations."""
    corpus = write_corpus(tmp_path, [1600, 1600])
    reader = SplitReader(corpus, "train", 16, "best_fit", quarantined=["train-00000"])
    for number in range(100):
        found, attempt = number, 0
        while found < 100:
            attempt += 1
            found = permuted(number, 200, f"substitute/{attempt}")
        assert reader.substitute(number) == found


def test_the_stream_of_a_quarantined_corpus_differs_at_bad_samples_alone(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [400, 200, 400])
    sound = TrainStream([SplitReader(corpus, "train", 16)], 1, seed=3)
    wanted = [next(sound) for _ in range(120)]
    sound.close()
    flip(tmp_path / "train-00001.bin", 100)
    found = find_bad_shards(Corpora({"": corpus}, {}), lambda line: None)
    reader = SplitReader(corpus, "train", 16, quarantined=found[""])
    stream = TrainStream([reader], 1, seed=3)
    for position, batch in enumerate(wanted):
        number = stream.place(position).number
        is_bad = "train-00001" in shards_of(reader, number)
        same = bool((next(stream).tokens_BS == batch.tokens_BS).all())
        assert same != is_bad
    stream.close()


# What cannot be read.


def test_a_split_whose_shards_are_all_bad_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [100, 60])
    with pytest.raises(DataError, match="no sample of the train split") as caught:
        SplitReader(corpus, "train", 16, quarantined=["train-00000", "train-00001"])
    assert "\n" not in str(caught.value)
    SplitReader(corpus, "validation", 16, quarantined=["train-00000", "train-00001"])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("sizes", [[100, 5], [5, 100], [12, 100, 12]])
def test_a_split_without_a_sound_sample_is_refused(
    tmp_path: Path, packing: str, sizes: list[int]
) -> None:
    """The shards that are left are smaller than a sample: no sample could stand in."""
    corpus = write_corpus(tmp_path, sizes)
    bad = f"train-{sizes.index(100):05}"
    with pytest.raises(DataError, match="train split") as caught:
        SplitReader(corpus, "train", 16, packing, quarantined=[bad])
    assert "\n" not in str(caught.value)


def test_without_quarantine_a_bad_shard_is_refused_at_once_or_when_it_is_read(
    tmp_path: Path,
) -> None:
    corpus = write_corpus(tmp_path, [100, 60])
    flip(tmp_path / "train-00001.bin", 0)
    reader = SplitReader(corpus, "train", 16)
    reader.sample(0)
    with pytest.raises(DataError, match=r"train-00001.bin' is damaged"):
        reader.sample(reader.num_samples - 1)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(DataError, match=r"train-00001.bin' is missing"):
        SplitReader(corpus, "train", 16)
