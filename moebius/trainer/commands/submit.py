"""moebius submit: a run as a job of SLURM that saves in time, is requeued and goes on."""

import argparse
import os
from itertools import product
from pathlib import Path

from rich.console import Console

from moebius.errors import ConfigError
from moebius.trainer.cluster import client
from moebius.trainer.cluster.config import ClusterConfig, load_cluster
from moebius.trainer.cluster.script import Job, check_syntax, render
from moebius.trainer.cluster.submission import SCRIPT, check_plain, next_folder, note_jobs, write
from moebius.trainer.commands.arguments import whole
from moebius.trainer.commands.train import check_processes
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.folder import check_folder

NUMBERS = {
    "nodes": "nodes of the job",
    "gpus-per-node": "GPUs of each, with a process for each",
    "processes-per-node": "processes of each, where there are no GPUs",
    "cpus-per-node": "CPUs of each",
    "max-restarts": "starts of the processes inside of a job, after one of them has died",
    "max-requeues": "requeues of a job that has failed or lost a node",
    "lead": "seconds before the end at which the run is asked to save and stop",
}
TEXTS = {
    "time": "limit of one stretch, [days-]hours:minutes:seconds",
    "partition": "as for sbatch",
    "account": "as for sbatch",
    "qos": "as for sbatch",
    "job-name": "default: name of the run folder",
    "container": "words before python, as 'apptainer exec --nv image.sif'",
    "python": "default: the one that submits",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius submit CONFIG [path.to.option=value ...] [--cluster FILE] [--nodes N] ...`."""
    parser.add_argument("config", help="run file, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file, as optim.lr=3e-4")
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="YAML of what follows, as slurm/gpu-8.yaml"
    )
    for name, text in NUMBERS.items():
        parser.add_argument(f"--{name}", type=whole(0), metavar="N", help=text)
    for name, text in TEXTS.items():
        parser.add_argument(f"--{name}", metavar="TEXT", help=text)
    parser.add_argument(
        "--setup", action="append", metavar="LINE", help="line of bash before all else; repeatable"
    )
    parser.add_argument(
        "--option", action="append", metavar="--X=Y", help="another one for sbatch; repeatable"
    )
    parser.add_argument(
        "--no-preflight", action="store_false", dest="preflight", default=None, help="skip it"
    )
    parser.add_argument(
        "--preflight-option",
        action="append",
        metavar="--X=Y",
        help="of moebius preflight, as --wait=300; repeatable",
    )
    parser.add_argument(
        "--exclude-bad-nodes",
        action="store_true",
        default=None,
        help="requeue without the nodes that the preflight names",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="PATH=VALUE,VALUE",
        help="a job array with a run for each value, or each combination; repeatable",
    )
    parser.add_argument("--after", metavar="JOB", help="start when it has ended, however")
    parser.add_argument("--after-ok", metavar="JOB", help="start when it has ended well")
    parser.add_argument(
        "--chain", type=whole(1), default=1, metavar="N", help="so many jobs, one after the other"
    )
    parser.add_argument("--print", action="store_true", help="only show the script")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Check all that can be checked here, then hand the script in, or only print it."""
    cluster = load_cluster(arguments.cluster, flags(arguments))
    base = load_config(arguments.config, arguments.overrides)
    configs = members(arguments, base)
    for config in configs:
        check_processes(config, cluster.nodes * cluster.processes)
        check_folder(config)
    job = job_of(base, len(configs) if arguments.sweep else 0)
    script = render(job, cluster)
    check_syntax(script)
    if arguments.print:
        console.file.write(script)
        return 0
    options = dependency(arguments)
    client.check(script, options)
    numbers = range(len(configs)) if arguments.sweep else [None]
    names = ["config.yaml" if n is None else f"config-{n}.yaml" for n in numbers]
    write(job.submission, script, dict(zip(names, configs, strict=True)))
    jobs: list[str] = []
    for _ in range(arguments.chain):
        jobs.append(client.submit(job.submission / SCRIPT, options))
        options = [f"--dependency=afterany:{jobs[-1]}"]
        note_jobs(job.submission, jobs)
    for line in farewell(job, cluster, jobs, configs):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def flags(arguments: argparse.Namespace) -> dict[str, object]:
    """The options of `ClusterConfig` that were given; None for the others."""
    names = [name.replace("-", "_") for name in (*NUMBERS, *TEXTS)]
    names += ["setup", "preflight", "exclude_bad_nodes"]
    return {name: getattr(arguments, name) for name in names} | {
        "options": arguments.option,
        "preflight_options": arguments.preflight_option,
    }


def members(arguments: argparse.Namespace, base: RunConfig) -> list[RunConfig]:
    """The configs of all runs, one for each combination of the values of `--sweep`, none of which
    writes where another one does.

    Raises ConfigError where there is nothing to choose from, or a value is wrong.
    """
    if not arguments.sweep:
        return [base]
    places = {"run_dir": base.run_dir, "checkpoint.dir": base.checkpoint.dir}
    axes = []
    for text in arguments.sweep:
        name, equals, values = text.partition("=")
        words = [word for word in values.split(",") if word]
        if not equals or len(words) < 2:
            raise ConfigError(f"--sweep: '{text}' is not of the form path.to.option=value,value")
        if name in places:
            raise ConfigError(f"--sweep: {name} cannot be swept; each run gets a folder of its own")
        axes.append([f"{name}={word}" for word in words])
    return [
        load_config(
            arguments.config,
            [*arguments.overrides, *chosen]
            + [f"{name}={place}/{number}" for name, place in places.items() if place is not None],
        )
        for number, chosen in enumerate(product(*axes))
    ]


def job_of(base: RunConfig, number: int) -> Job:
    """Where a job has its files; paths that SLURM cannot take are refused."""
    folder, run = Path.cwd(), Path(os.path.abspath(base.run_dir))
    check_plain("run_dir", run)
    check_plain("working directory", folder)
    return Job(run, next_folder(run), number, folder)


def dependency(arguments: argparse.Namespace) -> list[str]:
    """The option of sbatch for what a job waits for."""
    found = [
        f"{kind}:{job}"
        for kind, job in (("afterany", arguments.after), ("afterok", arguments.after_ok))
        if job is not None
    ]
    return [f"--dependency={','.join(found)}"] if found else []


def farewell(job: Job, cluster: ClusterConfig, jobs: list[str], runs: list[RunConfig]) -> list[str]:
    """Lines that say what was handed in and how to follow it."""
    what = f"{cluster.nodes} x {cluster.processes} processes, {cluster.time} each time"
    return [
        f"submitted: job {', then '.join(jobs)} ({what})",
        f"script:    {job.submission / SCRIPT}",
        f"logs:      {job.run}/slurm-*.log",
        *(f"status:    moebius status {config.run_dir}" for config in runs),
    ]
