"""The currency of routing over width, and what its stages may know about the tokens.

Stages in order, each chosen by its section of `RouterConfig`: scorer, score norm, candidates,
selector, weight policy, capacity; beside them losses and controllers. A stage is a configuration
node with one method. Numbers are fp32 whatever the precision of the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.kernels.random import gumbel, normal, uniform
from moebius.model.context import StepContext, TokenContext
from moebius.model.program import Site


@dataclass(frozen=True)
class Routing:
    """Where tokens go. Ids are global expert ids; int64, as torch indexing wants them."""

    ids_TK: Tensor
    """chosen experts, -1 for an empty assignment; K is the most that a token can have"""
    weights_TK: Tensor
    """factor on each chosen expert's output, 0 for an empty assignment"""
    probs_TN: Tensor
    """differentiable, adding up to 1 over all experts, for losses"""
    logits_TN: Tensor
    """raw scores before normalisation"""


@dataclass(frozen=True)
class Scores:
    """What the score norm makes of logits, and what selection sees of it."""

    affinity_TN: Tensor
    """what weights are made of: softmax probabilities or sigmoid values, without any bias"""
    probs_TN: Tensor
    """the affinity, divided by its sum where it does not add up to 1"""
    select_TN: Tensor
    """affinity plus the controllers' bias, -inf where an expert is no candidate; detached"""
    threshold: Tensor | None = None
    """set by a controller: `[1]` for all experts or `[N]`"""
    bias_N: Tensor | None = None
    """what controllers have added in `select_TN`"""
    entropy_T: Tensor | None = None
    """of the probabilities, divided by its maximum, where it has come along with the choice"""
    logsumexp_T: Tensor | None = None
    """of the raw logits, where it has come along with the choice"""


@dataclass(frozen=True)
class RouteContext:
    """Where and when a router is being called, and for which tokens."""

    site: Site
    use: int
    """which of the uses of its router this is, from 0"""
    tokens: TokenContext
    step: StepContext
    by_document: bool = False
    """whether all tokens of a document share their draws, as they share their decision"""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and slots per row, of which T is the product."""
        rows, length = self.tokens.segment_ids_BS.shape
        return rows, length

    @property
    def valid_T(self) -> Tensor:
        """False for empty slots."""
        rows, length = self.shape
        if self.tokens.valid_BS is None:
            return torch.ones(
                rows * length, dtype=torch.bool, device=self.tokens.segment_ids_BS.device
            )
        return self.tokens.valid_BS.flatten()

    def uniform(self, purpose: str, columns: int, own: bool = False) -> Tensor:
        """Uniform numbers per token, `[T, columns]`; a function of seed, step, site and token.
        With `own` those of the own slots only."""
        counter_T = self._counter_T()
        if own:
            counter_T = self.tokens.spread.own(counter_T.view(self.shape)).flatten()
        return uniform(self._key(purpose), counter_T, columns)

    def normal(self, purpose: str, columns: int) -> Tensor:
        """Standard normal numbers per token, `[T, columns]`."""
        return normal(self._key(purpose), self._counter_T(), columns)

    def gumbel(self, purpose: str, columns: int) -> Tensor:
        """Standard Gumbel numbers per token, `[T, columns]`."""
        return gumbel(self._key(purpose), self._counter_T(), columns)

    def uniform_per_step(self, purpose: str, columns: int) -> Tensor:
        """Uniform numbers `[columns]` that are the same for all tokens of a step at this site."""
        counter = torch.zeros(1, dtype=torch.int64, device=self.tokens.segment_ids_BS.device)
        return uniform(self._key(purpose), counter, columns)[0]

    def _counter_T(self) -> Tensor:
        if not self.by_document:
            return self.tokens.global_ids_T
        ids_BS = self.tokens.global_ids_T.view(self.shape)
        return ids_BS.gather(1, self.tokens.document_start_BS).flatten()

    def _key(self, purpose: str) -> int:
        text = f"{self.step.seed}/{self.step.step}/{self.site}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def expert_counts(ids_TK: Tensor, group_T: Tensor, num_groups: int, num_experts: int) -> Tensor:
    """Assignments per group of tokens and expert, fp32 `[groups, N]`; empty ones count nowhere."""
    chosen = ids_TK >= 0
    slot_TK = group_T.unsqueeze(1) * num_experts + ids_TK.clamp(min=0)
    counts = torch.zeros(num_groups * num_experts, dtype=torch.float32, device=ids_TK.device)
    counts.scatter_add_(0, slot_TK.flatten(), chosen.flatten().float())
    return counts.view(num_groups, num_experts)


def expert_mask(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Which experts each token has, bool `[T, N]`."""
    mask = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    # Empty assignments go to a column of their own.
    mask.scatter_(1, ids_TK.masked_fill(ids_TK < 0, num_experts), True)
    return mask[:, :num_experts]
