"""Configuration of the corpus and of how it becomes batches."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moebius.config import ConfigNode, Problem


class StdlibSource(ConfigNode):
    """The source code of the running interpreter's standard library: real text on every machine."""

    kind: Literal["stdlib"] = "stdlib"


class FilesSource(ConfigNode):
    """Local files: .txt (one document each), .jsonl, .json or .parquet (one document per row)."""

    kind: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], Field(strict=False)]
    """files or glob patterns, relative to the working directory"""
    text_field: str = "text"
    """column that holds a document's text"""


class HubSource(ConfigNode):
    """A data set of the Hugging Face hub, streamed through `datasets`."""

    kind: Literal["hf"] = "hf"
    name: str
    """data set, for example HuggingFaceFW/fineweb-edu"""
    subset: str | None = None
    """configuration of the data set, where it has several"""
    split: str = "train"
    """split to read; validation documents are held out of it by hash"""
    text_field: str = "text"
    """column that holds a document's text"""
    max_documents: PositiveInt | None = None
    """stop after so many documents; null: all"""


class TokenizerConfig(ConfigNode):
    """A byte-level BPE trained on the corpus, or an existing tokenizer.json."""

    path: str | None = None
    """tokenizer.json to use; null: train one"""
    vocab_size: int | None = Field(None, ge=257)
    """size of a trained vocabulary; null: the model's `vocab_size`"""
    eod_token: str = "<|endoftext|>"
    """token that separates documents"""


class DataConfig(ConfigNode):
    """Corpus, tokenizer and shape of samples."""

    dir: str
    """folder of the prepared corpus; made from `source` unless a manifest is there"""
    source: Annotated[StdlibSource | FilesSource | HubSource, Field(discriminator="kind")] = (
        StdlibSource()
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: PositiveInt = 512
    """tokens of a sample"""
    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """share of the documents held out for validation, chosen by the hash of their id"""


def tokenizer_rules(data: DataConfig) -> Iterator[Problem]:
    """A tokenizer is either loaded or trained."""
    if data.tokenizer.path is not None and data.tokenizer.vocab_size is not None:
        yield Problem(
            "tokenizer.vocab_size",
            f"{data.tokenizer.vocab_size}, but tokenizer.path is given; "
            "the size of a loaded tokenizer is its own, remove one of the two",
        )


def source_rules(data: DataConfig) -> Iterator[Problem]:
    """Files must be named."""
    if isinstance(data.source, FilesSource) and not data.source.paths:
        yield Problem("source.paths", "empty; give at least one file or pattern")


DATA_RULES = (tokenizer_rules, source_rules)
