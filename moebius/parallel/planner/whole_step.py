"""A step of many micro-batches from one of few: the rest repeats what was seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moebius.parallel.batch import row_ranges
from moebius.parallel.comm import Traffic
from moebius.parallel.mesh import Axes
from moebius.parallel.planner.simulate import Job, Usage, simulate
from moebius.parallel.ring.executor import LIVE_PER_RANK


@dataclass(frozen=True)
class Shape:
    """How a batch is cut."""

    dp: int
    """processes with other rows"""
    rows: int
    """of a micro-batch; on a ring that merges, of those that travel together"""
    micro_batches: int
    """of the process that has most"""
    period: int
    """so many micro-batches make a process send the same again"""
    least: int
    """micro-batches after which no more are alive at once"""

    @classmethod
    def of(cls, job: Job) -> Shape:
        """Of a job. Raises LayoutError where the processes do not fill the axes."""
        sizes = Axes.of(job.parallel, job.world_size).dense
        dp = sizes["dp_replicate"] * sizes["dp_shard"]
        pipeline, ring = job.parallel.pipeline, job.parallel.ring
        joins = job.model.depth.num_recursions if sizes["rp"] > 1 and ring.merge else 1
        rows = job.micro_batch_size * joins
        count = len(row_ranges(job.rows, rows, 0, dp))
        if sizes["rp"] > 1:
            live = ring.live or sizes["rp"] * LIVE_PER_RANK
            return cls(dp, rows, count, sizes["rp"], live + sizes["rp"])
        if sizes["pp"] == 1:
            return cls(dp, rows, count, 1, 2)
        if pipeline.schedule == "gpipe":  # all are alive at once
            return cls(dp, rows, count, 1, count)
        if pipeline.schedule == "interleaved_1f1b":
            stages = sizes["pp"] * pipeline.stages_per_rank
            return cls(dp, rows, count, sizes["pp"], 2 * stages)
        return cls(dp, rows, count, 1, sizes["pp"] + 1)


def use_of_whole_step(job: Job, rank: int = 0) -> list[Usage]:
    """What `simulate` would say of all micro-batches.

    Memory is that of as many as are ever alive together; the passes of the others send as much.
    """
    shape = Shape.of(job)
    whole = job.rows % (shape.dp * shape.rows) == 0
    few = -(-shape.least // shape.period) * shape.period
    if not whole or shape.micro_batches <= few or shape.micro_batches % shape.period:
        return simulate(job, rank)
    rows = shape.dp * shape.rows * few
    return [_continued(u, shape.micro_batches) for u in simulate(replace(job, rows=rows), rank)]


def _continued(usage: Usage, micro_batches: int) -> Usage:
    traffic = usage.traffic_of(micro_batches)
    of_passes = Traffic(traffic.calls, traffic.sent)
    return replace(usage, micro_batches=micro_batches, of_passes=of_passes, of_update=Traffic())
