"""Prepared corpora as samples: a sample is some windows of consecutive tokens."""

import bisect
import hashlib
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moebius.data.config import CorpusConfig, DataConfig
from moebius.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    TokenizerEntry,
    read_manifest,
)
from moebius.data.order import permuted
from moebius.data.packing import Packing
from moebius.data.packing_file import load_packing
from moebius.data.shards import Shard
from moebius.data.storage import CacheConfig, Storage, open_storage
from moebius.errors import DataError

Windows = list[NDArray[np.int64]]
"""what a sample is made of: its labels are all tokens but the first of each window"""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus and where it lies."""

    storage: Storage
    manifest: Manifest

    @classmethod
    def open(cls, location: str, cache: CacheConfig | None = None) -> "Corpus":
        """The corpus of a folder or URL. Raises DataError where there is none."""
        storage = open_storage(location, cache or CacheConfig())
        if storage.is_remote:
            for name in (MANIFEST_NAME, TOKENIZER_NAME):
                storage.fetch(name, fresh=True)
        return cls(storage, read_manifest(storage.folder))


@dataclass(frozen=True)
class Corpora:
    """The corpora of a run, by name, all of one tokenizer; without a mixture it is one."""

    members: Mapping[str, Corpus]
    source: Mapping[str, object]
    """of a corpus that is streamed, what identifies it; else empty"""

    @property
    def first(self) -> Corpus:
        """The first of them."""
        return next(iter(self.members.values()))

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer of all."""
        return self.first.manifest.tokenizer

    @property
    def tokenizer_file(self) -> Path:
        """Its tokenizer.json."""
        return self.first.storage.folder / TOKENIZER_NAME

    @property
    def fingerprint(self) -> str:
        """A hash of tokenizer, tokens and names: what a model was trained on, wherever it lies."""
        if len(self.members) == 1 and not self.source:
            return self.first.manifest.fingerprint
        prints = {name: corpus.manifest.fingerprint for name, corpus in self.members.items()}
        return hashlib.sha256(json.dumps([prints, dict(self.source)]).encode()).hexdigest()


def corpus_locations(config: DataConfig) -> dict[str, tuple[str, CorpusConfig]]:
    """By name, where each corpus of a run lies and what it is made from; one has the name ''."""
    if not config.corpora:
        return {"": (config.dir, CorpusConfig(dir=config.dir, source=config.source))}
    return {
        name: (corpus.dir or f"{config.dir.rstrip('/')}/{name}", corpus)
        for name, corpus in config.corpora.items()
    }


def open_corpora(config: DataConfig) -> Corpora:
    """The prepared corpora of a run. Raises DataError where one is missing or damaged, or where
    their tokenizers differ."""
    members = {
        name: Corpus.open(location, config.cache)
        for name, (location, _) in corpus_locations(config).items()
    }
    streamed = config.source is not None and config.source.kind == "hf-stream"
    source = config.source.model_dump() if streamed and config.source is not None else {}
    corpora = Corpora(members, source)
    for name, corpus in members.items():
        if corpus.manifest.tokenizer != corpora.tokenizer:
            raise DataError(
                f"data.corpora.{name}: '{corpus.storage.folder}' was prepared with another "
                f"tokenizer than '{corpora.first.storage.folder}'",
                "prepare both with one data.tokenizer.path",
            )
    return corpora


