"""Writes down where tokens went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.routing_record import save_routing

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class RoutingRecorder(Callback):
    """Records the first `log.record_routing` steps in `<run_dir>/routing`, one file each."""

    name = "routing_recorder"
    priority = 25

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Write the step that has just ended, if it was to be recorded."""
        if run.step <= run.config.log.record_routing:
            save_routing(run.folder / "routing", run.step, report.sample_ids, report.ledger)
