"""Runs that are started again until they are through, by processes that are really killed.

A launcher like torchrun's: it starts the processes of an attempt, kills the others when one has
died, and starts the next attempt. Processes are forked from this one, which has imported torch.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moebius.trainer.cli import main
from moebius.trainer.recovery.faults import VARIABLE

FORK = multiprocessing.get_context("fork")
GRACE = 5.0
"""seconds"""


@dataclass(frozen=True)
class Attempt:
    """How one start of a run ended."""

    exit_codes: list[int | None]
    """by rank; negative: the signal that killed it"""
    seconds: float
    output: str

    @property
    def succeeded(self) -> bool:
        return all(code == 0 for code in self.exit_codes)


def attempt(
    words: Sequence[str], world_size: int, number: int, log: Path, timeout: float = 120
) -> Attempt:
    """Start `moebius` on so many processes, and kill all once one has failed: at once where it was
    killed, after a moment where it has ended by itself, in which others may come to the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RESTART_COUNT": str(number),
        VARIABLE: "1",
    }
    began = time.monotonic()
    processes = [
        FORK.Process(target=enter, args=(list(words), world, rank, log))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = end = began + timeout
    while any(process.is_alive() for process in processes):
        codes = [process.exitcode for process in processes if process.exitcode]
        if codes:
            end = min(end, time.monotonic() + (0 if min(codes) < 0 else GRACE))
        if time.monotonic() >= end:
            _end([p.pid for p in processes if p.is_alive() and p.pid])
        time.sleep(0.02)
    for process in processes:
        process.join()
    assert time.monotonic() < deadline, log.read_text()
    output = log.read_text()
    return Attempt([p.exitcode for p in processes], time.monotonic() - began, output)


def until_done(
    words: Sequence[str],
    layouts: Sequence[tuple[int, Sequence[str]]],
    folder: Path,
    max_attempts: int,
) -> list[Attempt]:
    """Attempts until one succeeds, each with the next of some (world size, options)."""
    attempts: list[Attempt] = []
    folder.mkdir(parents=True, exist_ok=True)
    while not attempts or not attempts[-1].succeeded:
        number = len(attempts)
        assert number < max_attempts, attempts[-1].output
        world_size, options = layouts[number % len(layouts)]
        log = folder / f"attempt-{number}.log"
        attempts.append(attempt([*words, *options], world_size, number, log))
    return attempts


def _end(pids: Sequence[int]) -> None:
    """As torchrun does; those that are blocked have no time to say goodbye."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def enter(words: list[str], world: dict[str, str], rank: int, log: Path) -> None:
    """Be one of the processes: run `moebius`, write what it says to a file, and end."""
    torch.set_num_threads(1)
    os.environ |= world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    code: Any = 1
    try:
        code = main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
