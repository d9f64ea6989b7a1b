"""Packings kept beside their shards: they are made once, and then mapped."""

import hashlib
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from moebius.data.packing import Packing, pack_best_fit
from moebius.data.shards import Shard

MAGIC = b"moebius-pack-1\x00\x00"
HEADER = struct.Struct("<16s32sQQ")
"""magic, SHA-256 of all that makes and follows it, samples, pieces"""


def load_packing(shard: Shard, sequence_length: int) -> Packing:
    """The best-fit packing of a shard, made first where it is not there or damaged.

    It is kept in `<shard>.best_fit-<length>`, where the folder can be written.
    """
    path = shard.storage.folder / f"{shard.entry.name}.best_fit-{sequence_length}"
    packing = _read(path, shard, sequence_length)
    if packing is None:
        packing = pack_best_fit(shard.lengths(), sequence_length)
        with suppress(OSError):  # a folder that cannot be written: made again next time
            _write(path, packing, shard, sequence_length)
    return packing


def _write(path: Path, packing: Packing, shard: Shard, sequence_length: int) -> None:
    content = b"".join(
        array.tobytes() for array in (packing.offsets_N, packing.starts_P, packing.lengths_P)
    )
    counts = packing.num_samples, len(packing.starts_P)
    digest = _digest(shard, sequence_length, counts, content)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # processes may make it at once
    try:
        temporary.write_bytes(HEADER.pack(MAGIC, digest, *counts) + content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, shard: Shard, sequence_length: int) -> Packing | None:
    try:
        if not path.is_file() or path.stat().st_size < HEADER.size:
            return None
        content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError:
        return None
    magic, digest, samples, pieces = HEADER.unpack(content[: HEADER.size].tobytes())
    sizes = [8 * (samples + 1), 8 * pieces, 4 * pieces]
    body = content[HEADER.size :]
    if magic != MAGIC or len(body) != sum(sizes):
        return None
    if _digest(shard, sequence_length, (samples, pieces), body.data) != digest:
        return None
    offsets, starts, lengths = np.split(body, np.cumsum(sizes[:2]))
    return Packing(
        starts_P=starts.view("<i8"), lengths_P=lengths.view("<i4"), offsets_N=offsets.view("<i8")
    )


def _digest(
    shard: Shard, sequence_length: int, counts: tuple[int, int], content: bytes | memoryview
) -> bytes:
    digest = hashlib.sha256(f"{shard.entry.index_sha256}/{sequence_length}/{counts}/".encode())
    digest.update(content)
    return digest.digest()
