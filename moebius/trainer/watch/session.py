"""Putting a process under the watch of its node."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moebius.trainer.watch.board import Board, board_path
from moebius.trainer.watch.progress import Progress, WatchdogConfig
from moebius.trainer.watch.watchdog import dump_on_signal, start


@contextmanager
def watched(limits: WatchdogConfig, folder: Path) -> Iterator[Progress]:
    """Where this process is, seen by a watchdog that its node's first process starts.

    Reports of the watchdog go to `folder`. What a launcher says is read from the environment.
    """
    if not limits.enabled or not Path("/proc/self/stat").exists():  # it needs Linux
        yield Progress(limits)
        return
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    words = [os.environ.get(name, "") for name in names]
    attempt = "-".join(words) if launched else f"{words[2]}-{_number('WORLD_SIZE', 1)}"
    if _number("WORLD_SIZE", 1) == 1:
        attempt += f"-{os.getpid()}"
    local_rank = _number("LOCAL_RANK", _number("RANK", 0))
    local_size = _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE", 1))
    board = Board(board_path(attempt, os.getppid()), _number("RANK", 0), local_rank, local_size)
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
