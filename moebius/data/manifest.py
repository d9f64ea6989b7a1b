"""The manifest of a prepared corpus: what made it and what it holds."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from moebius.config import ConfigNode
from moebius.errors import DataError
from moebius.files import file_sha256, seal, unseal, write_whole

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
Count = Annotated[int, Field(gt=0, lt=2**48)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(ConfigNode):
    """One shard: the files `<name>.bin`, `<name>.idx` and `<name>.sums`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)
    documents: Count
    tokens: Count
    sha256: Sha256
    """of the .bin file"""
    index_sha256: Sha256
    """of the .idx file"""
    sums_sha256: Sha256
    """of the .sums file"""


class Split(ConfigNode):
    """The shards of one split."""

    bytes: Annotated[NonNegativeInt, Field(lt=2**62)]
    """UTF-8 bytes of the text, for bits per byte"""
    shards: list[ShardEntry] = Field(min_length=1)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards, end-of-document tokens included."""
        return sum(shard.tokens for shard in self.shards)


class TokenizerEntry(ConfigNode):
    """The tokenizer.json beside the manifest."""

    sha256: Sha256
    vocab_size: PositiveInt
    eod_id: NonNegativeInt

    @model_validator(mode="after")
    def _has_its_end(self) -> Self:
        if self.eod_id >= self.vocab_size:
            raise ValueError(f"eod_id {self.eod_id} is not below vocab_size {self.vocab_size}")
        return self


class Manifest(ConfigNode):
    """Everything a reader of the shards needs to know."""

    format: Literal[2] = 2
    recipe: dict[str, object]
    """source and tokenizer settings that determine the shards"""
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "int32"]
    """type of the tokens in the shards"""
    duplicates: NonNegativeInt = 0
    """documents left out because another one has their id"""
    splits: dict[str, Split]
    """train, unless it is streamed, and validation"""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not {"validation"} <= self.splits.keys() <= {"train", "validation"}:
            raise ValueError("splits must be train and validation")
        if self.dtype != ("uint16" if self.tokenizer.vocab_size <= 2**16 else "int32"):
            raise ValueError(f"dtype {self.dtype} is not that of the vocabulary")
        return self

    @property
    def fingerprint(self) -> str:
        """A hash of tokenizer and tokens: what a model was trained on, wherever the folder is."""
        shards = [
            shard.sha256 for name in sorted(self.splits) for shard in self.splits[name].shards
        ]
        return hashlib.sha256("\n".join([self.tokenizer.sha256, *shards]).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a folder of shards a corpus."""
    write_whole(folder / MANIFEST_NAME, seal(manifest.model_dump(mode="json")))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise DataError where a file cannot be read, for want of permission or a good disk."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data: cannot read '{path}': {error.strerror or error}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check the tokenizer beside it.

    Raises DataError where there is no corpus, or a damaged one.
    """
    path = folder / MANIFEST_NAME
    with readable(path):
        there = path.is_file()
    if not there:
        raise DataError(
            f"data.dir: there is no prepared corpus in '{folder}'", "make it with moebius prepare"
        )
    try:
        # Through JSON again: only there a tuple of the model is a list.
        manifest = Manifest.model_validate_json(json.dumps(unseal(path.read_bytes())))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(
            f"data.dir: cannot read '{path}': {reason}", "delete the folder to rebuild"
        ) from error
    tokenizer = folder / TOKENIZER_NAME
    with readable(tokenizer):
        same = tokenizer.is_file() and file_sha256(tokenizer) == manifest.tokenizer.sha256
    if not same:
        raise DataError(
            f"data.dir: '{tokenizer}' is missing or not the one the shards were made with",
            "delete the folder to rebuild",
        )
    return manifest
