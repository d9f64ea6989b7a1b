"""Saving on all processes: who writes what, when a checkpoint is whole, which older ones go."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import chain

from moebius.errors import CheckpointError
from moebius.parallel.part import Parts
from moebius.parallel.together import WAIT_SECONDS, from_first, gathered, patiently, together
from moebius.parallel.world import agree, is_main, rank
from moebius.trainer.checkpoint.commit import INDEX_NAME, RECORD_NAME, CommitRecord, FileEntry
from moebius.trainer.checkpoint.files import BLOCK
from moebius.trainer.checkpoint.loader import open_checkpoint
from moebius.trainer.checkpoint.plan import (
    Index,
    file_name,
    key,
    listing,
    plan,
    total_bytes,
    write_index,
)
from moebius.trainer.checkpoint.retention import outdated
from moebius.trainer.checkpoint.storage import Storage
from moebius.trainer.checkpoint.writer import Source, Staging, Writer
from moebius.trainer.config import CheckpointConfig


class Saver:
    """Writes checkpoints while the training goes on. All methods but `abandon` and `writing` are
    collective calls.

    `begin` returns when the model may change again. `settle` waits until all have written and makes
    that a checkpoint; nobody waits once no process is `writing` any more. `phase` is told what is
    being done, and `alive` called while others are waited for.
    """

    def __init__(
        self,
        storage: Storage,
        config: CheckpointConfig,
        phase: Callable[[str], None] = lambda phase: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage = storage
        self.config = config
        budget = config.host_gigabytes
        # A block that is written and one that is read back need memory, too.
        self.staging = Staging(None if budget is None else round(budget * 1e9) - 2 * BLOCK)
        self.phase = phase
        self.alive = alive
        self._index: Index | None = None
        self._pending: tuple[CommitRecord, Index, Writer] | None = None

    @property
    def pending(self) -> bool:
        """Whether a save has begun that is not a checkpoint yet."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether this process still writes."""
        return self._pending is not None and self._pending[2].running

    def begin(self, record: CommitRecord, parts: Parts) -> None:
        """Save parts of the model and the optimizer; an earlier save is waited for.

        A checkpoint of that step that is already there stays: a run has one state per step.
        Raises CheckpointError where there is no room, and for a failure of the earlier save.
        """
        self.settle()
        steps = together(self.storage.steps, CheckpointError)
        if from_first(record.step in steps):
            return
        if self._index is None:  # it stays the same as long as the layout does
            self._index = plan(gathered(listing(parts)))
        index = self._index
        room = partial(self._make_room, record.step, total_bytes(index))
        patiently(room, CheckpointError, self.alive)
        writer = Writer(self.storage, record.step, sources(index, parts), self.staging, self.phase)
        self._pending = (record, index, writer)
        self._wait(writer, lambda: not writer.released)

    def _make_room(self, step: int, needed: int) -> None:
        if not is_main():
            return
        self.storage.begin(step)  # what is left of earlier attempts takes room too
        free = self.storage.free()
        if free is not None and free < needed:
            raise CheckpointError(
                f"checkpoint: {needed:,} bytes are needed in '{self.storage.location}', "
                f"{free:,} are free",
                "make room or name another checkpoint.dir; the checkpoints of before are untouched",
            )

    def settle(self) -> str:
        """Make what all processes have written a checkpoint; gives what went wrong beside it.

        Raises CheckpointError where one of them could not write.
        """
        if self._pending is None:
            return ""
        record, index, writer = self._pending
        self._wait(writer, lambda: writer.running)
        self._pending = None
        found: list[tuple[dict[str, FileEntry], str | None]] = gathered(
            (writer.entries, writer.error)
        )
        errors = [error for _, error in found if error]
        if errors:
            raise CheckpointError(errors[0])
        files = dict(chain.from_iterable(entries.items() for entries, _ in found))
        self.phase("commit")
        commit = partial(self._commit, record, index, files)
        return patiently(commit, CheckpointError, self.alive)

    def _commit(self, record: CommitRecord, index: Index, files: dict[str, FileEntry]) -> str:
        if not is_main():
            return ""
        text = write_index(index)
        entry = FileEntry.of(text.encode())
        sealed = record.model_copy(update={"files": files | {INDEX_NAME: entry}})
        self.storage.commit(record.step, {INDEX_NAME: text, RECORD_NAME: sealed.text()})
        self.phase("retain")
        try:
            self.retain()
        except CheckpointError as error:  # the new one is there all the same
            return str(error)
        return ""

    def amend(self, record: CommitRecord) -> None:
        """Change what is said of a checkpoint that is there, but for its files and evaluation."""
        together(lambda: self._amend(record), CheckpointError)

    def _amend(self, record: CommitRecord) -> None:
        if is_main():
            there = open_checkpoint(self.storage, record.step).record
            kept = {"files": there.files, "evaluation": there.evaluation}
            amended = record.model_copy(update=kept)
            self.storage.amend(record.step, RECORD_NAME, amended.text())

    def retain(self) -> list[int]:
        """Delete the checkpoints that are not to be kept, on one process; their steps."""
        config = self.config
        steps = self.storage.steps()
        losses = validation_losses(self.storage, steps) if config.keep_best else {}
        gone = outdated(steps, losses, config.keep, config.keep_every, config.keep_best)
        for step in gone:
            self.storage.remove(step)
        return gone

    def _wait(self, writer: Writer, busy: Callable[[], bool]) -> None:
        """Wait for the writers of all processes: together, for no collective waits long enough."""
        blocks = -1
        while agree(int(busy())):
            # Who waits for others is alive; so is who gets on.
            if not busy() or writer.blocks != blocks:
                self.alive()
            blocks = writer.blocks
            writer.wait(WAIT_SECONDS)

    def abandon(self) -> None:
        """Give a pending save up."""
        if self._pending is not None:
            self._pending[2].abandon()
            self._pending = None


def sources(index: Index, parts: Parts) -> list[Source]:
    """What this process writes, in the order of its files."""
    own_rank = rank()
    found = []
    for name, part in parts.items():
        entry = index[name]
        file = file_name(name.partition("/")[0], own_rank)
        own = {stored.box for stored in entry.stored if stored.file == file}
        found += [
            Source(file, key(name, entry, chunk.box), chunk.tensor)
            for chunk in part.chunks
            if chunk.box in own and chunk.box.numel
        ]
    return sorted(found, key=lambda s: (s.file, -s.tensor.element_size(), s.key))


def validation_losses(storage: Storage, steps: list[int]) -> dict[int, float]:
    """Those that checkpoints have; damaged ones have none."""
    losses = {}
    for step in steps:
        try:
            loss = CommitRecord.read(storage.text(step, RECORD_NAME)).evaluation
        except (OSError, ValueError, json.JSONDecodeError):
            continue
        if loss is not None:
            losses[step] = loss
    return losses
