"""Continuous depth-wise batching: tokens of several sequences at any pass of a loop, together.

All passes of a loop run the same layers, so a decoding step gathers the tokens that wait in front
of any pass into one batch (Relaxed Recursive Transformers, arXiv 2410.20672, section 3.3). A token
that is done makes room at once: its successor, or the first token of the next sequence, enters at
the first pass while others are at later ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.context import DepthContext, StepContext, TokenContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.model.generation.cache import KVCache
from moebius.model.generation.plain import Choose, Limits, document_logits, generate_plain
from moebius.model.ledger import Ledger
from moebius.model.moe.experts import GRUExpert
from moebius.model.moe.router import Router
from moebius.model.program import Segment
from moebius.model.recursion.routing import DepthRouting, LoopState, Selection


def generate(
    executor: LocalExecutor,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    limits: Limits,
    step: StepContext,
    num_slots: int,
) -> list[list[int]]:
    """New ids after each prompt, which is one document; `num_slots` at a time share passes.

    Where routing looks at other tokens than the present one, which a cache does not keep, every
    token runs its whole context again.
    """
    if needs_whole_rows(executor.decoder):
        return generate_plain(executor, prompts, choose, limits, step)
    return DepthBatchedGenerator(executor, num_slots, limits, step).run(prompts, choose)


def needs_whole_rows(decoder: Decoder) -> bool:
    """Whether experts or routers of a model need more of earlier tokens than keys and values."""
    return any(
        isinstance(module, GRUExpert)
        or (
            isinstance(module, Router)
            and (
                module.config.scorer.granularity == "document"
                or module.config.selector.looks_at_row
            )
        )
        for module in decoder.modules()
    )


@dataclass
class Text:
    """A prompt and what was generated after it."""

    number: int
    ids: list[int]
    new: list[int]


@dataclass(frozen=True)
class Traveller:
    """A token on its way through the program."""

    slot: int
    place: int
    x_11D: Tensor
    """residual stream"""
    carry: Carry
    segment: int = 0
    passes: int = 0
    """done in this segment"""
    state: LoopState | None = None
    """in a routed loop"""


@dataclass(frozen=True)
class Wave:
    """Tokens that make the same pass."""

    travellers: list[Traveller]
    context: DepthContext
    inner: Tensor
    """what the pass reads, `[B, 1, D]`"""
    state: LoopState | None = None
    chosen: Selection | None = None


class DepthBatchedGenerator:
    """Generates with a cache; sequences share the passes through the layers.

    The result is that of `generate_plain`, up to the rounding of matrix products of other shapes.
    """

    def __init__(
        self, executor: LocalExecutor, num_slots: int, limits: Limits, step: StepContext
    ) -> None:
        self.executor = executor
        self.limits = limits
        self.cache = KVCache(num_slots)
        self.step = replace(step, cache=self.cache)
        self.slots: list[Text | None] = [None] * num_slots
        self.starts = [0] * num_slots
        self.restarts: set[int] = set()
        """slots whose context was full, so that its newer half is to be run again"""
        self.travellers: list[Traveller] = []
        self.batch_sizes: list[int] = []
        """tokens in each pass through the layers of a segment, prompts not counted"""

    @torch.no_grad()
    def run(self, prompts: Sequence[Sequence[int]], choose: Choose) -> list[list[int]]:
        """New ids after each prompt, which is one document."""
        sequences = [Text(number, list(ids), []) for number, ids in enumerate(prompts)]
        waiting = deque(sequences)
        while waiting or self.travellers or self.restarts:
            for slot in range(len(self.slots)):
                while slot in self.restarts or (waiting and self.slots[slot] is None):
                    if slot not in self.restarts:
                        self.slots[slot] = waiting.popleft()
                    self.restarts.discard(slot)
                    self._prefill(slot, choose)
            self._tick(choose)
        return [sequence.new for sequence in sequences]

    def _prefill(self, slot: int, choose: Choose) -> None:
        """Run what the next token of a sequence sees, and choose that token."""
        sequence = self.slots[slot]
        assert sequence is not None
        self.cache.clear(slot)
        self.starts[slot] = self.limits.window_start(len(sequence.ids))
        device = self.executor.decoder.embedding.weight.device
        ids_1S = torch.tensor([sequence.ids[self.starts[slot] :]], device=device)
        slots_B = torch.tensor([slot], device=device)
        logits_BSV = document_logits(self.executor, ids_1S, self.step, slots_B)
        self._accept(slot, logits_BSV[0, -1], choose)

    def _accept(self, slot: int, logits_V: Tensor, choose: Choose) -> None:
        """Choose the next token of a sequence and send it off, or end the sequence."""
        sequence = self.slots[slot]
        assert sequence is not None
        token = choose(logits_V, sequence.number, len(sequence.new))
        if token == self.limits.stop_id:
            self.slots[slot] = None
            return
        sequence.ids.append(token)
        sequence.new.append(token)
        if len(sequence.new) == self.limits.max_new_tokens:
            self.slots[slot] = None
        elif self.limits.window_start(len(sequence.ids)) != self.starts[slot]:
            self.restarts.add(slot)
        else:
            place = len(sequence.ids) - 1 - self.starts[slot]
            ids_11 = torch.tensor([[token]], device=logits_V.device)
            x_11D = self.executor.decoder.embed(ids_11)
            self.travellers.append(Traveller(slot, place, x_11D, Carry()))

    def _tick(self, choose: Choose) -> None:
        """One pass through each segment in which tokens are; then those at the end choose."""
        executor, segments = self.executor, self.executor.program.segments
        with executor.autocast(executor.decoder.embedding.weight.device):
            for number, segment in enumerate(segments):
                here = [t for t in self.travellers if t.segment == number]
                if here:
                    others = [t for t in self.travellers if t.segment != number]
                    here.sort(key=lambda traveller: traveller.passes)
                    self.travellers = others + self._advance(segment, here)
            done = [t for t in self.travellers if t.segment == len(segments)]
            self.travellers = [t for t in self.travellers if t.segment < len(segments)]
            if not done:
                return
            stream_BSD = torch.cat([traveller.x_11D for traveller in done])
            logits_BSV = executor.decoder.logits(executor.decoder.norm(stream_BSD))
        for traveller, logits_SV in zip(done, logits_BSV, strict=True):
            self._accept(traveller.slot, logits_SV[-1], choose)

    def _advance(self, segment: Segment, here: list[Traveller]) -> list[Traveller]:
        """Tokens of a segment, sorted by pass, after one more pass, or past the segment."""
        step = replace(self.step, ledger=Ledger())
        arrived: list[Traveller] = []
        waves: list[Wave] = []
        for _, group in groupby(here, key=lambda traveller: traveller.passes):
            wave, left = self._admit(segment, list(group), step)
            arrived += left
            waves += [wave] if wave.travellers else []
        if not waves:
            return arrived
        everyone = [traveller for wave in waves for traveller in wave.travellers]
        self.batch_sizes.append(len(everyone))
        context = waves[0].context
        if len(waves) > 1:
            parts = tuple(wave.context for wave in waves)
            context = replace(context, tokens=self._tokens(everyone), parts=parts)
        outer = torch.cat([wave.inner for wave in waves])
        carry = Carry.join([t.carry for t in everyone], [1] * len(everyone))
        for index, visit in enumerate(segment.passes[0]):
            visits = [segment.passes[wave.travellers[0].passes][index] for wave in waves]
            layer = self.executor.decoder.layers[visit.layer]
            outer, carry = layer(outer, carry, context.at(visits))
        row = 0
        for wave in waves:
            size = len(wave.travellers)
            after = carry.rows(row, row + size)
            arrived += self._absorb(segment, wave, outer[row : row + size], after)
            row += size
        return arrived

    def _admit(
        self, segment: Segment, group: list[Traveller], step: StepContext
    ) -> tuple[Wave, list[Traveller]]:
        """Who of the tokens in front of the same pass enters it; the others are past the loop."""
        visit = segment.passes[group[0].passes][0]
        context = DepthContext(visit, self._tokens(group), step, self.executor.decoder.shared)
        if segment.router is None:
            x_BSD = torch.cat([traveller.x_11D for traveller in group])
            return Wave(group, context, x_BSD), []
        routing = self._routing(segment)
        if visit.depth == 1:
            x_BSD = torch.cat([traveller.x_11D for traveller in group])
            state = routing.begin(x_BSD, context, segment.num_passes)
        else:
            state = LoopState.join([t.state for t in group if t.state is not None])
        share = segment.shares(step.step)[visit.depth - 1]
        state, chosen = routing.admit(state, share, context)
        enters = (chosen.index_BK[:, 0] >= 0).tolist()
        left = [
            replace(
                t, x_11D=state.stream_BSD[i : i + 1], state=None, passes=0, segment=t.segment + 1
            )
            for i, t in enumerate(group)
            if not enters[i]
        ]
        rows = torch.tensor([i for i, enter in enumerate(enters) if enter], dtype=torch.int64)
        stay = [group[i] for i in rows.tolist()]
        rows = rows.to(state.stream_BSD.device)
        state = state.select(rows)
        chosen = chosen.select(rows)
        context = replace(context, tokens=self._tokens(stay)) if stay else context
        return Wave(stay, context, state.inner_BSD, state, chosen), left

    def _absorb(
        self, segment: Segment, wave: Wave, outer_BSD: Tensor, carry: Carry
    ) -> list[Traveller]:
        """The tokens of a wave after their pass."""
        state, x_BSD = wave.state, outer_BSD
        depth = wave.travellers[0].passes + 1
        if state is not None and wave.chosen is not None:
            routing = self._routing(segment)
            state = routing.absorb(state, wave.chosen, wave.inner, outer_BSD)
            x_BSD = state.stream_BSD
        is_past = depth == len(segment.passes)
        after = []
        for row, traveller in enumerate(wave.travellers):
            mine = None
            if state is not None and not is_past:
                mine = state.select(torch.tensor([row], device=x_BSD.device))
            after.append(
                replace(
                    traveller,
                    x_11D=x_BSD[row : row + 1],
                    carry=carry.rows(row, row + 1),
                    state=mine,
                    passes=0 if is_past else depth,
                    segment=traveller.segment + is_past,
                )
            )
        return after

    def _routing(self, segment: Segment) -> DepthRouting:
        return cast(DepthRouting, self.executor.decoder.depth_routers[segment.number])

    def _tokens(self, travellers: Sequence[Traveller]) -> TokenContext:
        """Rows of one token each."""
        device = self.executor.decoder.embedding.weight.device
        place_B1 = torch.tensor([[traveller.place] for traveller in travellers], device=device)
        nothing_B1 = torch.zeros_like(place_B1)
        cos_B1C, sin_B1C = self.executor.decoder.rope(place_B1)
        return TokenContext(
            segment_ids_BS=nothing_B1,
            cos_BSC=cos_B1C,
            sin_BSC=sin_B1C,
            sample_ids_B=nothing_B1[:, 0],
            place_BS=place_B1,
            row_length=1,
            slots_B=torch.tensor([traveller.slot for traveller in travellers], device=device),
        )
