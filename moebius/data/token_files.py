"""Documents from token files that other tools made.

- `X.bin` with `X.idx`: Megatron; the layout is in `moebius.data.shards`.
- `X.ds` with `X.ds.index`: datatrove. `.ds` is the tokens, u16 or u32, without header; `.ds.index`
  is the u64 end of each document, in tokens; `.ds.metadata`, where it exists, is text whose first
  line is `tokenizer|bytes of a token` and whose second line is the number of tokens.
- `X.npy`: an array of NumPy. Documents end at the end-of-document id.
- `X.bin` alone: tokens without header. Documents end at the end-of-document id.

All numbers are little endian; `.npy` names its own order.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moebius.data.shards import HEADER, MAGIC
from moebius.data.sources import matching
from moebius.errors import DataError

Tokens = NDArray[np.integer[Any]]

SUFFIXES = (".bin", ".npy", ".ds")
HEADERLESS_DTYPES = {"uint16": "<u2", "uint32": "<u4", "int32": "<i4"}
MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
DATATROVE_DTYPES = {2: "<u2", 4: "<u4"}
CHUNK = 2**21
"""numbers that are looked at together: what a file costs in memory besides one document"""


class TokenDocument(NamedTuple):
    """The tokens of a document, with an identity that does not depend on the machine."""

    id: str
    """file and number of the document in it; documents without tokens count"""
    ids: NDArray[np.uint32]
    """without the end-of-document token at its end"""
    number: int
    """among the documents of all files"""


class _Run(NamedTuple):
    """Adjacent tokens of a file."""

    tokens: Tokens
    ends: NDArray[np.int64]
    """the file's own borders among them, the last at their end"""


def token_documents(
    paths: Sequence[str], dtype: str | None, eod_id: int, vocab_size: int, start: int = 0
) -> Iterator[TokenDocument]:
    """Documents of the files that the patterns match, from document number `start` of the whole on.

    A document ends where its file's index says and at every `eod_id`. Documents without tokens are
    left out, but they have a number. Those before `start` are only searched for `eod_id`. `dtype`
    is the token type of `.bin` files without `.idx`. Raises DataError for anything unreadable.
    """
    return _documents(paths, dtype, eod_id, vocab_size, start, CHUNK)


def _documents(
    paths: Sequence[str], dtype: str | None, eod_id: int, vocab_size: int, start: int, chunk: int
) -> Iterator[TokenDocument]:
    before = 0
    for path, name in _files(paths):
        number = 0
        for run in _runs(path, dtype, eod_id, chunk):
            begins, ends = _cut(run, eod_id)
            first = max(0, start - before - number)
            if first < len(begins):
                _check_ids(run.tokens, begins, first, number, path, vocab_size)
            bounds = zip(begins[first:].tolist(), ends[first:].tolist(), strict=True)
            for at, (begin, end) in enumerate(bounds, number + first):
                if begin < end:
                    ids = run.tokens[begin:end].astype(np.uint32)
                    yield TokenDocument(f"{name}:{at}", ids, before + at)
            number += len(begins)
        before += number


def _cut(run: _Run, eod_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the documents of a run begin and end, without the `eod_id` that closes them."""
    eods = np.flatnonzero(run.tokens == eod_id)
    # A border of the file right behind an `eod_id` is the same border, but not if it closes a
    # document without any token.
    doubled = (np.diff(run.ends, prepend=0) > 0) & np.isin(run.ends, eods + 1)
    borders = run.ends[~doubled]
    nexts = np.concatenate([eods + 1, borders])
    order = np.argsort(nexts, kind="stable")
    begins = np.concatenate([[0], nexts[order][:-1]])
    return begins, np.concatenate([eods, borders])[order]


def _check_ids(
    tokens: Tokens, begins: Tokens, first: int, number: int, path: Path, vocab_size: int
) -> None:
    """Refuse ids of documents from the `first` of the run on; the run's first is `number`."""
    # As unsigned numbers, negative ids are too large as well.
    unsigned = tokens.view(tokens.dtype.str.replace("i", "u"))
    bad = np.flatnonzero(unsigned[begins[first] :] >= vocab_size)
    if not bad.size:
        return
    found = begins[first] + bad[0]
    at = int(np.searchsorted(begins, found, "right")) - 1
    raise DataError(
        f"data.source.paths: '{path}' document {number + at} has id {tokens[found]} at "
        f"position {found - begins[at]}, allowed: 0 to {vocab_size - 1}",
        "was it made with another tokenizer, or with another token type?",
    )


def _files(patterns: Sequence[str]) -> list[tuple[Path, str]]:
    if not patterns:
        raise DataError("data.source.paths is empty", "name the token files")
    files = matching(tuple(patterns))
    for path, _ in files:
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"data.source.paths: '{path}' is none of {', '.join(SUFFIXES)}",
                "name the token files only, like 'folder/*.bin': an index is found beside its file",
            )
    return files


