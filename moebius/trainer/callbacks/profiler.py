"""Records what some steps do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.watch.profile import ProfileConfig, Recording

if TYPE_CHECKING:
    from moebius.trainer.run import Run

FOLDER = "profile"


class ProfilerCallback(Callback):
    """Writes traces of the steps `profile.steps` to `<run_dir>/profile` and prints what they spent
    their time on.

    A run that stops among these steps writes those it has made, and goes on with the others when it
    is continued. Where it goes back or fails, nothing is written. A file that cannot be written
    does not stop the training.
    """

    name = "profiler"
    priority = 8  # before all that belongs to no step begins, and after the guard, who may go back

    def __init__(self, config: ProfileConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.recording: Recording | None = None

    def on_start(self, run: Run) -> None:
        """Say where the steps lie behind a run that is continued, and nothing of them is there."""
        (first, last), rank = self.config.steps, run.layout.mesh.rank
        written = any((run.folder / FOLDER).glob(f"step-*-rank-{rank}.json.gz"))
        if run.step >= last and not written:
            run.tell(
                "profile", f"steps {first} to {last} lie behind step {run.step}: none recorded"
            )

    def on_step_start(self, run: Run) -> None:
        """Begin to record, or to warm up in the step before."""
        coming, (first, last) = run.step + 1, self.config.steps
        if not first - 1 <= coming <= last:
            return
        if self.recording is None:
            self.recording = Recording(self.config, run.progress, run.device)
        if coming >= first:
            self.recording.begin(coming)

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Leave out what other callbacks do, as far as it is known to be the last step."""
        if self.recording is None or not self.recording.steps:
            return
        self.recording.end()
        if run.step == self.config.steps[1]:
            self.recording.stop()

    def on_agreed(self, run: Run, agreed: Mapping[str, int]) -> None:
        """Write after the last step, or the last one before a stop."""
        if self.recording is None or not (self.recording.stopped or agreed["stop"]):
            return
        self.recording.stop()
        if self.recording.steps:
            self._write(run, self.recording)
        self.close()

    def close(self) -> None:
        """End what is still recorded."""
        if self.recording is not None:
            self.recording.release()
            self.recording = None

    def _write(self, run: Run, recording: Recording) -> None:
        first, last = recording.steps[0], recording.steps[-1]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        try:
            path = recording.write(run.folder / FOLDER, run.layout.mesh.rank)
        except OSError as error:
            run.tell("profile", f"{steps} could not be written: {error}")
        else:
            run.tell("profile", f"{steps}: {path}")
        if not self.console.quiet:
            for table in recording.summary():
                self.console.print(table)
