"""Loading on all processes: verify, walk back to the newest sound checkpoint, read own parts."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moebius.errors import CheckpointError
from moebius.parallel.part import Parts
from moebius.parallel.together import from_first, gathered, patiently
from moebius.parallel.world import rank, world_size
from moebius.trainer.checkpoint.commit import INDEX_NAME, RECORD_NAME, CommitRecord
from moebius.trainer.checkpoint.plan import KINDS, Index, Read, read_index, reads
from moebius.trainer.checkpoint.storage import Storage, UnreachableError

DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO})
"""what a system says of files that are gone or damaged; anything else may pass"""
Refused = list[tuple[int, str]]
"""steps of checkpoints that were passed over, and why"""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose record and index have been read."""

    storage: Storage
    record: CommitRecord
    index: Index

    @property
    def name(self) -> str:
        """For messages."""
        return self.storage.name(self.record.step)


def open_checkpoint(storage: Storage, step: int) -> Checkpoint:
    """Raises CheckpointError where its record or its index is damaged or another step's."""
    name = storage.name(step)
    try:
        record = CommitRecord.read(storage.text(step, RECORD_NAME))
    except OSError as error:
        raise unreadable(name, RECORD_NAME, error) from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"checkpoint '{name}': no valid {RECORD_NAME}: {reason}") from None
    if record.step != step:
        raise CheckpointError(f"checkpoint '{name}': its {RECORD_NAME} is of step {record.step}")
    check_file(storage, record, INDEX_NAME)
    try:
        index = read_index(storage.text(step, INDEX_NAME))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint '{name}': no valid {INDEX_NAME}: {error}") from None
    for entry in index.values():
        for stored in entry.stored:
            if stored.file not in record.files:
                raise CheckpointError(f"checkpoint '{name}': {stored.file} was not committed")
    return Checkpoint(storage, record, index)


def unreadable(name: str, file: str, error: OSError) -> CheckpointError:
    """The error of a file that cannot be read: whether that is damage, or may pass."""
    text = f"checkpoint '{name}': no valid {file}: {error.strerror or error}"
    if error.errno in DAMAGE:
        return CheckpointError(text)
    return UnreachableError(text, "try again; nothing was changed")


def check_file(storage: Storage, record: CommitRecord, file: str) -> None:
    """Raise CheckpointError where a file is missing or differs in size or content."""
    name = storage.name(record.step)
    entry = record.files.get(file)
    if entry is None:
        raise CheckpointError(f"checkpoint '{name}': {file} was not committed")
    try:
        size, digest = storage.digest(record.step, file)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint '{name}': {file} is missing") from None
    except OSError as error:
        raise unreadable(name, file, error) from None
    if size != entry.size:
        raise CheckpointError(
            f"checkpoint '{name}': {file} has {size} bytes, {entry.size} were committed"
        )
    if digest != entry.sha256:
        raise CheckpointError(f"checkpoint '{name}': {file} was changed after its commit")


def verify(checkpoint: Checkpoint, files: Iterable[str]) -> None:
    """Raise CheckpointError for the first of some files that is damaged."""
    for file in files:
        check_file(checkpoint.storage, checkpoint.record, file)


def files_of(record: CommitRecord, kinds: Sequence[str]) -> list[str]:
    """Those that hold tensors of some kinds."""
    return [name for name in sorted(record.files) if name.partition("-")[0] in kinds]


def newest_sound(
    storage: Storage, steps: Sequence[int], alive: Callable[[], None] = lambda: None
) -> tuple[Checkpoint | None, Refused]:
    """The newest sound checkpoint of some steps, and those that were passed over; None where there
    are no steps. A collective call, in which each process verifies some of the files; `alive` is
    called while others do.

    Raises CheckpointError where there are checkpoints and none is sound, and UnreachableError where
    that cannot be told.
    """
    refused: Refused = []
    for step in sorted(from_first(list(steps)), reverse=True):
        found, reason = patiently(partial(_verified, storage, step), UnreachableError, alive)
        reasons = [text for text in gathered(reason) if text]
        if found is not None and not reasons:
            return found, refused
        refused.append((step, reasons[0]))
    if refused:
        raise CheckpointError(
            f"none of {len(refused)} checkpoints in '{storage.location}' is sound; {refused[0][1]}",
            "restore one, or choose another run_dir to begin anew",
        )
    return None, refused


def _verified(storage: Storage, step: int) -> tuple[Checkpoint | None, str]:
    """A checkpoint of which this process has verified its share, or why it is none."""
    try:
        found = open_checkpoint(storage, step)
        verify(found, files_of(found.record, KINDS)[rank() :: world_size()])
    except UnreachableError:
        raise
    except CheckpointError as error:
        return None, str(error)
    return found, ""


@torch.no_grad()
def fill(checkpoint: Checkpoint, parts: Parts, go_on: Callable[[], None] = lambda: None) -> None:
    """Copy saved values into the own parts, which all are in the index; `go_on` is called after
    each file.

    Raises CheckpointError where a file cannot be read or lacks something.
    """
    wanted: dict[str, list[Read]] = defaultdict(list)
    for read in reads(checkpoint.index, parts):
        wanted[read.file].append(read)
    for file, items in sorted(wanted.items()):
        with (
            reading(checkpoint, file),
            checkpoint.storage.open(checkpoint.record.step, file) as at,
        ):
            _copy(at, items, parts)
        go_on()


def _copy(path: object, items: Sequence[Read], parts: Parts) -> None:
    with safe_open(str(path), "pt") as file:
        for item in items:
            chunk = parts[item.name].chunks[item.chunk]
            target = chunk.tensor[item.box.within(chunk.box)]
            target.copy_(values(file, item))


def values(file: Any, item: Read) -> Tensor:
    """What is to be read of an open tensor file."""
    where = item.box.within(item.source)
    found: Tensor = file.get_slice(item.key)[where] if where else file.get_tensor(item.key)
    return found


@contextmanager
def reading(checkpoint: Checkpoint, file: str) -> Iterator[None]:
    """Turn what a tensor file cannot give into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint '{checkpoint.name}': {file}: {error}") from None
