"""Runs on the cluster: handing them in, following them, hurting them."""

import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.trainer.recovery.faults import VARIABLE
from tests.cluster.machines import Cluster, processes_with, until
from tests.trainer.helpers import REPOSITORY, moebius

STARTS, REQUEUES = 120.0, 60.0
"""seconds that two processes may take to import everything, and a job to end"""


@dataclass
class Submitted:
    """A job and its run folder."""

    cluster: Cluster
    folder: Path
    job: str

    @property
    def log(self) -> str:
        paths = sorted(self.folder.glob("slurm-*.log"))
        return "".join(path.read_text() for path in paths)

    @property
    def state(self) -> str:
        return self.cluster.facts(self.job)["JobState"]

    @property
    def step(self) -> int:
        """The last one that was reported."""
        path = self.folder / "metrics.jsonl"
        numbers = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
        return max(map(int, numbers), default=0)

    def reaches(self, step: int) -> None:
        until(lambda: self.step >= step or self.ended, STARTS, lambda: self.log)
        assert self.step >= step, self.log

    def logs(self, text: str, count: int = 1, seconds: float = STARTS) -> None:
        until(lambda: self.log.count(text) >= count, seconds, lambda: self.log)

    @property
    def ended(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

    def ends(self, state: str) -> None:
        until(lambda: self.ended, STARTS, lambda: self.log)
        assert self.state == state, self.log

    def requeued(self, count: int) -> None:
        """Wait for that, and do not wait for the minutes that SLURM then lets pass."""
        until(
            lambda: self.cluster.facts(self.job)["Restarts"] == str(count),
            REQUEUES,
            lambda: self.log + str(self.cluster.facts(self.job)),
        )
        self.cluster.release(self.job)

    def worker(self, rank: int) -> int:
        """The process of the training that has a rank."""
        (pid,) = (
            pid
            for pid in processes_with(f"RANK={rank}", self.cluster.folder)
            if b"moebius.trainer\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        return pid

    def status(self) -> dict[str, Any]:
        result = moebius("status", self.folder, "--json", env=environment(self.cluster))
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def kill_worker(self, rank: int) -> None:
        os.kill(self.worker(rank), signal.SIGKILL)


def environment(cluster: Cluster) -> dict[str, str]:
    """Of commands and jobs; CI's own job must not be taken for one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", VARIABLE: "1"}
    return kept | own | cluster.environment


def submit(cluster: Cluster, folder: Path, config: Path, *words: str) -> Submitted:
    """`moebius submit`, as a user does it."""
    python = () if "--python" in words else ("--python", sys.executable)
    result = moebius("submit", config, *words, *python, env=environment(cluster))
    assert result.returncode == 0, result.stderr
    job = re.match(r"submitted: job (\d+)", result.stdout)
    assert job is not None, result.stdout
    return Submitted(cluster, folder, job[1])
