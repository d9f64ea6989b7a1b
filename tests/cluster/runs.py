"""Runs on the cluster: handing them in, following them, hurting them."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from moebius.trainer.cli import main
from moebius.trainer.recovery.faults import VARIABLE
from tests.cluster.machines import Cluster, processes_with, until
from tests.trainer.helpers import REPOSITORY

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
        result = command(self.cluster, "status", self.folder, "--json")
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


def command(cluster: Cluster, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`moebius` in this process, which need not import everything again."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        wanted = environment(cluster)
        for name in os.environ.keys() - wanted.keys():
            patch.delenv(name)
        for name, value in wanted.items():
            patch.setenv(name, value)
        code = main([str(word) for word in words])
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def submit(cluster: Cluster, folder: Path, config: Path, *words: str) -> Submitted:
    """`moebius submit`, as a user does it."""
    python = () if "--python" in words else ("--python", sys.executable)
    result = command(cluster, "submit", config, *words, *python)
    assert result.returncode == 0, result.stderr
    job = re.match(r"submitted: job (\d+)", result.stdout)
    assert job is not None, result.stdout
    return Submitted(cluster, folder, job[1])
