"""Samples in a fixed order: which one comes when depends on (seed, position) alone."""

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moebius.data.batch import Batch, make_batch
from moebius.data.manifest import Manifest
from moebius.data.shards import open_shard
from moebius.errors import DataError


class SplitReader:
    """One split of a prepared corpus as consecutive windows of `sequence_length + 1` tokens.

    Neighbouring windows share one token: the last label of one is the first input of the next.
    """

    def __init__(self, folder: Path, manifest: Manifest, name: str, sequence_length: int) -> None:
        split = manifest.splits[name]
        self.eod_id = manifest.tokenizer.eod_id
        self.vocab_size = manifest.tokenizer.vocab_size
        self.sequence_length = sequence_length
        self.names = [str(folder / shard.name) for shard in split.shards]
        self.shards = [open_shard(folder / shard.name, shard.tokens) for shard in split.shards]
        self.starts = [0, *itertools.accumulate(len(shard) for shard in self.shards)]
        self.num_windows = (split.tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise DataError(
                f"data.sequence_length: {sequence_length}, but the {name} split in '{folder}' has "
                f"only {split.tokens} tokens",
                "use shorter sequences or more text",
            )

    def window(self, number: int) -> NDArray[np.int64]:
        """Window `number`. Raises DataError for an id outside the tokenizer's vocabulary."""
        start = number * self.sequence_length
        tokens = self._tokens(start, start + self.sequence_length + 1)
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            bad = int(np.argmax((tokens >= self.vocab_size) | (tokens < 0)))
            shard = bisect.bisect_right(self.starts, start + bad) - 1
            raise DataError(
                f"data: '{self.names[shard]}.bin' holds token id {tokens[bad]} at position "
                f"{start + bad - self.starts[shard]}, allowed: 0 to {self.vocab_size - 1}",
                "the shard is damaged, delete its folder to rebuild",
            )
        return tokens

    def _tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens `start:end` of the split; they may span shards."""
        parts = []
        shard = bisect.bisect_right(self.starts, start) - 1
        while start < end:
            stop = min(end, self.starts[shard + 1])
            offset = self.starts[shard]
            parts.append(np.asarray(self.shards[shard][start - offset : stop - offset]))
            start, shard = stop, shard + 1
        return np.concatenate(parts).astype(np.int64)


class TrainStream:
    """Endless training batches; every epoch is a permutation of all windows.

    `position` counts samples given out. It is the whole state: a stream at the same position goes
    on with the same samples, whatever the batch size before.
    """

    def __init__(self, reader: SplitReader, batch_size: int, seed: int, position: int = 0) -> None:
        self.reader = reader
        self.batch_size = batch_size
        self.seed = seed
        self.position = position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        (batch,) = self.take([(0, self.batch_size)])
        return batch

    def take(self, ranges: Sequence[tuple[int, int]]) -> list[Batch]:
        """Some rows (start, end) of the next batch, each range a batch of its own; others are not
        read. A range may be empty."""
        batches = []
        for start, end in ranges:
            samples = range(self.position + start, self.position + end)
            windows = np.empty((len(samples), self.reader.sequence_length + 1), dtype=np.int64)
            for row, sample in enumerate(samples):
                windows[row] = self.reader.window(self._window_of(sample))
            batches.append(make_batch(windows, self.reader.eod_id, samples.start))
        self.position += self.batch_size
        return batches

    def _window_of(self, sample: int) -> int:
        epoch, number = divmod(sample, self.reader.num_windows)
        return permuted(number, self.reader.num_windows, f"{self.seed}/{epoch}")


def validation_batches(reader: SplitReader, batch_size: int, num_batches: int) -> Iterator[Batch]:
    """The first windows of a split in order, at most `num_batches` batches."""
    end = min(reader.num_windows, batch_size * num_batches)
    for start in range(0, end, batch_size):
        numbers = range(start, min(start + batch_size, end))
        windows = np.stack([reader.window(number) for number in numbers])
        yield make_batch(windows, reader.eod_id, start)


def permuted(number: int, size: int, key: str) -> int:
    """Image of `number` under a pseudo-random permutation of `range(size)`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands
    inside (Black & Rogaway 2002): no table in memory, however many samples there are.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        number = (left << half) | right
        if number < size:
            return number
