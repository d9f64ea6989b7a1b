"""Putting a process under the watch of its node."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moebius.trainer.watch.board import Board, board_path
from moebius.trainer.watch.progress import Progress, WatchdogConfig
from moebius.trainer.watch.watchdog import dump_on_signal, start

ATTEMPT = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
"""what tells the attempts of a launcher apart"""


@contextmanager
def watched(limits: WatchdogConfig, folder: Path) -> Iterator[Progress]:
    """Where this process is, seen by a watchdog that its node's first process starts.

    Reports of the watchdog go to `folder`. What a launcher says is read from the environment.
    """
    if not limits.enabled or not Path("/proc/self/stat").exists():  # it needs Linux
        yield Progress(limits)
        return
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank = _number("LOCAL_RANK", rank)
    local_size = _number("LOCAL_WORLD_SIZE", size)
    # One machine may pretend to be several nodes, and start the same run again at the same port.
    words = [os.environ.get(name, "") for name in ATTEMPT] + [str(rank - local_rank)]
    if size == 1:
        words.append(str(os.getpid()))
    board = Board(board_path("-".join(words), os.getppid()), rank, local_rank, local_size)
    with dump_on_signal(board):
        progress = Progress(limits, board)
        if local_rank == 0:
            start(board, folder, orphans=launched)
        try:
            yield progress
        finally:
            progress.done()
            board.close()


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
