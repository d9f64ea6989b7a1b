"""Which layout of so many devices: all that there are, priced roughly, the best ones simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

from moebius.config import Problem
from moebius.errors import LayoutError
from moebius.model.context import Recompute
from moebius.parallel.config import ParallelConfig
from moebius.parallel.planner.device import DeviceProfile
from moebius.parallel.planner.estimate import ROOM, Plan, make_plan
from moebius.parallel.planner.rough import RECOMPUTES, Price, Pricing
from moebius.parallel.planner.simulate import Job
from moebius.parallel.planner.whole_step import Shape
from moebius.parallel.rules import Asked, layout_problems
from moebius.parallel.schedule import plan as plan_pipeline

LONG_ROW = 8192
"""tokens of a row from which it is worth cutting"""
WANTED, MOST_SIMULATED = 3, 6
CLOSE = 1.03
"""times that differ by less are alike; then the simpler layout comes first"""
MOST_STAGES = 16


@dataclass(frozen=True)
class Candidate:
    """A layout and what became of it."""

    job: Job
    price: Price
    plan: Plan | None = None
    """where it was simulated"""


@dataclass
class Found:
    """The result of a search."""

    ranked: list[Candidate] = field(default_factory=list)
    """simulated and fitting, fastest first"""
    others: list[Candidate] = field(default_factory=list)
    """with other axes; slower or too large"""
    refused: dict[str, int] = field(default_factory=dict)
    """reasons, and how many layouts each has refused"""


def search(
    job: Job,
    device: DeviceProfile,
    more: Callable[[ParallelConfig], Iterable[Problem]] = lambda config: (),
) -> Found:
    """Rank the layouts of `job.world_size` devices; of axes `job.parallel` only says `etp`.

    `more` finds what speaks against a layout besides the rules of layouts. Raises LayoutError where
    none is legal.
    """
    found, rules, legal = Found(), _Rules(more), []
    for wanted in _layouts(job, device):
        reason = rules.refusal(wanted)
        if reason is None:
            legal.append(wanted)
        else:
            found.refused[reason] = found.refused.get(reason, 0) + 1
    if not legal:
        reason = next(iter(found.refused), "no axes were tried")
        raise LayoutError(f"--gpus: {job.world_size}; no layout of so many is legal: {reason}")
    pricing = Pricing(job, device)
    priced = [Candidate(one, pricing.price(one)) for one in legal]
    priced.sort(key=lambda candidate: _rank(candidate, ROOM * device.memory))
    distinct = _with_other_axes(priced)
    simulated: list[Candidate] = []
    for candidate in distinct[:MOST_SIMULATED]:
        simulated.append(replace(candidate, plan=make_plan(candidate.job, device)))
        if sum(one.plan is not None and one.plan.fits for one in simulated) == WANTED:
            break
    plans = [(c, c.plan) for c in simulated if c.plan is not None]
    fitting = sorted((p.step_seconds, n) for n, (_, p) in enumerate(plans) if p.fits)
    found.ranked = [simulated[number] for _, number in fitting]
    found.others = [c for c in simulated if c not in found.ranked] + distinct[len(simulated) :]
    return found


def _rank(candidate: Candidate, room: float) -> tuple[float, ...]:
    """Those that fit, the fastest first, of two that are alike the simpler one; then the others,
    the smallest first."""
    price, job, config = candidate.price, candidate.job, candidate.job.parallel
    if price.memory > room:
        return (1.0, price.memory)
    time = round(math.log(price.seconds) / math.log(CLOSE))
    axes = config.model_size * config.ep
    return (0.0, time, RECOMPUTES.index(job.recompute), -job.micro_batch_size, axes)


def _with_other_axes(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of those with the same axes and scheme the first one."""
    seen: dict[tuple[object, ...], Candidate] = {}
    for candidate in candidates:
        config = candidate.job.parallel
        axes = (config.tp, config.cp, config.pp, config.rp, config.ep, config.data)
        seen.setdefault(axes, candidate)
    return list(seen.values())


def _layouts(job: Job, device: DeviceProfile) -> Iterator[Job]:
    """All combinations of powers of two; whether they are legal is for the rules to say."""
    world = job.world_size
    depth, etp = job.model.depth, job.parallel.etp
    stages = [n for n in _powers(MOST_STAGES) if world % n == 0]
    rings = stages if depth.num_recursions > 1 else [1]
    sequence = [1, 2, 4, 8] if job.row_length >= LONG_ROW else [1]
    schemes: list[tuple[str, Recompute]] = list(product(("zero1", "fsdp2"), RECOMPUTES))
    largest = job.micro_batch_size
    sizes = [n for n in (largest, largest // 4, 1) if n and job.rows % n == 0]
    for tp, pp, rp, cp, ep in product(
        _powers(device.devices_per_node), stages, rings, sequence, _powers(64)
    ):
        if (pp > 1 and rp > 1) or world % (tp * pp * rp * cp) or world // (pp * rp) % (ep * etp):
            continue
        options: Mapping[str, Any] = {"tp": tp, "pp": pp, "rp": rp, "cp": cp, "ep": ep}
        for data, recompute in schemes:
            config = job.parallel.model_copy(update={**options, "data": data, "dp_replicate": 1})
            for size in dict.fromkeys(sizes):
                yield replace(job, parallel=config, recompute=recompute, micro_batch_size=size)


def _powers(limit: int) -> list[int]:
    return [1 << n for n in range(limit.bit_length()) if 1 << n <= limit]


class _Rules:
    """What speaks against layouts; every question is asked once."""

    def __init__(self, more: Callable[[ParallelConfig], Iterable[Problem]]) -> None:
        self.more = more
        self.known: dict[object, str | None] = {}

    def refusal(self, job: Job) -> str | None:
        """Why a layout is none."""
        config, shape = job.parallel, Shape.of(job)
        if config not in self.known:
            rules = layout_problems(Asked(job.model, config, job.row_length))
            problems = chain(rules, self.more(config))
            self.known[config] = next((f"{path}: {message}" for path, message in problems), None)
        if self.known[config] is not None:
            return self.known[config]
        if shape.dp > job.rows:
            return f"train.batch_size: {job.rows} rows for {shape.dp} data-parallel processes"
        order = (config.pp, shape.micro_batches)
        if config.pp > 1 and order not in self.known:
            self.known[order] = _pipeline_refusal(config, shape.micro_batches)
        return self.known.get(order)


def _pipeline_refusal(config: ParallelConfig, micro_batches: int) -> str | None:
    pipeline = config.pipeline
    try:
        plan_pipeline(pipeline.schedule, config.pp, pipeline.stages_per_rank, micro_batches)
    except ValueError as error:
        return f"parallel.pipeline: {error}"
    return None


def why_it_loses(candidate: Candidate, best: Candidate, device: DeviceProfile) -> str:
    """In a few words."""
    plan, winner = candidate.plan, best.plan
    memory = candidate.price.memory if plan is None else plan.total_bytes
    seconds = candidate.price.seconds if plan is None else plan.step_seconds
    reference = best.price.seconds if plan is None or winner is None else winner.step_seconds
    if memory > ROOM * device.memory:
        return f"does not fit: {memory / 1e9:,.0f} GB of {ROOM * device.memory / 1e9:,.0f}"
    if seconds < CLOSE * reference:
        return "no faster, and less simple"
    return f"slower: {seconds / reference:.2f} times the time"