def _runs(path: Path, dtype: str | None, eod_id: int, chunk: int) -> Iterator[_Run]:
    """All tokens of a file in their order. No run is longer than a chunk and one document."""
    if path.suffix == ".ds":
        return _datatrove(path, eod_id, chunk)
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        return _megatron(path, eod_id, chunk)
    tokens = _numpy(path) if path.suffix == ".npy" else _headerless(path, dtype)
    return _runs_between_eods(tokens, eod_id, chunk)


def _runs_between_eods(tokens: Tokens, eod_id: int, chunk: int) -> Iterator[_Run]:
    begin = 0
    for low in range(0, len(tokens), chunk):
        eods = np.flatnonzero(tokens[low : low + chunk] == eod_id)
        if eods.size:
            end = low + int(eods[-1]) + 1
            yield _Run(tokens[begin:end], np.array([end - begin]))
            begin = end
    if begin < len(tokens):
        yield _Run(tokens[begin:], np.array([len(tokens) - begin]))


def _runs_between_borders(
    tokens: Tokens, blocks: Iterable[NDArray[np.int64]], eod_id: int, chunk: int
) -> Iterator[_Run]:
    """Runs of as many documents as fit a chunk; `blocks` are the ends of all documents."""
    begin = 0
    for ends in blocks:
        first = 0
        while first < len(ends):
            last = int(np.searchsorted(ends, begin + chunk, "right"))
            if last > first:
                yield _Run(tokens[begin : ends[last - 1]], ends[first:last] - begin)
            else:  # larger than a chunk; may be many documents packed into one
                last = first + 1
                yield from _runs_between_eods(tokens[begin : ends[first]], eod_id, chunk)
            begin, first = int(ends[last - 1]), last


def _megatron(path: Path, eod_id: int, chunk: int) -> Iterator[_Run]:
    index = path.with_suffix(".idx")
    raw = _map(index, "|u1")
    dtype, count, borders_count = _megatron_header(index, raw)
    at = list(itertools.accumulate((HEADER.size, 4 * count, 8 * count, 8 * borders_count)))
    lengths, pointers, borders = (
        raw[low:high].view(kind)
        for (low, high), kind in zip(itertools.pairwise(at), ("<i4", "<i8", "<i8"), strict=True)
    )
    tokens = _map(path, dtype.str)
    _check_pointers(path, lengths, pointers, tokens, chunk)
    _check_order(index, borders, chunk)
    if borders[0] != 0 or borders[-1] != count:
        raise DataError(
            f"data.source.paths: documents of '{index}' are sequences {borders[0]} to "
            f"{borders[-1]}, allowed: 0 to {count}",
            "make the index again",
        )
    if not _adjacent(lengths, pointers, dtype.itemsize, chunk):
        return _scattered(path, tokens, lengths, pointers, borders, chunk)
    begin = int(pointers[0]) // dtype.itemsize if count else 0
    ends = _adjacent_ends(lengths, pointers, borders, dtype.itemsize, chunk)
    return _runs_between_borders(tokens[begin:], ends, eod_id, chunk)


def _adjacent(lengths: Tokens, pointers: Tokens, itemsize: int, chunk: int) -> bool:
    """Whether every sequence begins where the one before it ends."""
    for low in range(0, len(lengths), chunk):
        pointer = pointers[low : low + chunk + 1]
        length = lengths[low : low + len(pointer) - 1].astype(np.int64)
        if (pointer[1:] != pointer[:-1] + length * itemsize).any():
            return False
    return True