class SplitReader:
    """One split of a corpus as samples of `sequence_length` labels.

    Packed by concat, the split is one text: neighbouring samples share one token, the last label
    of one is the first input of the next. Packed by best_fit, each shard is packed by itself.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        sequence_length: int,
        packing: str = "concat",
        quarantined: Collection[str] = (),
    ) -> None:
        """`quarantined`: names of shards that are not read; others stand in for their samples."""
        found = corpus.manifest.splits[split]
        self.storage = corpus.storage
        self.eod_id = corpus.manifest.tokenizer.eod_id
        vocab_size = corpus.manifest.tokenizer.vocab_size
        self.sequence_length = sequence_length
        self.shards = [Shard(corpus.storage, shard, vocab_size) for shard in found.shards]
        self.bad = [shard.entry.name in quarantined for shard in self.shards]
        if not corpus.storage.is_remote:
            for shard, bad in zip(self.shards, self.bad, strict=True):
                if not bad:
                    shard.check_present()
        self.tokens = [0, *itertools.accumulate(len(shard) for shard in self.shards)]
        """tokens before each shard, and all"""
        self.packed = packing == "best_fit"
        shares = [len(shard) // sequence_length for shard in self.shards]
        self.samples = [0, *itertools.accumulate(shares)]
        """packed samples before each shard, and all"""
        self.packings: dict[int, Packing] = {}
        count = self.samples[-1] if self.packed else (found.tokens - 1) // sequence_length
        self.num_samples = count
        if count < 1:
            raise DataError(
                f"data.sequence_length: {sequence_length}, but the {split} split in "
                f"'{corpus.storage.folder}' has only {found.tokens} tokens",
                "use shorter sequences or more text",
            )
        if self.count_substituted() == count:
            raise DataError(
                f"data: no sample of the {split} split in '{corpus.storage.folder}' is without "
                "damage",
                "fetch or prepare the corpus again",
            )

    def sample(self, number: int) -> Windows:
        """The windows of a sample. Raises DataError where a token is not the one prepared."""
        number = self.substitute(number)
        if not self.packed:
            start = number * self.sequence_length
            return [self._window(start, start + self.sequence_length + 1)]
        place = bisect.bisect_right(self.samples, number) - 1
        shard, packing = self._shard(place), self._packing(place)
        windows = []
        for start, length in packing.pieces(number - self.samples[place]):
            # The input of a document's first label is the end of the document before it.
            before = [] if start else [np.array([self.eod_id], dtype=np.int64)]
            tokens = shard.tokens(max(start - 1, 0), start + length)
            windows.append(np.concatenate([*before, tokens]))
        return windows

    def substitute(self, number: int) -> int:
        """The sample itself, or the one that stands in for it where it lies in a bad shard."""
        attempt, found = 0, number
        while self._touches_bad(found):
            attempt += 1
            found = permuted(number, self.num_samples, f"substitute/{attempt}")
        return found

    def count_substituted(self) -> int:
        """Samples that others stand in for."""
        if not any(self.bad):
            return 0
        length, is_bad = self.sequence_length, np.zeros(self.num_samples, dtype=np.bool_)
        for place in (place for place, bad in enumerate(self.bad) if bad):
            first, end = self.samples[place], self.samples[place + 1]
            if not self.packed:  # neighbours that reach into the shard are bad, too
                first = max(0, -(-(self.tokens[place] - length) // length))
                end = (self.tokens[place + 1] - 1) // length + 1
            is_bad[first:end] = True
        return int(is_bad.sum())

    def _touches_bad(self, number: int) -> bool:
        if not any(self.bad):
            return False
        if self.packed:
            return self.bad[bisect.bisect_right(self.samples, number) - 1]
        start = number * self.sequence_length
        first = bisect.bisect_right(self.tokens, start) - 1
        last = bisect.bisect_right(self.tokens, start + self.sequence_length) - 1
        return any(self.bad[first : last + 1])

    def _window(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens `start:end` of the split; they may span shards."""
        parts = []
        place = bisect.bisect_right(self.tokens, start) - 1
        while start < end:
            stop = min(end, self.tokens[place + 1])
            offset = self.tokens[place]
            parts.append(self._shard(place).tokens(start - offset, stop - offset))
            start, place = stop, place + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _shard(self, place: int) -> Shard:
        shard = self.shards[place]
        if self.storage.is_remote and not shard.is_open:
            # A file that has left the cache keeps its room on the disk while it is mapped.
            for other in self.shards:
                other.close_if_gone()
        return shard

    def _packing(self, place: int) -> Packing:
        if place not in self.packings:
            self.packings[place] = load_packing(self.shards[place], self.sequence_length)
        return self.packings[place]
