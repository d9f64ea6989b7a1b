"""The order of samples depends on seed and position, on nothing else."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.data.batch import Batch
from moebius.data.config import DataConfig
from moebius.data.manifest import Manifest
from moebius.data.stream import SplitReader, TrainStream, permuted, validation_batches
from moebius.errors import DataError


@pytest.fixture
def reader(data_config: DataConfig, manifest: Manifest) -> SplitReader:
    return SplitReader(Path(data_config.dir), manifest, "train", 32)


def rows(stream: TrainStream, num_batches: int) -> torch.Tensor:
    """The next samples as one tensor of rows."""
    return torch.cat([batch.tokens_BS for batch in itertools.islice(stream, num_batches)])


def test_two_streams_agree_and_another_seed_differs(reader: SplitReader) -> None:
    first = rows(TrainStream(reader, 4, seed=0), 5)
    assert torch.equal(first, rows(TrainStream(reader, 4, seed=0), 5))
    assert not torch.equal(first, rows(TrainStream(reader, 4, seed=1), 5))


@pytest.mark.parametrize("position", [0, 1, 7, 20])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_stream_continues_at_any_position_with_any_batch_size(
    reader: SplitReader, position: int, batch_size: int
) -> None:
    whole = rows(TrainStream(reader, 1, seed=3), 40)
    stream = TrainStream(reader, batch_size, seed=3, position=position)
    got = rows(stream, 4)
    assert torch.equal(got, whole[position : position + 4 * batch_size])
    assert stream.position == position + 4 * batch_size


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(
    reader: SplitReader,
) -> None:
    size = reader.num_windows
    epochs = [[permuted(i, size, f"0/{epoch}") for i in range(size)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size))
    assert epochs[0] != epochs[1] != list(range(size))
    samples = rows(TrainStream(reader, size, seed=0), 2)
    for epoch, order in enumerate(epochs):
        expected = np.stack([reader.window(number)[:-1] for number in order])
        assert np.array_equal(samples[epoch * size : (epoch + 1) * size].numpy(), expected)


def test_permutations_are_bijections() -> None:
    for size in range(1, 130):
        assert sorted(permuted(i, size, "key") for i in range(size)) == list(range(size))
    images = {permuted(i, 10**12, "key") for i in range(2_000)}
    assert len(images) == 2_000
    assert max(images) < 10**12
    assert max(images) > 10**11, "a permutation of a large range must not stay near its start"


def test_windows_are_the_text_in_order(reader: SplitReader) -> None:
    """Neighbours share the token that is the last label of one and the first input of the next."""
    for number in range(3):
        assert reader.window(number)[-1] == reader.window(number + 1)[0]
    everything = np.concatenate([reader.window(n)[:-1] for n in range(reader.num_windows)])
    tokens = np.concatenate([np.asarray(shard) for shard in reader.shards])
    assert np.array_equal(everything, tokens[: len(everything)])
    assert len(tokens) - len(everything) <= 33


def test_validation_batches_are_the_first_windows_without_repeats(
    data_config: DataConfig, manifest: Manifest
) -> None:
    reader = SplitReader(Path(data_config.dir), manifest, "validation", 32)
    batches: list[Batch] = list(validation_batches(reader, 3, 2))
    assert [len(batch.tokens_BS) for batch in batches] == [3, 3]
    everything = list(validation_batches(reader, 7, 10**6))
    assert sum(len(batch.tokens_BS) for batch in everything) == reader.num_windows
    got = torch.cat([batch.tokens_BS for batch in everything]).numpy()
    assert np.array_equal(got, np.stack([reader.window(n)[:-1] for n in range(reader.num_windows)]))


def test_an_id_outside_the_vocabulary_is_named(
    data_config: DataConfig, manifest: Manifest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data_config.dir, tmp_path / "copy"))
    path = folder / "train-00000.bin"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[40] = 512
    tokens.tofile(path)
    reader = SplitReader(folder, manifest, "train", 32)
    reader.window(0)
    with pytest.raises(DataError) as caught:
        reader.window(1)
    assert f"'{path}' holds token id 512 at position 40, allowed: 0 to 511" in str(caught.value)


def test_a_sequence_longer_than_the_split_is_refused(
    data_config: DataConfig, manifest: Manifest
) -> None:
    with pytest.raises(DataError, match=r"data\.sequence_length: 1000000, but the train split"):
        SplitReader(Path(data_config.dir), manifest, "train", 1_000_000)
