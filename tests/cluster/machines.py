"""A SLURM cluster of this one machine: a controller and a few node daemons under one folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
INSTALLED = all(shutil.which(name) for name in DAEMONS)
NODE_CPUS, NODE_GPUS = 2, 2
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=3600
FirstJobId={first_job}
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.[1-{nodes}] Port=[{first}-{last}] \\
  CPUs={cpus} RealMemory=1000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Wait for something. `what` says what is missing when that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.1)


@dataclass
class Cluster:
    """Daemons that were started here, and nothing else, are stopped here."""

    folder: Path
    nodes: int
    number: int = 0
    """several may run on a machine, with other ports, also those that are made of job numbers"""
    ports: list[int] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def host(self) -> str:
        return socket.gethostname().partition(".")[0]

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        self.ports = free_ports(self.nodes + 1, 27000 + 500 * self.number)
        gpus = [self.folder / f"gpu{number}" for number in range(NODE_GPUS)]
        for gpu in gpus:
            gpu.touch()
        text = CONFIG.format(
            host=self.host,
            user=os.environ.get("USER") or "root",
            folder=self.folder,
            port=self.ports[0],
            first=self.ports[1],
            last=self.ports[-1],
            nodes=self.nodes,
            first_job=1 + 1000 * self.number,
            cpus=NODE_CPUS,
            gpus=NODE_GPUS,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        self.call("slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        until(
            lambda: self.states() == ["idle"] * self.nodes,
            30,
            lambda: self.call("sinfo", "-N", "-l"),
        )

    def start_node(self, name: str) -> None:
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        self.call("slurmd", "-N", name)

    def states(self) -> list[str]:
        """Of all nodes."""
        return self.call("sinfo", "--noheader", "--Node", "--format=%t").split()

    def call(self, *words: str) -> str:
        """A command of SLURM that must succeed."""
        result = subprocess.run(
            words, capture_output=True, text=True, env=os.environ | self.environment, timeout=60
        )
        assert result.returncode == 0, (words, result.stdout, result.stderr)
        return result.stdout

    def facts(self, job: str) -> dict[str, str]:
        """What the controller says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", job)))

    def release(self, job: str) -> None:
        """SLURM may hold a requeued job for two minutes; wait until it is pending, and end that."""
        until(
            lambda: self.facts(job)["JobState"] in ("PENDING", "RUNNING"),
            90,
            lambda: str(self.facts(job)),
        )
        if self.facts(job)["JobState"] == "PENDING":
            until(lambda: not self.call("squeue", "-h", "--steps", "-j", job), 60, "an old step")
            # Nodes refuse what starts in the second in which they were told to end a stretch.
            self.call("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def lose(self, node: str, silently: bool = False) -> None:
        """A machine that is gone: its daemon and all processes of its jobs, at once.

        With `silently` also those by which SLURM looks after them, which would tell of it.
        """
        tasks = processes_with(f"SLURMD_NODENAME={node}", self.folder)
        parents = {parent_of(pid) for pid in tasks} if silently else set()
        keepers = [pid for pid in parents if "slurmstepd" in command_of(pid)]
        for pid in [self.pid(self.folder / f"{node}.pid"), *keepers, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pid(self, path: Path) -> int:
        return int(path.read_text())

    def stop(self) -> None:
        """End jobs, then daemons, then what is left of both."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.call("scancel", "--full", "--user", str(os.getuid()))
            until(lambda: not self.call("squeue", "-h"), 15, "jobs stay")
        for path in self.folder.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(self.pid(path), signal.SIGKILL)
        for pid in processes_with(f"SLURM_CONF={self.folder}/slurm.conf", self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_ports(count: int, lowest: int) -> list[int]:
    """Neighbouring ports below those that the kernel gives to others."""
    for first in range(lowest, lowest + 500 - count, count):
        sockets: Sequence[socket.socket] = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + number))
        except OSError:
            continue
        else:
            return list(range(first, first + count))
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def parent_of(pid: int) -> int:
    """0 where the process is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def command_of(pid: int) -> str:
    """The command line of a process; empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def processes_with(variable: str, folder: Path) -> list[int]:
    """Processes of this cluster that have a variable in their environment; not this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            values = path.read_bytes().split(b"\0")
        except OSError:
            continue
        own = f"SLURM_CONF={folder}/slurm.conf".encode() in values
        pid = int(path.parent.name)
        if own and variable.encode() in values and pid != os.getpid():
            found.append(pid)
    return found
