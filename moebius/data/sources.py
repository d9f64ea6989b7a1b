"""Documents from where they are: the standard library, local files, the hub."""

import glob
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moebius.data.config import FilesSource, HubSource, HubStreamSource, StdlibSource
from moebius.data.text_files import JsonFile, TextFile
from moebius.errors import DataError

FILE_KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
TextSource = StdlibSource | FilesSource | HubSource | HubStreamSource


class Document(NamedTuple):
    """A text with an identity that does not depend on the machine or the order of reading."""

    id: str
    text: str


class Rows(NamedTuple):
    """A part of a source: a file, or a data set."""

    name: str
    """begins the ids of its documents"""
    where: str
    """names it in errors"""
    open: Callable[[], Any]
    """gives an iterable of rows; a data set that can go on from a state where it has one"""
    num_bytes: int | None
    """of its text, about; None: unknown"""


class Documents:
    """All documents of a source, in a fixed order, from its beginning or from a saved state on.

    Raises DataError for anything unreadable.
    """

    def __init__(self, source: TextSource, state: dict[str, Any] | None = None) -> None:
        self.source = source
        self.parts = _parts(source)
        start = state or {}
        self._part, self._row = int(start.get("part", 0)), int(start.get("row", 0))
        self._rows_state: dict[str, Any] | None = start.get("rows")
        self._rows: Any = None

    @property
    def num_bytes(self) -> int | None:
        """Bytes of text, about; None: unknown."""
        sizes = [part.num_bytes for part in self.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def state(self) -> dict[str, Any]:
        """Where to go on after the last document that was given out; JSON values."""
        rows = self._rows.state_dict() if hasattr(self._rows, "state_dict") else None
        return {"part": self._part, "row": self._row, "rows": rows}

    def __iter__(self) -> Iterator[Document]:
        limit = self.source.max_documents if isinstance(self.source, HubSource) else None
        for part in self.parts[self._part :]:
            yield from self._documents(part, limit)
            self._rows, self._rows_state = None, None
            self._part, self._row = self._part + 1, 0

    def _documents(self, part: Rows, limit: int | None) -> Iterator[Document]:
        try:
            self._rows = part.open()
            skipped = 0
            if self._rows_state is not None:
                self._rows.load_state_dict(self._rows_state)
                skipped = self._row
            for number, row in enumerate(self._rows, skipped):
                if number == limit:
                    return
                if number < self._row:
                    continue
                document = _document(row, self.source, part, number)
                self._row = number + 1
                yield document
        except DataError:
            raise
        except Exception as error:  # the readers' own errors name neither file nor remedy
            raise _unreadable(self.source, part, error) from error


def documents(source: TextSource) -> Documents:
    """All documents of a source, in a fixed order. Raises DataError for anything unreadable."""
    return Documents(source)


def matching(patterns: tuple[str, ...]) -> list[tuple[Path, str]]:
    """The files that some patterns match, with the place of each below their common folder.

    That makes an identity: files of one name in two folders differ, and the same files elsewhere
    do not. Raises DataError where a pattern matches nothing.
    """
    paths: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(
                f"data.source.paths: no file matches '{pattern}'",
                "paths are relative to the working directory",
            )
        paths.extend(Path(match) for match in matches)
    root = os.path.commonpath([path.parent.absolute() for path in paths])
    # Two patterns may match one file.
    return [(path, os.path.relpath(path, root)) for path in dict.fromkeys(paths)]


def _parts(source: TextSource) -> list[Rows]:
    if isinstance(source, StdlibSource):
        return list(_stdlib(Path(sysconfig.get_paths()["stdlib"])))
    if isinstance(source, FilesSource):
        return [_file(path, name) for path, name in matching(source.paths)]
    # A folder has its own name wherever it lies.
    name = Path(source.name).resolve().name if os.path.isdir(source.name) else source.name
    return [Rows(name, f"'{source.name}'", partial(_hub, source), None)]


def _stdlib(root: Path) -> Iterator[Rows]:
    """Every module below the standard library; installed packages are not part of it."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if "site-packages" not in name.parts and "dist-packages" not in name.parts:
            yield Rows(name.as_posix(), f"'{path}'", partial(_module, path), path.stat().st_size)


def _module(path: Path) -> list[dict[str, str]]:
    try:
        return [{"text": path.read_bytes().decode("utf-8")}]
    except UnicodeDecodeError:
        return []  # test inputs of the interpreter in other encodings


def _file(path: Path, name: str) -> Rows:
    bare = _bare(path)
    kind = FILE_KINDS.get(bare.suffix)
    if kind is None or (bare != path and kind in ("parquet", "arrow")):
        raise DataError(
            f"data.source.paths: '{path}' is none of {', '.join(FILE_KINDS)}",
            f"all but .parquet and .arrow may be compressed ({', '.join(COMPRESSED)})",
        )
    if not path.is_file():
        raise DataError(f"data.source.paths: '{path}' is no file", "name files only")
    size = path.stat().st_size if bare == path else None
    if kind == "text":
        return Rows(name, f"'{path}'", partial(TextFile, path), size)
    if kind == "json":
        return Rows(name, f"'{path}'", partial(JsonFile, path), size)
    if kind == "parquet":
        size = _parquet_bytes(path)
        if size == 0:  # which `datasets` cannot read
            return Rows(name, f"'{path}'", list, 0)
    return Rows(name, f"'{path}'", partial(_load_file, kind, path), size)


def _bare(path: Path) -> Path:
    """The name of a file before it was compressed."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _parquet_bytes(path: Path) -> int | None:
    """Bytes of all columns, uncompressed; None for what is no parquet, which is said later."""
    from pyarrow import ArrowException, parquet

    try:
        found = parquet.ParquetFile(path).metadata
        if found.num_rows == 0:
            return 0
        sizes = [found.row_group(i).total_byte_size for i in range(found.num_row_groups)]
        return int(sum(sizes))
    except (ArrowException, OSError, ValueError):
        return None


def _load_file(kind: str, path: Path) -> Any:
    import datasets

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it would log what is raised below
    # Else every file, a local one too, is counted by a request to the hub.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets.load_dataset(
        kind, data_files=glob.escape(str(path)), split="train", streaming=True
    )


