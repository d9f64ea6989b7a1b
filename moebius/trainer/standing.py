"""How a run stands: a small file in its folder, for the script of a job and for people."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from moebius.errors import ConfigError, DataError, LayoutError, MoebiusError
from moebius.files import sync
from moebius.parallel.world import rank
from moebius.trainer.folder import is_locked

FILE_NAME = "standing.json"
HOPELESS = (ConfigError, DataError, LayoutError)
"""what the same start on the same files gives again. Others may pass: a disk that was full, a
checkpoint that a node did not see yet, a lock that a lost node held, a step that went wrong."""
State = Literal["running", "stopped", "complete", "failed"]


def launch_id() -> str:
    """What tells this start of a run from others: the job and its stretch, or the process."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        return f"{job}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    return os.environ.get("TORCHELASTIC_RUN_ID") or f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True)
class Standing:
    """What a training has last said about itself; one that is killed says nothing more."""

    state: State
    again: bool
    """whether starting it again would bring it further; read by the script of a job"""
    reason: str = ""
    """of a stop or a failure"""
    step: int | None = None
    """after which it has said so"""
    num_steps: int | None = None
    launch: str = field(default_factory=launch_id)
    at: float = field(default_factory=time.time)
    """seconds of the clock, since 1970"""


def write_standing(folder: Path, standing: Standing) -> None:
    """Replace what a run has said before. Several processes may do so at a time."""
    path = folder / FILE_NAME
    temporary = path.with_name(f"{FILE_NAME}.{socket.gethostname()}-{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(standing)) + "\n")
    sync(temporary)
    os.replace(temporary, path)


def read_standing(folder: Path) -> Standing | None:
    """None where a run has said nothing that can be read."""
    try:
        return Standing(**json.loads((folder / FILE_NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def failures_noted(folder: Path) -> Iterator[None]:
    """Write down an error that ends this process; on any process, for only one may have it.

    A folder that does not exist is not made, and what another start says that trains there stays.
    """
    try:
        yield
    except MoebiusError as error:
        before = read_standing(folder)
        ours = before is not None and before.launch == launch_id()
        if folder.is_dir() and (ours or not is_locked(folder)):
            with suppress(OSError):  # the error that is on its way counts
                write_standing(folder, _failed(error, before if ours else None))
        raise


def _failed(error: MoebiusError, before: Standing | None) -> Standing:
    where = f"rank {rank()}: " if rank() else ""
    return Standing(
        state="failed",
        again=not isinstance(error, HOPELESS),
        reason=f"{where}{error}",
        step=before.step if before else None,
        num_steps=before.num_steps if before else None,
    )
