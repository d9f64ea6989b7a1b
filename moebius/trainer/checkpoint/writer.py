"""One process's share of a checkpoint, written by a thread while the training goes on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread, get_native_id

import torch
from torch import Tensor

from moebius.errors import CheckpointError, MoebiusError
from moebius.trainer.checkpoint.commit import FileEntry
from moebius.trainer.checkpoint.files import BLOCK, Item, write_tensors, writing
from moebius.trainer.checkpoint.storage import Storage

ABANDON_SECONDS = 10.0
NICE = 10
"""the training goes first where there are too few cores for both"""


class AbandonedError(Exception):
    """The run ends; an unfinished checkpoint is of no use."""


@dataclass(frozen=True)
class Source:
    """A tensor to be written, and the file it belongs to."""

    file: str
    key: str
    tensor: Tensor
    """a view of the model's or the optimizer's values"""

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return self.tensor.numel() * self.tensor.element_size()


class Staging:
    """Copies in the host's memory, which are used again by every save."""

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, sources: Sequence[Source]) -> Mapping[tuple[str, str], Tensor]:
        """The copies of as many of the last sources as there is memory for, by file and key."""
        chosen = []
        left = self.max_bytes
        for source in reversed(sources):
            if left is not None:
                left -= source.num_bytes
                if left < 0:
                    break
            chosen.append(source)
        copies = {}
        for source in chosen:
            name = (source.file, source.key)
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != source.tensor.shape:
                pinned = source.tensor.is_cuda
                buffer = torch.empty(
                    source.tensor.shape, dtype=source.tensor.dtype, pin_memory=pinned
                )
            copies[name] = buffer.copy_(source.tensor, non_blocking=True)
        if any(source.tensor.is_cuda for source in chosen):
            torch.cuda.synchronize()
        self.buffers = copies
        return copies


class Writer:
    """Writes sources in their order; those that were not staged come first.

    Once it has `released` the model may be changed again. `phase` is told what is being done.
    """

    def __init__(
        self,
        storage: Storage,
        step: int,
        sources: Sequence[Source],
        staging: Staging,
        phase: Callable[[str], None],
    ) -> None:
        self.storage = storage
        self.step = step
        self.phase = phase
        self.entries: dict[str, FileEntry] = {}
        self.error: str | None = None
        """why it failed"""
        self.blocks = 0
        """written or read back so far: it is alive"""
        self._released = Event()
        self._abandoned = False
        phase("stage")
        copies = staging.copy(sources)
        if len(copies) == len(sources):
            self._released.set()
        self._files: dict[str, list[Item]] = {}
        for source in sources:
            copy = copies.get((source.file, source.key))
            value = partial(self._staged, copy) if copy is not None else partial(_live, source)
            item = Item(source.key, tuple(source.tensor.shape), source.tensor.dtype, value)
            self._files.setdefault(source.file, []).append(item)
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether files are still being written."""
        return self._thread.is_alive()

    @property
    def released(self) -> bool:
        """Whether what could not be staged is written."""
        return self._released.is_set()

    def wait(self, seconds: float) -> None:
        """Until all is written, or failed, but not longer."""
        self._thread.join(seconds)

    def abandon(self) -> None:
        """Stop writing; a disk that hangs is not waited for."""
        self._abandoned = True
        self._thread.join(ABANDON_SECONDS)

    def _staged(self, copy: Tensor) -> Tensor:
        self._released.set()  # all that was not staged has been written before
        return copy

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            with suppress(OSError):  # a sandbox may forbid it
                os.setpriority(os.PRIO_PROCESS, get_native_id(), NICE)
        try:
            for file, items in self._files.items():
                self.entries[file] = self._write(file, items)
        except AbandonedError:
            self.error = "abandoned"
        except MoebiusError as error:
            self.error = str(error)
        except Exception as error:
            self.error = f"checkpoint: {type(error).__name__}: {error}"
        finally:
            self._files = {}
            self._released.set()

    def _write(self, file: str, items: list[Item]) -> FileEntry:
        path = self.storage.scratch(self.step) / file
        try:
            with writing(path):
                self.phase("write")
            entry = write_tensors(path, items, self._go_on)
            check(path, entry, self._go_on)
            self.storage.add(self.step, file, self._go_on)
        except BaseException:
            with suppress(OSError):
                path.unlink(missing_ok=True)  # it may take much room
            raise
        return entry

    def _go_on(self) -> None:
        self.blocks += 1
        if self._abandoned:
            raise AbandonedError


def _live(source: Source) -> Tensor:
    return source.tensor


def check(path: Path, entry: FileEntry, went_on: Callable[[], None]) -> None:
    """Read a written file back, from the disk where the system allows it.

    Raises CheckpointError where it is not what was written.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(BLOCK):
            digest.update(block)
            went_on()
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(
            f"checkpoint: '{path}' does not hold what was written to it",
            "check the disk; the checkpoints of before are untouched",
        )
