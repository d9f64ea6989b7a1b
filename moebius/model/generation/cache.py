"""Keys and values of earlier tokens, by slot, layer and pass.

A slot holds one sequence. A pass stores only the tokens that entered it, so a cache of a routed
loop grows with what its tokens really do (Mixture-of-Recursions, arXiv 2507.10524, section 2.3):
`per_depth` and `hybrid` hold on average (N_r + 1) / (2 N_r) of an unrolled model's entries at the
published shares, `shared_first` 1 / N_r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.model.context import DepthContext
from moebius.model.recursion.config import KVSharing

FIRST_CAPACITY = 32
"""entries that a slot has room for at first; room doubles when it is used up"""
NOWHERE = torch.iinfo(torch.int64).max
"""place of an unused entry: after all tokens"""


class Entries:
    """What the tokens of each slot have left in one layer at one pass, in order of their places.

    Shapes: N slots, J entries, Q new tokens, G heads, C channels.
    """

    def __init__(self, num_slots: int) -> None:
        self.count_N = torch.zeros(num_slots, dtype=torch.int64)
        self.place_NJ = torch.full((num_slots, 0), NOWHERE)
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, slots_B: Tensor, place_BQ: Tensor, k: Tensor, v: Tensor) -> None:
        """Add the tokens of some slots; those with place -1 are empty and left out."""
        valid_BQ = place_BQ >= 0
        entry_BQ = self.count_N[slots_B].unsqueeze(1) + valid_BQ.cumsum(dim=1) - 1
        self._make_room(int(entry_BQ.max()) + 1, k, v)
        assert self.k is not None
        assert self.v is not None
        slot = slots_B.unsqueeze(1).expand_as(entry_BQ)[valid_BQ]
        entry = entry_BQ[valid_BQ]
        self.place_NJ[slot, entry] = place_BQ[valid_BQ]
        self.k[slot, entry], self.v[slot, entry] = k[valid_BQ], v[valid_BQ]
        self.count_N[slots_B] += valid_BQ.sum(dim=1)

    def read(self, slots_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places, keys and values of some slots, as many entries as the longest of them has."""
        assert self.k is not None
        assert self.v is not None
        longest = int(self.count_N[slots_B].max())
        places = self.place_NJ[slots_B, :longest]
        return places, self.k[slots_B, :longest], self.v[slots_B, :longest]

    def clear(self, slot: int) -> None:
        """Forget a slot's sequence."""
        self.count_N[slot] = 0
        self.place_NJ[slot] = NOWHERE

    def _make_room(self, needed: int, k: Tensor, v: Tensor) -> None:
        room = self.place_NJ.shape[1]
        if self.k is not None and needed <= room:
            return
        room = max(FIRST_CAPACITY, 2 * room, needed)
        device, slots = k.device, len(self.count_N)
        place_NJ = torch.full((slots, room), NOWHERE, device=device)
        place_NJ[:, : self.place_NJ.shape[1]] = self.place_NJ
        self.place_NJ, self.count_N = place_NJ, self.count_N.to(device)
        grown = []
        for old, new in ((self.k, k), (self.v, v)):
            tensor = new.new_zeros(slots, room, *new.shape[2:])
            if old is not None:
                tensor[:, : old.shape[1]] = old
            grown.append(tensor)
        self.k, self.v = grown


class KVCache:
    """The entries of all layers and passes for some number of slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.entries: dict[tuple[str, int], Entries] = {}

    def extend(
        self,
        ctx: DepthContext,
        k_BSGC: Tensor | None,
        v_BSGC: Tensor | None,
        kv: KVSharing,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store the keys and values of the tokens of `ctx`; return what they may look at.

        That is `[B, J, G, C]` twice and a mask `[B, S, J]` of the entries at places up to their
        own, or before it with `strict`. With `kv` shared_first, later passes bring nothing that
        counts and look at the first pass's entries; with hybrid they look at the newest entry of
        each token among the passes up to their own.
        """
        layer, depth = ctx.visit.layer, ctx.visit.depth
        slots_B, place_BS = ctx.tokens.slots_B, ctx.tokens.place_BS
        assert slots_B is not None
        stored = 1 if kv == "shared_first" else depth
        if stored == depth:
            assert k_BSGC is not None
            assert v_BSGC is not None
            own = self.entries.setdefault((layer, depth), Entries(self.num_slots))
            own.append(slots_B, place_BS, k_BSGC, v_BSGC)
        if kv == "hybrid":
            places, k, v = self._newest(layer, depth, slots_B)
        else:
            places, k, v = self.entries[layer, stored].read(slots_B)
        reach_BS1 = (place_BS - 1 if strict else place_BS).unsqueeze(-1)
        # An empty slot sees something, or its softmax would be NaN.
        return k, v, (places.unsqueeze(1) <= reach_BS1) | (place_BS < 0).unsqueeze(-1)

    def _newest(self, layer: str, depth: int, slots_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first pass's entries, replaced by those of later passes up to `depth`."""
        places, k, v = self.entries[layer, 1].read(slots_B)
        row_B1 = torch.arange(len(slots_B), device=k.device).unsqueeze(1)
        for later in range(2, depth + 1):
            if (layer, later) not in self.entries:
                continue
            newer_places, newer_k, newer_v = self.entries[layer, later].read(slots_B)
            used = newer_places != NOWHERE
            entry = torch.searchsorted(places.contiguous(), newer_places.contiguous())
            rows = row_B1.expand_as(entry)[used]
            k[rows, entry[used]], v[rows, entry[used]] = newer_k[used], newer_v[used]
        return places, k, v

    def clear(self, slot: int) -> None:
        """Forget a slot's sequence."""
        for entries in self.entries.values():
            entries.clear(slot)

    def stored_tokens(self) -> dict[tuple[str, int], int]:
        """By layer and pass, entries in use, over all slots."""
        return {key: int(entries.count_N.sum()) for key, entries in self.entries.items()}
