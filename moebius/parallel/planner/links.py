"""What communication costs: which links an axis uses, and how long its bytes take on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moebius.parallel.comm import Group, Traffic
from moebius.parallel.mesh import Mesh
from moebius.parallel.planner.device import DeviceProfile, Link

HIDDEN = ("send", "header")
"""messages between stages and slices travel while others are computed"""
EXPERT_SHARD = "expert_shard"
"""among which FSDP2 shares out experts that are spread: an axis of its own, for it hides"""
RINGS = ("all_reduce", "reduce_scatter", "all_gather")
"""collectives whose processes pass data on in a ring"""


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
        reach = groups[axis]
        calls = traffic.calls[axis, operation]
        found.append(
            Exchange(
                axis,
                operation,
                reach.size,
                calls,
                sent,
                reach.leaves_node,
                seconds(operation, sent, calls, reach.size, link_of(reach, operation, device)),
                operation in HIDDEN or axis in ("shard", EXPERT_SHARD),
            )
        )
    return sorted(found, key=lambda exchange: -exchange.seconds)


@dataclass(frozen=True)
class Reach:
    """Where the processes of a group are."""

    size: int
    leaves_node: bool
    per_node: int
    """processes on the node with fewest"""


def link_of(reach: Reach, operation: str, device: DeviceProfile) -> Link:
    """What a process of a group has to itself.

    Rings go through all processes of a node before they leave it. So there is one for each process
    of a node, over that one's share of the network, and all of them together carry the data.
    """
    if not reach.leaves_node:
        return device.node
    rings = reach.per_node if operation in RINGS else 1
    bandwidth = min(device.node.bandwidth, rings * device.network.bandwidth)
    return Link(bandwidth=bandwidth, latency=device.network.latency)


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


def groups_of(mesh: Mesh, devices_per_node: int) -> Mapping[str, Reach]:
    """By the axis that traffic is counted under; of several groups of this process the worst of
    each number."""
    found: dict[str, Reach] = {}
    for group in _all_groups(mesh):
        nodes = Counter(rank // devices_per_node for rank in group.ranks)
        fewest = min(nodes.values())
        seen = found.get(group.axis, Reach(1, False, fewest))
        found[group.axis] = Reach(
            max(seen.size, group.size),
            seen.leaves_node or len(nodes) > 1,
            min(seen.per_node, fewest),
        )
    # Layers that several stages hold add up their gradients among these.
    found["depth"] = found[mesh.depth.axis]
    found[EXPERT_SHARD] = found[mesh.edp.axis]
    return found


def _all_groups(mesh: Mesh) -> Iterator[Group]:
    for value in vars(mesh).values():
        if isinstance(value, Group):
            yield value
        elif isinstance(value, dict):
            yield from (group for group in value.values() if isinstance(group, Group))
