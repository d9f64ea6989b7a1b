"""The mean of the weights of several checkpoints, as a checkpoint.

It has the files of the newest one: those of the model are written anew, a box of a tensor at a
time, the others are copied.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Container, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moebius.errors import CheckpointError
from moebius.files import sync
from moebius.parallel.part import Box, Chunk, Part
from moebius.trainer.checkpoint.commit import INDEX_NAME, RECORD_NAME, CommitRecord, FileEntry
from moebius.trainer.checkpoint.files import DTYPES, Item, write_tensors, writing
from moebius.trainer.checkpoint.loader import Checkpoint, files_of, reading, values
from moebius.trainer.checkpoint.plan import Index, check_index, key, reads, write_index
from moebius.trainer.checkpoint.storage import Storage
from moebius.trainer.checkpoint.writer import check


class OpenModel:
    """The model's files of a checkpoint, which stay open; a download lasts as long."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self.checkpoint = checkpoint
        self.files: dict[str, Any] = {}
        for file in files_of(checkpoint.record, ("model",)):
            with reading(checkpoint, file):
                at = checkpoint.storage.open(checkpoint.record.step, file)
                path = stack.enter_context(at)
                self.files[file] = stack.enter_context(safe_open(str(path), "pt"))

    def read(self, name: str, box: Box) -> Tensor:
        """A box of a tensor. Raises CheckpointError where a file lacks some of it."""
        index = self.checkpoint.index
        whole = torch.empty(box.sizes, dtype=DTYPES[index[name].dtype])
        part = Part(index[name].shape, whole.dtype, (Chunk(box, whole),), whole)
        for item in reads(index, {name: part}):
            with reading(self.checkpoint, item.file):
                whole[item.box.within(box)].copy_(values(self.files[item.file], item))
        return whole


def average(
    checkpoints: Sequence[Checkpoint],
    averaged: Container[str],
    record: CommitRecord,
    target: Storage,
) -> None:
    """Write a checkpoint with the mean of tensors that several sound ones have, the newest last.

    `averaged` are the names, as in an index, of parameters; integers among them and all other
    tensors are those of the newest. `record` is that of the new checkpoint but for its files.
    Raises CheckpointError where the checkpoints are not of one model, and what a disk says.
    """
    newest = checkpoints[-1]
    check_alike(checkpoints)
    target.begin(record.step)
    entries = {}
    with ExitStack() as stack:
        models = [OpenModel(checkpoint, stack) for checkpoint in checkpoints]
        for file, items in sorted(_items(newest.index, models, averaged).items()):
            path = target.scratch(record.step) / file
            entries[file] = write_tensors(path, items, _go_on)
            check(path, entries[file], _go_on)
            target.add(record.step, file, _go_on)
    for file in sorted(newest.record.files.keys() - entries.keys() - {INDEX_NAME}):
        entries[file] = newest.record.files[file]
        _copy(newest, file, target.scratch(record.step) / file)
        target.add(record.step, file, _go_on)
    text = write_index(newest.index)
    entries[INDEX_NAME] = FileEntry.of(text.encode())
    sealed = record.model_copy(update={"files": entries})
    target.commit(record.step, {INDEX_NAME: text, RECORD_NAME: sealed.text()})


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise CheckpointError where some are of another model than the last."""
    newest = checkpoints[-1]
    shapes = {
        name: entry.shape for name, entry in newest.index.items() if name.startswith("model/")
    }
    for checkpoint in checkpoints[:-1]:
        try:
            check_index(checkpoint.index, shapes, ("model",))
        except CheckpointError as error:
            raise CheckpointError(
                f"checkpoint '{checkpoint.name}' is of another model than '{newest.name}'; {error}",
                "choose steps between which the model was not changed",
            ) from None


def _items(
    index: Index, models: Sequence[OpenModel], averaged: Container[str]
) -> dict[str, list[Item]]:
    """What is to be written, by file."""
    files: dict[str, list[Item]] = defaultdict(list)
    for name, entry in index.items():
        if not name.startswith("model/"):
            continue
        dtype = DTYPES[entry.dtype]
        chosen = models if name in averaged and dtype.is_floating_point else models[-1:]
        for stored in entry.stored:
            box = stored.box
            value = partial(_mean, chosen, name, box)
            files[stored.file].append(Item(key(name, entry, box), box.sizes, dtype, value))
    return {
        file: sorted(items, key=lambda item: (-item.dtype.itemsize, item.key))
        for file, items in files.items()
    }


def _mean(models: Sequence[OpenModel], name: str, box: Box) -> Tensor:
    newest = models[-1].read(name, box)
    if len(models) == 1:
        return newest
    total = newest.double()
    for model in models[:-1]:
        total += model.read(name, box)
    return (total / len(models)).to(newest.dtype)


def _copy(checkpoint: Checkpoint, file: str, path: Path) -> None:
    """Copy a file and read it back. Raises CheckpointError where it is not what was committed."""
    with (
        reading(checkpoint, file),
        checkpoint.storage.open(checkpoint.record.step, file) as source,
        writing(path),
    ):
        shutil.copyfile(source, path)
        sync(path)
    check(path, checkpoint.record.files[file], _go_on)


def _go_on() -> None:
    """Nothing stops it."""