def _adjacent_ends(
    lengths: Tokens, pointers: Tokens, borders: Tokens, itemsize: int, chunk: int
) -> Iterator[NDArray[np.int64]]:
    """Ends of the documents, in tokens behind the begin of the first sequence."""
    for low in range(1, len(borders), chunk):
        border = borders[low : low + chunk]
        ends = np.zeros(len(border), np.int64)
        last = border[border > 0] - 1
        ends[border > 0] = (pointers[last] - pointers[:1]) // itemsize + lengths[last]
        yield ends


def _scattered(
    path: Path, tokens: Tokens, lengths: Tokens, pointers: Tokens, borders: Tokens, chunk: int
) -> Iterator[_Run]:
    """Each document by itself, put together from its sequences."""
    for number, (first, last) in enumerate(itertools.pairwise(_integers(borders, chunk))):
        begins = pointers[first:last] // tokens.itemsize
        ends = begins + lengths[first:last]
        size = int((ends - begins).sum())
        if size > len(tokens):  # sequences may overlap, but a damaged index must not cost memory
            raise DataError(
                f"data.source.paths: document {number} of '{path}' has {size} tokens by its .idx, "
                f"the file has {len(tokens)}",
                "make the index again",
            )
        parts = [tokens[begin:end] for begin, end in zip(begins, ends, strict=True)]
        yield _Run(np.concatenate([tokens[:0], *parts]), np.array([size]))


def _megatron_header(index: Path, raw: Tokens) -> tuple[np.dtype[Any], int, int]:
    """Token type, number of sequences, number of document borders; the sizes fit the file."""
    head = raw[: HEADER.size].tobytes()
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(
            f"data.source.paths: '{index}' is no Megatron index",
            "if its .bin has no header and no index, move the .idx away and set data.source.dtype",
        )
    _, version, code, count, borders = HEADER.unpack(head)
    if version != 1 or code not in MEGATRON_DTYPES:
        raise DataError(
            f"data.source.paths: '{index}' has version {version} and token type {code}, allowed: 1 "
            f"and one of {list(MEGATRON_DTYPES)}",
            "damaged, or another layout: make it again with Megatron",
        )
    expected = HEADER.size + 12 * count + 8 * borders
    if borders == 0 or len(raw) != expected:
        modes = len(raw) == expected + count and count > 0
        raise DataError(
            f"data.source.paths: '{index}' has {len(raw)} bytes, its header says {expected} for "
            f"{count} sequences and {borders} document borders",
            "multimodal sets are not read" if modes else "copy or make the index again",
        )
    return np.dtype(MEGATRON_DTYPES[code]), count, borders


