"""Documents come complete, in a fixed order and under ids that depend on no machine."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebius.data.config import FilesSource, HubSource, StdlibSource
from moebius.data.sources import Document, documents
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


def read(*paths: Path | str, text_field: str = "text") -> list[Document]:
    source = FilesSource(paths=tuple(str(path) for path in paths), text_field=text_field)
    return list(documents(source))


def texts(*paths: Path | str) -> list[str]:
    return [document.text for document in read(*paths)]


def refusal(*paths: Path | str, text_field: str = "text") -> str:
    """The message with which a source is refused; it is one line."""
    with pytest.raises(DataError) as caught:
        read(*paths, text_field=text_field)
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
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


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


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_give_their_texts_in_order(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"text": text, "n": 1} for text in TEXTS])
    assert texts(path) == TEXTS


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


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
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
    for suffix in (".txt", ".jsonl", ".json", ".parquet"):
        assert suffix in message


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
        "    next(documents(HubSource(name='nobody/no-data-set')))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
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
    removed = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")],
        env={name: value for name, value in os.environ.items() if name not in removed},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["['a', 'b']", "[]"]