def _hub(source: HubSource | HubStreamSource) -> Any:
    import datasets

    streaming = isinstance(source, HubStreamSource) or source.streaming
    found = datasets.load_dataset(
        source.name, source.subset, split=source.split, streaming=streaming
    )
    return found if streaming else found.to_iterable_dataset()


def _document(row: dict[str, Any], source: TextSource, part: Rows, number: int) -> Document:
    if isinstance(source, StdlibSource):
        return Document(part.name, row["text"])
    where = f"{part.where} row {number}"
    is_text = isinstance(source, FilesSource) and _bare(Path(part.name)).suffix == ".txt"
    text = _text(row, "text" if is_text else source.text_field, "text_field", where)
    id_field = None if isinstance(source, HubStreamSource) or is_text else source.id_field
    if id_field is None:
        return Document(f"{part.name}:{number}", text)
    return Document(str(_value(row, id_field, "id_field", where)), text)


def _text(row: dict[str, Any], field: str, option: str, where: str) -> str:
    value = _value(row, field, option, where)
    if not isinstance(value, str):
        raise DataError(f"data.source.{option}: '{field}' of {where} is not text")
    return value


def _value(row: dict[str, Any], field: str, option: str, where: str) -> str | int:
    if field not in row:
        raise DataError(f"data.source.{option}: {where} has no '{field}', only {list(row)}")
    value = row[field]
    if not isinstance(value, str | int):
        raise DataError(f"data.source.{option}: '{field}' of {where} is not text")
    return value


def _unreadable(source: TextSource, part: Rows, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(source, HubSource | HubStreamSource):
        return DataError(
            f"data.source.name: cannot stream {part.where}: {reason}",
            "local files work without a network: data.source.kind=files",
        )
    return DataError(f"data.source.paths: cannot read {part.where}: {reason}")
