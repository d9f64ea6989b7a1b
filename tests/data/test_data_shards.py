"""Token shards hold what was written, in the layout that other tools read."""

import hashlib
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from moebius.data.shards import ShardWriter, open_shard, token_dtype
from moebius.errors import DataError


def random_documents(vocab_size: int, count: int = 50) -> list[list[int]]:
    """Documents of 1 to 60 tokens; the first and the last id of the vocabulary are among them."""
    rng = random.Random(vocab_size)
    docs = [rng.choices(range(vocab_size), k=rng.randint(1, 60)) for _ in range(count)]
    return [[0, vocab_size - 1], *docs, [vocab_size - 1]]


def write(prefix: Path, docs: list[list[int]], vocab_size: int) -> dict[str, object]:
    writer = ShardWriter(prefix, vocab_size)
    for ids in docs:
        writer.write(ids)
    return writer.close()


def megatron_documents(prefix: Path) -> list[list[int]]:
    """An independent reader of the Megatron layout; checks every field of the index."""
    index = Path(f"{prefix}.idx").read_bytes()
    data = Path(f"{prefix}.bin").read_bytes()
    magic, version, code, count, boundaries = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, boundaries) == (b"MMIDIDX\x00\x00", 1, count + 1)
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    body = struct.Struct(f"<{count}i{count}q{count + 1}q")
    assert len(index) == 9 + 8 + 1 + 8 + 8 + body.size
    fields = body.unpack_from(index, 34)
    lengths, offsets = fields[:count], fields[count : 2 * count]
    assert fields[2 * count :] == tuple(range(count + 1))
    assert sum(lengths) * width == len(data)
    return [
        list(struct.unpack_from(f"<{length}{letter}", data, offset))
        for length, offset in zip(lengths, offsets, strict=True)
    ]


def refusal(prefix: Path, num_tokens: int) -> str:
    with pytest.raises(DataError) as caught:
        open_shard(prefix, num_tokens)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, int]:
    """A sound shard and the number of its tokens."""
    entry = write(tmp_path / "train-00000", random_documents(500), 500)
    return tmp_path / "train-00000", int(str(entry["tokens"]))


@pytest.mark.parametrize("vocab_size", [257, 65536, 65537, 200_000])
def test_tokens_read_back_as_written(tmp_path: Path, vocab_size: int) -> None:
    docs = random_documents(vocab_size)
    write(tmp_path / "shard", docs, vocab_size)
    flat = [token for ids in docs for token in ids]
    assert open_shard(tmp_path / "shard", len(flat)).tolist() == flat


@pytest.mark.parametrize("vocab_size", [257, 65536, 65537, 200_000])
def test_the_index_gives_every_document_to_a_megatron_reader(
    tmp_path: Path, vocab_size: int
) -> None:
    docs = random_documents(vocab_size)
    write(tmp_path / "shard", docs, vocab_size)
    assert megatron_documents(tmp_path / "shard") == docs


def test_a_shard_of_one_document_is_indexed(tmp_path: Path) -> None:
    write(tmp_path / "shard", [[3, 1, 2]], 300)
    assert megatron_documents(tmp_path / "shard") == [[3, 1, 2]]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(257, "<u2"), (65535, "<u2"), (65536, "<u2"), (65537, "<i4"), (2**20, "<i4")],
)
def test_ids_take_two_bytes_where_they_fit(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    docs = [[vocab_size - 1] * 5]
    write(tmp_path / "shard", docs, vocab_size)
    size = (tmp_path / "shard.bin").stat().st_size
    assert size == 5 * np.dtype(dtype).itemsize
    assert open_shard(tmp_path / "shard", 5).dtype == np.dtype(dtype)


def test_an_id_beyond_the_type_is_never_wrapped(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", 300)
    with pytest.raises(OverflowError):
        writer.write([1, 65536])
    writer.close()


def test_the_entry_states_what_the_files_hold(tmp_path: Path) -> None:
    docs = random_documents(500)
    content = write(tmp_path / "train-00007", docs, 500)
    assert content == {
        "name": "train-00007",
        "documents": len(docs),
        "tokens": sum(len(ids) for ids in docs),
        "sha256": hashlib.sha256((tmp_path / "train-00007.bin").read_bytes()).hexdigest(),
    }


def test_tokens_are_mapped_not_loaded(shard: tuple[Path, int]) -> None:
    """And cannot be changed through the map."""
    tokens = open_shard(*shard)
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_refused(shard: tuple[Path, int], suffix: str) -> None:
    prefix, num_tokens = shard
    path = prefix.with_suffix(suffix)
    path.unlink()
    message = refusal(prefix, num_tokens)
    assert str(path) in message
    assert "missing" in message


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_tokens_cut_off_or_added_are_refused(shard: tuple[Path, int], change: int) -> None:
    prefix, num_tokens = shard
    path = prefix.with_suffix(".bin")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    message = refusal(prefix, num_tokens)
    assert str(path) in message
    assert str(len(content)) in message
    assert str(len(content) + change) in message


def test_an_empty_bin_is_refused(shard: tuple[Path, int]) -> None:
    prefix, num_tokens = shard
    prefix.with_suffix(".bin").write_bytes(b"")
    assert str(prefix.with_suffix(".bin")) in refusal(prefix, num_tokens)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MMIDIDX\x00\x00",  # cut off in the header
        b"TNTIDX\x00\x00" + bytes(64),  # the index of older Megatron data
        b"PAR1" + bytes(64),
        bytes(64),
    ],
)
def test_a_foreign_index_is_refused(shard: tuple[Path, int], content: bytes) -> None:
    prefix, num_tokens = shard
    path = prefix.with_suffix(".idx")
    path.write_bytes(content)
    assert str(path) in refusal(prefix, num_tokens)


@pytest.mark.parametrize("code", [0, 1, 5, 6, 255])
def test_an_index_of_another_token_type_is_refused(shard: tuple[Path, int], code: int) -> None:
    prefix, num_tokens = shard
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[17] = code
    path.write_bytes(content)
    message = refusal(prefix, num_tokens)
    assert str(path) in message
    assert f"type {code}," in message


def test_tokens_of_another_width_than_the_index_says_are_refused(shard: tuple[Path, int]) -> None:
    """Else pairs of ids would be read as one."""
    prefix, num_tokens = shard
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[17] = 4
    path.write_bytes(content)
    assert str(prefix.with_suffix(".bin")) in refusal(prefix, num_tokens)
