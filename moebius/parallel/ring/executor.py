"""The ring executor: micro-batches go around slices of a looped block, in a plan's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor, StepResult, TokenBatch
from moebius.model.objective import TeacherModel
from moebius.parallel.batch import row_ranges
from moebius.parallel.config import RingConfig
from moebius.parallel.ledger import merge_depth
from moebius.parallel.messages import Channel
from moebius.parallel.ring.slices import Costs, Ring, way
from moebius.parallel.ring.step import RingStep
from moebius.parallel.ring.timeline import Timeline, plan

LIVE_PER_RANK = 3
"""micro-batches on their way, where the configuration does not say: with fewer, processes wait"""


class RingExecutor:
    """Runs this process's slice, and what is at home of the micro-batches that are at home here.

    All processes of a ring are given the same rows.
    """

    def __init__(
        self,
        local: LocalExecutor,
        ring: Ring,
        costs: Costs,
        channel: Channel,
        config: RingConfig,
    ) -> None:
        self.local = local
        self.ring = ring
        self.costs = costs
        self.channel = channel
        self.config = config
        self.timelines: dict[tuple[int, bool], Timeline] = {}

    def timeline(self, num_micro_batches: int, trains: bool = True) -> Timeline:
        """The plan of a step, made once for each number of micro-batches."""
        key = (num_micro_batches, trains)
        if key not in self.timelines:
            self.timelines[key] = plan_ring(
                self.ring, self.costs, self.config, num_micro_batches, trains=trains
            )
        return self.timelines[key]

    def accumulate_gradients(
        self,
        micro_batches: Sequence[TokenBatch],
        step: StepContext,
        teacher: TeacherModel | None,
        num_labels: int,
    ) -> StepResult:
        """See `LocalExecutor.accumulate_gradients`."""
        run = RingStep(self, micro_batches, step, teacher, num_labels)
        run.run(self.timeline(len(micro_batches)))
        return merge_depth(run.losses, run.ledgers, self.channel.group)

    @torch.no_grad()
    def token_losses(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """See `LocalExecutor.token_losses`; of the rows that are at home here."""
        rows, size = len(batch.tokens_BS), self.ring.num_ranks
        parts = [row_ranges(rows, max(rows, 1), number, size)[0] for number in range(size)]
        micro_batches = [batch.rows(start, end) for start, end in parts]
        num_labels = max(batch.labels_BS.numel(), 1)
        run = RingStep(self, micro_batches, replace(step, training=False), None, num_labels)
        run.run(self.timeline(size, trains=False))
        return {len(self.local.program.visits): torch.cat(run.token_losses)}


def plan_ring(
    ring: Ring,
    costs: Costs,
    config: RingConfig,
    num_micro_batches: int,
    latency: float = 0.0,
    trains: bool = True,
) -> Timeline:
    """The plan of so many micro-batches, joined ones with `merge`; `latency` in the unit of the
    costs."""
    size, joined = ring.num_ranks, ring.num_passes if config.merge else 1
    live = -(-(config.live or LIVE_PER_RANK * size) // joined)
    ways = [way(ring, costs, number % size, config) for number in range(num_micro_batches)]
    return plan(ways, size, live, latency, trains)
