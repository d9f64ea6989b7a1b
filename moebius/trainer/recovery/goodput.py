"""Where the time of a run has gone: into steps that count, or something else.

A run writes an account of its sections (see `watch.progress`) at every report. An attempt begins
where a process starts, or goes back to a checkpoint; steps after the point from which a later
attempt goes on are lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE_NAME = "time.jsonl"
PRODUCTIVE = "step"


@dataclass(frozen=True)
class Account:
    """The state of an attempt at some moment."""

    at: float
    """seconds of the clock, since 1970"""
    step: int
    seconds: Mapping[str, float]
    """since the beginning of the attempt, by section"""


@dataclass
class Attempt:
    """Accounts of one attempt, the first from its beginning."""

    accounts: list[Account] = field(default_factory=list)
    ended: bool = False
    """by itself, not by a crash"""

    @property
    def began(self) -> float:
        """When, in seconds of the clock."""
        first = self.accounts[0]
        return first.at - sum(first.seconds.values())


def goodput(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Shares of the time since the beginning: `steps` that count, `lost` steps, the other sections,
    and `down`, when nothing ran. They add up to 1."""
    total = attempts[-1].accounts[-1].at - attempts[0].began
    seconds: dict[str, float] = {"steps": 0.0, "lost": 0.0, "down": 0.0}
    goes_on_from: float = float("inf")
    for number in reversed(range(len(attempts))):
        attempt = attempts[number]
        last = attempt.accounts[-1]
        counting = [a for a in attempt.accounts if a.step <= goes_on_from]
        kept = counting[-1].seconds.get(PRODUCTIVE, 0.0) if counting else 0.0
        seconds["steps"] += kept
        seconds["lost"] += last.seconds.get(PRODUCTIVE, 0.0) - kept
        for section, value in last.seconds.items():
            if section != PRODUCTIVE:
                seconds[section] = seconds.get(section, 0.0) + value
        if number:
            seconds["down"] += max(attempt.began - attempts[number - 1].accounts[-1].at, 0.0)
        goes_on_from = min(goes_on_from, attempt.accounts[0].step)
    return {name: value / total if total > 0 else 0.0 for name, value in seconds.items()}


def write_account(
    path: Path, account: Account, *, begins: bool = False, ends: bool = False
) -> None:
    """Append an account, perhaps the first one or the last one of an attempt."""
    line = {"begins": begins, "ends": ends, **vars(account)}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_accounts(path: Path) -> list[Attempt]:
    """All attempts of a run; a line that was cut off is left out."""
    attempts: list[Attempt] = []
    if not path.exists():
        return attempts
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            account = Account(float(line["at"]), int(line["step"]), dict(line["seconds"]))
            begins, ends = bool(line["begins"]), bool(line["ends"])
        except (ValueError, KeyError, TypeError):
            continue
        if begins or not attempts:
            attempts.append(Attempt())
        attempts[-1].accounts.append(account)
        attempts[-1].ended = ends
    return attempts
