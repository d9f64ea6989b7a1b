"""Token shards hold what was written, in the layout that other tools read, and notice damage."""

import hashlib
import random
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moebius.data import shards as shards_module
from moebius.data.manifest import ShardEntry
from moebius.data.shards import Shard, ShardWriter, token_dtype
from moebius.data.storage import CacheConfig, open_storage
from moebius.errors import DataError

KINDS = ("bin", "idx", "sums")
PIECE = 64
"""bytes checked at once in these tests, so that a small shard has many pieces"""


def random_documents(vocab_size: int, count: int = 50) -> list[list[int]]:
    """Documents of 1 to 60 tokens; the first and the last id of the vocabulary are among them."""
    rng = random.Random(vocab_size)
    docs = [rng.choices(range(vocab_size), k=rng.randint(1, 60)) for _ in range(count)]
    return [[0, vocab_size - 1], *docs, [vocab_size - 1]]


def flat(docs: list[list[int]]) -> list[int]:
    return [token for ids in docs for token in ids]


def write(prefix: Path, docs: list[list[int]], vocab_size: int) -> ShardEntry:
    writer = ShardWriter(prefix, vocab_size)
    for ids in docs:
        writer.write(np.array(ids))
    return writer.close()


def opened(prefix: Path, entry: ShardEntry, vocab_size: int) -> Shard:
    return Shard(open_storage(str(prefix.parent), CacheConfig()), entry, vocab_size)


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


