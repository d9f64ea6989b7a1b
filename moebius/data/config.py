"""Configuration of the corpus and of how it becomes batches."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from moebius.config import ConfigNode, Problem
from moebius.data.objective import CausalObjective, Objective, sentinels
from moebius.data.order import GlobalShuffle, Shuffle
from moebius.data.storage import CacheConfig


class StdlibSource(ConfigNode):
    """The source code of the running interpreter's standard library: real text on every machine."""

    kind: Literal["stdlib"] = "stdlib"


class FilesSource(ConfigNode):
    """Local files: .txt (one document each), .jsonl, .json, .parquet or .arrow (one document per
    row); all but the last two may be compressed (.gz, .bz2, .xz, .zst)."""

    kind: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], Field(strict=False)]
    """files or glob patterns, relative to the working directory"""
    text_field: str = "text"
    """column that holds a document's text"""
    id_field: str | None = None
    """column that holds a document's id, of documents with the same id the first is kept; null:
    file and row"""


class HubSource(ConfigNode):
    """A data set of the Hugging Face hub, or a folder in its layout, read through `datasets`."""

    kind: Literal["hf"] = "hf"
    name: str
    """data set, for example HuggingFaceFW/fineweb-edu"""
    subset: str | None = None
    """configuration of the data set, where it has several"""
    split: str = "train"
    """split to read; validation documents are held out of it by hash"""
    text_field: str = "text"
    """column that holds a document's text"""
    id_field: str | None = None
    """column that holds a document's id, of documents with the same id the first is kept; null:
    the row"""
    max_documents: PositiveInt | None = None
    """stop after so many documents; null: all"""
    streaming: bool = True
    """read it while it arrives; false: download it first"""


class HubStreamSource(ConfigNode):
    """A data set that is tokenized while training, without shards; only its validation split is
    written. Every process reads the whole stream."""

    kind: Literal["hf-stream"]
    name: str
    """data set, or a folder of files"""
    subset: str | None = None
    """configuration of the data set, where it has several"""
    split: str = "train"
    """split to read; validation documents are held out of it by hash"""
    text_field: str = "text"
    """column that holds a document's text"""


class TokensSource(ConfigNode):
    """Token files made by other tools: Megatron .bin with .idx, .npy, datatrove .ds, bare .bin."""

    kind: Literal["tokens"]
    paths: Annotated[tuple[str, ...], Field(strict=False)]
    """files or glob patterns, relative to the working directory"""
    dtype: Literal["uint16", "uint32", "int32"] | None = None
    """type of the tokens of a .bin without .idx"""


Source = Annotated[
    StdlibSource | FilesSource | HubSource | HubStreamSource | TokensSource,
    Field(discriminator="kind"),
]


class TokenizerConfig(ConfigNode):
    """A byte-level BPE trained on the corpus, or an existing tokenizer.json."""

    path: str | None = None
    """tokenizer.json to use; null: train one"""
    vocab_size: int | None = Field(None, ge=257)
    """size of a trained vocabulary; null: the model's `vocab_size`"""
    eod_token: str = "<|endoftext|>"
    """token that separates documents"""
    special_tokens: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """further tokens of a trained vocabulary that text is never encoded to, like the sentinels of
    an objective"""


class CorpusConfig(ConfigNode):
    """One corpus of a mixture."""

    dir: str | None = None
    """its folder, or the URL of one; null: the folder of its name in `data.dir`"""
    source: Source | None = None
    """what it is made from; null: it is there already"""


class MixturePhase(ConfigNode):
    """Shares of the corpora from some point of the run on."""

    from_tokens: NonNegativeInt = 0
    """tokens of the run after which the weights hold"""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """corpus -> share of the tokens, in any unit; a corpus that is not named has none"""


