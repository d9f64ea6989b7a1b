"""Running a Program in one process: the definition that every parallel executor must reproduce."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from moebius.kernels.depth_select import add_rows, take_rows
from moebius.model.context import Carry, DepthContext, StepContext, TokenContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.program import Segment, Visit
from moebius.model.recursion.router import DepthRouter


class TokenBatch(Protocol):
    """What a model reads: tensors `[B, S]`, integers."""

    @property
    def tokens_BS(self) -> Tensor:
        """Token ids."""

    @property
    def labels_BS(self) -> Tensor:
        """The token that follows each token."""

    @property
    def segment_ids_BS(self) -> Tensor:
        """The document of each token; attention does not cross documents."""

    @property
    def positions_BS(self) -> Tensor:
        """The position of each token in its document."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Which sample of the training stream each row is."""


@dataclass(frozen=True)
class StepResult:
    """What the gradients of one optimizer step were made of; tensors stay on the device."""

    loss: Tensor
    """mean cross-entropy per label, in nats"""
    ledger: Ledger


class LocalExecutor:
    """Passes token batches through a decoder on one device.

    With `autocast_dtype` matrix products run in that precision; parameters, residual stream,
    routers and losses stay in fp32.
    """

    def __init__(self, decoder: Decoder, autocast_dtype: torch.dtype | None = None) -> None:
        self.decoder = decoder
        self.autocast_dtype = autocast_dtype

    def accumulate_gradients(
        self, micro_batches: Sequence[TokenBatch], step: StepContext | None = None
    ) -> StepResult:
        """Add to the parameters the gradients of the mean loss over all micro-batches' labels.

        However a batch is cut into micro-batches, the sum is the same: every loss is divided by
        counts over the whole step, known before the first backward pass. `step` says how to run
        them; its own ledger stays empty, each micro-batch has one with its share of the labels.
        """
        step = step or StepContext("topk", Ledger(), training=True)
        num_labels = sum(batch.labels_BS.numel() for batch in micro_batches)
        ledgers, losses = [], []
        for batch in micro_batches:
            share = batch.labels_BS.numel() / num_labels
            ledger = Ledger(share, keep_routings=step.ledger.keep_routings)
            loss = self.loss_sum(batch, replace(step, ledger=ledger)) / num_labels
            loss.backward()
            losses.append(loss.detach())
            ledgers.append(ledger)
        return StepResult(torch.stack(losses).sum(), Ledger.merge(ledgers))

    def loss_sum(self, batch: TokenBatch, step: StepContext) -> Tensor:
        """Cross-entropy summed over the labels of one batch."""
        with self._autocast(batch.tokens_BS.device):
            return self.decoder.loss_sum(self.hidden(batch, step), batch.labels_BS)

    def next_token_logits(self, batch: TokenBatch, step: StepContext) -> Tensor:
        """Logits after the last token of each row, `[B, V]`."""
        with self._autocast(batch.tokens_BS.device):
            return self.decoder.logits(self.hidden(batch, step)[:, -1])

    def hidden(self, batch: TokenBatch, step: StepContext) -> Tensor:
        """The normalised final hidden states, `[B, S, D]`."""
        decoder = self.decoder
        x_BSD = decoder.embedding(batch.tokens_BS)
        tokens = TokenContext.of_rows(
            batch.segment_ids_BS, *decoder.rope(batch.positions_BS), batch.sample_ids_B
        )
        carry = Carry()
        for segment in decoder.program.segments:
            if segment.router is None:
                for visits in segment.passes:
                    x_BSD, carry = self._pass(x_BSD, carry, tokens, visits, step)
            else:
                x_BSD, carry = self._recurse(x_BSD, carry, tokens, segment, step)
        normed: Tensor = decoder.norm(x_BSD)
        return normed

    def _pass(
        self,
        x_BSD: Tensor,
        carry: Carry,
        tokens: TokenContext,
        visits: tuple[Visit, ...],
        step: StepContext,
    ) -> tuple[Tensor, Carry]:
        for visit in visits:
            context = DepthContext(visit, tokens, step, self.decoder.shared)
            x_BSD, carry = self.decoder.layers[visit.layer](x_BSD, carry, context)
        return x_BSD, carry

    def _recurse(
        self,
        x_BSD: Tensor,
        carry: Carry,
        tokens: TokenContext,
        segment: Segment,
        step: StepContext,
    ) -> tuple[Tensor, Carry]:
        """Repeat the block on ever fewer tokens; the others wait unchanged in `x` and `carry`."""
        num_rows, length = x_BSD.shape[:2]
        routers = cast(Iterable[DepthRouter], self.decoder.depth_routers)
        active_BK = torch.arange(length, device=x_BSD.device).expand(num_rows, -1)
        for router, visits in zip(routers, segment.passes, strict=True):
            x_BSD, selection = router(x_BSD, active_BK, step)
            active_BK = selection.index_BK
            inner_BKD = take_rows(x_BSD, active_BK)
            outer_BKD, inner_carry = self._pass(
                inner_BKD, carry.take(active_BK), tokens.take(active_BK), visits, step
            )
            if router.config.gating == "additive":
                outer_BKD = outer_BKD - inner_BKD
            x_BSD = add_rows(x_BSD, active_BK, selection.gate_BK.unsqueeze(-1) * outer_BKD)
            carry = carry.put(active_BK, inner_carry, length)
        return x_BSD, carry

    def _autocast(self, device: torch.device) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(device.type, self.autocast_dtype, enabled=enabled)
