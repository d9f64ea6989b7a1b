"""Context parallelism for rows of many documents: each is where as few processes as need be see it.

Cut where they are, rows put most documents on the border of two processes, and all processes
exchange the keys of all. Here documents are planned onto groups of processes, see `adaptive`, rows
are arranged by the plan, and keys and values travel inside these groups only. Every process makes
the same plan from the documents of the batch. For one that holds fewer tokens than the fullest,
there are empty slots, as in a pass of a routed loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from moebius.model.config import BDHConfig
from moebius.model.cost import BACKWARD_PER_FORWARD, forward_flops, planned_work
from moebius.model.decoder import Decoder
from moebius.model.spread import Spread
from moebius.parallel.adaptive import SequenceCost, plan
from moebius.parallel.comm import Group
from moebius.parallel.functions import Exchange
from moebius.parallel.rows import RowSpread


def sequence_cost(
    decoder: Decoder,
    num_ranks: int,
    row_length: int,
    flops_per_byte: float,
    dtype: torch.dtype | None,
) -> SequenceCost:
    """What a document costs in training, in FLOPs; `max_tokens_per_rank` is set for each batch.

    A whole decoder's FLOPs for a row, `a2 * length^2 + a1 * length`, are known at two lengths.
    Keys and values, in `dtype`, are sent to each of the others, and their gradients come back.
    """
    half = max(1, row_length // 2)
    work, of_half = (planned_work(decoder, 1, length) for length in (row_length, half))
    per_token = forward_flops(decoder, work) / row_length
    increase = per_token - forward_flops(decoder, of_half) / half
    a2 = max(0.0, increase / max(row_length - half, 1))
    a1 = per_token - a2 * row_length
    size = (dtype or decoder.norm.weight.dtype).itemsize
    visited = sum(extent.tokens for extent in work.visits.values()) / row_length
    return SequenceCost(
        a2=a2 * (1 + BACKWARD_PER_FORWARD),
        a1=a1 * (1 + BACKWARD_PER_FORWARD),
        token_bytes=2 * size * visited * joined_width(decoder),
        latency=0.0,
        bandwidth={
            degree: 1 / (flops_per_byte * max(degree - 1, 1)) for degree in range(1, num_ranks + 1)
        },
        max_tokens_per_rank=row_length,
    )


def joined_width(decoder: Decoder) -> int:
    """Numbers that a visit joins for each token: keys and values."""
    attention = decoder.config.attention
    if isinstance(attention, BDHConfig):
        return attention.num_heads * attention.neurons + decoder.config.hidden_size
    return 2 * attention.num_kv_heads * attention.head_dim


@dataclass(frozen=True)
class Arrangement:
    """Where the tokens of a row are."""

    places: tuple[tuple[int, ...], ...]
    """of the tokens of each process, ascending within documents"""
    groups: tuple[range, ...]
    """of each process: those that have parts of the same documents"""


def arrange(lengths: Sequence[int], num_ranks: int, cost: SequenceCost) -> Arrangement:
    """The tokens of a row's documents over so many processes, those of a group in equal numbers."""
    starts = list(accumulate(lengths, initial=0))
    places: list[tuple[int, ...]] = []
    members: list[range] = []
    for group in plan(lengths, num_ranks, cost, num_micro_batches=1).micro_batches[0]:
        tokens = [
            place
            for number in group.sequences
            for place in range(starts[number], starts[number + 1])
        ]
        each = -(-len(tokens) // group.degree)
        for part in range(group.degree):
            places.append(tuple(tokens[part * each : (part + 1) * each]))
            members.append(range(group.first_rank, group.first_rank + group.degree))
    return Arrangement(tuple(places), tuple(members))


class AdaptiveRows(RowSpread):
    """Rows that are arranged anew for each batch."""

    def __init__(self, context: Group, shards: Group, cost: SequenceCost, room: float) -> None:
        super().__init__(context, shards)
        self.cost = cost
        self.room = room

    def of(self, segment_ids_BS: Tensor) -> Spread:
        """See `Spread`. Reads the documents on the host."""
        size, length = self.context.size, segment_ids_BS.shape[1]
        most = max(int(self.room * length / size), -(-length // size))
        cost = replace(self.cost, max_tokens_per_rank=most)
        rows = [arrange(lengths, size, cost) for lengths in document_lengths(segment_ids_BS)]
        return ArrangedRows(self.context, self.shards, rows, segment_ids_BS.device)


def document_lengths(segment_ids_BS: Tensor) -> list[list[int]]:
    """Of the documents of each row."""
    return [
        torch.unique_consecutive(row_S, return_counts=True)[1].tolist()
        for row_S in segment_ids_BS.cpu()
    ]


class ArrangedRows(RowSpread):
    """The rows of one batch. M is the size of the largest group that the own part belongs to."""

    def __init__(
        self, context: Group, shards: Group, rows: Sequence[Arrangement], device: torch.device
    ) -> None:
        super().__init__(context, shards)
        self.device = device
        self.groups_BM = [row.groups[context.rank] for row in rows]
        """processes with parts of the documents of each row's own part"""
        ranks = range(context.size)
        self.largest_R = [max((len(row.groups[rank]) for row in rows), default=1) for rank in ranks]
        """M of each process"""
        self.exchanged_R = [
            [number for number, group in enumerate(self.groups_BM) if rank in group]
            for rank in ranks
        ]
        """numbers of the rows of which this process and each one give each other their slots"""
        part = self._slots_of_parts(rows)
        slots = [[*places, *[-1] * (part - len(places))] for row in rows for places in row.places]
        self.order_BS = self._integers(slots).view(len(rows), part * context.size)
        own = [range(len(row.places[context.rank])) for row in rows]
        self.present_T = self._integers(
            [number * part + slot for number, slots in enumerate(own) for slot in slots]
        )

    def _slots_of_parts(self, rows: Sequence[Arrangement]) -> int:
        """What the fullest part needs, divisible into own slots."""
        longest = max((len(places) for row in rows for places in row.places), default=1)
        pieces = self.num_shards // self.context.size
        return -(-longest // pieces) * pieces

    def _integers(self, numbers: object) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    @cached_property
    def members_BM(self) -> Tensor:
        """Processes of each group, -1 where it has fewer than the largest."""
        largest = self.largest_R[self.context.rank]
        members = [[*group, *[-1] * (largest - len(group))] for group in self.groups_BM]
        return self._integers(members).view(len(members), largest)

    @cached_property
    def arrival_BM(self) -> Tensor:
        """At which place of what arrives the slots of each member are; any where there is none."""
        pairs = [(rank, row) for rank, rows in enumerate(self.exchanged_R) for row in rows]
        place = {pair: number for number, pair in enumerate(pairs)}
        found = [
            [place.get((rank, row), 0) for rank in members]
            for row, members in enumerate(self.members_BM.tolist())
        ]
        return self._integers(found).view_as(self.members_BM)

    def read(self, batch_BS: Tensor) -> Tensor:
        """See `Spread`."""
        assert self.order_BS is not None
        return self.part(batch_BS.gather(1, self.order_BS.clamp(min=0)))

    def present(self, part_BS: Tensor) -> Tensor:
        """See `Spread`."""
        return part_BS.flatten(0, 1).index_select(0, self.present_T)

    def join(self, part_BS: Tensor) -> Tensor:
        """See `Spread`."""
        if max(self.largest_R) == 1:  # of everyone, so nobody waits
            return part_BS
        counts = [len(rows) for rows in self.exchanged_R]
        leaving = self._integers([row for rows in self.exchanged_R for row in rows])
        exchange = Exchange(self.context, counts, counts)
        arrived = exchange.send(part_BS.index_select(0, leaving))
        exchange.wait()
        members = arrived.index_select(0, self.arrival_BM.flatten())
        joined_BJ: Tensor = members.unflatten(0, self.arrival_BM.shape).flatten(1, 2)
        return joined_BJ

    def joined_slots(self, num_slots: int) -> Tensor:
        """See `Spread`."""
        part = num_slots // self.context.size
        slot_K = torch.arange(part, device=self.device)
        slots_BMK = (self.members_BM * part).unsqueeze(-1) + slot_K
        missing_BM1 = self.members_BM.unsqueeze(-1) < 0
        return slots_BMK.masked_fill(missing_BM1, -1).flatten(1)

    def pairs(self, num_rows: int, num_slots: int) -> int:
        """See `Spread`."""
        part = num_slots // self.context.size
        return num_rows * part * part * sum(self.largest_R)
