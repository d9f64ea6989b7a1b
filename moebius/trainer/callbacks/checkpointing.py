"""Saves during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moebius.parallel.world import is_main
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.recovery.crashes import note_progress

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class CheckpointCallback(Callback):
    """Writes a checkpoint every interval, after the last step and before a stop.

    After the callbacks whose state it holds, and after the guard, which has judged all steps by
    then: what is saved is sound.
    """

    name = "checkpoint"
    priority = 40

    def __init__(self) -> None:
        self.done_at = -1
        """last step at which there was nothing left to save"""

    def on_start(self, run: Run) -> None:
        """The present step is that of a checkpoint, or the beginning."""
        self.done_at = run.step

    def on_agreed(self, run: Run, agreed: Mapping[str, int]) -> None:
        """Make what all have written a checkpoint, and begin the next one where it is due."""
        if run.saver.pending and not agreed["writing"]:
            self._settle(run)
        if run.step != self.done_at and run.step % run.config.checkpoint.interval == 0:
            with run.progress.section("save"):
                run.save()
            self.done_at = run.step

    def on_end(self, run: Run) -> None:
        """Save the last state, and wait for it."""
        with run.progress.section("save"):
            run.save()
        self._settle(run)

    def _settle(self, run: Run) -> None:
        with run.progress.section("save"):
            run.saver.settle()
        if is_main():
            note_progress(run.folder)
