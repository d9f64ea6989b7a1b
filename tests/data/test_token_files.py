"""Token files of other tools give the documents that were written, or one line of error."""

import os
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moebius.data.token_files import CHUNK, TokenDocument, _adjacent, _documents, token_documents
from moebius.errors import DataError

EOD = 7
VOCAB = 120  # below 128, for the signed bytes of Megatron
LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}

Documents = list[list[int]]
Writer = Callable[[Path, Documents], Path]


def pack(letter: str, numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}{letter}", *numbers)


def flat(documents: Documents) -> list[int]:
    return [token for ids in documents for token in ids]


def megatron_index(code: int, lengths: list[int], pointers: list[int], borders: list[int]) -> bytes:
    """The index as Megatron describes it: sequences, and the documents that they belong to."""
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(borders))
    return head + pack("i", lengths) + pack("q", pointers) + pack("q", borders)


def megatron(code: int, unused: int = 0) -> Writer:
    """One sequence a document, one after the other, behind some tokens of none."""

    def write(stem: Path, documents: Documents) -> Path:
        data, lengths, pointers = pack(LETTERS[code], [VOCAB + 1] * unused), [], []
        for ids in documents:
            lengths.append(len(ids))
            pointers.append(len(data))
            data += pack(LETTERS[code], ids)
        borders = list(range(len(documents) + 1))
        Path(f"{stem}.idx").write_bytes(megatron_index(code, lengths, pointers, borders))
        Path(f"{stem}.bin").write_bytes(data)
        return Path(f"{stem}.bin")

    return write


def megatron_sequences(scattered: bool) -> Writer:
    """Documents of no, one or several sequences; scattered: in any order, with gaps between."""

    def write(stem: Path, documents: Documents) -> Path:
        rng = random.Random(len(documents))
        sequences, borders = [], [0]
        for ids in documents:
            while ids:
                size = rng.randint(0, len(ids))
                sequences.append(ids[:size])
                ids = ids[size:]
            borders.append(len(sequences))
        order = list(range(len(sequences)))
        data, pointers = b"", [0] * len(sequences)
        if scattered:
            rng.shuffle(order)
            data = pack("H", [VOCAB + 1] * 3)
        for number in order:
            pointers[number] = len(data)
            data += pack("H", sequences[number])
            data += pack("H", [VOCAB + 1] * scattered)
        lengths = [len(sequence) for sequence in sequences]
        Path(f"{stem}.idx").write_bytes(megatron_index(8, lengths, pointers, borders))
        Path(f"{stem}.bin").write_bytes(data)
        return Path(f"{stem}.bin")

    return write


def datatrove(letter: str, metadata: str | None) -> Writer:
    """Tokens, ends of the documents, and a text that names the tokenizer."""

    def write(stem: Path, documents: Documents) -> Path:
        data, ends = b"", [0]
        for ids in documents:
            data += pack(letter, ids)
            ends.append(ends[-1] + len(ids))
        Path(f"{stem}.ds").write_bytes(data)
        Path(f"{stem}.ds.index").write_bytes(pack("Q", ends[1:]))
        if metadata:
            Path(f"{stem}.ds.metadata").write_text(f"{metadata}\n{ends[-1]}\n{ends[-1] / 1e3} kT")
        return Path(f"{stem}.ds")

    return write


def numpy_array(dtype: str) -> Writer:
    def write(stem: Path, documents: Documents) -> Path:
        np.save(f"{stem}.npy", np.array(flat(documents), dtype=dtype))
        return Path(f"{stem}.npy")

    return write


def headerless(letter: str) -> Writer:
    def write(stem: Path, documents: Documents) -> Path:
        Path(f"{stem}.bin").write_bytes(pack(letter, flat(documents)))
        return Path(f"{stem}.bin")

    return write


