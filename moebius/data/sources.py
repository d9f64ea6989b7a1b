"""Documents from where they are: the standard library, local files, the hub."""

import glob
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moebius.data.config import FilesSource, HubSource, StdlibSource
from moebius.errors import DataError

FILE_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Document(NamedTuple):
    """A text with an identity that does not depend on the machine or the order of reading."""

    id: str
    text: str


def documents(source: StdlibSource | FilesSource | HubSource) -> Iterator[Document]:
    """All documents of a source, in a fixed order. Raises DataError for anything unreadable."""
    if isinstance(source, StdlibSource):
        return _stdlib(Path(sysconfig.get_paths()["stdlib"]))
    if isinstance(source, FilesSource):
        return _files(source)
    return _hub(source)


def _stdlib(root: Path) -> Iterator[Document]:
    """Every UTF-8 module below the standard library; installed packages are not part of it."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if "site-packages" in name.parts or "dist-packages" in name.parts:
            continue
        try:
            yield Document(name.as_posix(), path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            continue  # test inputs of the interpreter in other encodings


def _files(source: FilesSource) -> Iterator[Document]:
    paths: list[Path] = []
    for pattern in source.paths:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(
                f"data.source.paths: no file matches '{pattern}'",
                "paths are relative to the working directory",
            )
        paths.extend(Path(match) for match in matches)
    # Identity by the place below the common folder: files of one name in two folders differ, and
    # the same files elsewhere do not.
    root = os.path.commonpath([path.parent.absolute() for path in paths])
    for path in dict.fromkeys(paths):  # two patterns may match one file
        yield from _file(path, os.path.relpath(path, root), source.text_field)


def _file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    import datasets

    kind = FILE_KINDS.get(path.suffix)
    if kind is None:
        raise DataError(f"data.source.paths: '{path}' is none of {', '.join(FILE_KINDS)}")
    if kind != "parquet" and path.is_file() and path.stat().st_size == 0:
        return
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it would log what is raised below
    # Else every file, a local one too, is counted by a request to the hub.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        rows = datasets.load_dataset(
            kind, data_files=glob.escape(str(path)), split="train", streaming=True, **options
        )
        for number, row in enumerate(rows):
            column = "text" if kind == "text" else text_field
            yield Document(f"{name}:{number}", _text(row, column, f"'{path}' row {number}"))
    except DataError:
        raise
    except Exception as error:  # the readers' own errors name neither file nor remedy
        raise DataError(f"data.source.paths: cannot read '{path}': {_first_line(error)}") from error


def _hub(source: HubSource) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(source.name, source.subset, split=source.split, streaming=True)
        for number, row in enumerate(rows):
            if number == source.max_documents:
                return
            where = f"'{source.name}' row {number}"
            yield Document(f"{source.name}:{number}", _text(row, source.text_field, where))
    except DataError:
        raise
    except Exception as error:  # network, credentials, a data set that does not exist
        raise DataError(
            f"data.source.name: cannot stream '{source.name}': {_first_line(error)}",
            "local files work without a network: data.source.kind=files",
        ) from error


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"data.source.text_field: {where} has no '{field}', only {list(row)}")
    if not isinstance(row[field], str):
        raise DataError(f"data.source.text_field: '{field}' of {where} is not text")
    return str(row[field])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
