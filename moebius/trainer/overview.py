"""What can be seen of a run from its folder and, where there is one, from SLURM."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.errors import CheckpointError
from moebius.trainer.callbacks.events import FILE_NAME as EVENTS
from moebius.trainer.checkpoint.loader import open_checkpoint
from moebius.trainer.checkpoint.storage import open_storage
from moebius.trainer.cluster import client
from moebius.trainer.cluster.submission import is_sweep, jobs_of
from moebius.trainer.config_file import load_config
from moebius.trainer.folder import CONFIG_NAME, is_locked
from moebius.trainer.recovery.goodput import FILE_NAME as TIMES
from moebius.trainer.recovery.goodput import PRODUCTIVE, Attempt, goodput, read_accounts
from moebius.trainer.standing import Standing, read_standing

WAITING = ("PENDING", "REQUEUED", "CONFIGURING")
ALIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


@dataclass(frozen=True)
class Overview:
    """One moment of a run."""

    state: str
    """queued, starting, running, stopped, complete, failed, or new where nothing has run yet"""
    reason: str
    """of a stop or a failure, or why a job waits"""
    step: int
    num_steps: int | None
    seconds_left: float | None
    """of a run that trains, at the speed of its present attempt"""
    attempts: int
    """starts, and returns to a checkpoint"""
    goodput: Mapping[str, float]
    """shares of the time since the first start, see `recovery.goodput`"""
    jobs: Sequence[Mapping[str, str]]
    """of the newest submission: number, state, restarts, nodes, reason"""
    checkpoint: Mapping[str, Any] | None
    """the newest whose record is sound"""
    events: Sequence[Mapping[str, Any]]
    """the latest"""


def look(folder: Path, num_events: int) -> Overview:
    """Raises CheckpointError where the folder holds neither a run nor a submission of one."""
    jobs = [_job(number) for number in jobs_of(folder)]
    standing = read_standing(folder)
    config_path = folder / CONFIG_NAME
    if not (jobs or standing or config_path.is_file()):
        raise CheckpointError(f"'{folder}' is no run folder: it has no {CONFIG_NAME}")
    if is_sweep(folder) and not config_path.is_file():
        raise CheckpointError(
            f"'{folder}' holds the runs of a sweep, and is none itself", f"look at '{folder / '0'}'"
        )
    attempts = read_accounts(folder / TIMES)
    state, reason = state_of(standing, jobs, is_locked(folder))
    step = attempts[-1].accounts[-1].step if attempts else 0
    if standing and standing.state in ("stopped", "complete") and standing.step is not None:
        step = standing.step
    num_steps = standing.num_steps if standing else None
    return Overview(
        state,
        reason,
        step,
        num_steps,
        seconds_left(attempts, num_steps) if state == "running" else None,
        len(attempts),
        goodput(attempts) if attempts else {},
        jobs,
        _newest(folder) if config_path.is_file() else None,
        _events(folder / EVENTS)[-num_events:] if num_events else (),
    )


def state_of(
    standing: Standing | None, jobs: Sequence[Mapping[str, str]], locked: bool
) -> tuple[str, str]:
    """The state of a run, and why it is in it.

    The word of the run itself counts, unless a job of it waits or starts; a run that says that it
    is running while nobody holds its folder and no job of it is alive has been killed.
    """
    alive = [job for job in jobs if job["state"] in ALIVE]
    waiting = [job for job in jobs if job["state"] in WAITING]
    if alive or locked:
        stretches = {f"{job['job']}.{job['restarts']}" for job in alive}
        said = standing and (locked or standing.launch in stretches)
        if not said or standing is None:
            return "starting", ""
        return standing.state, standing.reason
    if standing and standing.state == "complete":
        return "complete", ""
    if waiting:
        return "queued", waiting[0]["reason"]
    if standing is None:
        ended = [job for job in jobs if job["state"]]
        return ("failed", f"job {ended[-1]['state']}") if ended else ("new", "")
    if standing.state == "running":
        return "failed", "it has ended without a word, as killed processes do"
    return standing.state, standing.reason


def seconds_left(attempts: Sequence[Attempt], num_steps: int | None) -> float | None:
    """At the speed of the last attempt, steps alone; None before it has made one."""
    if not attempts or num_steps is None:
        return None
    first, last = attempts[-1].accounts[0], attempts[-1].accounts[-1]
    done = last.step - first.step
    spent = last.seconds.get(PRODUCTIVE, 0.0) - first.seconds.get(PRODUCTIVE, 0.0)
    left = (num_steps - last.step) * spent / done if done > 0 else None
    return None if left is None else max(left - (time.time() - last.at), 0.0)


def _job(number: str) -> dict[str, str]:
    facts = client.job_state(number)
    reason = facts.get("Reason", "")
    return {
        "job": facts.get("JobId", number),
        "state": facts.get("JobState", ""),
        "restarts": facts.get("Restarts", "0"),
        "nodes": facts.get("NodeList", "").replace("(null)", ""),
        "reason": "" if reason == "None" else reason,
    }


def _newest(folder: Path) -> dict[str, Any] | None:
    config = load_config(folder / CONFIG_NAME)
    storage = open_storage(config.checkpoint.dir or str(folder / "checkpoints"))
    for step in reversed(storage.steps()):
        try:
            record = open_checkpoint(storage, step).record
        except CheckpointError:
            continue
        return {"step": step, "tokens": record.tokens, "written": storage.written(step)}
    return None


def _events(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last one may be cut."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
