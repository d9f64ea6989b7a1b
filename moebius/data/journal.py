"""How far a preparation has come: what a killed one goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from moebius.config import ConfigNode
from moebius.data.manifest import Sha256, ShardEntry, Split
from moebius.data.shards import ShardWriter
from moebius.files import file_sha256, seal, unseal, write_whole

JOURNAL_NAME = "progress.json"


class SplitProgress(ConfigNode):
    """One split: closed shards, and what has been flushed of the open one."""

    bytes: NonNegativeInt = 0
    shards: list[ShardEntry] = Field(default_factory=list)
    documents: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class Journal(ConfigNode):
    """The state of a preparation; everything it speaks of is on disk."""

    format: Literal[1] = 1
    recipe: dict[str, object]
    tokenizer_sha256: Sha256
    itemsize: Literal[2, 4]
    """bytes of a token"""
    documents: NonNegativeInt = 0
    """read from the source"""
    duplicates: NonNegativeInt = 0
    source: dict[str, Any] | None = None
    """state of the source's reader; null: its beginning"""
    splits: dict[str, SplitProgress] = Field(default_factory=dict)


def read_journal(folder: Path, recipe: dict[str, object], tokenizer: Path) -> Journal | None:
    """The journal of an unfinished preparation by the same recipe and tokenizer; None: there is
    none to go on from."""
    try:
        tree = unseal((folder / JOURNAL_NAME).read_bytes())
        found = Journal.model_validate_json(json.dumps(tree))
    except (OSError, ValueError):  # of which a ValidationError is one
        return None
    if found.recipe != recipe or not tokenizer.is_file():
        return None
    same = found.tokenizer_sha256 == file_sha256(tokenizer)
    return found if same and _is_on_disk(found, folder) else None


def write_journal(folder: Path, journal: Journal) -> None:
    """Replace the journal; the shards must be flushed."""
    write_whole(folder / JOURNAL_NAME, seal(journal.model_dump(mode="json")))


def clear(folder: Path) -> None:
    """Delete the shards of a preparation that is begun anew."""
    for kind in ("bin", "idx", "sums", "lengths"):
        for split in ("train", "validation"):
            for path in folder.glob(f"{split}-*.{kind}"):
                path.unlink()


def tidy(folder: Path, shards: Iterable[ShardEntry]) -> None:
    """Delete what is kept for shards until they are known to be closed."""
    for shard in shards:
        (folder / f"{shard.name}.lengths").unlink(missing_ok=True)


def _is_on_disk(journal: Journal, folder: Path) -> bool:
    """Whether the files that a journal speaks of are there, and those of open shards whole."""
    for name, split in journal.splits.items():
        if not all((folder / f"{shard.name}.bin").is_file() for shard in split.shards):
            return False
        if split.documents == 0:
            continue
        prefix = folder / shard_name(name, len(split.shards))
        lengths_path, tokens_path = prefix.with_suffix(".lengths"), prefix.with_suffix(".bin")
        if not (lengths_path.is_file() and tokens_path.is_file()):
            return False
        lengths = np.fromfile(lengths_path, dtype="<i4", count=split.documents)
        whole = len(lengths) == split.documents and lengths.sum(dtype=np.int64) == split.tokens
        size = split.tokens * journal.itemsize
        if not whole or lengths.min() < 1 or tokens_path.stat().st_size < size:
            return False
    return True


def shard_name(split: str, number: int) -> str:
    """Name of a shard of a split."""
    return f"{split}-{number:05}"


class SplitWriter:
    """Writes the documents of one split to shards of bounded size."""

    def __init__(
        self, folder: Path, name: str, vocab_size: int, progress: SplitProgress, shard_tokens: int
    ) -> None:
        self.folder, self.name, self.vocab_size = folder, name, vocab_size
        self.shard_tokens = shard_tokens
        self.num_bytes = progress.bytes
        self.shards = list(progress.shards)
        self.writer = self._open(progress.documents, progress.tokens)

    @property
    def num_documents(self) -> int:
        """Documents written."""
        return sum(shard.documents for shard in self.shards) + self.writer.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens written."""
        return sum(shard.tokens for shard in self.shards) + self.writer.num_tokens

    def write(self, ids: Any, num_bytes: int) -> None:
        """Append a document of token ids, which stand for so many bytes of text."""
        if self.writer.num_tokens >= self.shard_tokens:
            self.shards.append(self.writer.close())
            self.writer = self._open(0, 0)
        self.writer.write(ids)
        self.num_bytes += num_bytes

    def flush(self) -> SplitProgress:
        """Force everything to disk; returns how far that is."""
        documents, tokens = self.writer.flush()
        return SplitProgress(
            bytes=self.num_bytes, shards=self.shards, documents=documents, tokens=tokens
        )

    def close(self) -> Split:
        """Close the last shard, which must have documents."""
        self.shards.append(self.writer.close())
        return Split(bytes=self.num_bytes, shards=self.shards)

    def _open(self, documents: int, tokens: int) -> ShardWriter:
        prefix = self.folder / shard_name(self.name, len(self.shards))
        return ShardWriter(prefix, self.vocab_size, documents, tokens)
