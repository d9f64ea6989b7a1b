"""Saves during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moebius.errors import TrainingError
from moebius.trainer.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class CheckpointCallback(Callback):
    """Writes a checkpoint every interval, after the last step and before a stop.

    A step whose loss or gradient was not finite has spoilt the weights: nothing is saved after it,
    so that the checkpoints of before stay.
    """

    name = "checkpoint"
    priority = 40

    def __init__(self) -> None:
        self.finite: Tensor | None = None

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Save where it is due; after the callbacks whose state the checkpoint holds."""
        finite = report.losses["loss"].isfinite() & report.grad_norm.isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if run.step % run.config.checkpoint.interval == 0:
            self._save(run)

    def on_end(self, run: Run) -> None:
        """Save the last state."""
        self._save(run)

    def _save(self, run: Run) -> None:
        if self.finite is not None and not bool(self.finite):
            newest = run.store.find()
            raise TrainingError(
                f"a loss or gradient up to step {run.step} was not finite; newest checkpoint: "
                f"{newest.name if newest else 'none'}",
                "lower optim.lr or raise optim.schedule.warmup_steps",
            )
        run.save()
