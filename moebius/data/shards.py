"""Token shards: Megatron `.bin`/`.idx` pairs, readable by np.memmap and by the tools of others.

`.bin` is the tokens, little endian, without header. `.idx` is: 9 bytes magic, u64 version 1, u8
code of the token type, u64 documents, u64 documents + 1, i32 length of each document, i64 byte
offset of each, i64 document boundaries. Beside them lies `.sums`, the SHA-256 of each MiB of the
`.bin`: what is read is checked when it is first touched, without reading the rest.
"""

import hashlib
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moebius.data.manifest import ShardEntry, readable
from moebius.data.storage import Storage
from moebius.errors import DataError
from moebius.files import file_sha256, sync

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[np.unsignedinteger] | np.dtype[np.signedinteger]] = {
    8: np.dtype("<u2"),
    4: np.dtype("<i4"),
}
PIECE = 1 << 20
"""bytes that are checked at once"""
DIGEST = hashlib.sha256().digest_size
REBUILD = "fetch the file again, or delete its folder to rebuild"


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger] | np.dtype[np.signedinteger]:
    """The smallest of the format's types that holds every id."""
    return DTYPES[8] if vocab_size <= 2**16 else DTYPES[4]


class ShardWriter:
    """Writes documents to `<prefix>.bin` as they come, and the rest at the end.

    Until then their lengths are in `<prefix>.lengths`; a writer that was killed can go on from the
    last `flush`.
    """

    def __init__(self, prefix: Path, vocab_size: int, documents: int = 0, tokens: int = 0) -> None:
        """`documents` and `tokens`: how many an earlier writer has flushed; the rest is cut off."""
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_documents, self.num_tokens = documents, tokens
        self.bin = prefix.with_suffix(".bin").open("r+b" if documents else "wb")
        self.lengths = prefix.with_suffix(".lengths").open("r+b" if documents else "wb")
        for file, size in ((self.bin, tokens * self.dtype.itemsize), (self.lengths, documents * 4)):
            file.truncate(size)
            file.seek(size)

    def write(self, ids: NDArray[np.integer]) -> None:
        """Append one document. Raises OverflowError for an id that the vocabulary does not have."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise OverflowError(f"token id {ids.max()} or {ids.min()} of {self.vocab_size}")
        self.bin.write(ids.astype(self.dtype, copy=False).tobytes())
        self.lengths.write(struct.pack("<i", len(ids)))
        self.num_documents += 1
        self.num_tokens += len(ids)

    def flush(self) -> tuple[int, int]:
        """Force what was written to disk; returns the numbers of documents and tokens there."""
        for file in (self.bin, self.lengths):
            file.flush()
            os.fsync(file.fileno())
        return self.num_documents, self.num_tokens

    def close(self) -> ShardEntry:
        """Write index and sums; returns the shard's entry for the manifest.

        The lengths stay: a preparation that is killed now has to open the shard again.
        """
        self.bin.close()
        self.lengths.close()
        names = {kind: self.prefix.with_suffix(f".{kind}") for kind in ("bin", "idx", "sums")}
        lengths = np.fromfile(self.prefix.with_suffix(".lengths"), dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        offsets[1:] = np.cumsum(lengths[:-1], dtype=np.int64) * self.dtype.itemsize
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with names["idx"].open("wb") as idx:
            idx.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            idx.write(lengths.tobytes() + offsets.tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        sha256, sums = content_hashes(names["bin"])
        names["sums"].write_bytes(sums)
        for path in names.values():
            sync(path)
        return ShardEntry(
            name=self.prefix.name,
            documents=len(lengths),
            tokens=self.num_tokens,
            sha256=sha256,
            index_sha256=file_sha256(names["idx"]),
            sums_sha256=hashlib.sha256(sums).hexdigest(),
        )


def content_hashes(path: Path) -> tuple[str, bytes]:
    """SHA-256 of a file, and those of its pieces one after the other."""
    whole, sums = hashlib.sha256(), b""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            whole.update(piece)
            sums += hashlib.sha256(piece).digest()
    return whole.hexdigest(), sums


class Fault(NamedTuple):
    """What is wrong with a shard."""

    file: str
    reason: str


class _Open(NamedTuple):
    """A mapped file, the sums of its pieces, and which of them have been checked."""

    tokens: NDArray[np.generic]
    sums: bytes
    checked: NDArray[np.bool_]


class Shard:
    """The tokens of a shard, checked when they are first touched. Files are opened at need.

    Threads may share it.
    """

    def __init__(self, storage: Storage, entry: ShardEntry, vocab_size: int) -> None:
        self.storage = storage
        self.entry = entry
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._open: _Open | None = None

    def __len__(self) -> int:
        return self.entry.tokens

    @property
    def num_bytes(self) -> int:
        """Size of the `.bin` file."""
        return len(self) * self.dtype.itemsize

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens `start:end`. Raises DataError where they are not those that were prepared."""
        opened = self._opened()
        size = self.dtype.itemsize
        pieces = slice(start * size // PIECE, (end * size - 1) // PIECE + 1)
        if not opened.checked[pieces].all():
            self._check(opened, pieces)
        return opened.tokens[start:end].astype(np.int64)

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, `[documents]`, its end-of-document token included."""
        path = self.storage.fetch(f"{self.entry.name}.idx")
        with readable(path):
            same = path.is_file() and file_sha256(path) == self.entry.index_sha256
        if not same:
            raise self._error(Fault(path.name, "is missing or damaged"))
        return np.fromfile(path, dtype="<i4", count=self.entry.documents, offset=HEADER.size)

    @property
    def is_open(self) -> bool:
        """Whether its file is mapped."""
        return self._open is not None

    def close_if_gone(self) -> None:
        """Let go of a file that is no longer there; it is fetched again at need."""
        if self._open is not None and not self._path("bin").exists():
            self._open = None

    def check_present(self) -> None:
        """Raise DataError where a local file is missing or has another length than it should."""
        fault = self._missing()
        if fault is not None:
            raise self._error(fault)

    def fault(self) -> Fault | None:
        """What is wrong with the files, read from beginning to end; None: nothing. Raises DataError
        where they cannot be fetched."""
        name = self.entry.name
        paths = {kind: self.storage.fetch(f"{name}.{kind}") for kind in ("bin", "idx", "sums")}
        missing = self._missing()
        if missing is not None:
            return missing
        wanted = (self.entry.sha256, self.entry.index_sha256, self.entry.sums_sha256)
        for (kind, path), sha256 in zip(paths.items(), wanted, strict=True):
            try:
                same = file_sha256(path) == sha256
            except OSError as error:
                return Fault(f"{name}.{kind}", f"cannot be read: {error.strerror or error}")
            if not same:
                return Fault(f"{name}.{kind}", "is not the file that was prepared (SHA-256)")
        return None

    def _missing(self) -> Fault | None:
        index_size = HEADER.size + 20 * self.entry.documents + 8
        num_pieces = -(-self.num_bytes // PIECE)
        sizes = {"bin": self.num_bytes, "idx": index_size, "sums": DIGEST * num_pieces}
        faults = (self._wrong_size(kind, size) for kind, size in sizes.items())
        return next((fault for fault in faults if fault is not None), None)

    def _wrong_size(self, kind: str, expected: int) -> Fault | None:
        path = self._path(kind)
        if not path.is_file():
            return Fault(path.name, "is missing")
        size = path.stat().st_size
        if size == expected:
            return None
        return Fault(
            path.name, f"has {size} bytes, its manifest says {expected}: truncated or overwritten"
        )

    def _opened(self) -> _Open:
        opened = self._open
        if opened is None:
            try:
                opened = self._map(fresh=False)
            except DataError:
                if not self.storage.is_remote:
                    raise
                # The copy is damaged or an old one, or has just left the cache.
                opened = self._map(fresh=True)
            self._open = opened
        return opened

    def _map(self, fresh: bool) -> _Open:
        name = self.entry.name
        sums_path = self.storage.fetch(f"{name}.sums", fresh=fresh)
        with readable(sums_path):
            sums = sums_path.read_bytes() if sums_path.is_file() else b""
        if hashlib.sha256(sums).hexdigest() != self.entry.sums_sha256:
            raise self._error(Fault(f"{name}.sums", "is missing or damaged"))
        path = self.storage.fetch(f"{name}.bin", fresh=fresh)
        fault = self._wrong_size("bin", self.num_bytes)
        if fault is not None:
            raise self._error(fault)
        checked = np.zeros(len(sums) // DIGEST, dtype=np.bool_)
        with readable(path):
            mapped = np.memmap(path, dtype=self.dtype, mode="r").view(np.ndarray)
        return _Open(mapped, sums, checked)

    def _check(self, opened: _Open, pieces: slice) -> None:
        content = opened.tokens.view(np.uint8)
        for piece in range(pieces.start, pieces.stop):
            if opened.checked[piece]:
                continue
            part = content[piece * PIECE : (piece + 1) * PIECE]
            found = hashlib.sha256(part.data).digest()
            if found != opened.sums[piece * DIGEST : (piece + 1) * DIGEST]:
                where = f"bytes {piece * PIECE} to {min((piece + 1) * PIECE, self.num_bytes) - 1}"
                raise self._error(
                    Fault(f"{self.entry.name}.bin", f"is damaged: {where} are not those prepared")
                )
            self._check_ids(part.view(self.dtype), piece * PIECE // self.dtype.itemsize)
            opened.checked[piece] = True

    def _check_ids(self, tokens: NDArray[np.generic], first: int) -> None:
        ids = tokens.astype(np.int64)
        is_bad = (ids >= self.vocab_size) | (ids < 0)
        if is_bad.any():
            bad = int(np.argmax(is_bad))
            raise DataError(
                f"data: '{self._path('bin')}' holds token id {ids[bad]} at position "
                f"{first + bad}, allowed: 0 to {self.vocab_size - 1}",
                "the corpus was made for another tokenizer, delete its folder to rebuild",
            )

    def _path(self, kind: str) -> Path:
        return self.storage.folder / f"{self.entry.name}.{kind}"

    def _error(self, fault: Fault) -> DataError:
        path = self.storage.folder / fault.file
        return DataError(
            f"data: shard file '{path}' {fault.reason}",
            f"{REBUILD}, or set data.bad_shards=quarantine",
        )
