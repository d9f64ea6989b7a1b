"""What a step computes: products of the model, and those that it computes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moebius.model.attention import core_flops
from moebius.model.block import Block
from moebius.model.cost import (
    BACKWARD_PER_FORWARD,
    VisitCost,
    balanced_rows,
    forward_flops,
    planned_work,
    visit_costs,
)
from moebius.model.decoder import Decoder
from moebius.model.mixture_attention import MixtureAttention
from moebius.parallel.planner.simulate import Job


@dataclass(frozen=True)
class Flops:
    """Of all processes in a step."""

    model: float
    """forward and backward"""
    again: float
    """computed again in the backward pass instead of being kept"""


def flops_of(job: Job, decoder: Decoder) -> Flops:
    """At balanced loads. `decoder` is whole and may lie on `meta`."""
    work = planned_work(decoder, job.rows, job.row_length)
    rows = balanced_rows(decoder, work)
    forward = forward_flops(decoder, work, rows)
    again = _again(job, decoder, visit_costs(decoder, work, rows))
    return Flops(float(forward * (1 + BACKWARD_PER_FORWARD)), float(again))


def _again(job: Job, decoder: Decoder, costs: Sequence[VisitCost]) -> int:
    """By `train.recompute`, and once more by a ring, which keeps only what enters a slice."""
    again = 0
    if job.recompute == "full":
        again += sum(cost.flops for cost in costs)
    elif job.recompute == "selective":
        again += sum(_core_flops(decoder, cost) for cost in costs)
    if job.parallel.rp > 1 and job.parallel.ring.recompute:
        loops = [segment for segment in decoder.program.segments if len(segment.passes) > 1]
        looped = {visit for loop in loops for visits in loop.passes for visit in visits}
        again += sum(cost.flops for cost in costs if cost.visit in looped)
    return again


def _core_flops(decoder: Decoder, cost: VisitCost) -> int:
    """Of the products of queries, keys and values; in feed-forwards `selective` repeats none."""
    layer = decoder.layers[cost.visit.layer]
    if not isinstance(layer, Block):
        return 0
    attention = layer.attention
    heads = attention.config.num_heads
    if isinstance(attention, MixtureAttention):
        heads *= attention.config.num_assignments
    return core_flops(cost.extent, cost.visit, heads, attention.config, attention.kv)
