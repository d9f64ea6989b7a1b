"""Batches in a fixed order: which sample comes when depends on (seed, position) alone."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, NamedTuple

from moebius.data.batch import Batch, make_batch
from moebius.data.corpus import SplitReader, Windows
from moebius.data.mixture import Turns
from moebius.data.objective import Transform
from moebius.data.order import GlobalShuffle, Shuffle, sample_at

Ranges = Sequence[tuple[int, int]]


class Place(NamedTuple):
    """Where a sample of the run comes from."""

    corpus: int
    epoch: int
    """of the corpus"""
    number: int
    """of the sample in its corpus"""


class Stream(ABC):
    """Endless training batches, made ready by threads.

    `position` counts samples given out. A stream at the same position goes on with the same
    samples, whatever the batch size, the processes or the threads before.
    """

    def __init__(
        self, length: int, eod_id: int, batch_size: int, prefetch: int = 2, workers: int = 1
    ) -> None:
        """`length` in tokens; `prefetch` in batches, 0: made when they are taken."""
        self.length = length
        self.eod_id = eod_id
        self.batch_size = batch_size
        self.position = 0
        self.mask_documents = True
        self.transform: Transform | None = None
        self.turns: Turns | None = None
        """whose turn it is, in a mixture"""
        self.waited = 0.0
        """seconds that batches had to be waited for"""
        self._prefetch, self._workers = prefetch, workers
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[tuple[int, Ranges], Future[list[Batch]]]] = deque()

    @abstractmethod
    def sample(self, position: int) -> Windows:
        """The sample of a position; threads may ask at once."""

    @property
    @abstractmethod
    def num_samples(self) -> list[int] | None:
        """Samples in an epoch of each corpus; None: there is no end."""

    @abstractmethod
    def place(self, position: int) -> Place:
        """Where the sample of a position comes from."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        (batch,) = self.take([(0, self.batch_size)])
        return batch

    def take(self, ranges: Ranges) -> list[Batch]:
        """Some rows (start, end) of the next batch, each range a batch of its own; others are not
        read. A range may be empty."""
        began = perf_counter()
        if self._prefetch:
            batches = self._prepared(tuple(ranges))
        else:
            batches = self._batches(self.position, ranges)
        self.waited += perf_counter() - began
        self.position += self.batch_size
        return batches

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the position; JSON values."""
        return {}

    def load(self, position: int, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.position = position

    def skip_to(self, position: int) -> None:
        """Leave out the samples before a position that lies ahead."""
        self.close()
        self.position = position

    def close(self) -> None:
        """End the threads."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _prepared(self, ranges: Ranges) -> list[Batch]:
        """The batch at the position, while those that are likely to follow are being made."""
        if self._ahead and self._ahead[0][0] != (self.position, ranges):
            self.close()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="data")
        while len(self._ahead) <= self._prefetch:
            position = self.position + len(self._ahead) * self.batch_size
            future = self._pool.submit(self._batches, position, ranges)
            self._ahead.append(((position, ranges), future))
        _, first = self._ahead.popleft()
        return first.result()

    def _batches(self, position: int, ranges: Ranges) -> list[Batch]:
        return [self._batch(position + start, position + end) for start, end in ranges]

    def _batch(self, start: int, end: int) -> Batch:
        samples = [self._transformed(position) for position in range(start, end)]
        return make_batch(samples, self.length, self.eod_id, start, self.mask_documents)

    def _transformed(self, position: int) -> Windows:
        windows = self.sample(position)
        if self.transform is None:
            return windows
        # A sample has at most `length` windows: each has a number of its own.
        first = position * self.length
        return [self.transform(window, first + n) for n, window in enumerate(windows)]


class TrainStream(Stream):
    """Batches from prepared corpora; every epoch of a corpus has all of its samples once."""

    def __init__(
        self,
        readers: Sequence[SplitReader],
        batch_size: int,
        seed: int,
        shuffle: Shuffle | None = None,
        turns: Turns | None = None,
        prefetch: int = 2,
        workers: int = 1,
    ) -> None:
        """`turns` says whose turn it is where there are several readers; the default order of an
        epoch is a global shuffle."""
        super().__init__(
            readers[0].sequence_length, readers[0].eod_id, batch_size, prefetch, workers
        )
        self.readers = readers
        self.seed = seed
        self.shuffle = shuffle or GlobalShuffle()
        self.turns = turns

    @property
    def num_samples(self) -> list[int]:
        """Samples in an epoch of each corpus."""
        return [reader.num_samples for reader in self.readers]

    def place(self, position: int) -> Place:
        """Where the sample of a position comes from; another may stand in for it, see
        `SplitReader.substitute`."""
        corpus, before = (0, position) if self.turns is None else self.turns.turn(position)
        reader = self.readers[corpus]
        epoch, number = divmod(before, reader.num_samples)
        key = f"{self.seed}/{epoch}" if corpus == 0 else f"{self.seed}/{epoch}/{corpus}"
        return Place(corpus, epoch, sample_at(number, reader.num_samples, self.shuffle, key))

    def sample(self, position: int) -> Windows:
        """The sample of a position."""
        place = self.place(position)
        return self.readers[place.corpus].sample(place.number)


def validation_batches(reader: SplitReader, batch_size: int, num_batches: int) -> Iterator[Batch]:
    """The first samples of a split in order, at most `num_batches` batches."""
    end = min(reader.num_samples, batch_size * num_batches)
    for start in range(0, end, batch_size):
        numbers = range(start, min(start + batch_size, end))
        samples = [reader.sample(number) for number in numbers]
        yield make_batch(samples, reader.sequence_length, reader.eod_id, start)
