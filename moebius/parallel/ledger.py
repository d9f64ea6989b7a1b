"""What the processes of a step have booked, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
    the same on all processes that share them. Processes with other layers have their results merged
    already, see `merge_depth`.
    """
    if mesh.world.size == 1:
        return result
    losses = _unflatten(result.losses, mesh.data.all_reduce(_flatten(result.losses)))
    return StepResult(losses, _merge_rows(result.ledger, mesh.dp))


def _merge_rows(ledger: Ledger, dp: Group) -> Ledger:
    """Sums over processes with other rows, which have been at the same sites."""
    parts = _sums_of(ledger)
    device = _device(parts)
    flats = [_flatten(part).to(device) for part in parts]
    sums = dp.all_reduce(torch.cat(flats)).split([len(flat) for flat in flats])
    work = dp.all_reduce(_work_numbers(ledger.work))  # the host's numbers stay there
    merged = Ledger()
    merged.losses = _unflatten(ledger.losses, sums[0])
    for (site, part), flat in zip(ledger.statistics.items(), sums[1:], strict=True):
        merged.statistics[site] = _unflatten(part, flat)
    merged.work = _work_of(ledger.work, work.tolist())
    if ledger.routings:
        for found in dp.objects(_to(ledger.routings, "cpu")):
            for site, rows in found.items():
                merged.record_routing(site, rows)
    return merged


def merge_depth(
    losses: Mapping[str, Tensor],
    ledgers: Mapping[Any, Ledger],
    depth: Group,
    device: torch.device,
) -> StepResult:
    """The result of processes that hold different layers: routers of several learn alike.

    `ledgers` are of micro-batches; their keys put these in order, in which routings are joined.
    A process may have booked nothing: `device` is where all have it then.
    """
    mine = Ledger.merge(ledgers[key] for key in sorted(ledgers))
    routings = {key: _to(ledger.routings, "cpu") for key, ledger in ledgers.items()}
    statistics = {site: _to(sums, "cpu") for site, sums in mine.statistics.items()}
    booked = (_to(losses, "cpu"), _to(mine.losses, "cpu"), statistics, mine.work, routings)
    total: dict[str, Tensor] = {}
    parts: list[Ledger] = []
    rows: list[tuple[Any, dict[Site, Tensor]]] = []
    for found, auxiliary, sums_of, work, routings_of in depth.objects(booked):
        for name, loss in _to(found, device).items():
            total[name] = total[name] + loss if name in total else loss
        part = Ledger()
        part.losses, part.work = _to(auxiliary, device), work
        part.statistics = {site: _to(sums, device) for site, sums in sums_of.items()}
        parts.append(part)
        rows += routings_of.items()
    merged = Ledger.merge(parts)
    for _, of_sites in sorted(rows, key=lambda row: row[0]):
        for site, ids_BSK in of_sites.items():
            merged.record_routing(site, ids_BSK)
    in_order = sorted(merged.work.visits.items(), key=lambda item: item[0].index)
    merged.work.visits = dict(in_order)
    return StepResult(total, merged)


def _sums_of(ledger: Ledger) -> list[dict[str, Tensor]]:
    return [ledger.losses, *ledger.statistics.values()]


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


def _device(parts: Sequence[Mapping[Any, Tensor]]) -> torch.device:
    return next((t.device for part in parts for t in part.values()), torch.device("cpu"))


def _to(tensors: Mapping[Any, Tensor], device: torch.device | str) -> dict[Any, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
