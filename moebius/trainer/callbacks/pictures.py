"""Heat maps of routing for those who show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.metrics import fetched
from moebius.trainer.pictures import pictures

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class PicturesCallback(Callback):
    """Gives heat maps of a step to every callback that shows them, each `log.picture_interval`."""

    name = "pictures"
    priority = 20

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Draw where it is due."""
        last = run.step == run.config.train.num_steps
        if last or run.step % run.config.log.picture_interval == 0:
            for name, image_HWC in pictures(fetched(report.ledger)).items():
                run.show(name, image_HWC)
