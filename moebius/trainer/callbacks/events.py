"""Writes down what happened to a run beside its training."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from moebius.trainer.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from moebius.trainer.run import Run

FILE_NAME = "events.jsonl"
COUNTED = {
    "skipped": "skipped",
    "spike": "spikes",
    "rewound": "rewinds",
    "straggler": "stragglers",
}
"""events whose number is published, and its name"""


class EventLog(Callback):
    """One line of JSON per event in `<run_dir>/events.jsonl`; those of steps that are done again
    stay, for they did happen."""

    name = "events"
    priority = 25

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_start(self, run: Run) -> None:
        """Count what has happened before."""
        path = run.folder / FILE_NAME
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        self.counts = Counter(filter(None, map(_kind, lines)))

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Publish how often things have happened, where it is due; after the step's metrics."""
        if run.reports:
            run.publish({f"health/{n}": float(self.counts[k]) for k, n in COUNTED.items()})

    def on_event(self, run: Run, kind: str, text: str) -> None:
        """Append a line."""
        self.counts[kind] += 1
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "step": run.step, "event": kind, "text": text}
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / FILE_NAME).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _kind(line: str) -> str | None:
    """What a line says has happened; None: it was cut off by a crash."""
    try:
        return str(json.loads(line)["event"])
    except (ValueError, KeyError, TypeError):
        return None