class DataConfig(ConfigNode):
    """Corpus, tokenizer and shape of samples."""

    dir: str
    """folder of the prepared corpus, or its URL; made from `source` unless a manifest is there"""
    source: Source | None = StdlibSource()
    """what the corpus is made from; null: it is there already"""
    corpora: dict[str, CorpusConfig] = Field(default_factory=dict)
    """several corpora instead of `source`, by name"""
    mixture: Annotated[tuple[MixturePhase, ...], Field(strict=False)] = ()
    """phases of the mixture of `corpora`; empty: in proportion to their tokens"""
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: PositiveInt = 512
    """tokens of a sample"""
    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """share of the documents held out for validation, chosen by the hash of their id"""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents one after the other, cut where a sample ends; best_fit: documents that fit
    are kept whole where possible (2404.10830); both fill every sample"""
    mask_documents: bool = True
    """documents of a sample do not see each other; false: one text, with positions that go on"""
    objective: Objective = CausalObjective()
    """what is predicted; validation is always causal"""
    shuffle: Shuffle = GlobalShuffle()
    """order of the samples of an epoch"""
    bad_shards: Literal["error", "quarantine"] = "error"
    """quarantine: verify all shards at the start, and take other samples for those of bad ones"""
    prefetch: PositiveInt = 2
    """batches that are made ready ahead"""
    workers: PositiveInt = 1
    """threads that make them"""
    cache: CacheConfig = CacheConfig()
    """local copies of what lies at URLs"""


def tokenizer_rules(data: DataConfig) -> Iterator[Problem]:
    """A tokenizer is either loaded or trained, and knows the sentinels of the objective."""
    tokenizer = data.tokenizer
    if tokenizer.path is not None and tokenizer.vocab_size is not None:
        yield Problem(
            "tokenizer.vocab_size",
            f"{tokenizer.vocab_size}, but tokenizer.path is given; "
            "the size of a loaded tokenizer is its own, remove one of the two",
        )
    if tokenizer.path is not None and tokenizer.special_tokens:
        yield Problem(
            "tokenizer.special_tokens",
            f"{list(tokenizer.special_tokens)}, but tokenizer.path is given; "
            "the tokens of a loaded tokenizer are its own",
        )
    names = [tokenizer.eod_token, *tokenizer.special_tokens]
    if len(set(names)) < len(names):
        yield Problem("tokenizer.special_tokens", f"{names} name a token twice")
    trained = tokenizer.path is None and (data.source is not None or bool(data.corpora))
    missing = [token for token in sentinels(data.objective) if token not in names]
    if trained and missing:
        yield Problem(
            "tokenizer.special_tokens",
            f"lacks {missing}, which data.objective needs; add them, the tokenizer is trained here",
        )


def source_rules(data: DataConfig) -> Iterator[Problem]:
    """Files must be named, token files need their tokenizer."""
    sources = {f"corpora.{name}.source": corpus.source for name, corpus in data.corpora.items()}
    for path, source in {"source": data.source, **sources}.items():
        if isinstance(source, FilesSource | TokensSource) and not source.paths:
            yield Problem(f"{path}.paths", "empty; give at least one file or pattern")
        if isinstance(source, TokensSource) and data.tokenizer.path is None:
            yield Problem(
                "tokenizer.path", f"null, but {path} is tokens already; name their tokenizer.json"
            )
        if source is not None and "://" in data.dir:
            yield Problem(
                path,
                f"given, but dir is '{data.dir}'; prepare in a local folder, upload it, and "
                f"then set {path}=null",
            )


def stream_rules(data: DataConfig) -> Iterator[Problem]:
    """What a corpus without shards cannot do."""
    for name, corpus in data.corpora.items():
        if isinstance(corpus.source, HubStreamSource):
            yield Problem(
                f"corpora.{name}.source.kind",
                "'hf-stream' cannot be mixed; prepare it, with kind 'hf'",
            )
    if not isinstance(data.source, HubStreamSource):
        return
    if isinstance(data.shuffle, GlobalShuffle):
        yield Problem(
            "shuffle.kind",
            "'global' needs all samples at hand, which an hf-stream does not have; allowed: "
            "{kind: blocks, block: 1024}, which shuffles so many among each other, or none",
        )
    if data.workers > 1:
        yield Problem("workers", f"{data.workers}, but an hf-stream is read by one; allowed: 1")
    if data.packing != "concat":
        yield Problem(
            "packing",
            f"'{data.packing}' needs the lengths of all documents, which an hf-stream does not "
            "have; allowed: concat, or prepare the corpus, with kind 'hf'",
        )


def mixture_rules(data: DataConfig) -> Iterator[Problem]:
    """Phases name corpora that there are, and follow each other."""
    if data.corpora and data.source not in (None, StdlibSource()):
        yield Problem("source", "given beside corpora; allowed: one of the two")
    for name in data.corpora:
        if not name.replace("-", "").replace("_", "").isalnum():
            yield Problem("corpora", f"'{name}' is no name; allowed: letters, digits, - and _")
    if data.mixture and not data.corpora:
        yield Problem("mixture", "given without corpora; name them, with their sources")
    starts = [phase.from_tokens for phase in data.mixture]
    if starts and (starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts))):
        yield Problem("mixture", f"from_tokens are {starts}; allowed: from 0 on, each later")
    for number, phase in enumerate(data.mixture):
        path = f"mixture.{number}.weights"
        unknown = sorted(phase.weights.keys() - data.corpora.keys())
        if unknown and data.corpora:
            yield Problem(path, f"{unknown} not in corpora; allowed: {list(data.corpora)}")
        if sum(phase.weights.values()) <= 0:
            yield Problem(path, f"{phase.weights} add to nothing; allowed: some above 0")


DATA_RULES = (tokenizer_rules, source_rules, stream_rules, mixture_rules)
