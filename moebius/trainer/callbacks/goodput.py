"""Accounts for the time of a run, over all its starts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.recovery.goodput import (
    FILE_NAME,
    Account,
    Attempt,
    goodput,
    read_accounts,
    write_account,
)

if TYPE_CHECKING:
    from moebius.trainer.run import Run


class GoodputCallback(Callback):
    """Publishes which share of the time went into steps that count, and what the rest went into."""

    name = "goodput"
    priority = 25

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.before: dict[str, float] = {}
        """seconds of this process that belong to an attempt that has ended"""

    def on_start(self, run: Run) -> None:
        """Begin an attempt."""
        path = run.folder / FILE_NAME
        if self.before:  # the run has gone back, which is no crash
            write_account(path, self.attempts[-1].accounts[-1], ends=True)
        self.attempts = [*read_accounts(path), Attempt()]
        self._note(run, begins=True)

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Publish where it is due; after the metrics of the step."""
        if run.reports:
            self._note(run)
            shares = goodput(self.attempts)
            starts = {"health/starts": float(len(self.attempts))}
            run.publish({f"goodput/{n}": share for n, share in shares.items()} | starts)

    def on_end(self, run: Run) -> None:
        """Note what came after the last step."""
        self._note(run, ends=True)

    def close(self) -> None:
        """What this process does from now on belongs to the next attempt."""
        if self.attempts and self.attempts[-1].accounts:
            last = self.attempts[-1].accounts[-1].seconds
            names = self.before.keys() | last.keys()
            self.before = {n: self.before.get(n, 0.0) + last.get(n, 0.0) for n in names}

    def _note(self, run: Run, *, begins: bool = False, ends: bool = False) -> None:
        spent = run.progress.spent().items()
        seconds = {name: round(value - self.before.get(name, 0.0), 6) for name, value in spent}
        account = Account(time.time(), run.step, seconds)
        self.attempts[-1].accounts.append(account)
        write_account(run.folder / FILE_NAME, account, begins=begins, ends=ends)
