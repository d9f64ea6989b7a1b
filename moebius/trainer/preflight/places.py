"""Whether all nodes see the folder of a run and that of its checkpoints, and how fast these are."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from moebius.errors import CheckpointError
from moebius.model.decoder import Decoder
from moebius.parallel.together import from_first, gathered
from moebius.parallel.world import is_main, rank, world_size
from moebius.trainer.checkpoint.storage import RemoteStorage, open_storage
from moebius.trainer.checkpoint.tensors import optimizer_shapes
from moebius.trainer.config import RunConfig
from moebius.trainer.optim import muon_roles
from moebius.trainer.preflight.facts import Place

LARGEST = 32 << 20
"""bytes that a process writes at most"""
TOTAL = 2 << 30
"""bytes that all processes write together at most, if that leaves each SMALLEST"""
SMALLEST = 1 << 20
VISIBLE = 10.0
"""seconds in which a file of one node has to be seen on the others: network file systems remember
for some time that there was nothing"""


class Folder(Protocol):
    """Where small files are put for a moment. All methods raise OSError or CheckpointError."""

    def make(self) -> None:
        """It is there."""

    def put(self, name: str, content: bytes) -> None:
        """On disk when it returns."""

    def get(self, name: str) -> bytes:
        """The content, not from this node's memory where that can be avoided."""

    def has(self, name: str) -> bool:
        """Whether it is seen here."""

    def drop(self, name: str) -> None:
        """Delete a file."""


class LocalFolder:
    """A folder, see `Folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """See `Folder`."""
        self.path.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, content: bytes) -> None:
        """See `Folder`."""
        with (self.path / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def get(self, name: str) -> bytes:
        """See `Folder`."""
        with (self.path / name).open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read()

    def has(self, name: str) -> bool:
        """See `Folder`."""
        return (self.path / name).exists()

    def drop(self, name: str) -> None:
        """See `Folder`."""
        (self.path / name).unlink(missing_ok=True)


class RemoteFolder:
    """A prefix of an object store, see `Folder`."""

    def __init__(self, storage: RemoteStorage) -> None:
        self.fs, self.root = storage.fs, storage.root

    def make(self) -> None:
        """See `Folder`."""
        self._do(lambda: self.fs.makedirs(self.root, exist_ok=True))

    def put(self, name: str, content: bytes) -> None:
        """See `Folder`."""
        self._do(lambda: self.fs.pipe_file(f"{self.root}/{name}", content))

    def get(self, name: str) -> bytes:
        """See `Folder`."""
        content: bytes = self._do(lambda: self.fs.cat_file(f"{self.root}/{name}"))
        return content

    def has(self, name: str) -> bool:
        """See `Folder`."""
        self.fs.invalidate_cache()
        return bool(self._do(lambda: self.fs.exists(f"{self.root}/{name}")))

    def drop(self, name: str) -> None:
        """See `Folder`."""
        self._do(lambda: self.fs.rm_file(f"{self.root}/{name}"))

    def _do(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # every filesystem has its own
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(lines[0]) from None


@dataclass(frozen=True)
class Wanted:
    """A place that a run writes to."""

    name: str
    where: str
    probe: int
    """bytes that each process writes and reads; 0: only a token"""


def wanted(config: RunConfig) -> list[Wanted]:
    """The places of a run; checkpoints are what takes time."""
    probe = min(LARGEST, max(SMALLEST, TOTAL // world_size()))
    location = config.checkpoint.dir or str(Path(config.run_dir) / "checkpoints")
    return [Wanted("run_dir", config.run_dir, 0), Wanted("checkpoint.dir", location, probe)]


def look_at(place: Wanted) -> Place:
    """Make it, see whether a file of the main process comes to be seen, write and read; a
    collective call. What is left are empty folders."""
    token = f"preflight-{from_first(os.urandom(8).hex())}"
    found = Place(place.name, place.where)
    try:
        folder = _open(place.where)
        if is_main():
            folder.make()
            folder.put(token, token.encode())
    except (OSError, CheckpointError) as error:
        found = replace(found, problem=_reason(error))
    # A place that the main process cannot write to is not looked for.
    if problem := from_first(found.problem):
        return replace(found, problem=problem)
    if not found.problem:
        found = _tried(folder, found, token, place.probe)
    gathered(None)  # all have seen the token
    if is_main():
        folder.drop(token)
    return found


def _tried(folder: Folder, found: Place, token: str, size: int) -> Place:
    """A place as this process finds it."""
    try:
        seen = _seen_after(folder, token)
        if seen is None:
            return found
        found = replace(found, seen_after=seen, free=open_storage(found.where).free())
        own = f"{token}-{rank()}"
        content = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
        try:
            began = time.perf_counter()
            folder.put(own, content)
            written = time.perf_counter() - began
            began = time.perf_counter()
            if folder.get(own) != content:
                return replace(found, problem="what was written is not what is read")
            read = time.perf_counter() - began
        finally:
            folder.drop(own)
    except (OSError, CheckpointError) as error:
        return replace(found, problem=_reason(error))
    return replace(found, written=size / written, read=size / read)


def _seen_after(folder: Folder, token: str) -> float | None:
    began = time.perf_counter()
    while not folder.has(token):
        if time.perf_counter() - began > VISIBLE:
            return None
        time.sleep(0.1)
    return time.perf_counter() - began


def _open(where: str) -> Folder:
    storage = open_storage(where)
    return RemoteFolder(storage) if isinstance(storage, RemoteStorage) else LocalFolder(Path(where))


def _reason(error: OSError | CheckpointError) -> str:
    """One line; a file system says which file it is about."""
    if isinstance(error, OSError) and error.errno is not None:
        number = errno.errorcode.get(error.errno, str(error.errno))
        return f"{os.strerror(error.errno)} ({number})"
    return str(error)


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of a checkpoint: parameters, buffers and moments in fp32."""
    with torch.device("meta"):
        decoder = Decoder(config.model)
    weights: int = sum(t.numel() * t.element_size() for t in decoder.state_dict().values())
    moments = optimizer_shapes(decoder, muon_roles(config.optim)).values()
    return weights + torch.float32.itemsize * sum(torch.Size(shape).numel() for shape in moments)


def saved_steps(config: RunConfig) -> int:
    """Checkpoints that are there already; where they cannot be listed, none."""
    try:
        return len(open_storage(wanted(config)[1].where).steps())
    except CheckpointError:
        return 0
