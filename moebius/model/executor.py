"""Running a Program in one process: the definition that every parallel executor must reproduce."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from moebius.kernels.cross_entropy import token_cross_entropy
from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.carry import Carry
from moebius.model.context import DepthContext, StepContext, TokenContext, in_full_rows
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.objective import TeacherModel, drawn_exits, exit_losses
from moebius.model.program import Program, Segment, Unit, Visit
from moebius.model.recursion.routing import DepthRouting, LoopState, Selection
from moebius.model.spread import ALONE, Spread


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

    def rows(self, start: int, end: int) -> "TokenBatch":
        """Some of the rows."""


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


@dataclass(frozen=True)
class Flow:
    """What flows from one unit of a program to the next; of the own slots."""

    x_BSD: Tensor
    """the residual stream"""
    carry: Carry
    loop: LoopState | None = None
    """between the passes of a routed loop"""


@dataclass(frozen=True)
class Entered:
    """What waits while a pass of a routed loop runs: tokens that are not in it, and how those that
    are will come back."""

    state: LoopState
    chosen: Selection
    carry: Carry
    """of all tokens"""
    kernels: Kernels


def differentiate(loss: Callable[[], Tensor]) -> None:
    """Compute a loss and add its gradients to those of the parameters."""
    loss().backward()


class LocalExecutor:
    """Passes token batches through a decoder on one device.

    With `autocast_dtype` matrix products run in that precision; parameters, residual stream,
    routers and losses stay in fp32. `program` is the decoder's own unless given: one with fewer
    passes or other shares can be run with the same weights. Where several processes share rows,
    each is given whole rows, and `spread` says which of the slots are its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        autocast_dtype: torch.dtype | None = None,
        program: Program | None = None,
        spread: Spread = ALONE,
    ) -> None:
        self.decoder = decoder
        self.autocast_dtype = autocast_dtype
        self.program = program or decoder.program
        self.spread = spread
        self.differentiate = differentiate
        """how each micro-batch is run; an engine that shares parameters out has its own way"""

    def accumulate_gradients(
        self,
        micro_batches: Sequence[TokenBatch],
        step: StepContext | None = None,
        teacher: TeacherModel | None = None,
        num_labels: int | None = None,
    ) -> StepResult:
        """Add to the parameters the gradients of the mean loss over all micro-batches' labels.

        With `num_labels` of the whole step these micro-batches are a part of it: losses and
        gradients are what they add to those of the step.

        However a batch is cut into micro-batches, the sum is the same: every loss is divided by
        counts over the whole step, known before the first backward pass. `step` says how to run
        them; its own ledger stays empty, each micro-batch has one with its share of the labels.
        """
        step = step or StepContext("topk", Ledger(), training=True)
        num_labels = num_labels or sum(batch.labels_BS.numel() for batch in micro_batches)
        ledgers: list[Ledger] = []
        losses: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            share = batch.labels_BS.numel() / num_labels
            ledger = Ledger(share, step.ledger.keep)
            own = replace(step, ledger=ledger, micro_batch=number)
            sums: dict[str, Tensor] = {}
            self.differentiate(partial(self._share_of_loss, batch, own, teacher, num_labels, sums))
            for name, value in sums.items():
                mean = value / num_labels
                losses[name] = losses[name] + mean if name in losses else mean
            ledgers.append(ledger)
        return StepResult(losses, Ledger.merge(ledgers))

    def _share_of_loss(
        self,
        batch: TokenBatch,
        step: StepContext,
        teacher: TeacherModel | None,
        num_labels: int,
        sums: dict[str, Tensor],
    ) -> Tensor:
        """What is differentiated; what is reported of it is left in `sums`."""
        step.mark("forward")
        total, reported = self.training_loss(batch, step, teacher)
        sums.update(reported)
        step.mark("backward")
        return total / num_labels

    def training_loss(
        self, batch: TokenBatch, step: StepContext, teacher: TeacherModel | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is differentiated, and what of it is reported; sums over labels."""
        exits = drawn_exits(self.decoder.config.exits, self.program, step)
        with self.autocast(batch.tokens_BS.device):
            hidden, labels_T = self._read_out(batch, step, exits)
            if teacher is None:
                return exit_losses(self.decoder, labels_T, hidden, step.kernels)
            lesson = teacher.predict(batch, step.kernels)
            return exit_losses(
                self.decoder, labels_T, hidden, step.kernels, lesson, teacher.coefficient
            )

    @torch.no_grad()
    def token_losses(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Cross-entropy of each label of the part, `[T]`, at some exits, by default the last."""
        exits = exits or (len(self.program.visits),)
        with self.autocast(batch.tokens_BS.device):
            hidden, labels_T = self._read_out(batch, step, exits)
            weight_VD, vocabulary = self.decoder.head_weight, self.decoder.vocabulary
            return {
                number: token_cross_entropy(
                    hidden_TD,
                    weight_VD,
                    labels_T,
                    vocabulary=vocabulary,
                    row_losses=step.kernels.row_losses,
                )
                for number, hidden_TD in hidden.items()
            }

    def final_loss(
        self,
        batch: TokenBatch,
        tokens: TokenContext,
        x_BSD: Tensor,
        step: StepContext,
        teacher: TeacherModel | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`training_loss` from the stream behind the last visit."""
        hidden_TD, labels_T = self._final(batch, tokens, x_BSD, step.kernels)
        step.ledger.work.head_tokens += batch.tokens_BS.numel()
        lesson, coefficient = None, 0.0
        if teacher is not None:
            lesson, coefficient = teacher.predict(batch, step.kernels), teacher.coefficient
        hidden = {len(self.program.visits): hidden_TD}
        return exit_losses(self.decoder, labels_T, hidden, step.kernels, lesson, coefficient)

    def final_token_losses(self, batch: TokenBatch, tokens: TokenContext, x_BSD: Tensor) -> Tensor:
        """`token_losses` at the last exit from the stream behind the last visit, `[T]`."""
        hidden_TD, labels_T = self._final(batch, tokens, x_BSD)
        decoder = self.decoder
        return token_cross_entropy(
            hidden_TD, decoder.head_weight, labels_T, vocabulary=decoder.vocabulary
        )

    def _final(
        self, batch: TokenBatch, tokens: TokenContext, x_BSD: Tensor, kernels: Kernels = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """What the head reads of the part's tokens, `[T, D]`, and their labels."""
        spread = tokens.spread
        hidden_BSD = self.decoder.head_input(x_BSD, kernels)
        return spread.present(hidden_BSD), spread.present(spread.read(batch.labels_BS))

    def loss_sums(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """`token_losses` summed over the batch, in fp64."""
        found = self.token_losses(batch, step, exits)
        return {number: losses_BS.double().sum() for number, losses_BS in found.items()}

    def hidden(self, batch: TokenBatch, step: StepContext) -> Tensor:
        """The normalised final hidden states, `[B, S, D]`."""
        last = len(self.program.visits)
        return self.exit_hiddens(batch, self.tokens(batch), step, (last,))[last]

    def exit_hiddens(
        self, batch: TokenBatch, tokens: TokenContext, step: StepContext, exits: Sequence[int]
    ) -> dict[int, Tensor]:
        """The normalised hidden states of the part after so many visits, `[B, S, D]`; nothing runs
        after the last of them. `tokens` is the context of the batch's rows."""
        x_BSD = self.decoder.embed(tokens.spread.read(batch.tokens_BS))
        streams = self.streams(x_BSD, tokens, step, exits)
        step.ledger.work.head_tokens += len(exits) * batch.tokens_BS.numel()
        head_input = partial(self.decoder.head_input, kernels=step.kernels)
        return {number: head_input(stream) for number, stream in streams.items()}

    def _read_out(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """The hidden states of the part's tokens at some exits, `[T, D]`, and their labels."""
        tokens = self.tokens(batch)
        hidden, spread = self.exit_hiddens(batch, tokens, step, exits), tokens.spread
        labels_T = spread.present(spread.read(batch.labels_BS))
        return {number: spread.present(h_BSD) for number, h_BSD in hidden.items()}, labels_T

    def tokens(self, batch: TokenBatch) -> TokenContext:
        """The context of a batch's rows."""
        rope, spread = self.decoder.rope(batch.positions_BS), self.spread.of(batch.segment_ids_BS)
        return TokenContext.of_rows(batch.segment_ids_BS, *rope, batch.sample_ids_B, spread)

    def streams(
        self, x_BSD: Tensor, tokens: TokenContext, step: StepContext, exits: Sequence[int]
    ) -> dict[int, Tensor]:
        """The residual stream after so many visits, `[B, S, D]`, for each of `exits`."""
        flow = Flow(x_BSD, Carry())
        found: dict[int, Tensor] = {}
        for unit in self.program.until(max(exits)).units:
            flow = self.run(unit, flow, tokens, step)
            if unit.end in exits:
                found[unit.end] = flow.x_BSD
        return found

    def run(self, unit: Unit, flow: Flow, tokens: TokenContext, step: StepContext) -> Flow:
        """One visit, or one pass of a routed loop."""
        if unit.segment is not None:
            entered, inner_BKD = self.enter(unit, flow, tokens, step)
            chosen = entered.chosen
            outer_BKD, carry = self.visit(
                inner_BKD,
                entered.carry.take(chosen.own_BK),
                tokens.take(chosen.index_BK, chosen.expected),
                unit.visits,
                step,
            )
            return self.leave(unit, entered, inner_BKD, outer_BKD, carry)
        return Flow(*self.visit(flow.x_BSD, flow.carry, tokens, unit.visits, step))

    def visit(
        self,
        x_BSD: Tensor,
        carry: Carry,
        tokens: TokenContext,
        visits: Sequence[Visit],
        step: StepContext,
    ) -> tuple[Tensor, Carry]:
        """Layer after layer on the tokens that are present."""
        if step.compile:
            tokens.prepare()
        for visit in visits:
            step.ledger.work.add_visit(visit, tokens.extent)
            context = DepthContext(visit, tokens, step, self.decoder.shared)
            x_BSD, carry = self.decoder.layers[visit.layer](x_BSD, carry, context)
        return x_BSD, carry

    def enter(
        self, unit: Unit, flow: Flow, tokens: TokenContext, step: StepContext
    ) -> tuple[Entered, Tensor]:
        """In front of a pass of a routed loop: what waits, and what the chosen tokens bring in,
        `[B, K, D]`."""
        segment, depth = unit.segment, unit.visits[0].depth
        assert segment is not None
        routing = self._routing(segment)
        context = DepthContext(unit.visits[0], tokens, step, self.decoder.shared)
        state = flow.loop or routing.begin(flow.x_BSD, context, segment.num_passes)
        step.ledger.work.add_candidates(segment.site(depth), state.active_BK.numel())
        state, chosen = routing.admit(state, segment.shares(step.step)[depth - 1], context)
        if step.ledger.keep:
            present_BK1 = torch.zeros_like(chosen.index_BK).unsqueeze(-1)
            entering_BS1 = in_full_rows(present_BK1, tokens.take(chosen.index_BK))
            step.ledger.record_decision(segment.site(depth), entering_BS1, tokens.sample_ids_B)
        entered = Entered(state, chosen, flow.carry, step.kernels)
        return entered, step.kernels.take_rows(state.inner_BSD, chosen.own_BK)

    def leave(
        self, unit: Unit, entered: Entered, inner_BKD: Tensor, outer_BKD: Tensor, carry: Carry
    ) -> Flow:
        """Behind the pass, which has made `outer` and `carry` of what the chosen tokens brought."""
        assert unit.segment is not None
        chosen = entered.chosen
        state = self._routing(unit.segment).absorb(
            entered.state, chosen, inner_BKD, outer_BKD, entered.kernels
        )
        carry = entered.carry.put(chosen.own_BK, carry, state.stream_BSD.shape[1])
        return Flow(state.stream_BSD, carry, None if unit.is_last else state)

    def _routing(self, segment: Segment) -> DepthRouting:
        return cast(DepthRouting, self.decoder.depth_routers[segment.number])

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of matrix products."""
        enabled = self.autocast_dtype is not None
        return torch.autocast(device.type, self.autocast_dtype, enabled=enabled)