INDEXED = {
    **{f"megatron {code}": megatron(code) for code in LETTERS},
    "megatron unused": megatron(4, unused=3),
    "megatron sequences": megatron_sequences(scattered=False),
    "megatron scattered": megatron_sequences(scattered=True),
    "datatrove 2": datatrove("H", "org/tokenizer|2"),
    "datatrove 4": datatrove("I", "Unknown Tokenizer|4|4"),
    "datatrove old": datatrove("H", "gpt2"),
    "datatrove bare": datatrove("I", None),
}
PLAIN = {
    **{f"npy {dtype}": numpy_array(dtype) for dtype in ("<u2", "<i4", "<i8", ">u4", "|u1", "|i1")},
    "headerless uint16": headerless("H"),
    "headerless uint32": headerless("I"),
    "headerless int32": headerless("i"),
}
WRITERS = {**INDEXED, **PLAIN}


def dtype_of(kind: str) -> str | None:
    return kind.split()[1] if kind.startswith("headerless") else None


def read(
    *paths: Path | str, dtype: str | None = None, start: int = 0, chunk: int = CHUNK
) -> list[TokenDocument]:
    return list(_documents([str(path) for path in paths], dtype, EOD, VOCAB, start, chunk))


def plain(documents: list[TokenDocument]) -> list[tuple[str, list[int]]]:
    return [(document.id, document.ids.tolist()) for document in documents]


def refusal(*paths: Path | str, dtype: str | None = None) -> str:
    """The message with which files are refused, whatever the chunk; it is one line."""
    messages = set()
    for chunk in (1, CHUNK):
        with pytest.raises(DataError) as caught:
            read(*paths, dtype=dtype, chunk=chunk)
        messages.add(str(caught.value))
    (message,) = messages
    assert message
    assert "\n" not in message
    return message


def random_documents(seed: int, count: int = 40) -> Documents:
    """Documents with and without a closing id, packed ones, and ones without any token."""
    rng = random.Random(seed)
    others = [token for token in range(VOCAB) if token != EOD]
    documents = []
    for _ in range(count):
        ids = rng.choices(others, k=rng.choice([0, 1, 2, 5, 20, 100]))
        for _ in range(rng.choice([0, 0, 0, 1, 4])):
            ids.insert(rng.randint(0, len(ids)), EOD)
        documents.append(ids + [EOD] * rng.choice([0, 1, 1, 1, 2]))
    return documents


def numbered(kind: str, documents: Documents) -> Documents:
    """The documents in a file with their numbers, cut token by token."""
    if kind in PLAIN:
        documents = [flat(documents)] if flat(documents) else []
    result: Documents = []
    for ids in documents:
        part: list[int] = []
        for token in ids:
            if token == EOD:
                result.append(part)
                part = []
            else:
                part.append(token)
        if ids[-1:] != [EOD]:
            result.append(part)
    return result


def expected(kind: str, documents: Documents, name: str) -> list[tuple[str, list[int]]]:
    parts = enumerate(numbered(kind, documents))
    return [(f"{name}:{number}", ids) for number, ids in parts if ids]


@pytest.mark.parametrize("kind", WRITERS)
def test_documents_are_those_written(tmp_path: Path, kind: str) -> None:
    """Whatever the chunk: smaller than a document, about as large, larger than the file."""
    for seed in range(3):
        documents = random_documents(seed, count=25)
        path = WRITERS[kind](tmp_path / f"{seed}", documents)
        for chunk in (1, 3, 50, 1000, CHUNK):
            found = read(path, dtype=dtype_of(kind), chunk=chunk)
            assert plain(found) == expected(kind, documents, path.name)
            assert all(document.ids.dtype == np.uint32 for document in found)


@pytest.mark.parametrize("kind", WRITERS)
def test_start_is_the_number_of_the_first_document_read(tmp_path: Path, kind: str) -> None:
    """Numbers count on from file to file, and count documents without tokens."""
    stored = [random_documents(seed, count=4) for seed in (1, 2)]
    paths = [WRITERS[kind](tmp_path / str(at), documents) for at, documents in enumerate(stored)]
    whole = [
        (f"{path.name}:{number}", ids)
        for path, documents in zip(paths, stored, strict=True)
        for number, ids in enumerate(numbered(kind, documents))
    ]
    for start in range(len(whole) + 3):
        rest = [(name, ids) for name, ids in whole[start:] if ids]
        chunk = (2, 30, CHUNK)[start % 3]
        found = read(*paths, dtype=dtype_of(kind), start=start, chunk=chunk)
        assert plain(found) == rest


