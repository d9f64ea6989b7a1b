"""moebius calibrate: measure this machine and write a device profile for moebius plan."""

import argparse
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moebius.parallel.comm import Group, Traffic
from moebius.parallel.measure import (
    Rates,
    all_to_all_rate,
    copy_rates,
    message_latency,
    product_rates,
)
from moebius.parallel.planner.device import DeviceProfile, Link
from moebius.parallel.together import gathered
from moebius.parallel.world import is_main, joined, rank, world_size
from moebius.trainer.commands.arguments import positive
from moebius.trainer.config import Device
from moebius.trainer.cpu import CPUConfig, prepare_cpu
from moebius.trainer.machine import select_device
from moebius.trainer.preflight.facts import memory_limit, processor
from moebius.trainer.preflight.measures import MESSAGE
from moebius.trainer.preflight.roll import node_name

SIZES = {"cpu": (1024, 512, 1408), "cuda": (8192, 4096, 14336)}
"""tokens, width and inner width of a model, by kind of device"""
SQUARE = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 128 << 20, "cuda": 2 << 30}
"""bytes, far more than caches hold"""
ASSUMED = {"cpu": Link(bandwidth=1e9, latency=1e-4), "cuda": Link(bandwidth=5e10, latency=2e-5)}
"""links that could not be measured"""
TIMEOUT = 120.0
"""seconds that a collective waits for the other processes"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius calibrate [--out FILE]`, with torchrun to measure links, too."""
    parser.add_argument("--out", type=Path, default=Path("device.json"), help="file to write")
    parser.add_argument("--name", help="of the profile; default: that of the file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=2.0,
        help="that each kind of product is repeated; default: 2",
        metavar="S",
    )


@dataclass(frozen=True)
class Measured:
    """Of one process, while all measured."""

    node: str
    fp32: Rates
    bf16: Rates
    best_fp32: float
    """FLOPs per second of the fastest square product"""
    best_bf16: float
    copy: Rates


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measure, print a table and write the profile."""
    kind: Device = arguments.device
    device = select_device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        said: list[str] = []
    else:
        said = list(prepare_cpu(CPUConfig(), "fp32"))  # as the training does
    with joined(device, TIMEOUT):
        gathered(None)  # all begin together
        everyone: list[Measured] = gathered(_measure(device, arguments.seconds))
        node, network = _links(device, [each.node for each in everyone])
        gathered(None)
    if not is_main():
        return 0
    profile = _profile(arguments, device, everyone, node, network)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    profile.write(arguments.out)
    for line in (*said, *_lines(node, network)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_table(profile, everyone))
    line = f"written: {arguments.out}, for moebius plan CONFIG --device {arguments.out}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _measure(device: torch.device, seconds: float) -> Measured:
    tokens, width, inner = SIZES[device.type]
    # The projections of attention, and of a feed-forward up and down.
    model = [(tokens, width, width), (tokens, 2 * inner, width), (tokens, width, inner)]
    side = SQUARE[device.type]
    rates = {
        dtype: (
            product_rates(device, dtype, model, seconds),
            product_rates(device, dtype, [(side, side, side)], seconds / 4).best,
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    return Measured(
        node_name(),
        rates[torch.float32][0],
        rates[torch.bfloat16][0],
        rates[torch.float32][1],
        rates[torch.bfloat16][1],
        copy_rates(device, COPIED[device.type], seconds / 4),
    )


def _links(device: torch.device, nodes: list[str]) -> tuple[Link | None, Link | None]:
    """Within nodes and between them, on the main process; None: there is no such link.

    Between nodes, all processes with the same number on theirs talk at the same time.
    """
    if world_size() == 1:
        return None, None
    members = [[r for r, name in enumerate(nodes) if name == node] for node in dict.fromkeys(nodes)]
    across = [
        [of[number] for of in members if number < len(of)]
        for number in range(max(len(of) for of in members))
    ]
    return _link(device, "node", members), _link(device, "network", across)


def _link(device: torch.device, name: str, lists: list[list[int]]) -> Link | None:
    group, _ = dist.new_subgroups_by_enumeration(lists)
    own = next(ranks for ranks in lists if rank() in ranks)
    rate, latency = float("inf"), 0.0
    if len(own) > 1:
        rate = all_to_all_rate(
            Group(name, own, group, Traffic(), rank()), device, MESSAGE[device.type]
        )
        place = own.index(rank())
        if place < 2:
            latency = message_latency(own[1 - place], device, first=place == 0)
    found: list[tuple[float, float]] = gathered((rate, latency))
    slowest, slowest_answer = min(r for r, _ in found), max(s for _, s in found)
    if slowest == float("inf"):
        return None
    return Link(bandwidth=slowest, latency=slowest_answer)


def _profile(
    arguments: argparse.Namespace,
    device: torch.device,
    everyone: list[Measured],
    node: Link | None,
    network: Link | None,
) -> DeviceProfile:
    """Rates of the median process: all of a kind are alike, or `moebius preflight` says so."""
    per_node = sum(each.node == everyone[0].node for each in everyone)
    if device.type == "cuda":
        model, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
        per_node = torch.cuda.device_count()
    else:
        model = f"{processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
        memory = memory_limit() // per_node
    said = [f"measured on {model}", f"{datetime.date.today()}", f"torch {torch.__version__}"]
    said.append(f"{len(everyone)} processes at the same time")
    assumed = ASSUMED[device.type]
    said += [
        f"link {name} assumed"
        for name, link in (("node", node), ("network", network))
        if link is None
    ]
    return DeviceProfile(
        name=arguments.name or arguments.out.stem,
        kind="cuda" if device.type == "cuda" else "cpu",
        source="; ".join(said),
        devices_per_node=per_node,
        memory=memory,
        memory_bandwidth=median(each.copy.sustained for each in everyone),
        flops_fp32=median(each.fp32.sustained for each in everyone),
        flops_bf16=median(each.bf16.sustained for each in everyone),
        efficiency=1.0,
        node=node or assumed,
        network=network or assumed,
    )


def _lines(node: Link | None, network: Link | None) -> Iterator[str]:
    """What could not be measured."""
    if node is None:
        yield (
            "link within a node: not measured, assumed; start several processes on a node with "
            "torchrun to measure it"
        )
    if network is None:
        yield "link between nodes: not measured, assumed; start it on several nodes to measure it"


def _table(profile: DeviceProfile, everyone: list[Measured]) -> Table:
    """What was measured, the best beside what is sustained."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "sustained, of a model", "best, square"):
        table.add_column(column)

    def gflops(rate: float) -> str:
        return f"{rate / 1e9:.1f} GFLOP/s"

    fp32 = max(each.best_fp32 for each in everyone)
    bf16 = max(each.best_bf16 for each in everyone)
    copy = max(each.copy.best for each in everyone) / 1e9
    table.add_row("products fp32", gflops(profile.flops_fp32), gflops(fp32))
    table.add_row("products bf16", gflops(profile.flops_bf16), gflops(bf16))
    table.add_row("memory", f"{profile.memory_bandwidth / 1e9:.1f} GB/s", f"{copy:.1f} GB/s")
    for name, link in (("node", profile.node), ("network", profile.network)):
        rate = f"{link.bandwidth / 1e9:.2f} GB/s, {1e6 * link.latency:.0f} us"
        table.add_row(f"link {name}", rate, "")
    table.add_row("size", f"{profile.memory / 1e9:.1f} GB of each device", "")
    return table
