"""Shards against an independent reader of the Megatron layout."""

import struct
from pathlib import Path

import numpy as np
import pytest

from moebius.data.shards import ShardWriter, open_shard
from moebius.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [3, 0]]


def write(prefix: Path, vocab_size: int = 512) -> int:
    writer = ShardWriter(prefix, vocab_size)
    for ids in DOCUMENTS:
        writer.write(ids)
    writer.close()
    return writer.num_tokens


@pytest.mark.parametrize(
    ("vocab_size", "code", "size"), [(512, 8, 2), (65_536, 8, 2), (65_537, 4, 4)]
)
def test_the_index_is_megatrons(tmp_path: Path, vocab_size: int, code: int, size: int) -> None:
    write(tmp_path / "shard", vocab_size)
    idx = (tmp_path / "shard.idx").read_bytes()
    data = (tmp_path / "shard.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    version, dtype_code, count, boundaries = struct.unpack("<QBQQ", idx[9:34])
    assert (version, dtype_code, count, boundaries) == (1, code, 4, 5)
    lengths = struct.unpack("<4i", idx[34:50])
    offsets = struct.unpack("<4q", idx[50:82])
    assert struct.unpack("<5q", idx[82:]) == (0, 1, 2, 3, 4)
    dtype = {2: "<u2", 4: "<i4"}[size]
    for ids, length, offset in zip(DOCUMENTS, lengths, offsets, strict=True):
        assert np.frombuffer(data, dtype, length, offset).tolist() == ids


def test_round_trip(tmp_path: Path) -> None:
    num_tokens = write(tmp_path / "shard")
    tokens = open_shard(tmp_path / "shard", num_tokens)
    assert tokens.tolist() == [token for ids in DOCUMENTS for token in ids]


def test_damage_is_named(tmp_path: Path) -> None:
    num_tokens = write(tmp_path / "shard")
    bin_path, idx_path = tmp_path / "shard.bin", tmp_path / "shard.idx"
    whole = bin_path.read_bytes()
    for changed in (whole[:-1], whole + b"\x00\x00"):
        bin_path.write_bytes(changed)
        with pytest.raises(DataError, match=r"shard\.bin' has \d+ bytes, its manifest says 20"):
            open_shard(tmp_path / "shard", num_tokens)
    bin_path.write_bytes(whole)
    idx_path.write_bytes(b"something else entirely, long enough to hold a header")
    with pytest.raises(DataError, match=r"shard\.idx' is no token index"):
        open_shard(tmp_path / "shard", num_tokens)
    idx_path.unlink()
    with pytest.raises(DataError, match=r"shard\.idx' is missing"):
        open_shard(tmp_path / "shard", num_tokens)
