"""The folder of a submission: the script, the config, the code and the surroundings of a job."""

import os
import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import yaml

from moebius.errors import LaunchError
from moebius.trainer.config import RunConfig

FOLDER = "submissions"
SCRIPT, JOBS = "job.sh", "jobs"
VARIABLES = re.compile(r"(SLURM|NCCL|CUDA|TORCH|OMP|MOEBIUS|UCX|FI|GLOO)_")
SECRET = re.compile(r"token|secret|password|key|jwt|credential", re.IGNORECASE)
PLAIN = re.compile(r"[\w./+=,@:-]+")
"""paths that mean the same to sbatch, which knows patterns as %j, and to bash"""


def next_folder(run: Path) -> Path:
    """The folder of the next submission of a run, which does not exist yet."""
    numbers = [int(path.name) for path in (run / FOLDER).glob("*") if path.name.isdecimal()]
    return run / FOLDER / str(max(numbers, default=0) + 1)


def check_plain(name: str, path: Path) -> None:
    """Raise LaunchError for a path that SLURM would take for something else."""
    if not PLAIN.fullmatch(str(path)):
        raise LaunchError(
            f"{name}: '{path}' has characters that sbatch reads in its own way",
            "use letters, digits and . / _ - + = , @ :",
        )


def write(folder: Path, script: str, configs: dict[str, RunConfig]) -> None:
    """Write all of it, configs by their file names. Raises LaunchError where somebody else has just
    made the folder."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise LaunchError(f"'{folder}' was just made by another submission", "try again") from None
    (folder / SCRIPT).write_text(script)
    for name, config in configs.items():
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (folder / name).write_text(text)
    packages = sorted(f"{found.name}=={found.version}" for found in distributions())
    (folder / "packages").write_text("\n".join(packages) + "\n")
    (folder / "environment").write_text("".join(f"{line}\n" for line in environment()))
    commit, changes = code_version()
    (folder / "code").write_text(f"{commit}\n")
    if changes:
        (folder / "code.diff").write_text(changes)


def note_jobs(folder: Path, jobs: list[str]) -> None:
    """Write down the numbers of the jobs."""
    (folder / JOBS).write_text("".join(f"{job}\n" for job in jobs))


def jobs_of(run: Path) -> list[str]:
    """The jobs of the newest submission of a run, or its own members of those of an array."""
    for place, member in ((run, ""), (run.parent, f"_{run.name}")):
        found = [
            path for path in (place / FOLDER).glob(f"*/{JOBS}") if path.parent.name.isdecimal()
        ]
        if found:
            newest = max(found, key=lambda path: int(path.parent.name))
            return [f"{job}{member}" for job in newest.read_text().split()]
    return []


def is_sweep(run: Path) -> bool:
    """Whether a folder was given to an array, whose runs are in folders below."""
    return any((run / FOLDER).glob("*/config-*.yaml"))


def environment() -> list[str]:
    """Variables that bear on a run; nothing that is named like a secret."""
    return sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if VARIABLES.match(name) and not SECRET.search(name)
    )


def code_version() -> tuple[str, str]:
    """The commit of this code and what was changed since, if it lies in a git checkout."""
    root = Path(__file__).parents[3]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        try:
            result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except FileNotFoundError:
            return ""
        return result.stdout if result.returncode == 0 else ""

    if git("rev-parse", "--show-toplevel").strip() != str(root):
        return f"not in a git checkout: {root}", ""
    return git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
