"""What a process knows of itself, its node and its device."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from moebius.parallel.world import rank
from moebius.trainer.preflight.roll import local_rank, node_name

PACKAGES = ("torch", "moebius", "triton", "flash-attn", "deepspeed")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Device:
    """What a process computes on."""

    kind: str
    name: str
    memory: int
    """bytes; of a CPU, the node's"""
    free: int
    """bytes that nobody uses"""
    identity: str = ""
    """of a GPU: no two processes have the same"""
    visible: int = 0
    """GPUs that the process sees"""
    unreachable: tuple[int, ...] = ()
    """numbers of visible GPUs whose memory it cannot reach directly"""
    cores: tuple[int, ...] = ()
    """numbers of the cores that the process may use"""
    threads: int = 1


@dataclass(frozen=True)
class Axis:
    """Links between the processes of a group along axes of the mesh."""

    name: str
    ranks: tuple[int, ...]
    all_reduce: float
    """bytes per second that this process sends"""
    all_to_all: float
    latency: float
    """seconds of an all-reduce of one number"""


@dataclass(frozen=True)
class Place:
    """A folder or URL, as one process finds it."""

    name: str
    """field of the config"""
    where: str
    problem: str = ""
    """why it cannot be used; empty: it can"""
    seen_after: float | None = None
    """seconds until a file of the main process was there; None: never"""
    written: float = 0.0
    """bytes per second, synced; all processes at the same time"""
    read: float = 0.0
    free: int | None = None
    """bytes; None: nobody knows"""


@dataclass
class Facts:
    """Of one process."""

    rank: int
    local_rank: int
    node: str
    versions: dict[str, str]
    settings: str
    """a hash of what its run file says"""
    device: Device
    host_memory: int
    """bytes of the node that are available"""
    shared_memory: int
    """bytes that are free in /dev/shm"""
    flops: float = 0.0
    """per second, of the fastest repetition"""
    flops_sustained: float = 0.0
    axes: list[Axis] = field(default_factory=list)
    near: float | None = None
    """bytes per second that it sends within its node while it receives as many; None: not measured,
    as with one process of a node"""
    far: float | None = None
    """the same between nodes"""
    places: list[Place] = field(default_factory=list)
    clock: float | None = None
    """seconds by which the node's clock is ahead of the main process's; None: not asked"""


def facts_of(device: torch.device, settings: str) -> Facts:
    """What needs no measuring and no other process."""
    return Facts(
        rank=rank(),
        local_rank=local_rank(),
        node=node_name(),
        versions=versions(),
        settings=settings,
        device=device_facts(device),
        host_memory=available_memory(),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0,
    )


def versions() -> dict[str, str]:
    """Of everything that has to be the same on all nodes; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["torch"] = torch.__version__  # with how it was built
    found["moebius sources"] = source_hash()
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        found["driver"] = driver_version(driver.read_text())
    return found


def source_hash() -> str:
    """Of the python files of the package, wherever it lies."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def driver_version(text: str) -> str:
    """The number in what the NVIDIA driver says of itself: digits and points, after the name."""
    words = (text.splitlines() or [""])[0].split()
    numbers = [w for w in words if w[0].isdigit() and "." in w and w.replace(".", "").isdigit()]
    return numbers[0] if numbers else "unknown"


def device_facts(device: torch.device) -> Device:
    """Of a GPU, or of the cores that this process may use."""
    if device.type != "cuda":
        total = memory_limit()
        cores = tuple(sorted(os.sched_getaffinity(0))) if sys.platform == "linux" else ()
        threads = torch.get_num_threads()
        return Device("cpu", processor(), total, available_memory(), cores=cores, threads=threads)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    count = torch.cuda.device_count()
    others = [number for number in range(count) if number != device.index]
    return Device(
        "cuda",
        properties.name,
        total,
        free,
        identity=str(getattr(properties, "uuid", "")),
        visible=count,
        unreachable=tuple(
            number for number in others if not torch.cuda.can_device_access_peer(device, number)
        ),
    )


def processor() -> str:
    """Name of the CPU as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def memory_limit() -> int:
    """Bytes that processes of this node may use together."""
    limits = [_meminfo("MemTotal")]
    with suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def available_memory() -> int:
    """Bytes that they may still take."""
    free = [_meminfo("MemAvailable")]
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(0, min(free))


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
