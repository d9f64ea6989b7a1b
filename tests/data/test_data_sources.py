"""Documents come complete, in a fixed order and under ids that depend on no machine."""

import bz2
import gzip
import importlib.util
import itertools
import json
import lzma
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebius.data.config import FilesSource, HubSource, HubStreamSource, StdlibSource
from moebius.data.sources import Document, Documents, TextSource, documents
from moebius.errors import DataError

TEXTS = [
    "def main():\n    return 0\n",
    'tab\t, quote " and \\ backslash',
    "naïve Größe, 数据, שלום, 🧵👩‍🚀, e\u0301",
    "line\u2028separator, next\x85line, form\x0cfeed",
]


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return list(documents(StdlibSource()))


def source_of(*paths: Path | str, **fields: Any) -> FilesSource:
    return FilesSource(paths=tuple(str(path) for path in paths), **fields)


def read(*paths: Path | str, **fields: Any) -> list[Document]:
    return list(documents(source_of(*paths, **fields)))


def texts(*paths: Path | str) -> list[str]:
    return [document.text for document in read(*paths)]


def refusal(*paths: Path | str, **fields: Any) -> str:
    """The message with which a source is refused; it is one line."""
    with pytest.raises(DataError) as caught:
        read(*paths, **fields)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of the kind that the suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def compressed(path: Path, suffix: str) -> Path:
    """The file in a compressed one beside it, which takes its place."""
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    target = path.with_name(path.name + suffix)
    with opened(target, "wb") as file:
        file.write(path.read_bytes())
    path.unlink()
    return target


def test_stdlib_gives_the_modules_of_the_interpreter(stdlib: list[Document]) -> None:
    """The text is that of the file, under its path below the standard library."""
    by_id = {document.id: document.text for document in stdlib}
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py", "email/mime/text.py"):
        assert by_id[name] == (root / name).read_text(encoding="utf-8")
    assert len(stdlib) > 400


def test_stdlib_ids_are_unique_relative_and_sorted(stdlib: list[Document]) -> None:
    ids = [document.id for document in stdlib]
    assert len(set(ids)) == len(ids)
    assert not any(name.startswith("/") or ".." in name.split("/") for name in ids)
    assert [tuple(name.split("/")) for name in ids] == sorted(tuple(n.split("/")) for n in ids)


def test_stdlib_has_no_installed_packages(stdlib: list[Document]) -> None:
    folders = {part for document in stdlib for part in document.id.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "torch", "numpy", "pytest"}


def test_stdlib_reads_the_same_twice(stdlib: list[Document]) -> None:
    assert list(documents(StdlibSource())) == stdlib


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_rows_give_their_texts_in_order(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"text": text, "n": 1} for text in TEXTS])
    assert texts(path) == TEXTS


def test_an_arrow_file_may_have_a_footer_or_none(tmp_path: Path) -> None:
    """The format of files and the one of streams, which `datasets` caches."""
    table = pa.Table.from_pylist([{"text": text} for text in TEXTS])
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert texts(tmp_path / "a.arrow") == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_compressed_file_gives_the_rows_of_the_file(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"text": text} for text in TEXTS])
    found = read(compressed(path, compression))
    assert [document.text for document in found] == TEXTS
    assert [document.id for document in found] == [
        f"rows{suffix}{compression}:{number}" for number in range(len(TEXTS))
    ]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
def test_a_compressed_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    path = compressed(tmp_path / "a.txt", compression)
    assert texts(path) == ["\n".join(TEXTS)]
    assert [d.text for d in read(path, text_field="body")] == ["\n".join(TEXTS)]


