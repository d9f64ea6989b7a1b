"""Text to token shards: documents -> tokenizer -> splits -> shards -> manifest, written last."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from moebius.data.config import DataConfig
from moebius.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Split,
    TokenizerEntry,
    read_manifest,
)
from moebius.data.shards import ShardWriter
from moebius.data.sources import Document, documents
from moebius.data.tokenizer import count_ids, eod_id, load_tokenizer, train_tokenizer
from moebius.errors import DataError
from moebius.files import file_sha256, write_whole

TOKENIZER_BYTES = 20_000_000
"""text a tokenizer is trained on; more changes a vocabulary of this size little"""
SHARD_TOKENS = 100_000_000
ENCODE_BATCH = 1000


def prepare(config: DataConfig, vocab_size: int, report: Callable[[str], None]) -> Manifest:
    """The manifest of the corpus in `config.dir`, which is made first where there is none.

    `vocab_size` is the model's: the size of a tokenizer to be trained unless the config sets one.
    Raises DataError where the folder holds a corpus made from another source or tokenizer.
    """
    folder = Path(config.dir)
    recipe = _recipe(config, vocab_size)
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder)
        for key, wanted in recipe.items():
            if manifest.recipe.get(key) != wanted:
                raise DataError(
                    f"data.{key}: '{folder}' was prepared with {manifest.recipe.get(key)}, "
                    f"this run asks for {wanted}",
                    "choose another data.dir or delete the folder",
                )
        return manifest

    folder.mkdir(parents=True, exist_ok=True)
    report(f"preparing corpus in {folder} from source '{config.source.kind}'")
    tokenizer = _tokenizer(config, vocab_size, folder)
    try:
        splits = _write_shards(config, tokenizer, folder)
    except OSError as error:
        raise DataError(f"data.dir: cannot write to '{folder}': {error.strerror}") from error
    for name, split in splits.items():
        report(f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens")
    manifest = Manifest(
        recipe=recipe,
        tokenizer=TokenizerEntry(
            sha256=file_sha256(folder / "tokenizer.json"),
            vocab_size=count_ids(tokenizer),
            eod_id=eod_id(tokenizer, config.tokenizer),
        ),
        splits=splits,
    )
    # A corpus without a manifest is an unfinished one: it is made again from the start.
    write_whole(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1))
    return manifest


def _recipe(config: DataConfig, vocab_size: int) -> dict[str, object]:
    """What determines the shards; compared, as JSON, with that of a folder found."""
    tokenizer = config.tokenizer.model_dump()
    if config.tokenizer.path is None and config.tokenizer.vocab_size is None:
        tokenizer["vocab_size"] = vocab_size
    recipe: dict[str, object] = json.loads(
        json.dumps(
            {
                "source": config.source.model_dump(),
                "tokenizer": tokenizer,
                "validation_fraction": config.validation_fraction,
            }
        )
    )
    return recipe


def _tokenizer(config: DataConfig, vocab_size: int, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if config.tokenizer.path is not None:
        _save(load_tokenizer(Path(config.tokenizer.path)), path)
    else:
        size = config.tokenizer.vocab_size or vocab_size
        texts = _up_to(TOKENIZER_BYTES, documents(config.source))
        _save(train_tokenizer(texts, size, config.tokenizer.eod_token), path)
    return load_tokenizer(path)


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


def _write_shards(config: DataConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, Split]:
    eod, num_ids = eod_id(tokenizer, config.tokenizer), count_ids(tokenizer)
    writers = {name: _SplitWriter(folder, name, num_ids) for name in ("train", "validation")}
    docs = (document for document in documents(config.source) if document.text)
    while batch := list(itertools.islice(docs, ENCODE_BATCH)):
        encodings = tokenizer.encode_batch_fast(
            [document.text for document in batch], add_special_tokens=False
        )
        for document, encoding in zip(batch, encodings, strict=True):
            held_out = is_validation(document.id, config.validation_fraction)
            writer = writers["validation" if held_out else "train"]
            writer.write([*encoding.ids, eod], len(document.text.encode()))
    splits = {name: writer.close() for name, writer in writers.items()}
    for name, split in splits.items():
        if split.documents == 0:
            total = sum(split.documents for split in splits.values())
            raise DataError(
                f"data.source: {total} documents with text in '{config.source.kind}' leave none "
                f"for the {name} split",
                "give more text or change data.validation_fraction"
                if total
                else "the corpus is empty",
            )
    return splits


class _SplitWriter:
    """Writes the documents of one split to shards of bounded size."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self.folder, self.name, self.vocab_size = folder, name, vocab_size
        self.num_bytes = 0
        self.shards: list[dict[str, object]] = []
        self.writer = self._open()

    def _open(self) -> ShardWriter:
        return ShardWriter(self.folder / f"{self.name}-{len(self.shards):05}", self.vocab_size)

    def write(self, ids: list[int], num_bytes: int) -> None:
        if self.writer.num_tokens >= SHARD_TOKENS:
            self.shards.append(self.writer.close())
            self.writer = self._open()
        self.writer.write(ids)
        self.num_bytes += num_bytes

    def close(self) -> Split:
        self.shards.append(self.writer.close())
        return Split.model_validate({"bytes": self.num_bytes, "shards": self.shards})
