"""What the processes of a step have booked, put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.model.executor import StepResult
from moebius.model.extent import Extent, Work
from moebius.model.ledger import Ledger
from moebius.model.program import Site, Visit
from moebius.parallel.comm import Group
from moebius.parallel.mesh import Mesh


def merge_results(result: StepResult, mesh: Mesh) -> StepResult:
    """The result of the whole step on every process, from each one's part of it.

    Losses of labels are of the own part of rows; what routers have booked is of whole rows, and so
    the same on all processes that share them.
    """
    if mesh.world.size == 1:
        return result
    losses = result.losses
    if losses:  # where the head is
        losses = _unflatten(losses, mesh.data.all_reduce(_flatten(losses)))
    ledger = _merge_rows(result.ledger, mesh.dp)
    if mesh.pp.size > 1:
        losses, ledger = _merge_stages(losses, ledger, mesh.pp)
    return StepResult(losses, ledger)


def _merge_rows(ledger: Ledger, dp: Group) -> Ledger:
    """Sums over processes with other rows, which have been at the same sites."""
    parts: list[Mapping[Any, Tensor]] = [ledger.losses, *ledger.statistics.values()]
    device = _device(parts)
    flats = [_flatten(part).to(device) for part in parts]
    sums = dp.all_reduce(torch.cat(flats)).split([len(flat) for flat in flats])
    work = dp.all_reduce(_work_numbers(ledger.work))  # the host's numbers stay there
    merged = Ledger()
    merged.losses = _unflatten(ledger.losses, sums[0])
    for (site, part), flat in zip(ledger.statistics.items(), sums[1:], strict=True):
        merged.statistics[site] = _unflatten(part, flat)
    merged.work = _work_of(ledger.work, work.tolist())
    for site, ids_BSK in ledger.routings.items():
        for rows in gather_objects(ids_BSK.cpu(), dp):
            merged.record_routing(site, rows)
    return merged


def _merge_stages(
    losses: dict[str, Tensor], ledger: Ledger, pp: Group
) -> tuple[dict[str, Tensor], Ledger]:
    """Every stage learns what the others have booked: routers of several stages learn alike."""
    device = _device([losses, ledger.losses, *ledger.statistics.values()])
    mine = (_to(losses, "cpu"), _to(ledger.losses, "cpu"), ledger.work, ledger.routings)
    statistics = {site: _to(sums, "cpu") for site, sums in ledger.statistics.items()}
    all_losses: dict[str, Tensor] = {}
    merged: list[Ledger] = []
    for (found, booked, work, routings), sums_of in gather_objects((mine, statistics), pp):
        all_losses |= _to(found, device)
        stage = Ledger()
        stage.losses, stage.work, stage.routings = _to(booked, device), work, routings
        stage.statistics = {site: _to(sums, device) for site, sums in sums_of.items()}
        merged.append(stage)
    return all_losses, Ledger.merge(merged)


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Everyone's value, small and picklable."""
    if group.size == 1:
        return [value]
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, value, group=group.process_group)
    return found


def _flatten(tensors: Mapping[Any, Tensor]) -> Tensor:
    """In fp64, in which counts stay exact."""
    flat = [tensor.double().flatten() for tensor in tensors.values()]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)


def _unflatten(like: Mapping[Any, Tensor], flat: Tensor) -> dict[Any, Tensor]:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.view_as(tensor).to(tensor.dtype)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def _work_numbers(work: Work) -> Tensor:
    numbers = [n for e in work.visits.values() for n in (e.tokens, e.pairs, e.row_pairs)]
    numbers += [*work.candidates.values(), work.head_tokens]
    return torch.tensor(numbers, dtype=torch.float64)


def _work_of(like: Work, numbers: list[float]) -> Work:
    counts = iter(round(number) for number in numbers)
    visits: dict[Visit, Extent] = {
        visit: Extent(next(counts), next(counts), next(counts)) for visit in like.visits
    }
    candidates: dict[Site, int] = {site: next(counts) for site in like.candidates}
    return Work(visits, candidates, next(counts))


def _device(parts: list[Mapping[Any, Tensor]]) -> torch.device:
    return next((t.device for part in parts for t in part.values()), torch.device("cpu"))


def _to(tensors: Mapping[Any, Tensor], device: torch.device | str) -> dict[Any, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