def test_a_zst_file_is_read_or_says_what_is_missing(tmp_path: Path) -> None:
    """Its library is not among those of Python."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    target = tmp_path / "rows.jsonl.zst"
    if pa.Codec.is_available("zstd"):
        with pa.output_stream(target, compression="zstd") as file:
            file.write(path.read_bytes())
    if importlib.util.find_spec("zstandard") is None:
        assert "zst" in refusal(target)
    else:
        assert texts(target) == TEXTS


def test_bytes_are_told_where_they_are_known(tmp_path: Path) -> None:
    """Of plain files the size, of parquet about that of the rows; compressed ones do not tell."""
    rows = [{"text": text} for text in TEXTS * 50]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.txt").write_text("12345")
    table = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table, use_dictionary=False)
    sizes = [documents(source_of(path)).num_bytes for path in (plain, tmp_path / "b.txt", table)]
    assert sizes[:2] == [plain.stat().st_size, 5]
    assert sizes[2] is not None
    assert 0.5 < sizes[2] / sum(len(row["text"].encode()) for row in rows) < 2
    both = documents(source_of(plain, tmp_path / "b.txt"))
    assert both.num_bytes == plain.stat().st_size + 5
    packed = compressed(plain, ".gz")
    assert documents(source_of(packed)).num_bytes is None
    assert documents(source_of(packed, tmp_path / "b.txt")).num_bytes is None


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    assert texts(tmp_path / "*.txt") == TEXTS


def test_a_text_file_larger_than_any_read_buffer_is_one_document(tmp_path: Path) -> None:
    text = "ein Wörterbuch\n" * 1_000_000
    path = tmp_path / "large.txt"
    path.write_text(text, encoding="utf-8")
    assert texts(path) == [text]


def test_a_jsonl_file_larger_than_any_read_buffer_gives_every_row(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    rows = [f"{number} {long}" for number in range(8)]
    path = write_rows(tmp_path / "large.jsonl", [{"text": text} for text in rows])
    assert [text[:2] for text in texts(path)] == [text[:2] for text in rows]
    assert all(len(text) == len(long) + 2 for text in texts(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_text_field_chooses_the_column(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "no", "body": text} for text in TEXTS]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    assert [document.text for document in read(path, text_field="body")] == TEXTS


def test_text_files_have_no_columns_to_choose(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole file")
    assert [document.text for document in read(tmp_path / "a.txt", text_field="body")] == [
        "whole file"
    ]


def test_matches_of_a_pattern_are_sorted_and_patterns_keep_their_order(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):  # written in another order than read
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{row}"} for row in range(2)])
        (tmp_path / f"{name}.txt").write_text(name)
    expected = ["a", "b", "c", "a0", "a1", "b0", "b1", "c0", "c1"]
    assert texts(tmp_path / "*.txt", tmp_path / "*.jsonl") == expected
    assert texts(tmp_path / "*.jsonl", tmp_path / "*.txt") == expected[3:] + expected[:3]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts(tmp_path / "b.txt", tmp_path / "*.txt") == ["b", "a"]


def test_two_stars_reach_nested_folders(tmp_path: Path) -> None:
    for name in ("z.txt", "inner/y.txt", "inner/deep/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(texts(tmp_path / "**" / "*.txt")) == [
        "inner/deep/x.txt",
        "inner/y.txt",
        "z.txt",
    ]


def test_paths_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert texts("here.txt") == ["here"]


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path: Path) -> None:
    found = []
    for place in ("one", "two/deeper"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        write_rows(folder / "rows.jsonl", [{"text": text} for text in TEXTS])
        found.append(read(folder / "*.jsonl"))
    assert found[0] == found[1]
    assert len({document.id for document in found[0]}) == len(TEXTS)


def test_files_of_the_same_name_have_ids_of_their_own(tmp_path: Path) -> None:
    """The id decides the split: one id for all would put a whole corpus in one of them."""
    for number in range(5):
        (tmp_path / f"book{number}").mkdir()
        (tmp_path / f"book{number}" / "text.txt").write_text(f"book {number}")
    found = read(tmp_path / "*" / "text.txt")
    assert [document.text for document in found] == [f"book {number}" for number in range(5)]
    assert len({document.id for document in found}) == 5


@pytest.mark.parametrize("name", ["a[1].txt", "b*.txt", "c?.txt"])
def test_a_file_name_may_hold_the_characters_of_patterns(tmp_path: Path, name: str) -> None:
    """What a pattern found is a file, not another pattern."""
    for other in ("a1.txt", "b2.txt", "c3.txt"):
        (tmp_path / other).write_text(other)
    (tmp_path / name).write_text(name)
    assert sorted(texts(tmp_path / "*.txt")) == sorted([name, "a1.txt", "b2.txt", "c3.txt"])


def test_an_empty_file_holds_no_rows(tmp_path: Path) -> None:
    """One empty part among others is no reason to stop."""
    (tmp_path / "0.jsonl").write_text("")
    write_rows(tmp_path / "1.jsonl", [{"text": "a"}])
    assert texts(tmp_path / "*.jsonl") == ["a"]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
def test_an_empty_file_that_is_compressed_holds_no_rows(tmp_path: Path, compression: str) -> None:
    (tmp_path / "0.jsonl").write_text("")
    compressed(tmp_path / "0.jsonl", compression)
    compressed(write_rows(tmp_path / "1.jsonl", [{"text": "a"}]), compression)
    assert texts(tmp_path / "*.jsonl*") == ["a"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_without_rows_holds_none(tmp_path: Path, suffix: str) -> None:
    rows = pa.table({"text": pa.array([], pa.string())})
    if suffix == ".parquet":
        pq.write_table(rows, tmp_path / "0.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "0.arrow", rows.schema) as writer:
            writer.write_table(rows)
    write_rows(tmp_path / f"1{suffix}", [{"text": "a"}])
    assert texts(tmp_path / f"*{suffix}") == ["a"]


def test_a_pattern_without_matches_is_refused(tmp_path: Path) -> None:
    """Even when other patterns do match."""
    (tmp_path / "a.txt").write_text("a")
    message = refusal(tmp_path / "a.txt", tmp_path / "missing-*.txt")
    assert "data.source.paths" in message
    assert str(tmp_path / "missing-*.txt") in message


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text\na\n")
    message = refusal(tmp_path / "table.csv")
    assert str(tmp_path / "table.csv") in message
    for suffix in (".txt", ".jsonl", ".json", ".parquet", ".arrow", ".gz", ".zst"):
        assert suffix in message


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.xz", "a.gz", "a.csv.gz", "gz", ".gz"])
def test_an_unknown_kind_of_compressed_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"PAR1", mtime=0))
    message = refusal(tmp_path / name)
    assert str(tmp_path / name) in message
    assert "may be compressed" in message


@pytest.mark.parametrize("content", ['{"text": "a"}\n{text\n', '{"text": "a"}\n{"text": "b'])
def test_a_malformed_json_line_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 but no table"),
        ("b.parquet", b""),
        ("a.txt", b"latin-1: \xe9"),
        ("a.json", b"3"),
        ("a.arrow", b"ARROW1 but no table"),
        ("a.jsonl.gz", b"not compressed"),
        ("b.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20]),
        ("c.txt.xz", lzma.compress(b"text" * 1000)[:-20]),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n{text\n', mtime=0)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_a_missing_text_field_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"title": "a", "body": "b"}])
    message = refusal(path, text_field="content")
    assert "data.source.text_field" in message
    for part in ("'content'", "title", "body", str(path)):
        assert part in message


@pytest.mark.parametrize("value", [7, None, ["a"], {"a": "b"}])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_field_that_is_not_text_is_refused(tmp_path: Path, suffix: str, value: object) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"text": value}])
    message = refusal(path)
    assert "data.source.text_field" in message
    assert "'text'" in message
    assert str(path) in message


def test_one_row_without_text_among_many_is_refused_by_its_number(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}, {"text": None}])
    assert f"'{path}' row 2" in refusal(path)


# Ids from the source.


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_id_field_gives_the_ids(tmp_path: Path, suffix: str) -> None:
    """Text or numbers, as they are; the same ones twice, too: who writes a corpus leaves out."""
    ids = ["a", "b/c", "a", ""]
    rows = [{"text": text, "key": name} for text, name in zip(TEXTS, ids, strict=True)]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    found = read(path, id_field="key")
    assert [document.id for document in found] == ids
    assert [document.text for document in found] == TEXTS
    rows = [{"text": text, "key": number} for number, text in enumerate(TEXTS)]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    assert [document.id for document in read(path, id_field="key")] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("value", [None, ["a"], {"a": "b"}])
def test_an_id_that_is_none_is_refused(tmp_path: Path, value: object) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "key": value}])
    message = refusal(path, id_field="key")
    assert "data.source.id_field" in message
    assert "'key'" in message
    assert f"'{path}' row 0" in message


def test_a_missing_id_field_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "key": "b"}])
    message = refusal(path, id_field="id")
    assert "data.source.id_field" in message
    assert "key" in message


def test_a_name_with_txt_inside_is_no_text_file(tmp_path: Path) -> None:
    """What counts is the last suffix that is not of a compression."""
    row = {"body": "the text", "key": "k", "text": "other"}
    path = write_rows(tmp_path / "dump.txt.jsonl", [row])
    assert read(path, text_field="body", id_field="key") == [Document("k", "the text")]


def test_text_files_have_their_names_for_ids(tmp_path: Path) -> None:
    """Beside files with ids."""
    (tmp_path / "a.txt").write_text("a text")
    write_rows(tmp_path / "b.jsonl", [{"text": "a row", "key": "k"}])
    found = read(tmp_path / "a.txt", tmp_path / "b.jsonl", id_field="key")
    assert found == [Document("a.txt:0", "a text"), Document("k", "a row")]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as `datasets` finds it on the hub, in a local folder."""
    folder = tmp_path_factory.mktemp("data_set")
    write_rows(folder / "train.jsonl", [{"text": text} for text in TEXTS])
    write_rows(folder / "test.jsonl", [{"text": "of the test split"}])
    return folder


