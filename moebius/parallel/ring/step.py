"""One step on a ring: what a process does at each event of the plan.

Gradients cross from one piece of work to the next by hand: what is handed on is cut from the graph
of what made it, and when its gradients are there the backward pass of that work runs. Most of it
travels in parcels. What a micro-batch leaves behind on a process for its own next stop there stays,
tokens that wait at home or what a layer keeps for its next pass, and so do its gradients: the
backward pass comes to the later stop first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.context import StepContext, TokenContext
from moebius.model.executor import Entered, Flow, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.objective import TeacherModel
from moebius.parallel.batch import row_ranges
from moebius.parallel.messages import tensors_of
from moebius.parallel.ring.mail import Mail, Message, Parcel, Route, severed
from moebius.parallel.ring.timeline import Event

if TYPE_CHECKING:
    from moebius.parallel.ring.executor import RingExecutor

Key = tuple[int, int, int]
"""micro-batch, stop and chunk"""
Read = Callable[[TokenBatch, TokenContext, Tensor], Tensor]
"""makes something of the stream behind the last visit"""


@dataclass
class Work:
    """What is kept of a piece of work until its backward pass."""

    arrived: list[tuple[Message, list[Tensor]]] = field(default_factory=list)
    """of each parcel its answer, and the leaves whose gradients that has"""
    sent: list[Message] = field(default_factory=list)
    """the answers that come back"""
    outputs: Callable[[], list[Tensor]] = list
    """what gradients come back for: of all parcels, then of what stayed; a visit that is computed
    again is so when this is called"""
    stayed: list[Tensor] = field(default_factory=list)
    """what the later stop has read of what stayed"""


class RingStep:
    """The work of one process in one step."""

    def __init__(
        self,
        executor: RingExecutor,
        route: Route,
        micro_batches: Sequence[TokenBatch],
        step: StepContext,
        num_labels: int,
        teacher: TeacherModel | None = None,
        read: Read | None = None,
    ) -> None:
        self.ring = executor.ring
        self.local = executor.local
        self.recompute = executor.config.recompute
        self.rank = executor.channel.group.rank
        self.events = route.timeline.events
        self.ways = route.timeline.ways
        self.mail = Mail(route, executor.channel)
        self.micro_batches = micro_batches
        self.step = step
        self.teacher = teacher
        self.num_labels = num_labels
        self.trains = step.training
        self.places = self.ring.places
        self.losses: dict[str, Tensor] = {}
        self.read = read
        """where nothing is trained"""
        self.found: dict[int, Tensor] = {}
        """what was read, by micro-batches that are at home here"""
        self.ledgers: dict[Key, Ledger] = {}
        self.works: dict[Key, Work] = {}
        self.waiting: dict[int, Entered] = {}
        """by micro-batch, at home"""
        self.left: dict[int, Carry] = {}
        """by micro-batch, what its layers keep for the next pass"""
        self.contexts: dict[tuple[int, int, int], TokenContext] = {}

    def run(self) -> None:
        """Every event of this process, in order."""
        for number, event in enumerate(self.events):
            if event.rank == self.rank:
                self.mail.begin(number)
                self.do(event)
        self.mail.close()

    def do(self, event: Event) -> None:
        """One event."""
        self.step.mark("forward" if event.is_forward else "backward")
        if not event.is_forward:
            self._backward(event)
        elif self.ways[event.micro_batch][event.stop].is_home:
            self._home(event)
        else:
            self._slice(event)

    # Forward

    def _home(self, event: Event) -> None:
        """Take tokens back, decide who goes on, or read what the model says."""
        number, depth = event.micro_batch, self.places[event.stop].depth
        batch, work = self.micro_batches[number], self._work(event)
        step = self._step(event, 0, len(batch.tokens_BS))
        with self.local.autocast(batch.tokens_BS.device):
            tokens = self._tokens(number, 0, len(batch.tokens_BS))
            flow = self._front(batch, tokens, step) if depth == 1 else self._returned(event, work)
            if depth > self.ring.num_passes:
                for unit in self.ring.back:
                    flow = self.local.run(unit, flow, tokens, step)
                self._end(number, tokens, flow, step, work)
                return
            self._send_out(event, flow, tokens, step, work)

    def _front(self, batch: TokenBatch, tokens: TokenContext, step: StepContext) -> Flow:
        flow = Flow(self.local.decoder.embed(tokens.spread.read(batch.tokens_BS)), Carry())
        for unit in self.ring.front:
            flow = self.local.run(unit, flow, tokens, step)
        return flow

    def _returned(self, event: Event, work: Work) -> Flow:
        """The stream when a pass has come home."""
        way, depth = self.ways[event.micro_batch], self.places[event.stop].depth - 1
        parcels = []
        for chunk in range(way[event.stop - 1].num_chunks):
            message = Message(True, event.micro_batch, event.stop, chunk)
            parcel, leaves = self.mail.take(message)
            work.arrived.append((message.answer, leaves))
            parcels.append(parcel)
        outer_BKD, carry = parcels[0].x_BKD, parcels[0].carry
        if parcels[1:]:
            outer_BKD = torch.cat([parcel.x_BKD for parcel in parcels])
            sizes = [len(parcel.x_BKD) for parcel in parcels]
            carry = Carry.join([parcel.carry for parcel in parcels], sizes)
        if not self.ring.is_routed:
            return Flow(outer_BKD, carry)
        entered = self.waiting.pop(event.micro_batch)
        inner_BKD = entered.kernels.take_rows(entered.state.inner_BSD, entered.chosen.own_BK)
        return self.local.leave(self.ring.unit(depth), entered, inner_BKD, outer_BKD, carry)

    def _send_out(
        self, event: Event, flow: Flow, tokens: TokenContext, step: StepContext, work: Work
    ) -> None:
        """Send the tokens of a pass to the first slice; all others wait here."""
        number, depth = event.micro_batch, self.places[event.stop].depth
        if self.ring.is_routed:
            entered, inner_BKD = self.local.enter(self.ring.unit(depth), flow, tokens, step)
            chosen = entered.chosen
            carry, _ = entered.carry.take(chosen.own_BK).split()
            whole = Parcel(inner_BKD, carry, chosen.index_BK.int(), chosen.expected)
            self.waiting[number], kept = severed(entered)
            work.stayed = [t for t in tensors_of(self.waiting[number]) if t.requires_grad]
        else:
            whole, kept = Parcel(flow.x_BSD, flow.carry.split()[0]), []
        outputs: list[Tensor] = []
        size = self.ways[number][event.stop + 1].num_chunks
        for chunk in range(size):
            start, end = self._chunk_rows(number, chunk, size)
            parcel = whole if size == 1 else _rows(whole, start, end)
            outputs += self._send(event, chunk, parcel, work)
        outputs += kept
        work.outputs = lambda: outputs

    def _slice(self, event: Event) -> None:
        """A visit to this process's slice."""
        message = Message(True, event.micro_batch, event.stop, event.chunk)
        work = self._work(event)
        parcel, leaves = self.mail.take(message)
        work.arrived.append((message.answer, leaves))
        left = self.left.pop(event.micro_batch, None)
        visit = self._visit_of(event, parcel, left)
        again = self.trains and self.recompute
        decisions: dict[Any, Tensor] | None = {} if again else None
        with torch.set_grad_enabled(self.trains and not again):
            step = replace(self._step_of_chunk(event), decisions=decisions)
            onward, own = visit(step)
        if again:
            for tensor in _floats(onward, own):
                tensor.requires_grad_()
        outputs = self._send(event, event.chunk, onward, work)
        if self.places[event.stop].depth < self.ring.num_passes:
            self.left[event.micro_batch], kept = severed(own)
            work.stayed = [t for t in tensors_of(self.left[event.micro_batch]) if t.requires_grad]
            outputs = outputs + kept
        if again:
            silent = replace(step, ledger=Ledger(step.ledger.share))  # all is booked already
            count = 2 if work.stayed else 1
            work.outputs = lambda: _floats(*visit(silent)[:count])
        else:
            work.outputs = lambda: outputs

    def _visit_of(
        self, event: Event, parcel: Parcel, left: Carry | None
    ) -> Callable[[StepContext], tuple[Parcel, Carry]]:
        """The visit, which may be called twice: what goes on, and what layers keep."""
        place, number = self.places[event.stop], event.micro_batch
        size = self.ways[number][event.stop].num_chunks
        start, end = self._chunk_rows(number, event.chunk, size)
        visits = self.ring.visits(place)
        goes_home = self.ways[number][event.stop + 1].is_home

        def visit(step: StepContext) -> tuple[Parcel, Carry]:
            with self.local.autocast(parcel.x_BKD.device):
                rows = tokens = self._tokens(number, start, end)
                own_BK, before = None, left or Carry()
                if parcel.index_BK is not None:
                    whole_BK = parcel.index_BK.long()
                    tokens = rows.take(whole_BK, parcel.expected)
                    own_BK = rows.spread.own_places(whole_BK, rows.num_slots)
                    before = before.take(own_BK)
                carry = parcel.carry.joined(before)
                x_BKD, carry = self.local.visit(parcel.x_BKD, carry, tokens, visits, step)
                onward, own = carry.split()
                if own_BK is not None:
                    length = rows.num_slots // rows.spread.num_shards
                    own = (left or Carry()).put(own_BK, own, length)
            index_BK = None if goes_home else parcel.index_BK  # home has not forgotten it
            return Parcel(x_BKD, onward, index_BK, parcel.expected), own

        return visit

    def _end(
        self,
        number: int,
        tokens: TokenContext,
        flow: Flow,
        step: StepContext,
        work: Work,
    ) -> None:
        batch = self.micro_batches[number]
        if self.read is not None:
            self.found[number] = self.read(batch, tokens, flow.x_BSD)
            return
        total, sums = self.local.final_loss(batch, tokens, flow.x_BSD, step, self.teacher)
        for name, value in sums.items():
            before = self.losses.get(name, torch.zeros_like(value))
            self.losses[name] = before + value / self.num_labels
        loss = total / self.num_labels
        work.outputs = lambda: [loss]

    def _send(self, event: Event, chunk: int, parcel: Parcel, work: Work) -> list[Tensor]:
        message = Message(True, event.micro_batch, event.stop + 1, chunk)
        work.sent.append(message.answer)
        return self.mail.send(message, parcel, self.trains)

    # Backward

    def _backward(self, event: Event) -> None:
        """Gradients have come back, or the loss is known: send on those of what had arrived."""
        work = self.works.pop(_key(event))
        gradients: list[Tensor | None] = []
        for answer in work.sent:
            gradients += self.mail.take_back(answer)
        gradients += [leaf.grad for leaf in work.stayed]
        outputs = work.outputs()
        if not work.sent:  # the loss
            gradients = [torch.ones_like(loss) for loss in outputs]
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output.requires_grad and gradient is not None
        ]
        torch.autograd.backward([output for output, _ in pairs], [g for _, g in pairs])
        for answer, leaves in work.arrived:
            self.mail.send_back(answer, leaves)
        number = event.micro_batch
        if not any(key[0] == number for key in self.works):  # it has no work left here
            for key in [key for key in self.contexts if key[0] == number]:
                del self.contexts[key]

    # What events need

    def _work(self, event: Event) -> Work:
        """A new record, kept where there will be a backward pass."""
        work = Work()
        if self.trains:
            self.works[_key(event)] = work
        return work

    def _step_of_chunk(self, event: Event) -> StepContext:
        size = self.ways[event.micro_batch][event.stop].num_chunks
        return self._step(event, *self._chunk_rows(event.micro_batch, event.chunk, size))

    def _step(self, event: Event, start: int, end: int) -> StepContext:
        """With a ledger for the rows of the event."""
        number, labels_BS = event.micro_batch, self.micro_batches[event.micro_batch].labels_BS
        share = (end - start) * labels_BS.shape[1] / self.num_labels
        ledger = Ledger(share, self.step.ledger.keep)
        self.ledgers[_key(event)] = ledger
        return replace(self.step, ledger=ledger, micro_batch=number)

    def _tokens(self, number: int, start: int, end: int) -> TokenContext:
        """The context of some rows of a micro-batch, with masks of its own: they are larger than
        what is kept of a visit."""
        key = (number, start, end)
        if key not in self.contexts:
            batch = self.micro_batches[number]
            if (start, end) != (0, len(batch.tokens_BS)):
                batch = batch.rows(start, end)
            self.contexts[key] = self.local.tokens(batch)
        return replace(self.contexts[key])

    def _chunk_rows(self, number: int, chunk: int, size: int) -> tuple[int, int]:
        rows = len(self.micro_batches[number].tokens_BS)
        return row_ranges(rows, max(rows, 1), chunk, size)[0]


def _key(event: Event) -> Key:
    return (event.micro_batch, event.stop, event.chunk)


def _rows(parcel: Parcel, start: int, end: int) -> Parcel:
    """Some rows of a micro-batch's tokens."""
    assert parcel.index_BK is not None
    expected = parcel.expected
    if expected is not None:
        expected *= (end - start) / max(len(parcel.x_BKD), 1)
    return Parcel(
        parcel.x_BKD[start:end],
        parcel.carry.rows(start, end),
        parcel.index_BK[start:end],
        expected,
    )


def _floats(*nests: Any) -> list[Tensor]:
    """The tensors of nests that can have gradients; in each nest every one once."""
    return [t for nest in nests for t in tensors_of(nest) if t.is_floating_point()]