@pytest.mark.parametrize("kind", WRITERS)
def test_files_without_documents_give_none(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "empty", [])
    assert read(path, dtype=dtype_of(kind)) == []


@pytest.mark.parametrize("kind", INDEXED)
def test_a_document_without_tokens_may_follow_each_of_many(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "x", [[1, EOD], []] * 500)
    assert plain(read(path)) == [(f"{path.name}:{number}", [1]) for number in range(0, 1000, 2)]


@pytest.mark.parametrize("kind", INDEXED)
def test_documents_without_tokens_have_a_number(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / "x", [[], [], [1], [EOD], [2, EOD], [], [3], []])
    numbers = ((2, [1]), (4, [2]), (6, [3]))
    assert plain(read(path)) == [(f"{path.name}:{number}", ids) for number, ids in numbers]
    empty = WRITERS[kind](tmp_path / "y", [[], []])
    assert plain(read(empty)) == []
    rest = [document.id for document in read(empty, path, start=5)]
    assert rest == [f"{path.name}:{number}" for number in (4, 6)]


def test_the_public_function_reads_the_same(tmp_path: Path) -> None:
    documents = random_documents(5)
    path = WRITERS["headerless uint16"](tmp_path / "x", documents)
    found = list(token_documents([str(path)], "uint16", EOD, VOCAB, 3))
    assert plain(found) == plain(read(path, dtype="uint16", start=3))
    assert found


def test_the_shards_of_this_project_are_read(tmp_path: Path) -> None:
    """An independent writer of the same format: 32-bit ids, no closing id."""
    documents = [[70000, 3], [1], [69999] * 300]
    path = megatron(4)(tmp_path / "x", documents)
    found = list(token_documents([str(path)], None, 0, 70001))
    assert [document.ids.tolist() for document in found] == documents


def test_documents_do_not_keep_the_file(tmp_path: Path) -> None:
    """Ids are the reader's own: it may write to them, and the file may go."""
    path = WRITERS["datatrove 2"](tmp_path / "x", [[1, 2, EOD], [3, EOD]])
    found = read(path)
    found[0].ids[:] = 5
    assert found[0].ids.base is None
    assert plain(read(path)) == [("x.ds:0", [1, 2]), ("x.ds:1", [3])]