def test_a_data_set_gives_the_rows_of_its_split(data_set: Path) -> None:
    train = list(documents(HubSource(name=str(data_set))))
    assert [document.text for document in train] == TEXTS
    assert len({document.id for document in train}) == len(TEXTS)
    test = list(documents(HubSource(name=str(data_set), split="test")))
    assert [document.text for document in test] == ["of the test split"]


@pytest.mark.parametrize("limit", [1, 3, 4, 9])
def test_max_documents_limits_a_data_set(data_set: Path, limit: int) -> None:
    source = HubSource(name=str(data_set), max_documents=limit)
    assert [document.text for document in documents(source)] == TEXTS[:limit]


def test_a_data_set_may_be_downloaded_first(data_set: Path, tmp_path: Path) -> None:
    """The same documents; in a process of its own, which keeps its copy in the test's folder."""
    program = (
        "import sys\n"
        "from moebius.data.config import HubSource\n"
        "from moebius.data.sources import Documents\n"
        "source = HubSource(name=sys.argv[1], streaming=False)\n"
        "found = list(Documents(source))\n"
        "streamed = list(Documents(HubSource(name=sys.argv[1])))\n"
        "assert len(found) == 4 and found == streamed\n"
        "for number in range(5):\n"
        "    first = Documents(source)\n"
        "    reading = iter(first)\n"
        "    for _ in range(number):\n"
        "        next(reading)\n"
        "    assert list(Documents(source, first.state())) == found[number:], number\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(data_set)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "USE_TORCH": "0"},
        timeout=60,
        check=True,
    )


