"""Where a prepared corpus lies: a local folder, or any URL that fsspec reads, with local copies.

The copies of one URL form a folder of the cache, shared by all processes of a machine. Beside each
file lies its lock, held while the file is downloaded; the lock's content is the version downloaded.
A download in progress is named `<file>@<size>`, so that others know the room it will take.
"""

import errno
import fcntl
import hashlib
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import Field

from moebius.config import ConfigNode
from moebius.errors import DataError
from moebius.files import sync

SHARD = ".bin"
"""suffix of the files that count towards the limit; all others are small"""
WITHOUT_VERSION = frozenset({"name", "size", "type", "url", "mimetype", "partial"})
"""what filesystems tell of a file that stays the same when its content changes, or may"""
POLL_SECONDS = 0.1


class CacheConfig(ConfigNode):
    """Local copies of a corpus that lies at a URL."""

    dir: str | None = None
    """folder on a disk of this machine; null: $XDG_CACHE_HOME/moebius or ~/.cache/moebius"""
    max_gigabytes: float = Field(50.0, gt=0)
    """shards beyond this are dropped, the longest unused first"""


def open_storage(location: str, cache: CacheConfig) -> "Storage":
    """The corpus at a local folder or URL; nothing is read yet."""
    max_bytes = round(cache.max_gigabytes * 1e9)
    if "://" not in location:
        return Storage(location, Path(location), max_bytes)
    url = location.rstrip("/")
    # A name to read and a hash to tell apart; credentials before an `@` are not for file names.
    slug = re.sub(r"[^A-Za-z0-9]+", "-", url.rpartition("@")[2]).strip("-")[-80:]
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Storage(location, _cache_root(cache) / f"{slug}-{digest}", max_bytes)


def _cache_root(cache: CacheConfig) -> Path:
    if cache.dir is not None:
        return Path(cache.dir)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "moebius"
    try:
        return Path.home() / ".cache" / "moebius"
    except RuntimeError as error:
        raise DataError(
            "data.cache.dir: null, but this user has no home folder", "set data.cache.dir"
        ) from error


@dataclass(frozen=True)
class Storage:
    """The files of one corpus, as local paths."""

    location: str
    folder: Path
    """where fetched files lie"""
    max_bytes: int
    """limit of the shards in the whole cache"""

    @property
    def is_remote(self) -> bool:
        """Whether files are downloaded."""
        return "://" in self.location

    def fetch(self, name: str, *, fresh: bool = False) -> Path:
        """Local path of a file, downloaded unless it is here.

        `fresh` asks the remote whether the file has changed since. A local file need not exist.
        Any number of processes and threads may fetch at once. A shard stays here until newer ones
        need its room: map or open it right away; what is mapped or open stays readable.
        Raises DataError.
        """
        path = self.folder / name
        if not self.is_remote:
            return path
        # Names come from a manifest that was downloaded too; they must not lead out of the folder.
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(
                f"data.dir: '{self.location}' names a file {name!r}",
                "allowed are letters, digits, _ . -",
            )
        try:
            if fresh or not _use(path):
                self._update(path, fresh)
        except OSError as error:
            reason = error.strerror or _first_line(error)
            raise DataError(
                f"data.cache.dir: cannot write to '{self.folder.parent}': {reason}",
                "make room there or choose another folder",
            ) from error
        return path

    def _update(self, path: Path, fresh: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_lock_of(path)) as lock:
            # Another process may have downloaded the file while this one waited.
            if _use(path) and not fresh:
                return
            remote = _Remote.find(self.location, path.name)
            lock.seek(0)
            if _use(path) and remote.version and lock.read() == remote.version:
                return
            self._download(remote, path)
            # In this order, a process killed in between leaves a file that counts as changed.
            lock.truncate(0)
            lock.write(remote.version)

    def _download(self, remote: "_Remote", path: Path) -> None:
        for remains in path.parent.glob(f"{path.name}@*"):  # of a process that was killed
            remains.unlink()
        temporary = path.with_name(f"{path.name}@{remote.size}")
        try:
            if path.suffix == SHARD:
                self._reserve(temporary, remote)
            remote.copy_to(temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, remote: "_Remote") -> None:
        """Create the temporary file of a shard as soon as there is room for all of it.

        Deletes the shards used longest ago, of whatever corpus. That is safe where a process has
        one mapped: the system keeps the content of a file until its last user lets go.
        """
        if remote.size > self.max_bytes:
            raise DataError(
                f"data.cache.max_gigabytes: {self.max_bytes / 1e9:g}, but '{remote.url}' alone has "
                f"{remote.size:,} bytes",
                f"set it to {math.ceil(remote.size / 1e8) / 10} or more",
            )
        root = self.folder.parent
        while True:
            with _locked(root / "lock"):
                # In this order, a download that ends in between counts twice rather than not.
                free = self.max_bytes - remote.size - _bytes_under_way(root)
                if free >= 0:
                    _shrink(root, free)
                    temporary.touch()
                    return
            # The downloads under way leave no room, even without any other shard.
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class _Remote:
    """A file of a corpus at a URL."""

    url: str
    fs: Any
    path: str
    size: int
    version: str
    """changes with the content; empty where the filesystem tells nothing that would"""

    @classmethod
    def find(cls, location: str, name: str) -> "_Remote":
        import fsspec.core  # takes a while, and local corpora do without

        url = f"{location.rstrip('/')}/{name}"
        with _explained(url):
            # Here and not once: connections that a forked process inherits do not work.
            fs, root = fsspec.core.url_to_fs(location)
            path = f"{root.rstrip('/')}/{name}"
            fs.invalidate_cache()  # some filesystems remember sizes and times
            info = fs.info(path)
            size = info["size"]
        if info["type"] == "directory" or size is None:
            raise DataError(f"data.dir: '{url}' must be a file whose size the server tells")
        return cls(url, fs, path, size, _version(info))

    def copy_to(self, path: Path) -> None:
        """Download the whole file."""
        with _explained(self.url):
            self.fs.get_file(self.path, str(path))
        size = path.stat().st_size
        if size != self.size:
            raise DataError(
                f"data.dir: got {size:,} bytes of '{self.url}', which has {self.size:,}",
                "the connection broke or the file is being written, try again",
            )


