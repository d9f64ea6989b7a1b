"""Which samples were trained on: logs that each process writes, and the proof they give.

A run that is started again gets a new attempt; what an attempt did after the step from which the
next one went on is undone. A log of an attempt and a process is one JSON object per line: first a
header, then one for each step.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from moebius.config import ConfigNode
from moebius.data.manifest import readable
from moebius.data.stream import Stream
from moebius.errors import DataError

COLUMNS = ("position", "corpus", "epoch", "sample")
LOG_NAME = re.compile(r"(?P<attempt>\d{4,9})-rank-(?P<rank>\d{5,9})\.jsonl")
Number = Annotated[int, Field(ge=0, lt=2**62)]


class Header(ConfigNode):
    """The first line of a log."""

    attempt: PositiveInt
    rank: NonNegativeInt
    dp: NonNegativeInt
    """which of the processes that read different rows"""
    step: NonNegativeInt
    """after which the attempt begins"""
    position: NonNegativeInt
    batch_size: PositiveInt
    samples: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None
    """in an epoch of each corpus; None: without an end"""
    skipped: tuple[tuple[Number, Number], ...] = ()
    """ranges of positions that the run has left out where it went back"""


class Line(ConfigNode):
    """What a process read for a step."""

    step: PositiveInt
    rows: tuple[tuple[Number, Number, Number, Number], ...]
    """`COLUMNS` of each"""


class AuditWriter:
    """Writes down what one process reads."""

    def __init__(
        self,
        folder: Path,
        attempt: int,
        rank: int,
        dp: int,
        step: int,
        stream: Stream,
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stream = stream
        self.file: TextIO = (folder / f"{attempt:04}-rank-{rank:05}.jsonl").open("w")
        samples = stream.num_samples
        self._write(
            Header(
                attempt=attempt,
                rank=rank,
                dp=dp,
                step=step,
                position=stream.position,
                batch_size=stream.batch_size,
                samples=None if samples is None else tuple(samples),
                skipped=tuple(skipped),
            )
        )

    def write(self, step: int, positions: Sequence[int]) -> None:
        """Note the samples that this process has read for a step, counted from 1."""
        rows = tuple((position, *self.stream.place(position)) for position in positions)
        self._write(Line(step=step, rows=rows))

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _write(self, line: ConfigNode) -> None:
        self.file.write(line.model_dump_json() + "\n")
        self.file.flush()


@dataclass(frozen=True)
class Attempt:
    """What the processes of one start of a run have read."""

    header: Header
    """that of one of them"""
    steps: dict[int, NDArray[np.int64]]
    """step -> rows `[B, 4]` of `COLUMNS`, by position"""


def log_files(folder: Path) -> dict[int, list[Path]]:
    """The logs of each attempt."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        name = LOG_NAME.fullmatch(path.name)
        if name is not None:
            found.setdefault(int(name["attempt"]), []).append(path)
    return found


def next_attempt(folder: Path) -> int:
    """The number of an attempt that has no log yet."""
    return max(log_files(folder), default=0) + 1


def read_audit(folder: Path) -> NDArray[np.int64]:
    """All rows that a run was trained on, `[N, 4]` of `COLUMNS`, in the order of its steps.

    Raises DataError where they do not prove that each sample came once: a gap, a repetition, a step
    that is missing, processes that disagree.
    """
    logs = log_files(folder)
    if not logs:
        raise DataError(f"audit: '{folder}' has no logs", "train with log.audit=true")
    attempts = [_attempt(folder, number, paths) for number, paths in sorted(logs.items())]
    first = attempts[0].header
    steps: dict[int, NDArray[np.int64]] = {}
    sizes: dict[int, int] = {}
    for attempt in attempts:
        reached = max(steps, default=first.step)
        begin = attempt.header.step
        if not first.step <= begin <= reached:
            raise DataError(
                f"audit '{folder}': an attempt begins after step {begin}, those before it "
                f"gave steps {first.step + 1} to {reached}"
            )
        steps = {step: rows for step, rows in steps.items() if step <= begin}
        steps |= attempt.steps
        sizes |= dict.fromkeys(attempt.steps, attempt.header.batch_size)
    left_out = attempts[-1].header.skipped
    jumps = {start: end for start, end in left_out if start < end}
    position = first.position
    for number in range(first.step + 1, max(steps, default=first.step) + 1):
        if number not in steps:
            raise DataError(f"audit '{folder}': step {number} is missing")
        found = steps[number][:, 0]
        size = sizes[number]
        while position in jumps:
            position = jumps[position]
        if len(found) != size or not np.array_equal(found, np.arange(position, position + size)):
            raise DataError(
                f"audit '{folder}': step {number} has samples {_brief(found)}, "
                f"expected {position} to {position + size - 1}"
            )
        position += sizes[number]
    empty = np.zeros((0, len(COLUMNS)), dtype=np.int64)
    rows = np.concatenate([empty, *(steps[number] for number in sorted(steps))])
    count = sum(end - start for start, end in left_out)
    _check_epochs(folder, rows, attempts[-1].header.samples, count)
    return rows