@pytest.mark.parametrize("change", [{"split": "missing"}, {"subset": "missing"}])
def test_a_part_that_a_data_set_lacks_is_refused(data_set: Path, change: dict[str, str]) -> None:
    with pytest.raises(DataError, match="missing") as caught:
        list(documents(HubSource(name=str(data_set), **change)))
    assert "\n" not in str(caught.value)
    assert str(data_set) in str(caught.value)


def test_without_a_network_local_files_are_suggested(tmp_path: Path) -> None:
    """In a process of its own: the hub's libraries read their environment once."""
    program = (
        "from moebius.data.config import HubSource\n"
        "from moebius.data.sources import documents\n"
        "from moebius.errors import DataError\n"
        "try:\n"
        "    next(iter(documents(HubSource(name='nobody/no-data-set'))))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "USE_TORCH": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert "data.source.name" in lines[0]
    assert "'nobody/no-data-set'" in lines[0]
    assert "data.source.kind=files" in lines[0]


def test_local_files_are_read_without_any_connection(tmp_path: Path) -> None:
    """The interpreter itself reports every look-up and connection of a process of its own."""
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.txt").write_text("b")
    others = [write_rows(tmp_path / f"c.{kind}", [{"text": kind}]) for kind in ("arrow", "parquet")]
    others += [compressed(write_rows(tmp_path / "d.jsonl", [{"text": "gz"}]), ".gz")]
    program = (
        "import sys\n"
        "seen = []\n"
        "def watch(event, values):\n"
        "    if event in ('socket.getaddrinfo', 'socket.connect'):\n"
        "        seen.append(values[0])\n"
        "sys.addaudithook(watch)\n"
        "from moebius.data.config import FilesSource\n"
        "from moebius.data.sources import documents\n"
        "print([document.text for document in documents(FilesSource(paths=sys.argv[1:]))])\n"
        "print(seen)\n"
    )
    environment = {**os.environ, "USE_TORCH": "0"}  # whose import by `datasets` takes seconds
    removed = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            *map(str, [tmp_path / "a.jsonl", tmp_path / "b.txt", *others]),
        ],
        env={name: value for name, value in environment.items() if name not in removed},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["['a', 'b', 'arrow', 'parquet', 'gz']", "[]"]


# Going on from a state.


