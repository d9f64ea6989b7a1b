"""Where the processes of a node are: a small file of shared memory, one place per process.

Each process writes its own place only, and nobody waits for anybody. A place holds the last two
records in turn, each with a checksum: a record that is read while it is written, or whose writer
was stopped in the middle of it, is not valid, and the one before it counts.
"""

import mmap
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

BODY = struct.Struct("<QQQQqqqdd?16s")
CHECKSUM = struct.Struct("<I")
RECORD_SIZE = 128
PLACE_SIZE = 2 * RECORD_SIZE
SECTION_SIZE = 16
"""bytes of the longest name of a section"""
NO_STEP = -1
TRIES = 10
"""a writer that writes twice while its place is read may tear both records"""


class Record(NamedTuple):
    """What one process says of itself."""

    pid: int
    started: int
    """start time of the process in ticks since boot, which tells it from a later one of its pid"""
    parent: int
    """pid of the process that started it, the launcher"""
    total: int
    """marks it has made"""
    rank: int
    step: int
    """-1: before the first"""
    marks: int
    """marks it has made since its step began"""
    time: float
    """of the last mark, by the monotonic clock, which all processes of a node share"""
    allowed: float
    """seconds that may pass until the next mark; 0: any number"""
    done: bool
    """it has ended its work and is no longer watched"""
    section: str


class Board:
    """The file of one node and attempt in the hands of one of its processes."""

    def __init__(self, path: Path, rank: int, local_rank: int, local_size: int) -> None:
        self.path = path
        self.rank = rank
        self.total = 0
        self.pid, self.parent = os.getpid(), os.getppid()
        self.started = process_state(self.pid)[1]
        self._memory = _create(path, local_size * PLACE_SIZE)
        self._begin = local_rank * PLACE_SIZE
        # Two zeroed records are not valid: nothing of an earlier process stays.
        self._memory[self._begin : self._begin + PLACE_SIZE] = bytes(PLACE_SIZE)

    def write(
        self, section: str, step: int, marks: int, allowed: float, *, done: bool = False
    ) -> None:
        """Say where this process is now; from a process forked from it, nothing is written."""
        if os.getpid() != self.pid:
            return
        self.total += 1
        body = BODY.pack(
            self.pid,
            self.started,
            self.parent,
            self.total,
            self.rank,
            step,
            marks,
            time.monotonic(),
            allowed,
            done,
            section.encode("ascii"),
        )
        record = body + CHECKSUM.pack(zlib.crc32(body))
        begin = self._begin + self.total % 2 * RECORD_SIZE
        self._memory[begin : begin + len(record)] = record

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._memory.close()


class BoardReader:
    """The file of one node and attempt, read only."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def records(self) -> list[Record | None]:
        """The last valid record of every place; None where no process has written one yet."""
        return [self._newest(begin) for begin in range(0, len(self._memory), PLACE_SIZE)]

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._memory.close()

    def _newest(self, place: int) -> Record | None:
        for _ in range(TRIES):
            found = [self._record(place), self._record(place + RECORD_SIZE)]
            valid = [record for record in found if record is not None]
            if valid:
                return max(valid, key=lambda record: record.total)
        return None

    def _record(self, begin: int) -> Record | None:
        raw = self._memory[begin : begin + BODY.size + CHECKSUM.size]
        body, checksum = raw[: BODY.size], CHECKSUM.unpack(raw[BODY.size :])[0]
        if zlib.crc32(body) != checksum:
            return None
        *fields, section = BODY.unpack(body)
        return Record._make([*fields, section.rstrip(b"\0").decode("ascii")])


def board_path(attempt: str, launcher: int) -> Path:
    """Where the board of an attempt lies on this node.

    `attempt` tells it from the other attempts of its launcher, and `launcher` is the pid of the
    process that starts those of this node: two runs on a node never share a board.
    """
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    name = "".join(c if c.isalnum() else "-" for c in attempt)
    return folder / f"moebius-{os.getuid()}-{launcher}-{name}.board"


def process_state(pid: int) -> tuple[str, int]:
    """The letter of a process's state and its start time; ("", 0) where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    fields = stat[stat.rindex(b")") + 1 :].split()  # the name in parentheses may hold anything
    return fields[0].decode(), int(fields[19])


def _create(path: Path, size: int) -> mmap.mmap:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
