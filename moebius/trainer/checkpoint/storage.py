"""Where the checkpoints of a run lie: a folder, or any URL that fsspec writes to.

In a folder a checkpoint is made under another name and renamed when it is whole. Object stores
cannot rename: there it is a checkpoint once its commit record, which is uploaded last, is there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from moebius.errors import CheckpointError
from moebius.files import sync, write_whole
from moebius.trainer.checkpoint.commit import RECORD_NAME
from moebius.trainer.checkpoint.files import BLOCK, writing

STEP_FOLDER = re.compile(r"step-(\d{8,})")
UNFINISHED = re.compile(r"step-\d{8,}\.tmp")
DAMAGED = ".damaged"


class UnreachableError(CheckpointError):
    """Nothing is known about a checkpoint: that it cannot be read now is no damage to it."""


class Storage(Protocol):
    """Files of checkpoints, each of which is either whole or not there."""

    location: str

    def steps(self) -> list[int]:
        """Those that have a checkpoint, lowest first; whether it is sound is not known."""

    def name(self, step: int) -> str:
        """Of a checkpoint, for messages."""

    def free(self) -> int | None:
        """Bytes that there is room for; None: nobody knows."""

    def begin(self, step: int) -> None:
        """Make room for a checkpoint, without what is left of earlier attempts; one process."""

    def scratch(self, step: int) -> Path:
        """The local folder in which processes write its files."""

    def add(self, step: int, file: str, alive: Callable[[], None]) -> None:
        """A file in the local folder is complete; `alive` is called as it is moved, and may
        raise."""

    def commit(self, step: int, texts: dict[str, str]) -> None:
        """Add some small files, the commit record as the last one; one process. From now on it is a
        checkpoint."""

    def amend(self, step: int, file: str, text: str) -> None:
        """Give a small file of a checkpoint another content at once."""

    def text(self, step: int, file: str) -> bytes:
        """The content of a small file. Raises OSError."""

    def digest(self, step: int, file: str) -> tuple[int, str]:
        """Size and SHA-256 of a file. Raises OSError."""

    def open(self, step: int, file: str) -> Any:
        """A context that gives a local path of a file. Raises OSError."""

    def set_aside(self, step: int) -> None:
        """No longer a checkpoint, but its files stay until others need their names."""

    def remove(self, step: int) -> None:
        """Delete a checkpoint."""

    def written(self, step: int) -> float | None:
        """When a checkpoint was committed, in seconds since 1970; None: nobody knows."""

    def remains(self) -> list[str]:
        """Names of what is no checkpoint: unfinished and set aside ones."""

    def remove_remains(self) -> list[str]:
        """Delete what is no checkpoint; the names."""


def open_storage(location: str) -> Storage:
    """A folder or a URL; nothing is read yet."""
    return RemoteStorage(location) if "://" in location else LocalStorage(Path(location))


def folder_name(step: int) -> str:
    """Of a checkpoint."""
    return f"step-{step:08}"


def _reason(error: Exception) -> str:
    """One line of what a filesystem says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sha256(file: Any) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


