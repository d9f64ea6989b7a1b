"""Everything a layer must know that depends on where and for which tokens it is being used.

A layer object serves many visits, so none of this lives in modules: it arrives as an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from moebius.kernels.attention import document_mask
from moebius.kernels.depth_select import replace_rows, take_rows
from moebius.model.program import Site, Visit


@dataclass(frozen=True)
class TokenContext:
    """Which tokens are present: rows as they are, or rows from which tokens have been taken."""

    segment_ids_BS: Tensor
    """document of each token, int"""
    cos_BSC: Tensor
    """rotary tables at each token's original position, see `rope_tables`"""
    sin_BSC: Tensor
    valid_BS: Tensor | None = None
    """false for empty slots; None: every slot holds a token"""

    def take(self, index_BK: Tensor) -> TokenContext:
        """The context of the tokens at `index` (ascending, -1 for an empty slot)."""
        return TokenContext(
            segment_ids_BS=self.segment_ids_BS.gather(1, index_BK.clamp(min=0)),
            cos_BSC=take_rows(self.cos_BSC, index_BK),
            sin_BSC=take_rows(self.sin_BSC, index_BK),
            valid_BS=index_BK >= 0,
        )

    @cached_property
    def attention_mask_BSS(self) -> Tensor:
        """See `document_mask`; made once for all layers of a pass."""
        return document_mask(self.segment_ids_BS, self.valid_BS)


@dataclass(frozen=True)
class Carry:
    """Per-token state that travels with the residual stream from layer to layer.

    It is an input and an output of every block, so recomputation, token selection and (later)
    pipeline stages handle it like the hidden state. Gradients flow through it.
    """

    router_scores_BSN: Tensor | None = None
    """raw scores of the previous MoE layer (MoE++ gating residual), fp32"""

    def take(self, index_BK: Tensor) -> Carry:
        """The state of the tokens at `index`."""
        if self.router_scores_BSN is None:
            return self
        return Carry(take_rows(self.router_scores_BSN, index_BK))

    def put(self, index_BK: Tensor, new: Carry, length: int) -> Carry:
        """This state with `new` at `index`; tokens that were not selected keep what they had.

        A token that has met no MoE layer yet carries zeros. `length` is the full row's.
        """
        if new.router_scores_BSN is None:
            return self
        old = self.router_scores_BSN
        if old is None:
            rows, _, num_experts = new.router_scores_BSN.shape
            old = new.router_scores_BSN.new_zeros(rows, length, num_experts)
        return Carry(replace_rows(old, index_BK, new.router_scores_BSN))


class Ledger:
    """What one forward pass produces besides its output: auxiliary losses and statistics by site.

    Values stay on the device. `share` is this pass's part of all tokens of the optimizer step: it
    weights auxiliary losses, so that their sum over the micro-batches is a mean over the step.
    """

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.statistics: dict[Site, dict[str, Tensor]] = {}
        self.losses: dict[str, Tensor] = {}

    def record(self, site: Site, **sums: Tensor) -> None:
        """Add statistics of a site; they must be sums over tokens, so that passes can be added."""
        entry = self.statistics.setdefault(site, {})
        for name, value in sums.items():
            value = value.detach()
            entry[name] = entry[name] + value if name in entry else value

    def attach(self, x: Tensor, name: str, loss: Tensor, coefficient: float) -> Tensor:
        """Return `x` unchanged, with `coefficient * share * loss` added to what is differentiated.

        The loss enters through the backward pass of `x`, so no module has to return it and it
        reaches the optimizer from wherever in the model it arises.
        """
        weight = coefficient * self.share
        booked = weight * loss.detach()
        self.losses[name] = self.losses[name] + booked if name in self.losses else booked
        attached: Tensor = _AttachLoss.apply(x, loss, weight)  # type: ignore[no-untyped-call]
        return attached

    @classmethod
    def merge(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """The ledger of several micro-batches together."""
        merged = cls()
        for ledger in ledgers:
            for site, sums in ledger.statistics.items():
                merged.record(site, **sums)
            for name, loss in ledger.losses.items():
                merged.losses[name] = merged.losses[name] + loss if name in merged.losses else loss
        return merged


Mode = Literal["topk", "threshold"]
"""How depth routers select. topk: the k best of the row, as published and as trained; it compares a
token with later ones. threshold: sigmoid(logit) >= 1/2, causal, the only mode for generation."""


@dataclass(frozen=True)
class StepContext:
    """What is the same for every layer of one forward pass."""

    mode: Mode
    ledger: Ledger


@dataclass(frozen=True)
class DepthContext:
    """Where in the unrolled depth a layer is being used, for which tokens, and in which pass."""

    visit: Visit
    tokens: TokenContext
    step: StepContext


class _AttachLoss(torch.autograd.Function):
    """Identity on x whose backward also sends `weight` to the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = torch.full_like(loss, weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.weight, None
