"""Saves during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moebius.errors import CheckpointError
from moebius.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class CheckpointCallback(Callback):
    """Writes a checkpoint every interval, after the last step and before a stop.

    After the callbacks whose state it holds, and after the guard, which has judged all steps by
    then: what is saved is sound. A save that fails is tried once more, at the next step.
    """

    name = "checkpoint"
    priority = 40

    def __init__(self) -> None:
        self.done_at = -1
        """last step at which there was nothing left to save"""
        self.failed = False
        """whether the save before the present one has failed"""

    def on_start(self, run: Run) -> None:
        """The present step is that of a checkpoint, or the beginning."""
        self.done_at = run.step

    def on_agreed(self, run: Run, agreed: Mapping[str, int]) -> None:
        """Make what all have written a checkpoint, and begin the next one where it is due."""
        due = run.step != self.done_at and run.step % run.config.checkpoint.interval == 0
        if run.saver.pending and (due or not agreed["writing"]):
            self._settle(run)
        if due:
            self._begin(run)

    def on_end(self, run: Run) -> None:
        """Save the last state, and wait for it."""
        self._settle(run)
        self._begin(run)
        while run.saver.pending:
            self._settle(run)

    def _begin(self, run: Run) -> None:
        if not run.saver.pending or run.step != self.done_at:
            with run.progress.section("save"):
                run.save()
            self.done_at = run.step

    def _settle(self, run: Run) -> None:
        step = self.done_at if run.saver.pending else None
        try:
            with run.progress.section("save"):
                warning = run.saver.settle()
        except CheckpointError as error:
            if self.failed:
                raise
            self.failed = True
            run.tell("save failed", f"{error}; saving again")
            self._begin(run)
            return
        self.failed = False
        if step is not None:
            for callback in run.callbacks:
                callback.on_saved(run, step)
        if warning:
            run.tell("not deleted", warning)
