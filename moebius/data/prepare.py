"""Text to token shards: documents -> tokenizer -> splits -> shards -> manifest, written last."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from moebius.data.config import (
    DataConfig,
    HubStreamSource,
    Source,
    TokenizerConfig,
    TokensSource,
)
from moebius.data.corpus import Corpora, Corpus, corpus_locations, open_corpora
from moebius.data.encode import Encoded, encoded, encoded_tokens
from moebius.data.journal import (
    JOURNAL_NAME,
    Journal,
    SplitProgress,
    SplitWriter,
    clear,
    read_journal,
    tidy,
    write_journal,
)
from moebius.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    Split,
    TokenizerEntry,
    read_manifest,
    write_manifest,
)
from moebius.data.seen import SEEN_NAME, SeenIds, delete_database
from moebius.data.shards import token_dtype
from moebius.data.sources import Document, Documents, documents
from moebius.data.tokenizer import count_ids, eod_id, load_tokenizer, train_tokenizer
from moebius.errors import DataError
from moebius.files import exclusive, file_sha256, write_whole

TOKENIZER_BYTES = 20_000_000
"""text a tokenizer is trained on; more changes a vocabulary of this size little"""
SHARD_TOKENS = 100_000_000
JOURNAL_SECONDS = 10.0
"""work that a killed preparation loses at most"""
STREAM_TOKENS = 100_000
"""validation tokens that are taken from the beginning of a corpus that is streamed"""


class Progress(Protocol):
    """Shows how far a preparation is."""

    def __call__(self, done: int, total: int | None) -> None:
        """`done` of about `total` bytes of text."""


def no_progress(done: int, total: int | None) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Workshop:
    """What a preparation works with."""

    report: Callable[[str], None]
    progress: Progress = no_progress
    processes: int = 1


def prepare(config: DataConfig, vocab_size: int, workshop: Workshop) -> Corpora:
    """The corpora of a run, which are made first where they are not there.

    `vocab_size` is the model's: the size of a tokenizer to be trained unless the config sets one.
    Raises DataError where a folder holds a corpus made from another source or tokenizer.
    """
    locations = corpus_locations(config)
    tokenizer = _common_tokenizer(config, vocab_size) if config.corpora else None
    for location, corpus in locations.values():
        if corpus.source is not None:
            prepare_corpus(config, corpus.source, Path(location), vocab_size, workshop, tokenizer)
    return open_corpora(config)


def prepare_corpus(
    config: DataConfig,
    source: Source,
    folder: Path,
    vocab_size: int,
    workshop: Workshop,
    tokenizer_file: Path | None = None,
) -> Manifest:
    """The manifest of the corpus in a folder, which is made first where there is none.

    A preparation that was killed goes on where it was. `tokenizer_file`: the tokenizer that
    corpora of a mixture share.
    """
    recipe = _recipe(config, source, vocab_size)
    if (folder / MANIFEST_NAME).exists():
        return _found(folder, recipe)
    with ExitStack() as stack:
        waiting = partial(workshop.report, f"another process prepares {folder}, waiting for it")
        try:
            stack.enter_context(exclusive(folder / "lock", waiting))
        except OSError as error:
            raise _unwritable(folder, error) from error
        if (folder / MANIFEST_NAME).exists():  # by the process that held the lock before
            return _found(folder, recipe)
        workshop.report(f"preparing corpus in {folder} from source '{source.kind}'")
        try:
            return _make(config, source, folder, recipe, vocab_size, workshop, tokenizer_file)
        except OSError as error:
            raise _unwritable(folder, error) from error


def _clean(folder: Path, manifest: Manifest) -> None:
    """Remove what a finished preparation needs no more; the journal last, which tells of the
    rest."""
    delete_database(folder / SEEN_NAME)
    for split in manifest.splits.values():
        tidy(folder, split.shards)
    (folder / JOURNAL_NAME).unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"data.dir: cannot write to '{folder}': {error.strerror or error}")


def _found(folder: Path, recipe: dict[str, object]) -> Manifest:
    """The corpus that is there. Raises DataError where another recipe has made it."""
    manifest = read_manifest(folder)
    for key, wanted in recipe.items():
        if manifest.recipe.get(key) != wanted:
            raise DataError(
                f"data.{key}: '{folder}' was prepared with {manifest.recipe.get(key)}, "
                f"this run asks for {wanted}",
                "choose another data.dir, delete the folder, or set data.source=null to take what "
                "is there",
            )
    if (folder / JOURNAL_NAME).exists():  # killed while it was cleaning up
        with suppress(OSError):
            _clean(folder, manifest)
    return manifest


def _recipe(config: DataConfig, source: Source, vocab_size: int) -> dict[str, object]:
    """What determines the shards; compared, as JSON, with that of a folder found."""
    tokenizer = config.tokenizer.model_dump()
    if config.tokenizer.path is None and config.tokenizer.vocab_size is None:
        tokenizer["vocab_size"] = vocab_size
    recipe: dict[str, object] = json.loads(
        json.dumps(
            {
                "source": source.model_dump(),
                "tokenizer": tokenizer,
                "validation_fraction": config.validation_fraction,
            }
        )
    )
    return recipe


def _make(
    config: DataConfig,
    source: Source,
    folder: Path,
    recipe: dict[str, object],
    vocab_size: int,
    workshop: Workshop,
    tokenizer_file: Path | None,
) -> Manifest:
    path = folder / TOKENIZER_NAME
    if tokenizer_file is not None:
        write_whole(path, tokenizer_file.read_text())
    journal = read_journal(folder, recipe, path)
    if journal is None:
        clear(folder)
        if tokenizer_file is None:
            make_tokenizer(config.tokenizer, [source], vocab_size, path)
        itemsize = token_dtype(count_ids(load_tokenizer(path))).itemsize
        journal = Journal(
            recipe=recipe,
            tokenizer_sha256=file_sha256(path),
            itemsize=2 if itemsize == 2 else 4,
        )
        write_journal(folder, journal)
    tokenizer = load_tokenizer(path)
    eod, num_ids = eod_id(tokenizer, config.tokenizer), count_ids(tokenizer)
    if journal.documents:
        workshop.report(f"  going on after {journal.documents:,} documents")
    splits, duplicates = _Shards(config, source, folder, journal, eod, num_ids).write(workshop)
    for name, split in splits.items():
        workshop.report(f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens")
    if duplicates:
        workshop.report(f"  {duplicates:,} documents left out: another one has their id")
    manifest = Manifest(
        recipe=recipe,
        tokenizer=TokenizerEntry(sha256=file_sha256(path), vocab_size=num_ids, eod_id=eod),
        dtype="uint16" if token_dtype(num_ids).itemsize == 2 else "int32",
        duplicates=duplicates,
        splits=splits,
    )
    # A corpus without a manifest is an unfinished one.
    write_manifest(folder, manifest)
    _clean(folder, manifest)
    return manifest


def make_tokenizer(
    config: TokenizerConfig, sources: Sequence[Source], vocab_size: int, path: Path
) -> None:
    """Write the tokenizer.json of a corpus: a given one, or one trained on the same amount of text
    of each source."""
    if config.path is not None:
        _save(load_tokenizer(Path(config.path)), path)
        return
    texts = itertools.chain.from_iterable(
        _up_to(TOKENIZER_BYTES // len(sources), documents(source))
        for source in sources
        if not isinstance(source, TokensSource)
    )
    size = config.vocab_size or vocab_size
    _save(train_tokenizer(texts, size, config.eod_token, config.special_tokens), path)


def _common_tokenizer(config: DataConfig, vocab_size: int) -> Path | None:
    """The tokenizer of all corpora of a mixture: that of one that is there, else a new one; None
    where all are there."""
    locations = corpus_locations(config).values()
    missing = [
        corpus.source
        for location, corpus in locations
        if corpus.source is not None and not (Path(location) / MANIFEST_NAME).exists()
    ]
    if not missing:
        return None
    if len(missing) < len(locations):
        there = next(
            location
            for location, corpus in locations
            if corpus.source is None or (Path(location) / MANIFEST_NAME).exists()
        )
        return Corpus.open(there, config.cache).storage.folder / TOKENIZER_NAME
    path = Path(config.dir) / TOKENIZER_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    make_tokenizer(config.tokenizer, missing, vocab_size, path)
    return path


def _save(tokenizer: Tokenizer, path: Path) -> None:
    try:
        tokenizer.save(str(path))
    except Exception as error:  # the library raises bare Exception, as for a full disk
        raise DataError(f"data.dir: cannot write '{path}': {error}") from error


def _up_to(num_bytes: int, docs: Iterable[Document]) -> Iterator[str]:
    for document in docs:
        if num_bytes <= 0:
            return
        num_bytes -= len(document.text.encode())
        yield document.text


def is_validation(document_id: str, fraction: float) -> bool:
    """Whether a document is held out: a pure function of its id."""
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class _Shards:
    """Writes the shards of a corpus, from where its journal says on."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        folder: Path,
        journal: Journal,
        eod: int,
        num_ids: int,
    ) -> None:
        self.source, self.folder, self.journal = source, folder, journal
        self.fraction, self.eod = config.validation_fraction, eod
        names = ["validation"] if isinstance(source, HubStreamSource) else ["train", "validation"]
        self.writers = {
            name: SplitWriter(
                folder, name, num_ids, journal.splits.get(name, SplitProgress()), SHARD_TOKENS
            )
            for name in names
        }
        self.documents, self.duplicates = journal.documents, journal.duplicates
        has_ids = getattr(source, "id_field", None) is not None
        self.seen = SeenIds(folder / SEEN_NAME, journal.documents) if has_ids else None

    def write(self, workshop: Workshop) -> tuple[dict[str, Split], int]:
        """The splits, and how many documents were left out as duplicates."""
        total = None
        if isinstance(self.source, TokensSource):
            start = int((self.journal.source or {}).get("document", 0))
            found = encoded_tokens(self.source, self.folder / TOKENIZER_NAME, self.eod, start)
        else:
            source = Documents(self.source, self.journal.source)
            total = source.num_bytes
            found = encoded(source, self.folder / TOKENIZER_NAME, workshop.processes)
        saved = time.monotonic()
        with closing(found):  # type: ignore[type-var]
            for batch in found:
                self._write(batch)
                workshop.progress(sum(w.num_bytes for w in self.writers.values()), total)
                if time.monotonic() - saved >= JOURNAL_SECONDS:
                    self._save(batch.state)
                    saved = time.monotonic()
                if self._is_enough():
                    break
        if self.seen is not None:
            self.seen.close()
        self._check_not_empty()
        return {name: writer.close() for name, writer in self.writers.items()}, self.duplicates

    def _write(self, batch: Encoded) -> None:
        for item in batch.items:
            if self.seen is not None and not self.seen.add(item.id, self.documents):
                self.duplicates += 1
                continue
            name = "validation" if is_validation(item.id, self.fraction) else "train"
            if name in self.writers:
                self.writers[name].write(np.append(item.ids, self.eod), item.num_bytes)
        self.documents += batch.read

    def _save(self, state: dict[str, Any]) -> None:
        """Note in the journal what is on disk."""
        if self.seen is not None:
            self.seen.commit()
        progress = {name: writer.flush() for name, writer in self.writers.items()}
        changes = {
            "documents": self.documents,
            "duplicates": self.duplicates,
            "source": state,
            "splits": progress,
        }
        write_journal(self.folder, self.journal.model_copy(update=changes))
        for writer in self.writers.values():
            tidy(self.folder, writer.shards)

    def _is_enough(self) -> bool:
        """Of a corpus that is streamed, some held-out documents are taken."""
        return (
            "train" not in self.writers and self.writers["validation"].num_tokens >= STREAM_TOKENS
        )

    def _check_not_empty(self) -> None:
        total = sum(writer.num_documents for writer in self.writers.values())
        for name, writer in self.writers.items():
            if writer.num_documents == 0:
                raise DataError(
                    f"data.source: {total} documents with text in '{self.source.kind}' leave none "
                    f"for the {name} split",
                    "give more text or change data.validation_fraction"
                    if total
                    else "the corpus is empty",
                )
