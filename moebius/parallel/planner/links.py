"""What communication costs: which links an axis uses, and how long its bytes take on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moebius.parallel.comm import Group, Traffic
from moebius.parallel.mesh import Mesh
from moebius.parallel.planner.device import DeviceProfile, Link

HIDDEN = ("send", "header")
"""messages between stages and slices travel while others are computed"""


@dataclass(frozen=True)
class Exchange:
    """One kind of collective of a process in a step."""

    axis: str
    operation: str
    size: int
    """processes of the group"""
    calls: int
    sent: int
    """bytes, as `Traffic` counts them"""
    across_nodes: bool
    seconds: float
    is_hidden: bool
    """whether something else is computed meanwhile"""


def exchanges(traffic: Traffic, mesh: Mesh, device: DeviceProfile) -> list[Exchange]:
    """What a process exchanges in a step, the slowest first."""
    groups = groups_of(mesh, device.devices_per_node)
    found = []
    for (axis, operation), sent in traffic.sent.items():
        size, across = groups[axis]
        calls = traffic.calls[axis, operation]
        link = device.network if across else device.node
        found.append(
            Exchange(
                axis,
                operation,
                size,
                calls,
                sent,
                across,
                seconds(operation, sent, calls, size, link),
                operation in HIDDEN or axis == "shard",
            )
        )
    return sorted(found, key=lambda exchange: -exchange.seconds)


def seconds(operation: str, sent: int, calls: int, size: int, link: Link) -> float:
    """On one link for each process and direction, with ring algorithms.

    Of n processes, each moves for an all-reduce 2 (n-1)/n of its bytes, for a reduce-scatter
    (n-1)/n and for an all-gather n-1 times its part; else what leaves it.
    """
    factor = {
        "all_reduce": 2 * (size - 1) / size,
        "reduce_scatter": (size - 1) / size,
        "all_gather": size - 1.0,
    }.get(operation, 1.0)
    return factor * sent / link.bandwidth + calls * link.latency


def groups_of(mesh: Mesh, devices_per_node: int) -> Mapping[str, tuple[int, bool]]:
    """By the axis that traffic is counted under: the size of the largest group, and whether one of
    them, of this process, leaves its node."""
    found: dict[str, tuple[int, bool]] = {}
    for group in _all_groups(mesh):
        nodes = {rank // devices_per_node for rank in group.ranks}
        size, across = found.get(group.axis, (1, False))
        found[group.axis] = max(size, group.size), across or len(nodes) > 1
    # Layers that several stages hold add up their gradients among these.
    found["depth"] = found[mesh.depth.axis]
    return found


def _all_groups(mesh: Mesh) -> Iterator[Group]:
    for value in vars(mesh).values():
        if isinstance(value, Group):
            yield value
        elif isinstance(value, dict):
            yield from (group for group in value.values() if isinstance(group, Group))
