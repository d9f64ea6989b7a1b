"""Saves during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius.trainer.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class CheckpointCallback(Callback):
    """Writes a checkpoint every interval, after the last step and before a stop."""

    name = "checkpoint"
    priority = 40

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Save where it is due; after the callbacks whose state the checkpoint holds."""
        if run.step % run.config.checkpoint.interval == 0:
            run.save()

    def on_end(self, run: Run) -> None:
        """Save the last state."""
        run.save()