def refusal(reading: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        reading()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """A sound shard."""
    prefix = tmp_path / "train-00000"
    return opened(prefix, write(prefix, random_documents(500), 500), 500)


def file_of(shard: Shard, kind: str) -> Path:
    return shard.storage.folder / f"{shard.entry.name}.{kind}"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("vocab_size", [257, 65536, 65537, 200_000])
def test_tokens_read_back_as_written(tmp_path: Path, vocab_size: int) -> None:
    """Any part of them, too."""
    docs = random_documents(vocab_size)
    entry = write(tmp_path / "shard", docs, vocab_size)
    shard, expected = opened(tmp_path / "shard", entry, vocab_size), flat(docs)
    assert len(shard) == len(expected)
    assert shard.tokens(0, len(expected)).tolist() == expected
    rng = random.Random(0)
    for _ in range(50):
        start = rng.randrange(len(expected))
        end = rng.randint(start + 1, len(expected))
        assert shard.tokens(start, end).tolist() == expected[start:end]


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
    entry = write(tmp_path / "shard", docs, vocab_size)
    size = (tmp_path / "shard.bin").stat().st_size
    assert size == 5 * np.dtype(dtype).itemsize
    shard = opened(tmp_path / "shard", entry, vocab_size)
    assert shard.dtype == np.dtype(dtype)
    assert shard.num_bytes == size


@pytest.mark.parametrize("token", [65536, -1])
def test_an_id_beyond_the_type_is_never_wrapped(tmp_path: Path, token: int) -> None:
    writer = ShardWriter(tmp_path / "shard", 300)
    writer.write(np.array([1]))
    with pytest.raises(OverflowError):
        writer.write(np.array([1, token]))
    assert writer.close().tokens == 1


def test_the_entry_states_what_the_files_hold(tmp_path: Path) -> None:
    docs = random_documents(500)
    entry = write(tmp_path / "train-00007", docs, 500)
    hashes = {
        kind: hashlib.sha256((tmp_path / f"train-00007.{kind}").read_bytes()).hexdigest()
        for kind in KINDS
    }
    assert entry.model_dump() == {
        "name": "train-00007",
        "documents": len(docs),
        "tokens": len(flat(docs)),
        "sha256": hashes["bin"],
        "index_sha256": hashes["idx"],
        "sums_sha256": hashes["sums"],
    }


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_sums_are_the_hashes_of_each_mib(tmp_path: Path, extra: int) -> None:
    """Also where the last piece is full or has a token more or less."""
    size = 2 * 2**20 // 2 + extra
    ids = np.random.default_rng(0).integers(0, 300, size)
    writer = ShardWriter(tmp_path / "shard", 300)
    writer.write(ids)
    entry = writer.close()
    content = (tmp_path / "shard.bin").read_bytes()
    pieces = [content[start : start + 2**20] for start in range(0, len(content), 2**20)]
    sums = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert (tmp_path / "shard.sums").read_bytes() == sums
    shard = opened(tmp_path / "shard", entry, 300)
    assert np.array_equal(shard.tokens(2**19 - 5, size), ids[2**19 - 5 :])
    assert shard.fault() is None


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_lengths_are_those_of_the_documents(tmp_path: Path, vocab_size: int) -> None:
    docs = random_documents(vocab_size)
    entry = write(tmp_path / "shard", docs, vocab_size)
    lengths = opened(tmp_path / "shard", entry, vocab_size).lengths()
    assert lengths.tolist() == [len(ids) for ids in docs]


def test_tokens_are_mapped_not_loaded(shard: Shard) -> None:
    """Nothing is open before it is needed, and what was read cannot change the file."""
    before = file_of(shard, "bin").read_bytes()
    assert not shard.is_open
    tokens = shard.tokens(0, 10)
    assert shard.is_open
    assert str(file_of(shard, "bin")) in Path("/proc/self/maps").read_text()
    tokens[:] = 1
    assert file_of(shard, "bin").read_bytes() == before
    assert shard.tokens(0, 2).tolist() == [0, 499]


def test_a_sound_shard_has_no_fault(shard: Shard) -> None:
    shard.check_present()
    assert shard.fault() is None


# Damage.


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_refused(shard: Shard, kind: str) -> None:
    path = file_of(shard, kind)
    path.unlink()
    message = refusal(shard.check_present)
    assert str(path) in message
    assert "missing" in message
    fault = shard.fault()
    assert fault is not None
    assert (fault.file, fault.reason) == (path.name, "is missing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_bytes_cut_off_or_added_are_refused(shard: Shard, kind: str, change: int) -> None:
    path = file_of(shard, kind)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    message = refusal(shard.check_present)
    assert str(path) in message
    assert str(len(content)) in message
    assert str(len(content) + change) in message
    assert "data.bad_shards" in message
    fault = shard.fault()
    assert fault is not None
    assert fault.file == path.name


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_tokens_cut_off_or_added_are_refused_when_they_are_read(shard: Shard, change: int) -> None:
    """What happens after the check at the start of a run."""
    path = file_of(shard, "bin")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    message = refusal(lambda: shard.tokens(0, 5))
    assert str(path) in message
    assert str(len(content)) in message
    assert str(len(content) + change) in message


def test_an_empty_bin_is_refused(shard: Shard) -> None:
    file_of(shard, "bin").write_bytes(b"")
    assert str(file_of(shard, "bin")) in refusal(shard.check_present)
    assert str(file_of(shard, "bin")) in refusal(lambda: shard.tokens(0, 1))


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
def test_a_foreign_index_is_refused(shard: Shard, content: bytes) -> None:
    path = file_of(shard, "idx")
    path.write_bytes(content)
    assert str(path) in refusal(shard.check_present)
    assert str(path) in refusal(shard.lengths)


@pytest.mark.parametrize("position", [0, 9, 17, 18, 26, 34, -1])
def test_an_index_of_another_content_is_refused(shard: Shard, position: int) -> None:
    """Magic, version, token type, counts, lengths and boundaries: any byte that is not its own."""
    path = file_of(shard, "idx")
    flip(path, position)
    shard.check_present()  # which looks at sizes alone
    message = refusal(shard.lengths)
    assert str(path) in message
    assert "damaged" in message
    fault = shard.fault()
    assert fault is not None
    assert fault.file == path.name


@pytest.mark.parametrize("code", [0, 1, 4, 5, 6, 255])
def test_an_index_of_another_token_type_is_refused(shard: Shard, code: int) -> None:
    """Also that of the other width, by which pairs of ids would be read as one."""
    path = file_of(shard, "idx")
    content = bytearray(path.read_bytes())
    assert content[17] == 8
    content[17] = code
    path.write_bytes(content)
    assert str(path) in refusal(shard.lengths)
    assert shard.fault() is not None


def test_tokens_of_another_width_than_the_vocabulary_says_are_refused(tmp_path: Path) -> None:
    """Else pairs of ids would be read as one."""
    prefix = tmp_path / "shard"
    entry = write(prefix, random_documents(500), 500)
    wide = opened(prefix, entry, 70_000)
    assert str(tmp_path / "shard.bin") in refusal(wide.check_present)
    assert str(tmp_path / "shard.bin") in refusal(lambda: wide.tokens(0, 1))


def test_a_flipped_bit_anywhere_is_found_when_its_piece_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that are sound can be read; those that are not name the file and the bytes."""
    monkeypatch.setattr(shards_module, "PIECE", PIECE)
    docs = random_documents(500)
    prefix = tmp_path / "small-pieces"
    entry = write(prefix, docs, 500)
    content, expected = prefix.with_suffix(".bin").read_bytes(), flat(docs)
    for position in random.Random(0).sample(range(len(content)), 40):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.Random(position).randrange(8)
        prefix.with_suffix(".bin").write_bytes(damaged)
        shard = opened(prefix, entry, 500)
        shard.check_present()
        per_piece = PIECE // 2
        for piece in range(-(-len(expected) // per_piece)):
            start, end = piece * per_piece, min((piece + 1) * per_piece, len(expected))
            if piece == position // PIECE:
                message = refusal(partial(shard.tokens, start, end))
                assert str(prefix.with_suffix(".bin")) in message
                assert f"bytes {2 * start} to {2 * end - 1} " in message
                refusal(partial(shard.tokens, max(0, start - 1), start + 1))
            else:
                assert shard.tokens(start, end).tolist() == expected[start:end]
        fault = shard.fault()
        assert fault is not None
        assert fault.file == f"{prefix.name}.bin"


@pytest.mark.parametrize("position", [0, 31, -1])
def test_damaged_sums_are_refused_before_any_token(shard: Shard, position: int) -> None:
    flip(file_of(shard, "sums"), position)
    shard.check_present()
    message = refusal(lambda: shard.tokens(0, 1))
    assert str(file_of(shard, "sums")) in message
    assert "missing or damaged" in message
    fault = shard.fault()
    assert fault is not None
    assert fault.file == "train-00000.sums"


def test_a_piece_is_hashed_once(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a shard costs one hash of it, however often its tokens are read."""
    shard.tokens(0, 1)
    monkeypatch.setattr(shards_module.hashlib, "sha256", None)
    assert shard.tokens(0, len(shard)).tolist() == flat(random_documents(500))


def test_threads_may_share_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first touch on, each gets its own tokens."""
    monkeypatch.setattr(shards_module, "PIECE", PIECE)
    docs = random_documents(500)
    entry, expected = write(tmp_path / "shard", docs, 500), flat(docs)
    for _ in range(20):
        shard = opened(tmp_path / "shard", entry, 500)
        starts = list(range(0, len(expected) - 10, 7))
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(shard.tokens, start, start + 10) for start in starts]
        assert [f.result().tolist() for f in found] == [expected[s : s + 10] for s in starts]


# A writer that was killed.


@pytest.mark.parametrize("kept", [0, 1, 7, 52])
def test_a_writer_goes_on_from_what_was_flushed(tmp_path: Path, kept: int) -> None:
    """What was written after it, whole or in part, is cut off."""
    docs = random_documents(500)
    write(tmp_path / "whole", docs, 500)
    first = ShardWriter(tmp_path / "shard", 500)
    for ids in docs[:kept]:
        first.write(np.array(ids))
    flushed = first.flush()
    assert flushed == (kept, len(flat(docs[:kept])))
    for ids in docs[kept : kept + 5]:
        first.write(np.array(ids) % 7)
    first.flush()
    with (tmp_path / "shard.bin").open("ab") as file:
        file.write(b"\x01")  # half a token
    with (tmp_path / "shard.lengths").open("ab") as file:
        file.write(b"\x01")
    second = ShardWriter(tmp_path / "shard", 500, *flushed)
    assert (second.num_documents, second.num_tokens) == flushed
    for ids in docs[kept:]:
        second.write(np.array(ids))
    second.close()
    assert megatron_documents(tmp_path / "shard") == docs
    for kind in KINDS:
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        assert (tmp_path / f"shard.{kind}").read_bytes() == whole


def test_a_writer_goes_on_after_the_shard_was_closed(tmp_path: Path) -> None:
    """A preparation may be killed between closing a shard and noting that it has."""
    docs = random_documents(500)
    entry = write(tmp_path / "shard", docs, 500)
    writer = ShardWriter(tmp_path / "shard", 500, 3, len(flat(docs[:3])))
    for ids in docs[3:]:
        writer.write(np.array(ids))
    assert writer.close() == entry
    assert megatron_documents(tmp_path / "shard") == docs
