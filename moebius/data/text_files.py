"""Rows of .txt, .jsonl and .json files, as they are: readers that guess types change texts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextFile:
    """A file that is one document."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _opened(self.path) as file:
            text = file.read().decode("utf-8-sig")
        if text:
            yield {"text": text}


class JsonFile:
    """A file of JSON objects: one in each line, or all in one list.

    Raises ValueError for anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._offset = 0

    def state_dict(self) -> dict[str, int] | None:
        """Where the next line begins; None: rows have to be counted from the file's beginning."""
        return {"offset": self._offset} if self._offset else None

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there: rows before it are not given out again."""
        self._start = state["offset"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _opened(self.path) as file:
            if self._start:
                file.seek(self._start)
            elif file.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                yield from self._list(file)
                return
            offset, is_plain = self._start, not _is_compressed(self.path)
            for line in file:
                text = (line if offset else line.removeprefix(BYTE_ORDER_MARK)).decode()
                offset += len(line)
                if is_plain:
                    self._offset = offset
                if text.strip():
                    yield _object(text)

    def _list(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        rows = _parsed(file.read().decode("utf-8-sig"))
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"an element of the list is no object but {type(row).__name__}")
            yield row


def _is_compressed(path: Path) -> bool:
    return path.suffix not in (".txt", ".jsonl", ".json")


def _opened(path: Path) -> io.BufferedReader:
    if not _is_compressed(path):
        return path.open("rb")
    return io.BufferedReader(fsspec.open(str(path.absolute()), "rb", compression="infer").open())


def _object(text: str) -> dict[str, Any]:
    row = _parsed(text)
    if not isinstance(row, dict):
        raise ValueError(f"a line is no object but {type(row).__name__}")
    return row


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
