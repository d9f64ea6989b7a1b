"""Running a Program in one process: the definition that every parallel executor must reproduce."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from moebius.kernels.cross_entropy import token_cross_entropy
from moebius.kernels.depth_select import take_rows
from moebius.model.carry import Carry
from moebius.model.context import DepthContext, StepContext, TokenContext
from moebius.model.decoder import Decoder
from moebius.model.extent import Extent
from moebius.model.ledger import Ledger
from moebius.model.objective import TeacherModel, drawn_exits, exit_losses
from moebius.model.program import Program, Segment, Visit
from moebius.model.recursion.routing import DepthRouting


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

    losses: dict[str, Tensor]
    """means per label, in nats: `loss`, the cross-entropy at the last exit that ran; with exits
    `exit_<n>_loss`; with a teacher `distillation_loss`"""
    ledger: Ledger

    @property
    def loss(self) -> Tensor:
        """The cross-entropy."""
        return self.losses["loss"]


class LocalExecutor:
    """Passes token batches through a decoder on one device.

    With `autocast_dtype` matrix products run in that precision; parameters, residual stream,
    routers and losses stay in fp32. `program` is the decoder's own unless given: one with fewer
    passes or other shares can be run with the same weights.
    """

    def __init__(
        self,
        decoder: Decoder,
        autocast_dtype: torch.dtype | None = None,
        program: Program | None = None,
    ) -> None:
        self.decoder = decoder
        self.autocast_dtype = autocast_dtype
        self.program = program or decoder.program

    def accumulate_gradients(
        self,
        micro_batches: Sequence[TokenBatch],
        step: StepContext | None = None,
        teacher: TeacherModel | None = None,
    ) -> StepResult:
        """Add to the parameters the gradients of the mean loss over all micro-batches' labels.

        However a batch is cut into micro-batches, the sum is the same: every loss is divided by
        counts over the whole step, known before the first backward pass. `step` says how to run
        them; its own ledger stays empty, each micro-batch has one with its share of the labels.
        """
        step = step or StepContext("topk", Ledger(), training=True)
        num_labels = sum(batch.labels_BS.numel() for batch in micro_batches)
        ledgers: list[Ledger] = []
        losses: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            share = batch.labels_BS.numel() / num_labels
            ledger = Ledger(share, keep_routings=step.ledger.keep_routings)
            own = replace(step, ledger=ledger, micro_batch=number)
            total, sums = self._training_loss(batch, own, teacher)
            (total / num_labels).backward()
            for name, value in sums.items():
                mean = value / num_labels
                losses[name] = losses[name] + mean if name in losses else mean
            ledgers.append(ledger)
        return StepResult(losses, Ledger.merge(ledgers))

    def _training_loss(
        self, batch: TokenBatch, step: StepContext, teacher: TeacherModel | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is differentiated, and what of it is reported; sums over labels."""
        exits = drawn_exits(self.decoder.config.exits, self.program, step)
        with self.autocast(batch.tokens_BS.device):
            hidden = self.exit_hiddens(batch, step, exits)
            return exit_losses(self.decoder, batch, hidden, teacher)

    @torch.no_grad()
    def token_losses(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Cross-entropy of each label `[B, S]` at some exits, by default the last."""
        exits = exits or (len(self.program.visits),)
        with self.autocast(batch.tokens_BS.device):
            hidden = self.exit_hiddens(batch, step, exits)
            weight, labels_T = self.decoder.head_weight, batch.labels_BS.flatten()
            return {
                number: token_cross_entropy(h.flatten(0, 1), weight, labels_T).view_as(
                    batch.labels_BS
                )
                for number, h in hidden.items()
            }

    def hidden(self, batch: TokenBatch, step: StepContext) -> Tensor:
        """The normalised final hidden states, `[B, S, D]`."""
        last = len(self.program.visits)
        return self.exit_hiddens(batch, step, (last,))[last]

    def exit_hiddens(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int]
    ) -> dict[int, Tensor]:
        """The normalised hidden states after so many visits, `[B, S, D]`; nothing runs after the
        last of them."""
        decoder = self.decoder
        tokens = TokenContext.of_rows(
            batch.segment_ids_BS, *decoder.rope(batch.positions_BS), batch.sample_ids_B
        )
        streams = self.streams(decoder.embed(batch.tokens_BS), tokens, step, exits)
        step.ledger.work.head_tokens += len(exits) * batch.tokens_BS.numel()
        return {number: decoder.norm(stream) for number, stream in streams.items()}

    def streams(
        self, x_BSD: Tensor, tokens: TokenContext, step: StepContext, exits: Sequence[int]
    ) -> dict[int, Tensor]:
        """The residual stream after so many visits, `[B, S, D]`, for each of `exits`."""
        carry = Carry()
        found: dict[int, Tensor] = {}
        done = 0
        for segment in self.program.until(max(exits)).segments:
            if segment.router is not None:
                x_BSD, carry = self._recurse(x_BSD, carry, tokens, segment, step, exits, found)
                continue
            for visit in (visit for visits in segment.passes for visit in visits):
                x_BSD, carry = self._pass(x_BSD, carry, tokens, (visit,), step)
                done = visit.index + 1
                if done in exits:
                    found[done] = x_BSD
        return found

    def _pass(
        self,
        x_BSD: Tensor,
        carry: Carry,
        tokens: TokenContext,
        visits: tuple[Visit, ...],
        step: StepContext,
    ) -> tuple[Tensor, Carry]:
        num_rows, length = x_BSD.shape[:2]
        extent = Extent.of(num_rows, length, tokens.row_length)
        for visit in visits:
            step.ledger.work.add_visit(visit, extent)
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
        exits: Sequence[int],
        found: dict[int, Tensor],
    ) -> tuple[Tensor, Carry]:
        """Repeat the block on ever fewer tokens; the others wait unchanged in the loop's state."""
        routing = cast(DepthRouting, self.decoder.depth_routers[segment.number])
        length = x_BSD.shape[1]
        context = DepthContext(segment.passes[0][0], tokens, step, self.decoder.shared)
        state = routing.begin(x_BSD, context, segment.num_passes)
        shares = segment.shares(step.step)
        for share, visits in zip(shares, segment.passes, strict=True):
            step.ledger.work.add_candidates(segment.site(visits[0].depth), state.active_BK.numel())
            state, chosen = routing.admit(state, share, replace(context, visit=visits[0]))
            index_BK = chosen.index_BK
            inner_BKD = take_rows(state.inner_BSD, index_BK)
            outer_BKD, inner_carry = self._pass(
                inner_BKD,
                carry.take(index_BK),
                tokens.take(index_BK, chosen.expected),
                visits,
                step,
            )
            state = routing.absorb(state, chosen, inner_BKD, outer_BKD, visits[0].depth)
            carry = carry.put(index_BK, inner_carry, length)
            if visits[-1].index + 1 in exits:
                found[visits[-1].index + 1] = state.stream_BSD
        return state.stream_BSD, carry

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of matrix products."""
        enabled = self.autocast_dtype is not None
        return torch.autocast(device.type, self.autocast_dtype, enabled=enabled)
