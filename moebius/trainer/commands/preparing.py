"""How preparing a corpus is shown: a bar with MB/s and the time left, or a line now and then."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moebius.data.prepare import Workshop

LINE_SECONDS = 10.0
"""between lines, where there is no terminal"""


@contextmanager
def workshop(console: Console, processes: int | None = None) -> Iterator[Workshop]:
    """What `prepare` works with; by default as many processes as this one may use cores."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    count = processes or len(os.sched_getaffinity(0))
    if not console.is_terminal:
        yield Workshop(say, _Lines(console), count)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tokenizing", total=None, visible=False)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield Workshop(say, show, count)


class _Lines:
    """One line every few seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self.first is None:  # what an earlier, killed preparation had done is not this one's
            self.first, self.began = done, now
        if now - self.last < LINE_SECONDS:
            return
        self.last = now
        rate = (done - self.first) / max(now - self.began, 1e-9)
        line = f"  {done / 1e6:,.0f} MB of text, {rate / 1e6:.1f} MB/s"
        if total and rate:
            left = time.strftime("%H:%M:%S", time.gmtime(max(total - done, 0) / rate))
            line += f", {min(done / total, 1):.0%}, ETA {left}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
