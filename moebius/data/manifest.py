"""The manifest of a prepared corpus: what made it and what it holds."""

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from moebius.config import ConfigNode
from moebius.errors import DataError
from moebius.files import file_sha256

MANIFEST_NAME = "manifest.json"


class Shard(ConfigNode):
    """One `.bin`/`.idx` pair."""

    name: str
    documents: int
    tokens: int
    sha256: str
    """of the .bin file"""


class Split(ConfigNode):
    """The shards of one split."""

    bytes: int
    """UTF-8 bytes of the text, for bits per byte"""
    shards: list[Shard] = Field(min_length=1)

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

    sha256: str
    vocab_size: int
    eod_id: int


class Manifest(ConfigNode):
    """Everything a reader of the shards needs to know."""

    format: Literal[1] = 1
    recipe: dict[str, object]
    """source and tokenizer settings that determine the shards"""
    tokenizer: TokenizerEntry
    splits: dict[str, Split]

    @model_validator(mode="after")
    def _has_both_splits(self) -> Self:
        if self.splits.keys() != {"train", "validation"}:
            raise ValueError("splits must be train and validation")
        return self

    @property
    def fingerprint(self) -> str:
        """A hash of tokenizer and tokens: what a model was trained on, wherever the folder is."""
        shards = [
            shard.sha256 for name in sorted(self.splits) for shard in self.splits[name].shards
        ]
        return hashlib.sha256("\n".join([self.tokenizer.sha256, *shards]).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check the tokenizer beside it.

    Raises DataError where there is no corpus, or a damaged one.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"data.dir: there is no prepared corpus in '{folder}'")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(
            f"data.dir: cannot read '{path}': {reason}", "delete the folder to rebuild"
        ) from error
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer.sha256:
        raise DataError(
            f"data.dir: '{tokenizer}' is missing or not the one the shards were made with",
            "delete the folder to rebuild",
        )
    return manifest
