"""Files that are either whole or not there, and their hashes."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a file that readers see with its old content or with all of the new one."""
    with replaced(path, path.with_name(f"{path.name}.tmp")) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path, temporary: Path) -> Iterator[Path]:
    """Let a file be written under a temporary name beside its own, which it gets once it is whole.

    Where that fails, nothing is left of it.
    """
    try:
        yield temporary
        sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def exclusive(path: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file, which is made, as long as the context lasts.

    Where another process holds it, `wait` is called and then waited; without one BlockingIOError is
    raised. The lock ends with the process, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def seal(tree: dict[str, Any]) -> str:
    """JSON with a checksum of itself under `checksum`."""
    return json.dumps(tree | {"checksum": _checksum(tree)}, indent=1)


def unseal(text: bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError where it is damaged or was edited."""
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(tree, dict) or tree.pop("checksum", None) != _checksum(tree):
        raise ValueError("its checksum is wrong")
    return tree


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
