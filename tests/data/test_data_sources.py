"""Documents of every kind of source, and what is said when they cannot be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebius.data.config import FilesSource, StdlibSource
from moebius.data.sources import documents
from moebius.errors import DataError

TEXTS = ["import os\n\nprint(os.name)\n", "naïve café ☕\n", "x = 1"]


def write_all(folder: Path) -> dict[str, str]:
    """The same texts as jsonl, json, parquet and one txt file each; returns glob patterns."""
    rows = [{"text": text} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return {
        "jsonl": f"{folder}/*.jsonl",
        "json": f"{folder}/rows.json",
        "parquet": f"{folder}/rows.parquet",
        "txt": f"{folder}/?.txt",
    }


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "txt"])
def test_every_format_gives_the_same_texts_in_order(tmp_path: Path, kind: str) -> None:
    source = FilesSource(paths=(write_all(tmp_path)[kind],))
    found = list(documents(source))
    assert [document.text for document in found] == TEXTS
    assert len({document.id for document in found}) == len(TEXTS)
    assert found == list(documents(source))


def test_files_of_one_name_in_two_folders_keep_their_identity(tmp_path: Path) -> None:
    """Ids hold enough of the path to tell documents apart: the split is chosen by them."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.txt").write_text(name)
    found = list(documents(FilesSource(paths=(f"{tmp_path}/*/part.txt",))))
    assert [document.text for document in found] == ["a", "b"]
    assert found[0].id != found[1].id


def test_stdlib_is_real_code_without_installed_packages() -> None:
    found = list(documents(StdlibSource()))
    ids = [document.id for document in found]
    assert len(found) > 500
    assert ids == sorted(ids, key=lambda name: Path(name).parts)
    assert {"argparse.py", "json/decoder.py"} <= set(ids)
    assert not any("site-packages" in name or name.startswith("/") for name in ids)
    text = next(document.text for document in found if document.id == "argparse.py")
    assert "class ArgumentParser" in text


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.csv", "x", "text", "is none of .txt, .jsonl, .json, .parquet"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "text", "cannot read"),
        ("a.jsonl", '{"body": "x"}\n', "text", "has no 'text', only ['body']"),
        ("a.jsonl", '{"text": 3}\n', "text", "'text' of"),
        ("a.parquet", "no parquet", "text", "cannot read"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, content: str, field: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        list(documents(FilesSource(paths=(str(path),), text_field=field)))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches '.*nothing-\*\.txt'"):
        list(documents(FilesSource(paths=(f"{tmp_path}/nothing-*.txt",))))


def test_a_hub_data_set_without_network_is_one_line_with_a_way_out() -> None:
    code = (
        "from moebius.data.config import HubSource; from moebius.data.sources import documents\n"
        "from moebius.errors import DataError\n"
        "try: list(documents(HubSource(name='no/such-set')))\n"
        "except DataError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = result.stdout.splitlines()
    assert line.startswith("data.source.name: cannot stream 'no/such-set': ")
    assert line.endswith("local files work without a network: data.source.kind=files")
