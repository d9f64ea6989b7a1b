"""What has to be measured, by all processes at the same time."""

from __future__ import annotations

import torch

from moebius.parallel.comm import Group
from moebius.parallel.measure import (
    all_reduce_latency,
    all_reduce_rate,
    all_to_all_rate,
    clock_offset,
    exchange_rate,
    product_rates,
)
from moebius.parallel.mesh import Mesh
from moebius.parallel.world import is_main, rank
from moebius.trainer.preflight.facts import Axis, Facts

SIDE = {"cpu": 512, "cuda": 8192}
"""of a square product, by kind of device"""
SECONDS = {"cpu": 0.6, "cuda": 1.5}
"""that products are repeated"""
MESSAGE = {"cpu": 4 << 20, "cuda": 256 << 20}
"""bytes of a collective"""


def measure_products(facts: Facts, device: torch.device, dtype: torch.dtype) -> None:
    """FLOPs per second of this process."""
    side = SIDE[device.type]
    rates = product_rates(device, dtype, [(side, side, side)], SECONDS[device.type])
    facts.flops, facts.flops_sustained = rates.best, rates.sustained


def axes_of(mesh: Mesh) -> list[Group]:
    """The groups of this process along the axes, each set of processes once.

    Groups of an axis are alike, so that what is left out is the same on all processes.
    """
    found: dict[tuple[int, ...], Group] = {}
    for group in (
        mesh.tp,
        mesh.cp,
        mesh.ep,
        mesh.etp,
        mesh.depth,
        mesh.shard,
        mesh.dp_replicate,
        mesh.dp,
        mesh.edp,
        mesh.world,
    ):
        if group.size > 1:
            found.setdefault(group.ranks, group)
    return list(found.values())


def measure_links(facts: Facts, mesh: Mesh, device: torch.device) -> None:
    """Bandwidths and latency along each axis; a collective call."""
    size = MESSAGE[device.type]
    for group in axes_of(mesh):
        facts.axes.append(
            Axis(
                group.axis,
                group.ranks,
                all_reduce_rate(group, device, size),
                all_to_all_rate(group, device, size),
                all_reduce_latency(group, device),
            )
        )


def measure_messages(facts: Facts, nodes: list[list[int]], device: torch.device) -> None:
    """What this process sends within its node and to others, given the processes of each node; a
    collective call."""
    facts.near = _around(nodes, device)
    shortest = min(len(members) for members in nodes)
    facts.far = _around([[of[number] for of in nodes] for number in range(shortest)], device)


def _around(rings: list[list[int]], device: torch.device) -> float | None:
    """The best of two neighbours: who has a slow one is not slow itself."""
    ring = next((ring for ring in rings if rank() in ring), [])
    place, size = ring.index(rank()) if ring else 0, len(ring)
    rates = [
        exchange_rate(
            ring[(place + away) % size], ring[(place - away) % size], device, MESSAGE[device.type]
        )
        for away in (1, 2)
        if away < size
    ]
    return max(rates, default=None)


def measure_clocks(firsts: list[int]) -> dict[int, float]:
    """Seconds by which clocks of nodes are ahead of the main process's, by the first process of
    each; the others get an empty answer. A collective call."""
    offsets = {0: 0.0} if is_main() else {}
    for partner in firsts:
        if partner and is_main():
            offsets[partner] = clock_offset(partner, asks=True)
        elif partner and partner == rank():
            clock_offset(0, asks=False)
    return offsets