def test_ids_do_not_depend_on_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one name in two folders differ, the same files elsewhere do not."""
    for folder in ("here/a", "here/b/c"):
        (tmp_path / folder).mkdir(parents=True)
        WRITERS["datatrove 2"](tmp_path / folder / "x", [[1, EOD], [2, EOD]])
    absolute = [document.id for document in read(tmp_path / "here" / "**" / "*.ds")]
    assert absolute == ["a/x.ds:0", "a/x.ds:1", "b/c/x.ds:0", "b/c/x.ds:1"]
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert [document.id for document in read("there/**/*.ds")] == absolute


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    for name in "bca":
        WRITERS["npy <u2"](tmp_path / name, [[1, EOD]])
    found = [document.id for document in read(tmp_path / "b.npy", tmp_path / "*.npy")]
    assert found == ["b.npy:0", "a.npy:0", "c.npy:0"]


def test_formats_may_be_mixed(tmp_path: Path) -> None:
    """The type is that of headerless files only: others name theirs."""
    documents = [[1, 2, EOD], [3, EOD]]
    for kind in ("megatron 4", "datatrove 4", "npy <i8"):
        WRITERS[kind](tmp_path / kind.split()[0], documents)
    WRITERS["headerless uint16"](tmp_path / "plain", documents)
    paths = [tmp_path / pattern for pattern in ("*.bin", "*.ds", "*.npy")]
    found = [document.id for document in read(*paths, dtype="uint16")]
    names = ("megatron.bin", "plain.bin", "datatrove.ds", "npy.npy")
    assert found == [f"{name}:{number}" for name in names for number in (0, 1)]


@pytest.mark.parametrize("kind", ["headerless uint16", "datatrove 2", "megatron 8", "npy <u2"])
def test_memory_is_that_of_a_chunk_and_a_document(tmp_path: Path, kind: str) -> None:
    """Reading 16 MB takes 2, in one index document as in many."""
    tokens = np.ones(8_000_000, "<u2")
    tokens[9_999::10_000] = EOD
    path = WRITERS[kind](tmp_path / "x", [[1, EOD]])
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    ends = [6_000_000, *range(6_010_000, 8_000_001, 10_000)]
    (tmp_path / "x.ds.index").write_bytes(pack("Q", ends))
    (tmp_path / "x.ds.metadata").write_text("t|2\n8000000")
    if kind.startswith("megatron"):
        (tmp_path / "x.idx").write_bytes(megatron_index(8, [8_000_000], [0], [0, 1]))
    tracemalloc.start()
    found = _documents([str(path)], dtype_of(kind), EOD, VOCAB, 0, 2**16)
    assert [len(document.ids) for document in found] == [9_999] * 800
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("kind", WRITERS)
def test_an_id_of_another_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    """Named are the file, the document, the place in it, the id and the range."""
    documents = [[1, EOD], [], [2, EOD, 3, 4, VOCAB, EOD], [5, EOD]]
    path = WRITERS[kind](tmp_path / "x", documents)
    number = numbered(kind, documents).index([3, 4, VOCAB])
    for chunk in (1, 4, CHUNK):
        with pytest.raises(DataError, match="another tokenizer") as caught:
            read(path, dtype=dtype_of(kind), chunk=chunk)
        assert f"'{path}' document {number} has id 120 at position 2" in str(caught.value)
        assert "0 to 119" in str(caught.value)
    assert plain(read(path, dtype=dtype_of(kind), start=number + 1))[-1][1] == [5]
    path = WRITERS[kind](tmp_path / "y", [[1, EOD], [EOD], [VOCAB]])
    assert f"'{path}' document 2 has id 120 at position 0" in refusal(path, dtype=dtype_of(kind))


@pytest.mark.parametrize(
    "kind", ["megatron 2", "megatron 3", "megatron 4", "megatron 5", "npy <i8", "headerless int32"]
)
@pytest.mark.parametrize("token", [-1, -128])
def test_a_negative_id_is_refused(tmp_path: Path, kind: str, token: int) -> None:
    path = WRITERS[kind](tmp_path / "x", [[1, EOD], [2, token, EOD]])
    message = refusal(path, dtype=dtype_of(kind))
    assert f"document 1 has id {token} at position 1" in message


def test_sequences_of_gigabytes_are_adjacent() -> None:
    """Their bytes are more than their lengths' own type can count."""
    lengths, pointers = np.array([2**30, 5], "<i4"), np.array([0, 2**32], "<i8")
    assert _adjacent(lengths, pointers, 4, CHUNK)
    assert not _adjacent(lengths, pointers * 2, 4, CHUNK)


def test_an_id_beyond_32_bits_is_refused(tmp_path: Path) -> None:
    path = WRITERS["npy <i8"](tmp_path / "x", [[2**32 + 1, EOD]])
    assert f"id {2**32 + 1}" in refusal(path)


def test_no_match_is_refused(tmp_path: Path) -> None:
    assert f"no file matches '{tmp_path}/*.bin'" in refusal(tmp_path / "*.bin")
    assert "empty" in refusal()


