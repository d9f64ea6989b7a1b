"""Writes down what happened to a run beside its training."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from moebius.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from moebius.trainer.run import Run

FILE_NAME = "events.jsonl"


class EventLog(Callback):
    """One line of JSON per event in `<run_dir>/events.jsonl`; those of steps that are done again
    stay, for they did happen."""

    name = "events"
    priority = 10

    def on_event(self, run: Run, kind: str, text: str) -> None:
        """Append a line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "step": run.step, "event": kind, "text": text}
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / FILE_NAME).open("a") as file:
            file.write(json.dumps(line) + "\n")