def numbered(first: int, count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {first + n}", "key": f"key {first + n}"} for n in range(count)]


def write_all_kinds(folder: Path) -> dict[str, TextSource]:
    """Sources of every kind, by name, of about six documents each; some in several files."""
    for suffix in (".jsonl", ".json", ".parquet", ".arrow"):
        write_rows(folder / f"rows{suffix}", numbered(0, 5))
        for number in range(3):
            write_rows(folder / f"part{number}{suffix}", numbered(10 * number, 1 + number))
    (folder / "part3.jsonl").write_text("")
    write_rows(folder / "part4.jsonl", numbered(50, 1))
    compressed(write_rows(folder / "packed.jsonl", numbered(0, 5)), ".gz")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"file {number}")
    data_set = folder / "data_set"
    data_set.mkdir()
    for number in range(3):
        write_rows(data_set / f"train-{number}.parquet", numbered(10 * number, 2 + number))
    kinds = ("jsonl", "json", "parquet", "arrow")
    sources: dict[str, TextSource] = {kind: source_of(folder / f"rows.{kind}") for kind in kinds}
    sources |= {f"several {kind}": source_of(folder / f"part*.{kind}") for kind in kinds}
    sources |= {
        "gz": source_of(folder / "packed.jsonl.gz"),
        "txt": source_of(folder / "*.txt"),
        "mixed": source_of(folder / "*.txt", folder / "rows.parquet", folder / "part1.jsonl"),
        "ids": source_of(folder / "rows.jsonl", folder / "part2.parquet", id_field="key"),
        "hub": HubSource(name=str(data_set)),
        "hub, limited": HubSource(name=str(data_set), max_documents=7, id_field="key"),
        "hub stream": HubStreamSource(kind="hf-stream", name=str(data_set)),
    }
    return sources


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextSource]:
    return write_all_kinds(tmp_path_factory.mktemp("kinds"))


KINDS = (
    *("jsonl", "json", "parquet", "arrow", "several jsonl", "several json", "several parquet"),
    *("several arrow", "gz", "txt", "mixed", "ids", "hub", "hub, limited", "hub stream"),
)


def taken(source: Documents, count: int) -> list[Document]:
    """The next documents; reading is not ended."""
    return list(itertools.islice(iter(source), count))


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a journal or a checkpoint."""
    back: dict[str, Any] = json.loads(json.dumps(state))
    return back


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_from_any_place(all_kinds: dict[str, TextSource], kind: str) -> None:
    source = all_kinds[kind]
    whole = list(documents(source))
    assert len(whole) >= 3
    assert len({document.id for document in whole}) == len(whole) or kind == "ids"
    for place in range(len(whole) + 1):
        first = Documents(source)
        assert taken(first, place) == whole[:place]
        state = through_json(first.state())
        assert list(Documents(source, state)) == whole[place:]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_again_and_again(all_kinds: dict[str, TextSource], kind: str) -> None:
    """Also from a state that is asked for before anything was read."""
    source = all_kinds[kind]
    whole = list(documents(source))
    state, found = None, []
    for _ in range(0, len(whole), 2):
        state = through_json(Documents(source, state).state())
        reading = Documents(source, state)
        found += taken(reading, 2)
        state = through_json(reading.state())
    assert found == whole
    assert list(Documents(source, state)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_after_the_end_has_nothing_left(
    all_kinds: dict[str, TextSource], kind: str
) -> None:
    reading = documents(all_kinds[kind])
    assert list(reading)
    assert list(Documents(all_kinds[kind], through_json(reading.state()))) == []


def test_states_that_are_asked_for_while_reading_do_not_disturb(
    all_kinds: dict[str, TextSource],
) -> None:
    source = all_kinds["mixed"]
    whole, reading = list(documents(source)), Documents(source)
    states = [reading.state()]
    found = []
    for document in reading:
        found.append(document)
        states.append(through_json(reading.state()))
    assert found == whole
    for place, state in enumerate(states):
        assert list(Documents(source, state)) == whole[place:]


def test_reading_the_standard_library_goes_on(stdlib: list[Document]) -> None:
    place, first = len(stdlib) // 2, Documents(StdlibSource())
    assert taken(first, place) == stdlib[:place]
    assert list(Documents(StdlibSource(), through_json(first.state()))) == stdlib[place:]


def test_reading_a_file_larger_than_any_read_buffer_goes_on(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    rows = [{"text": f"{number} {long}"} for number in range(8)]
    source = source_of(write_rows(tmp_path / "large.jsonl", rows))
    for place in (2, 5, 7):
        first = Documents(source)
        assert len(taken(first, place)) == place
        rest = list(Documents(source, through_json(first.state())))
        assert [document.text[:2] for document in rest] == [f"{n} " for n in range(place, 8)]
        assert [document.id for document in rest] == [f"large.jsonl:{n}" for n in range(place, 8)]


def test_an_error_after_going_on_names_the_same_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*numbered(0, 5), {"text": None, "key": "k"}])
    first = Documents(source_of(path))
    taken(first, 3)
    with pytest.raises(DataError, match="row 5"):
        list(Documents(source_of(path), through_json(first.state())))