@pytest.mark.parametrize("name", ["x.idx", "x.ds.index", "x.txt", "x"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    message = refusal(tmp_path / name)
    assert f"'{tmp_path / name}' is none of .bin, .npy, .ds" in message


@pytest.mark.parametrize("suffix", ["bin", "npy", "ds"])
def test_a_folder_or_dead_link_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder.{suffix}").mkdir()
    (tmp_path / f"link.{suffix}").symlink_to(tmp_path / "nothing")
    for name in ("folder", "link"):
        (tmp_path / f"{name}.ds.index").write_bytes(b"")
        assert f"{name}.{suffix}" in refusal(tmp_path / f"{name}.{suffix}", dtype="uint16")


def test_a_headerless_file_needs_a_type(tmp_path: Path) -> None:
    path = WRITERS["headerless uint16"](tmp_path / "x", [[1, EOD]])
    message = refusal(path)
    assert "data.source.dtype is not set" in message
    assert str(path) in message
    assert "uint16, uint32, int32" in message
    assert "float32" in refusal(path, dtype="float32")


def test_datatrove_tokens_need_their_index(tmp_path: Path) -> None:
    path = WRITERS["datatrove 2"](tmp_path / "x", [[1, EOD]])
    (tmp_path / "x.ds.index").unlink()
    assert "has no 'x.ds.index' beside it" in refusal(path)


DATATROVE_FAULTS = {
    "truncated tokens": ("x.ds", pack("H", [1]), "2 bytes"),
    "oversized tokens": ("x.ds", pack("H", [1, 7, 2, 7, 0]), "10 bytes"),
    "half a token": ("x.ds", b"1234567", "7 bytes"),
    "truncated index": ("x.ds.index", pack("Q", [2]), "'4' tokens, the index says 2"),
    "oversized index": ("x.ds.index", pack("Q", [2, 4, 6]), "the index says 6"),
    "half an index": ("x.ds.index", bytes(12), "12 bytes, no multiple of 8"),
    "decreasing index": ("x.ds.index", pack("Q", [5, 4]), "border 1 of"),
    "huge index": ("x.ds.index", pack("Q", [2, 2**64 - 1]), "the index says 18446744073709551615"),
    "count in metadata": ("x.ds.metadata", b"t|2\n5", "'5' tokens"),
    "no count in metadata": ("x.ds.metadata", b"t|2", "'' tokens"),
    "size in metadata": ("x.ds.metadata", b"t|3\n4", "token size '3', allowed: [2, 4]"),
    "other size in metadata": ("x.ds.metadata", b"t|4\n4", "8 bytes"),
    "bytes in metadata": ("x.ds.metadata", bytes(range(256)), "tokens"),
}


@pytest.mark.parametrize("fault", DATATROVE_FAULTS)
def test_damaged_datatrove_files_are_refused(tmp_path: Path, fault: str) -> None:
    path = WRITERS["datatrove 2"](tmp_path / "x", [[1, EOD], [2, EOD]])
    name, data, words = DATATROVE_FAULTS[fault]
    (tmp_path / name).write_bytes(data)
    message = refusal(path)
    assert words in message
    assert str(tmp_path / "x.ds") in message


def test_a_token_size_that_does_not_come_out_is_refused(tmp_path: Path) -> None:
    path = WRITERS["datatrove bare"](tmp_path / "x", [[1, EOD], [2, EOD]])
    for size in (0, 4, 12, 17, 32):
        path.write_bytes(bytes(size))
        assert f"{size} bytes for the 4 tokens of its index, allowed: [2, 4]" in refusal(path)


def index(
    code: int = 8,
    lengths: tuple[int, ...] = (2, 2),
    pointers: tuple[int, ...] = (0, 4),
    borders: tuple[int, ...] = (0, 1, 2),
) -> bytes:
    return megatron_index(code, list(lengths), list(pointers), list(borders))


MEGATRON_FAULTS = {
    "empty": (b"", "no Megatron index"),
    "magic": (b"MMIDIDY" + index()[7:], "no Megatron index"),
    "half a header": (index()[:30], "no Megatron index"),
    "version": (
        index()[:9] + pack("Q", [2]) + index()[17:],
        "version 2 and token type 8, allowed: 1",
    ),
    "no type": (index(code=0), "token type 0, allowed: 1 and one of [1, 2, 3, 4, 5, 8]"),
    "float type": (index(code=7), "token type 7"),
    "truncated": (index()[:-1], "81 bytes, its header says 82"),
    "oversized": (index() + b"1", "83 bytes, its header says 82"),
    "modes": (index() + b"12", "multimodal"),
    "huge counts": (index()[:18] + pack("Q", [2**60, 2**62]) + index()[34:], "82 bytes"),
    "no border": (index(borders=()), "0 document borders"),
    "type of other size": (index(code=5), "within the file's 8"),
    "negative length": (index(lengths=(2, -2)), "sequence 1 of"),
    "long": (index(lengths=(2, 3)), "sequence 1 of"),
    "negative pointer": (index(pointers=(-2, 4)), "sequence 0 of"),
    "most negative pointer": (index(pointers=(-(2**63), 4)), "sequence 0 of"),
    "pointer outside": (index(pointers=(0, 10)), "from byte 10 on"),
    "far pointer": (index(pointers=(0, 2**63 - 2)), "sequence 1 of"),
    "pointer within a token": (index(pointers=(0, 3)), "whole tokens of 2 bytes"),
    "decreasing borders": (index(borders=(0, 2, 1, 2)), "border 2 of"),
    "late first border": (index(borders=(1, 2)), "sequences 1 to 2, allowed: 0 to 2"),
    "early last border": (index(borders=(0, 1)), "sequences 0 to 1, allowed: 0 to 2"),
    "border outside": (index(borders=(0, 3)), "sequences 0 to 3"),
    "negative border": (index(borders=(-1, 2)), "sequences -1 to 2"),
    "larger than the file": (
        index(lengths=(4, 4), pointers=(0, 0), borders=(0, 2)),
        "document 0 of",
    ),
}


@pytest.mark.parametrize("fault", MEGATRON_FAULTS)
def test_damaged_megatron_indices_are_refused(tmp_path: Path, fault: str) -> None:
    path = WRITERS["megatron 8"](tmp_path / "x", [[1, EOD], [2, EOD]])
    assert (tmp_path / "x.idx").read_bytes() == index()
    data, words = MEGATRON_FAULTS[fault]
    (tmp_path / "x.idx").write_bytes(data)
    message = refusal(path)
    assert words in message
    assert str(tmp_path / "x.") in message


def test_damaged_megatron_tokens_are_refused(tmp_path: Path) -> None:
    path = WRITERS["megatron 8"](tmp_path / "x", [[1, EOD], [2, EOD]])
    os.truncate(path, 6)
    assert "sequence 1 of" in refusal(path)
    os.truncate(path, 5)
    assert "5 bytes, no multiple of 2" in refusal(path)


def test_arrays_that_are_no_row_of_integers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((2, 2), "<u2"))
    assert "2-D array of uint16" in refusal(path)
    np.save(path, np.array(3))
    assert "0-D array of int64" in refusal(path)
    for dtype in ("<f4", "?", "<c8", "<m8[s]", "S1"):
        np.save(path, np.ones(3, "i1").astype(dtype))
        assert f"1-D array of {np.dtype(dtype)}" in refusal(path)
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    assert "objects" in refusal(path)


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    path = WRITERS["npy <u2"](tmp_path / "x", [[1, EOD], [2, EOD]])
    data = path.read_bytes()
    damaged = {
        "nothing": b"",
        "headerless": data[128:],
        "truncated": data[:-2],
        "half a header": data[:60],
        "oversized": data + b"12",
        "other count": data.replace(b"(4,)", b"(3,)"),
        "huge count": data.replace(b"(4,), } ", b"(9**18,)")[:128] + data[128:],
        "negative count": data.replace(b"(4,), } ", b"(-4,), }"),
        "archive": b"PK\x03\x04" + data,
        "pickle": b"\x80\x04K\x01.",
    }
    for name, content in damaged.items():
        path.write_bytes(content)
        assert str(path) in refusal(path), name


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip a byte, cut the end off, append some bytes, or repeat a stretch."""
    at = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind < 2:
        return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data + rng.randbytes(rng.choice([1, 2, 4, 8, 100]))
    return data[:at] + data[rng.randrange(len(data)) :]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Never a traceback, an overflow, an id outside the vocabulary or a long wait."""
    rng = random.Random(f"mutants of {kind}")
    path = WRITERS[kind](tmp_path / "x", random_documents(9, count=6))
    sound = {file: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    refusals, begin = [], time.monotonic()
    for _ in range(25):
        file = rng.choice(list(sound))
        # Most of what can go wrong is in the first bytes of an index.
        head = rng.choice([40, 130, None]) if file != path or path.suffix == ".npy" else None
        content = sound[file]
        file.write_bytes(mutate(content[:head], rng) + (content[head:] if head else b""))
        try:
            for document in read(path, dtype=dtype_of(kind), chunk=rng.choice([20, CHUNK])):
                assert document.ids.size
                assert int(document.ids.max()) < VOCAB
                assert EOD not in document.ids
        except DataError as error:
            refusals.append(str(error))
        file.write_bytes(content)
    assert all(str(tmp_path) in message and "\n" not in message for message in refusals)
    assert len(refusals) >= 5
    assert time.monotonic() - begin < 30
