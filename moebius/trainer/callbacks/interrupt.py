"""Stops a run that is interrupted, without losing its work."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from moebius.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class InterruptCallback(Callback):
    """The first Ctrl-C ends the run after the present step, the second one at once."""

    name = "interrupt"
    priority = 0

    def __init__(self) -> None:
        self.previous = signal.getsignal(signal.SIGINT)

    def on_start(self, run: Run) -> None:
        """Take over the signal."""

        def stop(number: int, frame: FrameType | None) -> None:
            run.asked_to_stop = number
            signal.signal(signal.SIGINT, self.previous)

        self.previous = signal.signal(signal.SIGINT, stop)

    def close(self) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGINT, self.previous)
