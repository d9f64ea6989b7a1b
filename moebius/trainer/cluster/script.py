"""The script of a job, to be read and edited: what is asked for, settings, then `job.sh`."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from moebius.errors import ConfigError
from moebius.trainer.cluster.config import ClusterConfig


@dataclass(frozen=True)
class Job:
    """What a script is for."""

    run: Path
    """run folder; with `members` that of the first run is its folder `0`, and so on"""
    submission: Path
    """folder of the script and of what it leaves"""
    members: int = 0
    """runs of an array; 0: one run, and no array"""
    folder: Path = Path()
    """working directory, from which relative paths of the config count"""


def render(job: Job, cluster: ClusterConfig) -> str:
    """The text of the script."""
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in sbatch_options(job, cluster)),
    ]
    lines += ["", *_settings(job, cluster), ""]
    return "\n".join(lines) + (files(__package__) / "job.sh").read_text()


def check_syntax(script: str) -> None:
    """Raise ConfigError where lines of the user make it something that bash cannot read."""
    if shutil.which("bash") is None:  # the nodes have one
        return
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.splitlines()[0].removeprefix("bash: ")
        raise ConfigError(f"setup or container: bash cannot read the script: {said}")


def sbatch_options(job: Job, cluster: ClusterConfig) -> Iterator[str]:
    """What SLURM is asked for."""
    yield f"--job-name={cluster.job_name or job.run.name}"
    yield f"--nodes={cluster.nodes}"
    yield "--ntasks-per-node=1"
    if cluster.gpus_per_node is not None:
        yield f"--gpus-per-node={cluster.gpus_per_node}"
    if cluster.cpus_per_node is not None:
        yield f"--cpus-per-task={cluster.cpus_per_node}"
    yield f"--time={cluster.time}"
    for name in ("partition", "account", "qos"):
        value = getattr(cluster, name)
        if value is not None:
            yield f"--{name}={value}"
    if job.members:
        yield f"--array=0-{job.members - 1}"
    yield f"--chdir={job.folder}"
    yield f"--output={job.run}/slurm-{'%A_%a' if job.members else '%j'}.log"
    yield "--open-mode=append"
    yield "--requeue"
    yield f"--signal=B:USR1@{cluster.lead}"
    yield from cluster.options


def _settings(job: Job, cluster: ClusterConfig) -> Iterator[str]:
    """Variables that `job.sh` reads."""
    number = "$SLURM_ARRAY_TASK_ID"
    run, config = shlex.quote(str(job.run)), shlex.quote(str(job.submission / "config"))
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    options = [f"--cpus-per-task={cluster.cpus_per_node}"] if cluster.cpus_per_node else []
    if cluster.gpus_per_node is not None:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    yield f"submission={shlex.quote(str(job.submission))}"
    yield f"run={run}/{number}" if job.members else f"run={run}"
    yield f"config={config}-{number}.yaml" if job.members else f"config={config}.yaml"
    yield f"processes={cluster.processes}         # on each node"
    yield f"max_restarts={cluster.max_restarts}      # of all processes, inside of a stretch"
    yield f"max_requeues={cluster.max_requeues}      # after failures"
    yield f"preflight={int(cluster.preflight) or ''}         # empty: none"
    yield f"preflight_options=({shlex.join(cluster.preflight_options)})"
    yield f"exclude_bad_nodes={int(cluster.exclude_bad_nodes) or ''}"
    yield f"python=({cluster.container + ' ' if cluster.container else ''}{shlex.quote(python)})"
    yield f"srun_options=({shlex.join(options)})"
    for name, value in cluster.environment.items():
        yield f"export {name}={shlex.quote(value)}"
    yield from cluster.setup
