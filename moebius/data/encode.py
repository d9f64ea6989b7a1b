"""Documents to token ids, by several processes, in the order of the source."""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moebius.data.config import TokensSource
from moebius.data.encoding import Encoder, build_encoder
from moebius.data.sources import Document, Documents
from moebius.data.token_files import token_documents
from moebius.data.tokenizer import load_tokenizer, token_bytes
from moebius.errors import DataError

BATCH_DOCUMENTS = 1000
BATCH_BYTES = 2_000_000
SMALL_BYTES = 16_000_000
"""text that is encoded before other processes would have started"""


class Item(NamedTuple):
    """A document as tokens."""

    id: str
    ids: NDArray[np.integer[Any]]
    """without an end-of-document token"""
    num_bytes: int
    """UTF-8 bytes of its text"""


class Encoded(NamedTuple):
    """Some documents of a source, one after the other."""

    items: list[Item]
    state: dict[str, Any]
    """of the source, after them"""
    read: int
    """documents that were read for them, those without text too"""


class Batch(NamedTuple):
    """Documents to be encoded at once."""

    documents: list[Document]
    state: dict[str, Any]
    read: int


def encoded(
    source: Documents, tokenizer_file: Path, processes: int, batch_bytes: int = BATCH_BYTES
) -> Iterator[Encoded]:
    """All documents of a source that have text. Raises DataError where one cannot be encoded."""
    batches = _batches(source, batch_bytes)
    size = source.num_bytes
    if processes == 1 or (size is not None and size < SMALL_BYTES):
        encoder = build_encoder(load_tokenizer(tokenizer_file))
        for batch in batches:
            yield Encoded(_encode(encoder, batch.documents), batch.state, batch.read)
        return
    # Spawned: a fork would copy locks that threads of libraries hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin) as pool:
        ahead: deque[tuple[Batch, Future[list[Item]]]] = deque()
        try:
            while True:
                for batch in itertools.islice(batches, 2 * processes - len(ahead)):
                    task = pool.submit(_encode_with, str(tokenizer_file), batch.documents)
                    ahead.append((batch._replace(documents=[]), task))
                if not ahead:
                    return
                batch, task = ahead.popleft()
                yield Encoded(task.result(), batch.state, batch.read)
        except BrokenProcessPool as error:
            raise DataError(
                "data: a process that encodes has died", "give it more memory or fewer processes"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encoded_tokens(
    source: TokensSource, tokenizer_file: Path, eod_id: int, start: int
) -> Iterator[Encoded]:
    """All documents of token files, from document `start` on."""
    lengths_V = token_bytes(load_tokenizer(tokenizer_file))
    found = token_documents(source.paths, source.dtype, eod_id, len(lengths_V), start)
    items, number, tokens = [], start, 0
    for document in found:
        number = document.number + 1
        items.append(Item(document.id, document.ids, int(lengths_V[document.ids].sum())))
        tokens += len(document.ids)
        if len(items) == BATCH_DOCUMENTS or tokens * 4 > BATCH_BYTES:
            yield Encoded(items, {"document": number}, len(items))
            items, tokens = [], 0
    if items:
        yield Encoded(items, {"document": number}, len(items))


def _batches(source: Documents, batch_bytes: int) -> Iterator[Batch]:
    found: list[Document] = []
    read = size = 0
    for document in source:
        read += 1
        if document.text:
            found.append(document)
            size += len(document.text)
        if len(found) == BATCH_DOCUMENTS or size >= batch_bytes:
            yield Batch(found, source.state(), read)
            found, read, size = [], 0, 0
    if read:
        yield Batch(found, source.state(), read)


def _begin() -> None:
    """The processes are as many as the cores, so each has one thread; and one that ends them with
    the main process, which may be killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@lru_cache(maxsize=1)
def _encoder(tokenizer_file: str) -> Encoder:
    """Of this process, which is given many batches."""
    return build_encoder(load_tokenizer(Path(tokenizer_file)))


def _encode_with(tokenizer_file: str, documents: list[Document]) -> list[Item]:
    return _encode(_encoder(tokenizer_file), documents)


def _encode(encoder: Encoder, documents: Iterable[Document]) -> list[Item]:
    documents = list(documents)
    texts = [document.text for document in documents]
    sizes = []
    for document in documents:
        try:
            sizes.append(len(document.text.encode()))
        except UnicodeEncodeError as error:
            raise DataError(
                f"data.source: the text of document '{document.id}' is not Unicode: "
                f"{error.reason} at character {error.start}",
                "remove it from the source",
            ) from None
    found = encoder.encode(texts)
    return [
        Item(document.id, ids, size)
        for document, ids, size in zip(documents, found, sizes, strict=True)
    ]
