"""The manifest of a prepared corpus: what made it and what it holds."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from moebius.config import ConfigNode
from moebius.errors import DataError

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
    shards: list[Shard]

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


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest. Raises DataError where it is damaged."""
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.dir: cannot read '{path}': {reason}", "delete the folder to rebuild"
        ) from error