def _version(info: dict[str, Any]) -> str:
    """Not fsspec's `ukey`, which is a request of its own and for HTTP never changes."""
    told = {key: info[key] for key in sorted(info.keys() - WITHOUT_VERSION)}
    return hashlib.sha256(f"{info['size']} {told}".encode()).hexdigest() if told else ""


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns whatever a filesystem raises into one line; fsspec names a package that is missing."""
    try:
        yield
    except Exception as error:  # every filesystem has its own, for network and permissions alike
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the disk of the cache is full
        reason = _first_line(error)
        if isinstance(error, FileNotFoundError):
            # Its text is often the path alone, and for HTTP any failure is one, with a cause.
            cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
            reason = f"not found{cause}"
        raise DataError(f"data.dir: cannot read '{url}': {reason}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _use(path: Path) -> bool:
    """Note that a file is in use, and tell whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[TextIO]:
    """Hold a lock file, which is open to read and to append; it ends with the process at latest.

    Opened anew each time, it also keeps threads of one process apart. Lock files are never deleted:
    two processes could hold one name's old and new file.
    """
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        try:
            yield file
            file.flush()
        finally:
            # Closing is not enough: a child forked meanwhile has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def _bytes_under_way(root: Path) -> int:
    """Bytes that downloads of shards will take; deletes what killed processes left of theirs."""
    total = 0
    for temporary in root.glob(f"*/*{SHARD}@*"):
        name, _, size = temporary.name.rpartition("@")
        try:
            with _locked(_lock_of(temporary.with_name(name)), fcntl.LOCK_NB):
                temporary.unlink(missing_ok=True)
        except BlockingIOError:
            total += int(size)
    return total


def _shrink(root: Path, max_bytes: int) -> None:
    """Delete shards, the longest unused first, until the others have at most `max_bytes`."""
    shards = []
    # Only files with a lock are ours: the cache may have been put where other data lies.
    for lock in root.glob(f"*/*{SHARD}.lock"):
        path = lock.with_suffix("")
        if path.exists():
            stat = path.stat()
            shards.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if total <= max_bytes:
            return
        path.unlink()
        total -= size