def _check_pointers(
    path: Path, lengths: Tokens, pointers: Tokens, tokens: Tokens, chunk: int
) -> None:
    size, itemsize = tokens.nbytes, tokens.itemsize
    for low in range(0, len(lengths), chunk):
        length, pointer = lengths[low : low + chunk], pointers[low : low + chunk]
        outside = (length < 0) | (pointer < 0) | (length > (size - pointer) // itemsize)
        bad = np.flatnonzero(outside | (pointer % itemsize != 0))
        if bad.size:
            raise DataError(
                f"data.source.paths: sequence {low + bad[0]} of '{path}' has {length[bad[0]]} "
                f"tokens from byte {pointer[bad[0]]} on; allowed: whole tokens of {itemsize} bytes "
                f"within the file's {size}",
                "truncated, or the index is that of another file: copy both again",
            )


def _datatrove(path: Path, eod_id: int, chunk: int) -> Iterator[_Run]:
    index = path.with_name(f"{path.name}.index")
    if not index.exists():
        raise DataError(
            f"data.source.paths: '{path}' has no '{index.name}' beside it",
            "copy it, or rename the tokens to .bin and set data.source.dtype",
        )
    ends = _map(index, "<u8")
    _check_order(index, ends, chunk)
    total = int(ends[-1]) if len(ends) else 0
    raw = _map(path, "|u1")
    size = _token_size(path, len(raw), total)
    if len(raw) != size * total:
        raise DataError(
            f"data.source.paths: '{path}' has {len(raw)} bytes, its index says {total} tokens of "
            f"{size}",
            "truncated, or the index is that of another file: copy both again",
        )
    blocks = (ends[low : low + chunk].astype(np.int64) for low in range(0, len(ends), chunk))
    return _runs_between_borders(raw.view(DATATROVE_DTYPES[size]), blocks, eod_id, chunk)


def _token_size(path: Path, file_size: int, total: int) -> int:
    """Bytes of a token: as the metadata says, else as the file has them for each of `total`."""
    metadata = path.with_name(f"{path.name}.metadata")
    name, count = _head(metadata) if metadata.exists() else ("", str(total))
    if count != str(total):
        raise DataError(
            f"data.source.paths: '{metadata}' says {count[:20]!r} tokens, the index says {total}",
            "copy both again, or delete the metadata if the index is right",
        )
    _, named, size = name.rpartition("|")
    if named:
        sizes = [known for known in DATATROVE_DTYPES if str(known) == size]
        found = f"'{metadata}' has token size {size[:20]!r}"
    else:  # datatrove once named only the tokenizer
        sizes = [known for known in DATATROVE_DTYPES if known * total == file_size]
        found = f"'{path}' has {file_size} bytes for the {total} tokens of its index"
    if not sizes:
        raise DataError(
            f"data.source.paths: {found}, allowed: {list(DATATROVE_DTYPES)} bytes a token",
            "truncated, or made by another tool: copy its files again",
        )
    return sizes[0]


def _numpy(path: Path) -> Tokens:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header is whatever Python makes of its text
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.source.paths: cannot read '{path}': {reason}",
            "np.save a 1-D array of integers, or name a file without NumPy's header .bin",
        ) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"data.source.paths: '{path}' is a {tokens.ndim}-D array of {tokens.dtype}, allowed: "
            "1-D, integers",
            "save the documents' ids in a row, the end-of-document id after each",
        )
    size, expected = path.stat().st_size, tokens.offset + tokens.nbytes
    if size != expected:
        raise DataError(
            f"data.source.paths: '{path}' has {size} bytes, its header says {expected}",
            "copy or make it again",
        )
    return np.asarray(tokens)


def _headerless(path: Path, dtype: str | None) -> Tokens:
    if dtype not in HEADERLESS_DTYPES:
        raise DataError(
            f"data.source.dtype is {dtype or 'not set'}, but '{path}' has no .idx beside it that "
            "names the type of its tokens",
            f"copy the .idx, or set one of {', '.join(HEADERLESS_DTYPES)}",
        )
    return _map(path, HEADERLESS_DTYPES[dtype])


def _map(path: Path, dtype: str) -> Tokens:
    """A file of numbers, mapped."""
    try:
        size, itemsize = path.stat().st_size, np.dtype(dtype).itemsize
        if size == 0 and path.is_file():  # nothing to map
            return np.empty(0, dtype)
        if size % itemsize == 0:
            # A plain array: slices of np.memmap cost several times as much.
            return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise DataError(f"data.source.paths: cannot read '{path}': {error.strerror}") from error
    raise DataError(
        f"data.source.paths: '{path}' has {size} bytes, no multiple of {itemsize}",
        "truncated, or its numbers have another type",
    )


def _head(path: Path) -> tuple[str, str]:
    """The first two lines of a text, however long or damaged it is."""
    try:
        with path.open("rb") as file:
            first, second, *_ = [*file.read(4096).decode("utf-8", "replace").splitlines(), "", ""]
    except OSError as error:
        raise DataError(f"data.source.paths: cannot read '{path}': {error.strerror}") from error
    return first, second


def _check_order(index: Path, values: Tokens, chunk: int) -> None:
    for low in range(0, len(values), chunk):
        block = values[low : low + chunk + 1]
        bad = np.flatnonzero(block[1:] < block[:-1])
        if bad.size:
            raise DataError(
                f"data.source.paths: document border {low + bad[0] + 1} of '{index}' is "
                f"{block[bad[0] + 1]}, after {block[bad[0]]}; allowed: no smaller than that",
                "copy or make the index again",
            )


def _integers(values: Tokens, chunk: int) -> Iterator[int]:
    for low in range(0, len(values), chunk):
        yield from values[low : low + chunk].tolist()
