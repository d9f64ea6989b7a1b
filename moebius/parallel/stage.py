"""Pipeline stages: consecutive units of a program, cut by cost, and what each process holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from moebius.model.cost import depth_router_flops, planned_work, visit_costs
from moebius.model.decoder import Decoder
from moebius.model.moe.layer import MoE
from moebius.model.moe.scorers import GRUScorer
from moebius.model.program import Unit
from moebius.parallel.cut import cut


@dataclass(frozen=True)
class Stage:
    """A run of units."""

    number: int
    units: tuple[Unit, ...]
    is_first: bool
    """reads token ids"""
    is_last: bool
    """has the head"""


def unit_costs(decoder: Decoder, row_length: int) -> list[int]:
    """Forward FLOPs of each unit for a full row, after all schedules have ended."""
    work = planned_work(decoder, 1, row_length)
    by_visit = {cost.visit: cost.flops for cost in visit_costs(decoder, work)}
    costs = []
    for unit in decoder.program.units:
        flops = sum(by_visit[visit] for visit in unit.visits)
        if unit.segment is not None:
            site = unit.segment.site(unit.visits[0].depth)
            of_router = type(work)(candidates={site: work.candidates[site]})
            flops += depth_router_flops(decoder, of_router)
        costs.append(flops)
    return costs


def cut_stages(
    decoder: Decoder, num_stages: int, row_length: int, measured: Sequence[float] | None = None
) -> tuple[Stage, ...]:
    """Stages as alike in cost as whole units allow, the head counted with the last.

    `measured` has the cost of each unit and then of the head; by default they are modelled.
    """
    units = decoder.program.units
    *costs, head = measured or (*unit_costs(decoder, row_length), decoder.head_flops(row_length))
    ranges = cut(costs, num_stages, fixed_last=head)
    return tuple(
        Stage(number, units[run.start : run.stop], number == 0, number == num_stages - 1)
        for number, run in enumerate(ranges)
    )


def parts_of(decoder: Decoder, stages: Iterable[Stage]) -> set[str]:
    """Names of the parts of a decoder that some stages use."""
    found: set[str] = set()
    for stage in stages:
        if stage.is_first:
            found.add("embedding")
        if stage.is_last:
            found |= last_parts(decoder)
        for unit in stage.units:
            if unit.segment is not None:
                found.add(f"depth_routers.{unit.segment.number}")
            found |= layer_parts(decoder, (visit.layer for visit in unit.visits))
    return found


def last_parts(decoder: Decoder) -> set[str]:
    """Names of the parts behind the last layer."""
    return {"norm", "embedding" if decoder.head is None else "head"}


def layer_parts(decoder: Decoder, layers: Iterable[str]) -> set[str]:
    """Names of some layers and of what they share with others."""
    found: set[str] = set()
    for layer in layers:
        found.add(f"layers.{layer}")
        found |= {f"shared.{name}" for name in shared_names(decoder.layers[layer])}
    return found


def shared_names(layer: nn.Module) -> set[str]:
    """Which of the modules that several layers use a layer uses."""
    names = {m.pool_name for m in layer.modules() if isinstance(m, MoE) and m.experts is None}
    return names | {m.unit_name for m in layer.modules() if isinstance(m, GRUScorer)}


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    pieces = name.split(".")
    nested = pieces[0] in ("layers", "shared", "depth_routers")
    return ".".join(pieces[: 2 if nested else 1])


def keep_parts(decoder: Decoder, parts: set[str]) -> None:
    """Take everything else out of a decoder; its program stays."""
    for container in ("layers", "shared"):
        modules: nn.ModuleDict = getattr(decoder, container)
        for name in [name for name in modules if f"{container}.{name}" not in parts]:
            del modules[name]
    for number in range(len(decoder.depth_routers)):
        if f"depth_routers.{number}" not in parts:
            decoder.depth_routers[number] = nn.Module()
    for name in ("embedding", "norm", "head"):
        if name not in parts and getattr(decoder, name) is not None:
            delattr(decoder, name)
