"""Writes down which samples each process reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius.data.audit import AuditWriter, log_files, next_attempt
from moebius.parallel.world import agree
from moebius.trainer.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from moebius.trainer.run import Run

AUDIT_FOLDER = "audit"


class AuditCallback(Callback):
    """Logs in `<run_dir>/audit`, one file for each process and start, for `moebius audit`."""

    name = "audit"
    priority = 15

    def __init__(self) -> None:
        self.writer: AuditWriter | None = None

    def on_start(self, run: Run) -> None:
        """Begin the log of this attempt."""
        folder = run.folder / AUDIT_FOLDER
        if run.step == 0 and run.layout.mesh.rank == 0 and folder.exists():
            for paths in log_files(folder).values():  # of a run that was begun anew
                for path in paths:
                    path.unlink()
        attempt = agree(next_attempt(folder))
        mesh = run.layout.mesh
        self.writer = AuditWriter(
            folder, attempt, mesh.rank, mesh.dp.rank, run.step, run.stream, run.skipped
        )

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Note the step that has just ended."""
        if self.writer is not None:
            read = [number for batch in report.read for number in batch.sample_ids_B.tolist()]
            self.writer.write(run.step, read)

    def close(self) -> None:
        """Close the log."""
        if self.writer is not None:
            self.writer.close()
