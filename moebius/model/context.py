"""Everything a layer must know that depends on where and for which tokens it is being used.

A layer object serves many visits, so none of this lives in modules: it arrives as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebius.kernels.attention import document_mask
from moebius.kernels.depth_select import replace_rows, take_rows
from moebius.model.ledger import Ledger
from moebius.model.moe.replay import RoutingTable
from moebius.model.program import Visit

MAX_ROW = 1 << 24
"""longest row: a token is numbered `sample * MAX_ROW + place in the row`"""


@dataclass(frozen=True)
class TokenContext:
    """Which tokens are present: rows as they are, or rows from which tokens have been taken."""

    segment_ids_BS: Tensor
    """document of each token, int"""
    cos_BSC: Tensor
    """rotary tables at each token's original position, see `rope_tables`"""
    sin_BSC: Tensor
    sample_ids_B: Tensor
    """which sample of the training stream each row is, int64"""
    place_BS: Tensor
    """where in its full row each token stands, int64, -1 for an empty slot"""
    row_length: int
    """slots of the full row"""
    valid_BS: Tensor | None = None
    """false for empty slots; None: every slot holds a token"""

    @classmethod
    def of_rows(
        cls, segment_ids_BS: Tensor, cos_BSC: Tensor, sin_BSC: Tensor, sample_ids_B: Tensor
    ) -> TokenContext:
        """The context of full rows."""
        length = segment_ids_BS.shape[1]
        place = torch.arange(length, device=segment_ids_BS.device).expand_as(segment_ids_BS)
        return cls(segment_ids_BS, cos_BSC, sin_BSC, sample_ids_B, place, length)

    def take(self, index_BK: Tensor) -> TokenContext:
        """The context of the tokens at `index` (ascending, -1 for an empty slot)."""
        return TokenContext(
            segment_ids_BS=self.segment_ids_BS.gather(1, index_BK.clamp(min=0)),
            cos_BSC=take_rows(self.cos_BSC, index_BK),
            sin_BSC=take_rows(self.sin_BSC, index_BK),
            sample_ids_B=self.sample_ids_B,
            place_BS=index_BK,
            row_length=self.row_length,
            valid_BS=index_BK >= 0,
        )

    @cached_property
    def attention_mask_BSS(self) -> Tensor:
        """See `document_mask`; made once for all layers of a pass."""
        return document_mask(self.segment_ids_BS, self.valid_BS)

    @cached_property
    def global_ids_T(self) -> Tensor:
        """A number for each token that no layout changes, int64; randomness is keyed by it."""
        return (self.sample_ids_B.unsqueeze(1) * MAX_ROW + self.place_BS).flatten()

    @cached_property
    def document_start_BS(self) -> Tensor:
        """For each token the slot of its document's first present token in this row."""
        slot = torch.arange(self.segment_ids_BS.shape[1], device=self.segment_ids_BS.device)
        begins = torch.ones_like(self.segment_ids_BS, dtype=torch.bool)
        begins[:, 1:] = self.segment_ids_BS[:, 1:] != self.segment_ids_BS[:, :-1]
        return (slot * begins).cummax(dim=1).values


@dataclass(frozen=True)
class Carry:
    """Per-token state that travels with the residual stream from layer to layer.

    It is an input and an output of every block, so recomputation, token selection and (later)
    pipeline stages handle it like the hidden state. Gradients flow through it.
    """

    router_states: Mapping[str, Tensor] = field(default_factory=dict)
    """by sublayer, what its last router passes on to the next, fp32 `[B, S, N]`: raw scores (the
    gating residual of MoE++) or the state of a recurrent router (RMoE)"""

    def with_state(self, sublayer: str, state_BSN: Tensor) -> Carry:
        """This carry with another state of one sublayer."""
        return Carry({**self.router_states, sublayer: state_BSN})

    def take(self, index_BK: Tensor) -> Carry:
        """The state of the tokens at `index`."""
        return Carry({name: take_rows(s, index_BK) for name, s in self.router_states.items()})

    def put(self, index_BK: Tensor, new: Carry, length: int) -> Carry:
        """This state with `new` at `index`; tokens that were not selected keep what they had.

        A token that has met no such router yet carries zeros. `length` is the full row's.
        """
        states = dict(self.router_states)
        for name, rows in new.router_states.items():
            old = states.get(name)
            if old is None:
                old = rows.new_zeros(rows.shape[0], length, rows.shape[2])
            states[name] = replace_rows(old, index_BK, rows)
        return Carry(states)


Mode = Literal["topk", "threshold"]
"""How depth routers select. topk: the k best of the row, as published and as trained; it compares a
token with later ones. threshold: sigmoid(logit) >= 1/2, causal, the only mode for generation."""


@dataclass(frozen=True)
class StepContext:
    """What is the same for every layer of one forward pass."""

    mode: Mode
    ledger: Ledger
    step: int = 0
    """optimizer steps done; what is scheduled or random is a function of it"""
    seed: int = 0
    """of everything random in the forward pass"""
    training: bool = False
    """whether noise, capacities and sampling are on"""
    recompute: bool = False
    """whether activations inside sublayers are computed again in the backward pass"""
    replay: Mapping[str, RoutingTable] = field(default_factory=dict)
    """decisions that selectors of kind `replay` repeat, by the path they name"""

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`; with `recompute` its activations are not kept.

        Routers decide outside such a function and hand their decision in: what is computed again
        is the same, and statistics are taken once.
        """
        if not self.recompute or not torch.is_grad_enabled():
            return function(*inputs)
        result: Tensor = checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return result


@dataclass(frozen=True)
class DepthContext:
    """Where in the unrolled depth a layer is being used, for which tokens, and in which pass."""

    visit: Visit
    tokens: TokenContext
    step: StepContext
    shared: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    """modules that several layers use, by name; they belong to the decoder"""
