"""Which samples were trained on: logs that each process writes, and the proof they give.

A run that is started again gets a new attempt; what an attempt did after the step from which the
next one went on is undone. A log of an attempt and a process is one JSON object per line: first a
header, then one for each step.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from moebius.data.stream import Stream
from moebius.errors import DataError

COLUMNS = ("position", "corpus", "epoch", "sample")


class AuditWriter:
    """Writes down what one process reads."""

    def __init__(
        self, folder: Path, attempt: int, rank: int, dp: int, step: int, stream: Stream
    ) -> None:
        """`dp`: which of the processes that read different rows; `step`: the one gone on from."""
        folder.mkdir(parents=True, exist_ok=True)
        self.stream = stream
        self.file: TextIO = (folder / f"{attempt:04}-rank-{rank:05}.jsonl").open("w")
        self._write(
            attempt=attempt,
            step=step,
            position=stream.position,
            batch_size=stream.batch_size,
            dp=dp,
            samples=stream.num_samples,
        )

    def write(self, step: int, positions: Sequence[int]) -> None:
        """Note the samples that this process has read for a step, counted from 1."""
        rows = [[position, *self.stream.place(position)] for position in positions]
        self._write(step=step, rows=rows)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _write(self, **fields: Any) -> None:
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()


@dataclass(frozen=True)
class Attempt:
    """What the processes of one start of a run have read."""

    step: int
    """after which it began"""
    position: int
    batch_size: int
    samples: tuple[int, ...] | None
    """in an epoch of each corpus; None: without an end"""
    steps: dict[int, NDArray[np.int64]]
    """step -> rows `[B, 4]` of `COLUMNS`, by position"""


def next_attempt(folder: Path) -> int:
    """The number of an attempt that has no log yet."""
    return max((int(path.name[:4]) for path in folder.glob("*-rank-*.jsonl")), default=0) + 1


def read_audit(folder: Path) -> NDArray[np.int64]:
    """All rows that a run was trained on, `[N, 4]` of `COLUMNS`, in the order of its steps.

    Raises DataError where they do not prove that each sample came once: a gap, a repetition, a step
    that is missing, processes that disagree.
    """
    attempts = [_attempt(folder, number) for number in _numbers(folder)]
    first = attempts[0]
    steps: dict[int, NDArray[np.int64]] = {}
    sizes: dict[int, int] = {}
    for attempt in attempts:
        reached = max(steps, default=first.step)
        if not first.step <= attempt.step <= reached:
            raise DataError(
                f"audit '{folder}': an attempt begins after step {attempt.step}, those before it "
                f"gave steps {first.step + 1} to {reached}"
            )
        steps = {step: rows for step, rows in steps.items() if step <= attempt.step}
        steps |= attempt.steps
        sizes |= dict.fromkeys(attempt.steps, attempt.batch_size)
    position = first.position
    for number in range(first.step + 1, max(steps, default=first.step) + 1):
        if number not in steps:
            raise DataError(f"audit '{folder}': step {number} is missing")
        found = steps[number][:, 0]
        expected = np.arange(position, position + sizes[number])
        if not np.array_equal(found, expected):
            raise DataError(
                f"audit '{folder}': step {number} has samples {_brief(found)}, "
                f"expected {_brief(expected)}"
            )
        position += sizes[number]
    empty = np.zeros((0, len(COLUMNS)), dtype=np.int64)
    rows = np.concatenate([empty, *(steps[number] for number in sorted(steps))])
    _check_epochs(folder, rows, attempts[-1].samples)
    return rows


def compare(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[int, int]:
    """Of two runs, how many positions both have, and the first that differs or -1."""
    common, left, right = np.intersect1d(
        first[:, 0], second[:, 0], assume_unique=True, return_indices=True
    )
    differs = (first[left] != second[right]).any(axis=1)
    return len(common), int(common[np.argmax(differs)]) if differs.any() else -1


def _numbers(folder: Path) -> list[int]:
    numbers = sorted({int(path.name[:4]) for path in folder.glob("[0-9]*-rank-*.jsonl")})
    if not numbers:
        raise DataError(f"audit: '{folder}' has no logs", "train with log.audit=true")
    return numbers


def _attempt(folder: Path, number: int) -> Attempt:
    """The logs of all processes of an attempt, joined."""
    heads: list[dict[str, Any]] = []
    steps: dict[int, dict[int, list[list[int]]]] = {}
    """step -> reader -> rows"""
    for path in sorted(folder.glob(f"{number:04}-rank-*.jsonl")):
        lines = list(_lines(path))
        if not lines:
            continue  # killed before its first line
        head = lines[0]
        heads.append(head)
        for line in lines[1:]:
            readers = steps.setdefault(line["step"], {})
            if readers.setdefault(head["dp"], line["rows"]) != line["rows"]:
                raise DataError(
                    f"audit '{path}': at step {line['step']} processes of one row read different "
                    "samples"
                )
    if not heads:
        raise DataError(f"audit '{folder}': attempt {number} has no header")
    wanted = {head["dp"] for head in heads}
    joined = {}
    for step, readers in steps.items():
        if readers.keys() != wanted:
            continue  # some process was killed in this step, which is then not a whole one
        rows = [row for reader in readers.values() for row in reader]
        table = np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        joined[step] = table[np.argsort(table[:, 0], kind="stable")]
    samples = heads[0]["samples"]
    return Attempt(
        heads[0]["step"],
        heads[0]["position"],
        heads[0]["batch_size"],
        None if samples is None else tuple(samples),
        joined,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; the last one may be cut where a process was killed."""
    texts = path.read_text(errors="replace").split("\n")
    for number, text in enumerate(texts):
        if not text:
            continue
        try:
            line = json.loads(text)
            wanted = {"position", "batch_size", "dp", "samples"} if number == 0 else {"rows"}
            if not isinstance(line, dict) or not wanted | {"step"} <= line.keys():
                raise ValueError("fields")
        except ValueError:
            if number == len(texts) - 1:
                return
            raise DataError(f"audit '{path}': line {number + 1} is damaged") from None
        yield line


def _check_epochs(folder: Path, rows: NDArray[np.int64], samples: tuple[int, ...] | None) -> None:
    """No sample comes twice in an epoch, and all of a finished one come."""
    keys = rows[:, 1:]
    unique, counts = np.unique(keys, axis=0, return_counts=True)
    if (counts > 1).any():
        corpus, epoch, sample = unique[np.argmax(counts)].tolist()
        raise DataError(
            f"audit '{folder}': sample {sample} of corpus {corpus} came {counts.max()} times in "
            f"epoch {epoch}"
        )
    if samples is None or not len(rows) or rows[0, 0] != 0:
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
