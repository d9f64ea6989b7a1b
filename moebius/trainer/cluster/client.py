"""SLURM's own commands, their refusals in one line."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moebius.errors import LaunchError

PATIENCE = 60
"""seconds that a command of SLURM may take"""
NOISE = re.compile(r"^(sbatch|scontrol|squeue): (error: )?|^allocation failure: ")


def submit(script: Path, options: Sequence[str]) -> str:
    """Hand in a script; gives the number of the job. Raises LaunchError where SLURM refuses it."""
    return _call(["sbatch", "--parsable", *options, str(script)]).strip().partition(";")[0]


def check(script: str, options: Sequence[str]) -> None:
    """Raise LaunchError where SLURM would refuse a script, or could never start its job."""
    _call(["sbatch", "--test-only", *options], script)


def job_state(job: str) -> dict[str, str]:
    """What SLURM knows of a job, by the names of `scontrol show job`; empty where that is nothing.

    Of an array, the first member.
    """
    if shutil.which("scontrol") is None:
        return {}
    try:
        text = _call(["scontrol", "show", "job", job, "--oneliner"])
    except LaunchError:
        return {}
    first = text.splitlines()[0] if text.strip() else ""
    return dict(re.findall(r"(\w+)=(\S*)", first))


def _call(command: Sequence[str], script: str | None = None) -> str:
    name = command[0]
    if shutil.which(name) is None:
        raise LaunchError(
            f"{name}: not found on PATH; this is no machine of a SLURM cluster",
            "submit from a login node, or look at the script with --print",
        )
    try:
        result = subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{name}: no answer within {PATIENCE} seconds") from None
    if result.returncode:
        raise LaunchError(f"{name}: {reason(result.stderr)}")
    return result.stdout


def reason(text: str) -> str:
    """Why SLURM refuses, out of what it says: the last line that gives a reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    short = [NOISE.sub("", NOISE.sub("", line)) for line in lines]
    if not short:
        return "refused, without a reason"
    # A vague line comes last: "Batch job submission failed: Invalid partition name specified".
    return short[-1].removeprefix("Batch job submission failed: ")
