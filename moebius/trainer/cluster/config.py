"""What a job asks of SLURM: one YAML file for a cluster, flags of the command line on top."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from moebius.config import ConfigNode, Problem
from moebius.errors import ConfigError
from moebius.trainer.config_file import KeyPath, read_tree, validated

SHORTEST_LEAD = 120
"""seconds: SLURM looks at time limits every half minute, and its signal may be a minute early"""
Word = Annotated[str, Field(pattern=r"^[^\s\"'`$\\;&|<>()]+$")]
"""text that a line `#SBATCH --option=...` takes as it is"""
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]


class ClusterConfig(ConfigNode):
    """Nodes, time and surroundings of a job."""

    nodes: PositiveInt = 1
    """how many"""
    gpus_per_node: PositiveInt | None = None
    """one process is started for each; null on machines without"""
    processes_per_node: PositiveInt | None = None
    """where there are no GPUs"""
    cpus_per_node: PositiveInt | None = None
    """CPUs to ask for, shared by the processes of a node; null: the partition's default"""
    time: str = Field("01:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    """limit of one stretch, [days-]hours:minutes:seconds; the job is then requeued and goes on"""
    lead: int = Field(180, ge=SHORTEST_LEAD)
    """seconds before the end of `time` at which the run is asked to save and stop"""
    partition: Word | None = None
    """null: the default of the cluster, also for the two below"""
    account: Word | None = None
    """who pays"""
    qos: Word | None = None
    """quality of service"""
    job_name: Word | None = None
    """null: the name of the run folder"""
    options: Annotated[
        tuple[Annotated[Word, Field(pattern=r"^--\w")], ...], Field(strict=False)
    ] = ()
    """more options of sbatch, as `--constraint=h100` or `--mem=0`"""
    setup: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """lines of bash that come before everything else, as `module load cuda`"""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Line] = Field(
        default_factory=dict
    )
    """variables of all processes, as NCCL_SOCKET_IFNAME"""
    container: Line | None = None
    """words before `python`, as `apptainer exec --nv image.sif`"""
    python: Word | None = None
    """null: the one that submits; `python3` in a container"""
    max_restarts: NonNegativeInt = 3
    """of the processes inside of a job, when one of them has died"""
    max_requeues: NonNegativeInt = 3
    """of a job that has failed, lost a node or made no step; one that gets on and saves in time is
    always requeued"""
    preflight: bool = True
    """try out the nodes before the training"""
    preflight_options: Annotated[
        tuple[Annotated[Word, Field(pattern=r"^--\w")], ...], Field(strict=False)
    ] = ()
    """of `moebius preflight`, as `--wait=300` where nodes are slow to load the program"""
    exclude_bad_nodes: bool = False
    """requeue a job whose preflight names bad nodes, without these, up to `max_requeues` times"""

    @property
    def processes(self) -> int:
        """On a node."""
        return self.gpus_per_node or self.processes_per_node or 1

    @property
    def seconds(self) -> int:
        """Of `time`."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def process_rules(config: ClusterConfig) -> Iterator[Problem]:
    """Processes are counted by GPUs or by themselves."""
    given = (config.gpus_per_node, config.processes_per_node)
    if None not in given:
        yield Problem("processes_per_node", "given beside gpus_per_node; use one of them")
    if given == (None, None):
        yield Problem(
            "gpus_per_node", "missing; say how many, or processes_per_node where there are none"
        )
    cpus = config.cpus_per_node
    if cpus is not None and cpus < config.processes:
        yield Problem("cpus_per_node", f"{cpus} for {config.processes} processes; allowed: more")


def time_rules(config: ClusterConfig) -> Iterator[Problem]:
    """There must be time before the signal."""
    if config.seconds <= config.lead:
        yield Problem(
            "time",
            f"{config.time}, but the run is asked to stop {config.lead} seconds (lead) before its "
            "end; allowed: more",
        )


def load_cluster(path: Path | None, flags: Mapping[str, Any]) -> ClusterConfig:
    """Read a file, if there is one, put the flags that are given on top, and check everything.

    Raises ConfigError with one line per problem.
    """
    tree: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    if path is not None:
        tree, places = read_tree(path)
    given = {name: value for name, value in flags.items() if value is not None}
    if "gpus_per_node" in given or "processes_per_node" in given:  # one replaces the other
        for name in ("gpus_per_node", "processes_per_node"):
            tree.pop(name, None)
    tree |= given
    places |= {(name,): "command line" for name in given}
    fallback = str(path or "command line")
    config = validated(ClusterConfig, tree, places, fallback)
    lines = [
        f"{places.get((problem.path,), fallback)}: {problem.path}: {problem.message}"
        for rule in (process_rules, time_rules)
        for problem in rule(config)
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    return config
