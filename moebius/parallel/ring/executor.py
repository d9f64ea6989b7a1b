"""The ring executor: micro-batches go around slices of a looped block, in a plan's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebius.errors import LayoutError
from moebius.model.context import StepContext, TokenContext
from moebius.model.executor import LocalExecutor, StepResult, TokenBatch
from moebius.model.objective import TeacherModel
from moebius.model.spread import ALONE
from moebius.parallel.batch import row_ranges
from moebius.parallel.config import RingConfig
from moebius.parallel.ledger import merge_depth
from moebius.parallel.messages import Channel
from moebius.parallel.ring.mail import Route
from moebius.parallel.ring.slices import Ring, way
from moebius.parallel.ring.step import Read, RingStep
from moebius.parallel.ring.timeline import Timeline, plan

LIVE_PER_RANK, MERGED_LIVE_PER_RANK = 3, 6
"""micro-batches on their way, where the configuration does not say: with fewer, processes wait"""


class RingExecutor:
    """Runs this process's slice, and what is at home of the micro-batches that are at home here.

    All processes of a ring are given the same rows.
    """

    def __init__(
        self,
        local: LocalExecutor,
        ring: Ring,
        channel: Channel,
        config: RingConfig,
    ) -> None:
        self.local = local
        self.ring = ring
        self.channel = channel
        self.config = config
        self.routes: dict[tuple[int, bool], Route] = {}
        """by number of micro-batches, and whether it is for training"""

    def timeline(self, num_micro_batches: int, trains: bool = True) -> Timeline:
        """The plan of a step, made once for each number of micro-batches."""
        return self._route(num_micro_batches, trains).timeline

    def _route(self, num_micro_batches: int, trains: bool) -> Route:
        key = (num_micro_batches, trains)
        if key not in self.routes:
            # Where nothing is kept, there is nothing to gain from merging.
            config = self.config if trains else self.config.model_copy(update={"merge": False})
            timeline = plan_ring(self.ring, config, num_micro_batches, trains)
            self.routes[key] = Route.of(timeline, self.channel.group.rank)
        return self.routes[key]

    def accumulate_gradients(
        self,
        micro_batches: Sequence[TokenBatch],
        step: StepContext,
        teacher: TeacherModel | None,
        num_labels: int,
    ) -> StepResult:
        """See `LocalExecutor.accumulate_gradients`."""
        route = self._route(len(micro_batches), trains=True)
        run = RingStep(self, route, micro_batches, step, num_labels, teacher)
        run.run()
        step.mark("merge")
        return merge_depth(run.losses, run.ledgers, self.channel.group, self.channel.device)

    @torch.no_grad()
    def token_losses(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """See `LocalExecutor.token_losses`; of the rows that are at home here."""
        rows, size = len(batch.tokens_BS), self.ring.num_ranks
        parts = [row_ranges(rows, max(rows, 1), number, size)[0] for number in range(size)]
        micro_batches = [batch.rows(start, end) for start, end in parts]
        found = self._read(micro_batches, step, self.local.final_token_losses)
        losses = [found[number] for number in sorted(found)]
        return {len(self.local.program.visits): torch.cat(losses)}

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], step: StepContext) -> dict[int, Tensor]:
        """Logits `[V]` after prompts that are at home here, ids `[S]` of one document each.

        With a cache in `step`, the keys and values that layers of this process have made are in it
        then, those of prompt n in slot n. Each prompt has its own length. Raises LayoutError where
        prompts or the vocabulary are cut.
        """
        if self.local.spread is not ALONE or self.local.decoder.vocabulary is not None:
            raise LayoutError(
                "prefill: tp or cp is more than 1, so no process has a whole prompt's logits",
                "use tp = cp = 1",
            )
        batches = [_Prompt(ids_S.unsqueeze(0)) for ids_S in prompts]
        slots = [
            replace(self.local.tokens(batch), slots_B=batch.segment_ids_BS[:, 0] + number)
            for number, batch in enumerate(batches)
        ]
        return self._read(batches, step, self._last_logits, slots)

    def _read(
        self,
        micro_batches: Sequence[TokenBatch],
        step: StepContext,
        read: Read,
        contexts: Sequence[TokenContext] = (),
    ) -> dict[int, Tensor]:
        """Once around without gradients; contexts where they are not those of training."""
        route = self._route(len(micro_batches), trains=False)
        labels = max(sum(batch.labels_BS.numel() for batch in micro_batches), 1)
        still = replace(step, training=False)
        run = RingStep(self, route, micro_batches, still, labels, read=read)
        for number, tokens in enumerate(contexts):
            run.contexts[number, 0, len(tokens.place_BS)] = tokens
        run.run()
        return run.found

    def _last_logits(self, batch: TokenBatch, tokens: TokenContext, x_BSD: Tensor) -> Tensor:
        decoder = self.local.decoder
        return decoder.logits(decoder.norm(x_BSD[:, -1:]))[0, 0]


@dataclass(frozen=True)
class _Prompt:
    """A row of one document, as a batch."""

    tokens_BS: Tensor

    @property
    def labels_BS(self) -> Tensor:
        """Nobody asks for them."""
        return self.tokens_BS

    @property
    def segment_ids_BS(self) -> Tensor:
        """One document."""
        return torch.zeros_like(self.tokens_BS)

    @property
    def positions_BS(self) -> Tensor:
        """From its beginning."""
        place_S = torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device)
        return place_S.expand_as(self.tokens_BS)

    @property
    def sample_ids_B(self) -> Tensor:
        """It is none of the stream's samples."""
        return self.segment_ids_BS[:, 0]

    def rows(self, start: int, end: int) -> _Prompt:
        """Some of the rows."""
        return _Prompt(self.tokens_BS[start:end])


def plan_ring(
    ring: Ring,
    config: RingConfig,
    num_micro_batches: int,
    trains: bool = True,
) -> Timeline:
    """The plan of so many micro-batches, joined ones with `merge`."""
    size = ring.num_ranks
    usual = size * (MERGED_LIVE_PER_RANK if config.merge else LIVE_PER_RANK)
    live = joined(ring, config, config.live or usual)
    ways = [way(ring, number % size, config) for number in range(num_micro_batches)]
    return plan(ways, size, live, trains=trains)


def joined(ring: Ring, config: RingConfig, num_micro_batches: int) -> int:
    """How many are left where `merge` joins as many as there are passes."""
    return -(-num_micro_batches // (ring.num_passes if config.merge else 1))
