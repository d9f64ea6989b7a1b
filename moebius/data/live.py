"""Straight through: samples from a data set that is tokenized while it is read, without shards."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moebius.data.config import HubStreamSource
from moebius.data.corpus import Windows
from moebius.data.encode import encoded
from moebius.data.order import permuted
from moebius.data.prepare import is_validation
from moebius.data.sources import Documents
from moebius.data.stream import Place, Stream
from moebius.errors import DataError

READ_BYTES = 200_000
"""text that is encoded at once; a resumed run encodes it again"""


class Mark(NamedTuple):
    """A place in the endless text: where the source stood, and how many tokens came after it."""

    epoch: int
    source: dict[str, Any] | None
    skip: int


class Text:
    """The tokens of the training documents of a source, over and over, from a mark on."""

    def __init__(
        self, source: HubStreamSource, tokenizer_file: Path, eod_id: int, fraction: float
    ) -> None:
        self.source, self.tokenizer_file = source, tokenizer_file
        self.eod_id, self.fraction = eod_id, fraction
        self.go_to(Mark(0, None, 0))

    def go_to(self, mark: Mark) -> None:
        """Go on from a mark."""
        self._parts: list[tuple[Mark, NDArray[np.int64]]] = []
        self._first = mark.skip
        self._reading = self._read(mark._replace(skip=0))

    def mark(self) -> Mark:
        """Where the next token is."""
        while not self._parts:
            self._parts.append(next(self._reading))
        return self._parts[0][0]._replace(skip=self._first)

    def peek(self, count: int) -> NDArray[np.int64]:
        """The next tokens, which stay the next ones."""
        while sum(len(tokens) for _, tokens in self._parts) - self._first < count:
            self._parts.append(next(self._reading))
        joined = np.concatenate([tokens for _, tokens in self._parts])
        return joined[self._first : self._first + count]

    def skip(self, count: int) -> None:
        """Leave out the next tokens, which have been seen."""
        self._first += count
        while self._parts and self._first >= len(self._parts[0][1]):
            self._first -= len(self._parts[0][1])
            del self._parts[0]

    def _read(self, mark: Mark) -> Iterator[tuple[Mark, NDArray[np.int64]]]:
        """Tokens of some documents at a time, with the place before them."""
        epoch, state = mark.epoch, mark.source
        while True:
            documents = Documents(self.source, state)
            found = 0
            for batch in encoded(documents, self.tokenizer_file, 1, READ_BYTES):
                tokens = [
                    np.append(item.ids, self.eod_id).astype(np.int64)
                    for item in batch.items
                    if not is_validation(item.id, self.fraction)
                ]
                if tokens:
                    yield Mark(epoch, state, 0), np.concatenate(tokens)
                    found += 1
                state = batch.state
            if not found and mark.source is None:
                raise DataError(f"data.source.name: '{self.source.name}' has no training text")
            epoch, state, mark = epoch + 1, None, Mark(epoch + 1, None, 0)


class LiveStream(Stream):
    """Batches of a data set in the order of its text, shuffled inside of blocks of samples.

    It goes on exactly, on any number of processes: a checkpoint has the place where the current
    block begins and a hash of it, and the block is read again. One thread reads.
    """

    def __init__(
        self, text: Text, length: int, block: int, batch_size: int, seed: int, prefetch: int
    ) -> None:
        """`block`: samples that are shuffled among each other; 1: none."""
        super().__init__(length, text.eod_id, batch_size, prefetch, workers=1)
        self.text, self.block, self.seed = text, block, seed
        self._next = 0
        self._blocks: dict[int, tuple[Mark, NDArray[np.int64]]] = {}
        """by number, where a block begins and its tokens"""
        self._expected: tuple[int, str] | None = None
        self._lock = threading.Lock()

    @property
    def num_samples(self) -> None:
        """There is no end."""

    def place(self, position: int) -> Place:
        """Epochs of the text are not counted: samples are numbered from its first beginning on."""
        number, place = divmod(position, self.block)
        inside = permuted(place, self.block, f"{self.seed}/{number}")
        return Place(0, 0, number * self.block + inside)

    def sample(self, position: int) -> Windows:
        """The sample of a position, which must not lie before that of a checkpoint."""
        number, inside = divmod(self.place(position).number, self.block)
        with self._lock:
            _, tokens = self._read_until(number)
        start = inside * self.length
        return [tokens[start : start + self.length + 1]]

    def state_dict(self) -> dict[str, Any]:
        """Where the block of the position begins, and what it holds."""
        number = self.position // self.block
        with self._lock:
            mark, tokens = self._read_until(number)
        return {"block": number, "mark": mark._asdict(), "sha256": _sha256(tokens)}

    def load(self, position: int, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises DataError where the text is not the same."""
        self.close()
        self.position = position
        try:
            number, mark = int(state["block"]), Mark(**state["mark"])
            self.text.go_to(mark)
            self._expected = (number, str(state["sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("checkpoint: it has no place in the stream of data.source") from error
        self._blocks, self._next = {}, number

    def _read_until(self, number: int) -> tuple[Mark, NDArray[np.int64]]:
        while self._next <= number:
            mark = self.text.mark()
            size = self.block * self.length
            tokens = self.text.peek(size + 1)
            self.text.skip(size)
            if self._expected is not None and self._expected != (self._next, _sha256(tokens)):
                raise DataError(
                    f"data.source.name: '{self.text.source.name}' has other text than when the "
                    "checkpoint was written",
                    "bring the old text back, or choose another run_dir",
                )
            self._expected = None
            if self._next >= min(number, self.position // self.block):
                self._blocks[self._next] = (mark, tokens)  # the others are skipped
            self._next += 1
        done = [old for old in self._blocks if old < min(number, self.position // self.block)]
        for old in done:
            del self._blocks[old]
        return self._blocks[number]


def _sha256(tokens: NDArray[np.int64]) -> str:
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
