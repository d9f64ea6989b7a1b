"""Stops a run that is interrupted, without losing its work."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from moebius.parallel.world import is_main
from moebius.trainer.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from moebius.trainer.run import Run

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TIME_LIMIT, STOP_FILE, JOB_STOPS = 1001, 1002, 1003
"""reasons beside the numbers of signals"""
STOP_NAME = "STOP"
VARIABLE = "MOEBIUS_STOP_FILE"
"""names a file by which the script of a job asks for a stop: a signal may come before the processes
listen, and is then lost"""
FOR_GOOD = (signal.SIGINT, STOP_FILE)
"""reasons of a person, after which nothing is to start the run again"""
SAME_SECONDS = 0.5
"""launchers and schedulers send the same signal twice; a person who means it waits longer"""


def reason(code: int) -> str:
    """What has stopped a run, from the answer to the question `stop`."""
    if code == TIME_LIMIT:
        return "train.time_limit is over"
    if code == STOP_FILE:
        return f"there is a file {STOP_NAME} in run_dir"
    if code == JOB_STOPS:
        return "its job is about to end"
    return signal.Signals(code).name


class InterruptCallback(Callback):
    """Ends the run after the present step: on SIGINT (Ctrl-C), SIGTERM or SIGUSR1 to any of its
    processes, when its time is over, when there is a file `STOP` in the run folder, or when the
    script of its job asks for it.

    A second signal ends the process at once.
    """

    name = "interrupt"
    priority = 0

    def __init__(self) -> None:
        self.previous: dict[signal.Signals, Any] = {}
        self.asked = 0
        """why to stop; a signal may come at any time"""

    def on_start(self, run: Run) -> None:
        """Take over the signals."""
        since = 0.0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal since
            if not self.asked:
                self.asked, since = number, time.monotonic()
            elif time.monotonic() - since > SAME_SECONDS:
                self.close()
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        self.previous = {number: signal.signal(number, stop) for number in SIGNALS}
        self._vote(run)

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Ask for a stop where there is a reason."""
        self._vote(run)

    def _vote(self, run: Run) -> None:
        limit = run.config.train.time_limit
        if not self.asked and is_main():
            if limit is not None and time.monotonic() - run.progress.began >= 60 * limit:
                self.asked = TIME_LIMIT
            elif (run.folder / STOP_NAME).exists():
                self.asked = STOP_FILE
            elif VARIABLE in os.environ and Path(os.environ[VARIABLE]).exists():
                self.asked = JOB_STOPS
        run.consensus.vote("stop", self.asked)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
