"""Prepares a corpus in processes that are killed: run by test_killed_preparation.

It imports what a preparation needs and forks for each attempt, so that attempts take no start.
Arguments: what to do, a DataConfig as JSON, processes, and a number. It prints JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from moebius.data import encode, prepare
from moebius.data.config import DataConfig
from moebius.errors import DataError

VOCAB_SIZE = 300
SECONDS = 5.0
"""after which a process that is still there is one that stays"""


def main(action: str, config: str, processes: str, number: str) -> None:
    os.fsync = lambda descriptor: None  # a kill loses nothing that the system has
    prepare.JOURNAL_SECONDS = 0.0
    prepare.SHARD_TOKENS = 1000
    encode.BATCH_DOCUMENTS = 10
    encode.SMALL_BYTES = 0
    import_module("datasets")
    actions = {"random": kill_at_random, "once": kill_once, "sweep": kill_at_operations}
    act = actions[action]
    print(json.dumps(act(DataConfig.model_validate_json(config), int(processes), int(number))))


def forked(action: Callable[[], None]) -> int:
    """A process of a group of its own that does something."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            action()
        except DataError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def make(config: DataConfig, processes: int, progress: prepare.Progress) -> None:
    workshop = prepare.Workshop(lambda line: None, progress, processes)
    prepare.prepare(config, VOCAB_SIZE, workshop)


def journaled(config: DataConfig) -> int:
    """Documents that are safe."""
    path = Path(config.dir) / "progress.json"
    return int(json.loads(path.read_text())["documents"]) if path.is_file() else 0


def kill_after(config: DataConfig, processes: int, batches: int, seconds: float) -> tuple[int, int]:
    """Kill a preparation some batches and a moment after its start; its id and status."""
    reading, writing = os.pipe()
    pid = forked(lambda: make(config, processes, lambda done, total: os.write(writing, b".")))
    os.close(writing)
    while batches and os.read(reading, 1):
        batches -= 1
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.close(reading)
    return os.waitpid(pid, 0)


def kill_at_random(config: DataConfig, processes: int, seed: int) -> dict[str, Any]:
    """Kill again and again until it ends before: what was safe each time."""
    rng, safe = random.Random(seed), []
    while True:
        moment = rng.choice((0.0, 0.001, 0.003, 0.01))
        pid, status = kill_after(config, processes, rng.randint(1, 4), moment)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if not os.WIFSIGNALED(status):
            return {"safe": safe, "status": os.waitstatus_to_exitcode(status)}
        safe.append(journaled(config))


def kill_once(config: DataConfig, processes: int, batches: int) -> dict[str, Any]:
    """Kill the main process: how many others there were, and how many stay."""
    reading, writing = os.pipe()

    def count(done: int, total: int | None) -> None:
        os.write(writing, bytes([len(members(os.getpid())) - 1]))

    group = forked(lambda: make(config, processes, count))
    started = max(os.read(reading, 1)[0] for _ in range(batches))
    os.kill(group, signal.SIGKILL)
    os.waitpid(group, 0)
    end = time.monotonic() + SECONDS
    while (alive := members(group)) and time.monotonic() < end:
        time.sleep(0.01)
    if alive:
        os.killpg(group, signal.SIGKILL)
    return {"started": started, "left": len(alive)}


def members(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(of) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def kill_at_operations(config: DataConfig, processes: int, stride: int) -> dict[str, Any]:
    """Kill at every so many operations on files of the corpus, and go on to the end each time: how
    many operations there are, and what differs from the corpus in `<dir>-whole`."""
    whole = content(Path(f"{config.dir}-whole"))
    number, wrong = 0, []
    while True:
        shutil.rmtree(config.dir, ignore_errors=True)
        first = forked(partial(killed_at, number, config, processes))
        _, status = os.waitpid(first, 0)
        if not os.WIFSIGNALED(status):
            return {"operations": number, "wrong": wrong}
        second = forked(partial(make, config, processes, prepare.no_progress))
        _, status = os.waitpid(second, 0)
        found = content(Path(config.dir))
        if status or found != whole:
            names = [n for n in sorted(found | whole) if found.get(n) != whole.get(n)]
            wrong.append([number, os.waitstatus_to_exitcode(status), names])
        number += stride


def killed_at(number: int, config: DataConfig, processes: int) -> None:
    """Prepare up to an operation on a file: opening, renaming, deleting, or a batch."""
    seen = 0

    def count() -> None:
        nonlocal seen
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def watch(event: str, values: tuple[Any, ...]) -> None:
        of_files = event in ("open", "os.rename", "os.remove", "sqlite3.connect")
        if of_files and config.dir in str(values[0]):
            count()

    sys.addaudithook(watch)
    make(config, processes, lambda done, total: count())


def content(folder: Path) -> dict[str, bytes]:
    """The files of a corpus, without what a kill at the very end may leave beside them."""
    files = [path for path in folder.iterdir() if path.suffix != ".lengths"]
    return {path.name: path.read_bytes() for path in files if path.name != "progress.json"}


if __name__ == "__main__":
    main(*sys.argv[1:])
