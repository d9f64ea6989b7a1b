"""Tensor files of checkpoints: the safetensors format, written as a stream and hashed on the way.

The format (huggingface.co/docs/safetensors): eight bytes of length, a JSON header, then the values.
The library would need all tensors of a file in memory at once and a second pass for the hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moebius.errors import CheckpointError
from moebius.trainer.checkpoint.commit import FileEntry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 4 << 20
"""bytes that are written or read at a time"""


@dataclass(frozen=True)
class Item:
    """A tensor that is to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], Tensor]
    """asked for when its turn has come"""

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_tensors(path: Path, items: Iterable[Item], went_on: Callable[[], None]) -> FileEntry:
    """Write a file to disk and hash it; `went_on` is called after each block and may raise.

    Raises CheckpointError where the disk refuses.
    """
    items = list(items)
    digest = hashlib.sha256()
    with writing(path), path.open("wb") as file:
        for block in _blocks(items):
            file.write(block)
            digest.update(block)
            went_on()
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileEntry(size=size, sha256=digest.hexdigest())


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn what a disk says into one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: cannot write '{path}': {error.strerror or error}",
            "make room or name another checkpoint.dir; the checkpoints of before are untouched",
        ) from error


def _blocks(items: list[Item]) -> Iterator[memoryview]:
    header = {}
    end = 0
    for item in items:
        begin, end = end, end + item.num_bytes
        header[item.key] = {
            "dtype": NAMES[item.dtype],
            "shape": item.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for item in items:
        values = item.value().contiguous()
        values = values.as_strided((values.numel(),), (1,))  # one element may have any stride
        for piece in values.split(BLOCK // item.dtype.itemsize) if item.num_bytes else ():
            yield memoryview(piece.cpu().view(torch.uint8).numpy().data)