class LocalStorage:
    """A folder that all processes of a run see, see `Storage`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def steps(self) -> list[int]:
        """See `Storage`; other names are not touched."""
        names = (STEP_FOLDER.fullmatch(path.name) for path in self.root.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def name(self, step: int) -> str:
        """See `Storage`."""
        return str(self.root / folder_name(step))

    def free(self) -> int | None:
        """See `Storage`."""
        at = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        return shutil.disk_usage(at).free

    def begin(self, step: int) -> None:
        """See `Storage`."""
        with writing(self.scratch(step)):
            for path in self.root.glob("step-*.tmp"):
                if UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path)
            self.scratch(step).mkdir(parents=True)

    def scratch(self, step: int) -> Path:
        """See `Storage`."""
        return self.root / f"{folder_name(step)}.tmp"

    def add(self, step: int, file: str, alive: Callable[[], None]) -> None:
        """See `Storage`; it is where it belongs."""

    def commit(self, step: int, texts: dict[str, str]) -> None:
        """See `Storage`."""
        folder = self.scratch(step)
        final = self.root / folder_name(step)
        with writing(folder):
            for file, text in texts.items():
                write_whole(folder / file, text)
            os.replace(folder, final)
            sync(self.root)

    def amend(self, step: int, file: str, text: str) -> None:
        """See `Storage`."""
        path = self.root / folder_name(step) / file
        with writing(path):
            write_whole(path, text)

    def text(self, step: int, file: str) -> bytes:
        """See `Storage`."""
        return (self.root / folder_name(step) / file).read_bytes()

    def digest(self, step: int, file: str) -> tuple[int, str]:
        """See `Storage`."""
        with (self.root / folder_name(step) / file).open("rb") as opened:
            return _sha256(opened)

    @contextmanager
    def open(self, step: int, file: str) -> Iterator[Path]:
        """See `Storage`."""
        yield self.root / folder_name(step) / file

    def set_aside(self, step: int) -> None:
        """See `Storage`."""
        folder = self.root / folder_name(step)
        aside = folder.with_name(folder.name + DAMAGED)
        with writing(folder):
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            sync(self.root)

    def remove(self, step: int) -> None:
        """See `Storage`; what is left where the process is killed meanwhile is no checkpoint."""
        folder = self.root / folder_name(step)
        doomed = folder.with_name(folder.name + ".tmp")
        with writing(folder):
            os.replace(folder, doomed)
            shutil.rmtree(doomed)

    def written(self, step: int) -> float | None:
        """See `Storage`."""
        try:
            return (self.root / folder_name(step) / RECORD_NAME).stat().st_mtime
        except OSError:
            return None

    def remains(self) -> list[str]:
        """See `Storage`."""
        names = sorted(path.name for path in self.root.glob("step-*"))
        return [
            name
            for name in names
            if UNFINISHED.fullmatch(name)
            or (name.endswith(DAMAGED) and STEP_FOLDER.fullmatch(name.removesuffix(DAMAGED)))
        ]

    def remove_remains(self) -> list[str]:
        """See `Storage`."""
        found = self.remains()
        for name in found:
            with writing(self.root / name):
                shutil.rmtree(self.root / name)
        return found


class RemoteStorage:
    """A prefix of an object store, see `Storage`.

    Files are written to a local folder first; once they are uploaded they are deleted there.
    """

    def __init__(self, url: str) -> None:
        import fsspec.core  # takes a while, and local folders do without

        self.location = url.rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.location)
        except Exception as error:
            raise CheckpointError(f"checkpoint.dir: '{url}': {_reason(error)}") from None
        self.local = Path(tempfile.gettempdir()) / f"moebius-checkpoints-{os.getpid()}"

    def steps(self) -> list[int]:
        """See `Storage`."""
        try:
            self.fs.invalidate_cache()
            found = self.fs.glob(f"{self.root}/step-*/{RECORD_NAME}")
        except Exception as error:  # every filesystem has its own
            raise CheckpointError(f"checkpoint.dir: '{self.location}': {_reason(error)}") from None
        names = (STEP_FOLDER.fullmatch(path.split("/")[-2]) for path in found)
        return sorted(int(name[1]) for name in names if name)

    def name(self, step: int) -> str:
        """See `Storage`."""
        return f"{self.location}/{folder_name(step)}"

    def free(self) -> int | None:
        """See `Storage`."""
        return None

    def begin(self, step: int) -> None:
        """See `Storage`."""
        folder = f"{self.root}/{folder_name(step)}"
        with self._writing(step):
            self._clear(folder)
        for path in (self.root, folder):
            with suppress(Exception):  # there already, or a store that has no folders
                self.fs.mkdir(path, create_parents=False)

    def _clear(self, folder: str) -> None:
        self.fs.invalidate_cache()
        if self.fs.exists(folder):
            self.fs.rm(folder, recursive=True)

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every filesystem has its own
            raise CheckpointError(
                f"checkpoint: cannot write '{self.name(step)}': {_reason(error)}"
            ) from None

    def scratch(self, step: int) -> Path:
        """See `Storage`."""
        folder = self.local / folder_name(step)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add(self, step: int, file: str, alive: Callable[[], None]) -> None:
        """See `Storage`."""
        from fsspec.callbacks import Callback

        told = Callback(hooks={"alive": lambda *args, **kwargs: alive()})
        path = self.scratch(step) / file
        with self._writing(step):
            self.fs.put_file(str(path), self._path(step, file), callback=told)
        path.unlink()
        with suppress(OSError):  # there are other files
            path.parent.rmdir()
            self.local.rmdir()

    def commit(self, step: int, texts: dict[str, str]) -> None:
        """See `Storage`."""
        with self._writing(step):
            for file, text in texts.items():
                self.fs.pipe_file(self._path(step, file), text.encode())

    def _path(self, step: int, file: str) -> str:
        return f"{self.root}/{folder_name(step)}/{file}"

    def amend(self, step: int, file: str, text: str) -> None:
        """See `Storage`."""
        with self._writing(step):
            self.fs.pipe_file(self._path(step, file), text.encode())

    def text(self, step: int, file: str) -> bytes:
        """See `Storage`."""
        with self._reading(step, file):
            content: bytes = self.fs.cat_file(self._path(step, file))
        return content

    def digest(self, step: int, file: str) -> tuple[int, str]:
        """See `Storage`."""
        with self._reading(step, file), self.fs.open(self._path(step, file), "rb") as opened:
            return _sha256(opened)

    @contextmanager
    def open(self, step: int, file: str) -> Iterator[Path]:
        """See `Storage`; of a download, which is deleted at the end."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            with self._reading(step, file):
                self.fs.get_file(self._path(step, file), str(path))
            yield path

    @contextmanager
    def _reading(self, step: int, file: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # every filesystem has its own
            raise UnreachableError(
                f"checkpoint: cannot read '{self.name(step)}/{file}': {_reason(error)}",
                "try again when it can be reached; nothing was changed",
            ) from error

    def set_aside(self, step: int) -> None:
        """See `Storage`."""
        record = self._path(step, RECORD_NAME)
        with self._writing(step):
            self.fs.mv(record, record + DAMAGED)

    def remove(self, step: int) -> None:
        """See `Storage`; the record first, so that what is left is no checkpoint."""
        with self._writing(step):
            self.fs.rm_file(self._path(step, RECORD_NAME))
            self._clear(f"{self.root}/{folder_name(step)}")

    def written(self, step: int) -> float | None:
        """See `Storage`."""
        try:
            time: float = self.fs.modified(self._path(step, RECORD_NAME)).timestamp()
        except Exception:  # every filesystem has its own, and some have no times
            return None
        return time

    def remains(self) -> list[str]:
        """See `Storage`; the name does not tell an unfinished one from one that was set aside."""
        there = {folder_name(step) for step in self.steps()}
        folders = self.fs.glob(f"{self.root}/step-*")
        names = sorted({path.rstrip("/").rpartition("/")[2] for path in folders} - there)
        return [name for name in names if STEP_FOLDER.fullmatch(name)]

    def remove_remains(self) -> list[str]:
        """See `Storage`."""
        found = self.remains()
        for name in found:
            with self._writing(int(name.removeprefix("step-"))):
                self._clear(f"{self.root}/{name}")
        return found
