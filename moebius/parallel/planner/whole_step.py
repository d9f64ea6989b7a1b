"""A step of many micro-batches from steps of few: the rest repeats what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moebius.parallel.batch import row_ranges
from moebius.parallel.comm import Traffic
from moebius.parallel.mesh import Axes
from moebius.parallel.planner.simulate import Job, Usage, simulate


@dataclass(frozen=True)
class Shape:
    """How a batch is cut."""

    dp: int
    """processes with other rows"""
    micro_batches: int
    """of the process that has most"""
    period: int
    """after so many more micro-batches, a process has sent so much more"""
    least: int
    """micro-batches after which no more are alive at once"""

    @classmethod
    def of(cls, job: Job) -> Shape:
        """Of a job. Raises LayoutError where the processes do not fill the axes."""
        sizes = Axes.of(job.parallel, job.world_size).dense
        dp = sizes["dp_replicate"] * sizes["dp_shard"]
        count = len(row_ranges(job.rows, job.micro_batch_size, 0, dp))
        pipeline, ring = job.parallel.pp, job.parallel.rp
        if ring > 1:
            passes = job.model.depth.num_recursions if job.parallel.ring.merge else 1
            return cls(dp, count, ring * passes, 3 * ring * passes)
        schedule = job.parallel.pipeline.schedule
        if pipeline > 1 and schedule == "gpipe":  # all are alive at once
            return cls(dp, count, 1, count)
        if pipeline > 1 and schedule == "interleaved_1f1b":
            return cls(dp, count, pipeline, 2 * pipeline * job.parallel.pipeline.stages_per_rank)
        return cls(dp, count, 1, pipeline)


def use_of_whole_step(job: Job, rank: int = 0) -> list[Usage]:
    """What `simulate` would say of all micro-batches.

    Memory is that of as many as are ever alive together; traffic grows by the same with every
    further period of micro-batches of the same size.
    """
    shape = Shape.of(job)
    whole = job.rows % (shape.dp * job.micro_batch_size) == 0
    beyond = shape.micro_batches - shape.least
    if not whole or beyond < 2 * shape.period or beyond % shape.period:
        return simulate(job, rank)
    rows = shape.dp * job.micro_batch_size
    few = simulate(replace(job, rows=rows * shape.least), rank)
    more = simulate(replace(job, rows=rows * (shape.least + shape.period)), rank)
    return _continued(few, more, beyond // shape.period)


def _continued(few: Sequence[Usage], more: Sequence[Usage], times: int) -> list[Usage]:
    found = []
    for a, b in zip(few, more, strict=True):
        traffic = Traffic()
        for key in b.traffic.sent:
            calls = [t.calls.get(key, 0) for t in (a.traffic, b.traffic)]
            sent = [t.sent.get(key, 0) for t in (a.traffic, b.traffic)]
            traffic.calls[key] = calls[0] + times * (calls[1] - calls[0])
            traffic.sent[key] = sent[0] + times * (sent[1] - sent[0])
        found.append(replace(b, traffic=traffic))
    return found
