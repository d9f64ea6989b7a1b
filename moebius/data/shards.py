"""Token shards: Megatron `.bin`/`.idx` pairs, readable by np.memmap and by the tools of others.

`.bin` is the tokens, little endian, without header. `.idx` is: 9 bytes magic, u64 version 1, u8
code of the token type, u64 documents, u64 documents + 1, i32 length of each document, i64 byte
offset of each, i64 document boundaries.
"""

import hashlib
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moebius.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[np.unsignedinteger] | np.dtype[np.signedinteger]] = {
    8: np.dtype("<u2"),
    4: np.dtype("<i4"),
}


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger] | np.dtype[np.signedinteger]:
    """The smallest of the format's types that holds every id."""
    return DTYPES[8] if vocab_size <= 2**16 else DTYPES[4]


class ShardWriter:
    """Writes documents to `<prefix>.bin` as they come and `<prefix>.idx` at the end."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self.lengths: list[int] = []
        self.num_tokens = 0
        self.hash = hashlib.sha256()
        self.bin = prefix.with_suffix(".bin").open("wb")

    def write(self, ids: list[int]) -> None:
        """Append one document."""
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self.bin.write(data)
        self.hash.update(data)
        self.lengths.append(len(ids))
        self.num_tokens += len(ids)

    def close(self) -> dict[str, object]:
        """Write the index; returns the shard's entry for the manifest."""
        self.bin.close()
        lengths = np.asarray(self.lengths, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        offsets[1:] = np.cumsum(lengths[:-1], dtype=np.int64) * self.dtype.itemsize
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with self.prefix.with_suffix(".idx").open("wb") as idx:
            idx.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            idx.write(lengths.tobytes() + offsets.tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        return {
            "name": self.prefix.name,
            "documents": len(lengths),
            "tokens": self.num_tokens,
            "sha256": self.hash.hexdigest(),
        }


def open_shard(prefix: Path, num_tokens: int) -> NDArray[np.generic]:
    """Map a shard's tokens. Raises DataError where it is missing or not `num_tokens` long."""
    bin_path, idx_path = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(f"data: shard file '{path}' is missing", "delete its folder to rebuild")
    header = idx_path.read_bytes()[: HEADER.size]
    if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
        raise DataError(f"data: '{idx_path}' is no token index", "delete its folder to rebuild")
    code = HEADER.unpack(header)[2]
    if code not in DTYPES:
        raise DataError(f"data: '{idx_path}' holds token type {code}, allowed: {list(DTYPES)}")
    dtype = DTYPES[code]
    size, expected = bin_path.stat().st_size, num_tokens * dtype.itemsize
    if size != expected:
        raise DataError(
            f"data: shard '{bin_path}' has {size} bytes, its manifest says {expected}: "
            "truncated or overwritten",
            "delete its folder to rebuild",
        )
    return np.memmap(bin_path, dtype=dtype, mode="r")
