"""Which part of a step processes wait for each other, by their plan of the step."""

from __future__ import annotations

from itertools import islice

from moebius.model.cost import BACKWARD_PER_FORWARD
from moebius.model.decoder import Decoder
from moebius.parallel.planner.simulate import Job
from moebius.parallel.planner.whole_step import Shape
from moebius.parallel.ring.executor import plan_ring
from moebius.parallel.ring.slices import cut_ring
from moebius.parallel.schedule import plan, simulate
from moebius.parallel.stage import cut_stages, unit_costs

COUNTED = 256
"""micro-batches up to which a plan is worked through; of more, waiting grows evenly"""


def idle_share(job: Job, decoder: Decoder) -> float:
    """Of the time of all processes with different layers, that in which one computes nothing.

    `decoder` is whole and may lie on `meta`. Computing takes as long as its FLOPs say, messages no
    time; with recompute stages wait as long as without.
    """
    if job.parallel.pp * job.parallel.rp == 1:
        return 0.0
    shape = Shape.of(job)
    number = shape.micro_batches
    if number <= COUNTED:
        return _idle_share(job, decoder, number)
    # Multiples of the period, so that both end alike.
    many = COUNTED // shape.period * shape.period or shape.period
    few = many // 2 // shape.period * shape.period or many
    waits = {n: _waiting(job, decoder, n) for n in (few, many)}
    grows = (waits[many] - waits[few]) / max(many - few, 1)
    waiting = (waits[many] + grows * (number - many)) / number
    return waiting / (1 + waiting)


def _waiting(job: Job, decoder: Decoder, number: int) -> float:
    """Idle time of so many micro-batches, in units of the work of one."""
    idle = _idle_share(job, decoder, number)
    return number * idle / (1 - idle)


def _idle_share(job: Job, decoder: Decoder, number: int) -> float:
    config = job.parallel
    if config.rp > 1:
        ring = cut_ring(decoder, config.rp, job.row_length, config.ring.costs)
        waits = plan_ring(ring, config.ring, number).bubble
        return waits / (1 + waits)
    pipeline = config.pipeline
    count = config.pp * pipeline.stages_per_rank
    stages = cut_stages(decoder, count, job.row_length, pipeline.costs)
    costs = iter(unit_costs(decoder, job.row_length))
    times = [float(sum(islice(costs, len(stage.units)))) for stage in stages]
    times[-1] += decoder.head_flops(job.row_length)
    actions = plan(pipeline.schedule, config.pp, pipeline.stages_per_rank, number)
    return simulate(actions, times, [BACKWARD_PER_FORWARD * time for time in times]).idle_share