def compare(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[int, int]:
    """Of two runs, how many positions both have, and the first that differs or -1."""
    common, left, right = np.intersect1d(
        first[:, 0], second[:, 0], assume_unique=True, return_indices=True
    )
    differs = (first[left] != second[right]).any(axis=1)
    return len(common), int(common[np.argmax(differs)]) if differs.any() else -1


def _attempt(folder: Path, number: int, paths: list[Path]) -> Attempt:
    """The logs of all processes of an attempt, joined."""
    heads: list[Header] = []
    steps: dict[int, dict[int, tuple[tuple[int, ...], ...]]] = {}
    """step -> reader -> rows"""
    for path in paths:
        head, lines = _read(path)
        if head is None:
            continue  # killed before its first line
        own = LOG_NAME.fullmatch(path.name)
        if own is None or (head.attempt, head.rank) != (number, int(own["rank"])):
            raise DataError(f"audit '{path}': it is the log of another attempt or process")
        heads.append(head)
        if any(_shared(head) != _shared(other) for other in heads):
            raise DataError(f"audit '{path}': its header differs from those of other processes")
        for line in lines:
            readers = steps.setdefault(line.step, {})
            if readers.setdefault(head.dp, line.rows) != line.rows:
                raise DataError(
                    f"audit '{path}': at step {line.step} processes of one row read different "
                    "samples"
                )
    if not heads:
        raise DataError(f"audit '{folder}': attempt {number} has no header")
    wanted = {head.dp for head in heads}
    joined = {}
    for step, readers in steps.items():
        if readers.keys() != wanted:
            continue  # some process was killed in this step, which is then not a whole one
        rows = [row for reader in readers.values() for row in reader]
        table = np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        joined[step] = table[np.argsort(table[:, 0], kind="stable")]
    return Attempt(heads[0], joined)


def _shared(head: Header) -> Header:
    """What all processes of an attempt say alike."""
    return head.model_copy(update={"rank": 0, "dp": 0})


def _read(path: Path) -> tuple[Header | None, list[Line]]:
    """Header and lines of a log; the last one may be cut where a process was killed."""
    with readable(path):
        if not path.is_file():
            raise DataError(f"audit '{path}': it is no file")
        texts = path.read_bytes().split(b"\n")
    head: Header | None = None
    lines: list[Line] = []
    for number, text in enumerate(texts):
        if not text:
            continue
        try:
            if number == 0:
                head = Header.model_validate_json(text)
            else:
                lines.append(Line.model_validate_json(text))
        except ValueError:
            if number == len(texts) - 1:
                break
            raise DataError(f"audit '{path}': line {number + 1} is damaged") from None
    return head, lines if head is not None else []


def _check_epochs(
    folder: Path, rows: NDArray[np.int64], samples: tuple[int, ...] | None, left_out: int
) -> None:
    """No sample comes twice in an epoch, and all of a finished one come, unless some were left
    out."""
    keys = rows[:, 1:]
    if len(keys) and samples is not None:
        sizes = np.array(samples, dtype=np.int64)
        corpora = keys[:, 0]
        outside = corpora >= len(sizes)
        outside |= keys[:, 2] >= sizes[np.minimum(corpora, len(sizes) - 1)]
        outside |= keys[:, 1] > len(keys) + left_out
        if outside.any():
            corpus, epoch, sample = keys[np.argmax(outside)].tolist()
            raise DataError(
                f"audit '{folder}': there is no sample {sample} of corpus {corpus} in epoch {epoch}"
            )
    unique, counts = np.unique(keys, axis=0, return_counts=True)
    if (counts > 1).any():
        corpus, epoch, sample = unique[np.argmax(counts)].tolist()
        raise DataError(
            f"audit '{folder}': sample {sample} of corpus {corpus} came {counts.max()} times in "
            f"epoch {epoch}"
        )
    if samples is None or not len(rows) or rows[0, 0] != 0 or left_out:
        return
    for corpus, size in enumerate(samples):
        epochs = unique[unique[:, 0] == corpus, 1]
        found = np.bincount(epochs) if len(epochs) else np.zeros(0, dtype=np.int64)
        if (found[:-1] != size).any():
            epoch = int(np.argmax(found[:-1] != size))
            raise DataError(
                f"audit '{folder}': epoch {epoch} of corpus {corpus} has {found[epoch]} of its "
                f"{size} samples"
            )


def _brief(numbers: NDArray[np.int64]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) else "none"
