"""The shape of an expert pool: which expert of which kind has which id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ExpertKind = Literal["ffn", "low_rank", "attention", "gru", "constant", "copy", "zero"]
ID_ORDER: tuple[ExpertKind, ...] = (
    "ffn",
    "low_rank",
    "attention",
    "gru",
    "constant",
    "copy",
    "zero",
)
"""kinds in the order of their ids: those that tokens are sent to first"""
DISPATCHED: tuple[ExpertKind, ...] = ("ffn", "low_rank", "attention")
"""kinds that tokens are sent to; the others are computed where the tokens are"""
ZERO_COMPUTATION: tuple[ExpertKind, ...] = ("constant", "copy", "zero")
"""kinds that need no matrix product per token (MoE++)"""


@dataclass(frozen=True)
class PoolShape:
    """Kinds and numbers of experts, in the order of their ids."""

    groups: tuple[tuple[ExpertKind, int], ...]
    """(kind, how many), kinds in the order of `ID_ORDER`"""
    num_owners: int = 1
    """layers whose experts are in the pool"""

    @property
    def num_experts(self) -> int:
        """N, how many experts a router scores."""
        return sum(count for _, count in self.groups)

    def count(self, *kinds: ExpertKind) -> int:
        """Number of experts of some kinds."""
        return sum(count for kind, count in self.groups if kind in kinds)

    @property
    def num_dispatched(self) -> int:
        """E, how many experts tokens are sent to; their ids are `0 .. E-1`."""
        return self.count(*DISPATCHED)

    @property
    def num_computing(self) -> int:
        """How many experts need matrix products; their ids come before all others."""
        return self.num_experts - self.count(*ZERO_COMPUTATION)

    def first(self, kind: ExpertKind) -> int:
        """The lowest id of a kind, or the one it would have."""
        earlier = ID_ORDER[: ID_ORDER.index(kind)]
        return self.count(*earlier)

    def is_kind(self, *kinds: ExpertKind) -> Tensor:
        """Bool `[N]`: which experts are of some kinds."""
        return torch.tensor([kind in kinds for kind, count in self.groups for _ in range(count)])

    def load_weights(self, tau: float) -> Tensor:
        """eta, fp32 `[N]`: 1 for computing experts, tau for the others (MoE++ eq. 7)."""
        is_zero_N = self.is_kind(*ZERO_COMPUTATION)
        return torch.where(is_zero_N, tau, 1.0)
