"""A limit on how many assignments an expert takes. Without one nothing is dropped."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moebius.model.moe.pool import ZERO_COMPUTATION, PoolShape
from moebius.model.moe.routing import RouteContext, Scores, expert_counts, expert_mask
from moebius.model.moe.stage import Stage


class Capacity(Stage):
    """Limits in training; evaluation and generation take every assignment.

    An expert takes `factor * share * A` of the A assignments, where the shares add up to 1: MoE++
    eq. 8 with T read as assignments. (Read as tokens, as printed, it drops `1 - factor / K` of all
    assignments at perfect balance.)
    """

    factor: float = Field(1.1, gt=0)
    """gamma; at 1 the limits add up to the number of assignments"""
    tau: float = Field(1.0, gt=0)
    """limit of a computing expert relative to a zero-computation one; matters in pools with both"""
    scope: Literal["sequence", "micro_batch"] = "sequence"
    """over which tokens assignments are counted; `micro_batch` depends on how a batch is cut"""
    priority: Literal["score", "position"] = "score"
    """who comes first: score compares a token with later ones, position is causal"""
    overflow: Literal["drop", "spill"] = "drop"
    """what does not fit: drop leaves it out; spill sends it, with its weight, to the token's best
    zero-computation expert not chosen yet, and then those have no limit"""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """What spills needs a place."""
        if self.overflow == "spill" and not pool.count(*ZERO_COMPUTATION):
            yield "overflow", "spill needs a constant, copy or zero expert in the pool"

    def limits(self, assignments_G: Tensor, pool: PoolShape) -> Tensor:
        """Most assignments per group of tokens and expert, `[G, N]`, rounded up."""
        share_N = 1 / pool.load_weights(self.tau).to(assignments_G.device)
        share_N = share_N / share_N.sum()
        limit_GN = (self.factor * share_N * assignments_G.unsqueeze(1) - 1e-4).ceil()
        if self.overflow == "spill":
            free_N = pool.is_kind(*ZERO_COMPUTATION).to(limit_GN.device)
            limit_GN = limit_GN.masked_fill(free_N, float("inf"))
        return limit_GN

    def apply(self, ids_TK: Tensor, scores: Scores, pool: PoolShape, ctx: RouteContext) -> Tensor:
        """The ids `[T, K]` after the limits: what does not fit is emptied or spilled."""
        rows, length = ctx.shape
        group_T = torch.arange(rows, device=ids_TK.device).repeat_interleave(length)
        if self.scope == "micro_batch":
            group_T, rows = torch.zeros_like(group_T), 1
        counts_GN = expert_counts(ids_TK, group_T, rows, pool.num_experts)
        limit_GN = self.limits(counts_GN.sum(dim=1), pool)
        rank_TK = self._ranks(ids_TK, group_T, scores)
        fits_TK = rank_TK < limit_GN[group_T.unsqueeze(1), ids_TK.clamp(min=0)]
        overflow_TK = ~fits_TK & (ids_TK >= 0)
        if self.overflow == "drop":
            return ids_TK.masked_fill(overflow_TK, -1)
        return _spill(ids_TK, overflow_TK, scores, pool)

    def _ranks(self, ids_TK: Tensor, group_T: Tensor, scores: Scores) -> Tensor:
        """How many assignments of the same group and expert come before each one, `[T, K]`."""
        segment = (group_T.unsqueeze(1) * scores.probs_TN.shape[1] + ids_TK.clamp(min=0)).flatten()
        segment = segment.masked_fill(ids_TK.flatten() < 0, int(1e15))
        order = torch.arange(ids_TK.numel(), device=ids_TK.device)
        if self.priority == "score":
            score = scores.affinity_TN.detach().gather(1, ids_TK.clamp(min=0)).flatten()
            order = score.argsort(descending=True, stable=True)
        order = order[segment[order].argsort(stable=True)]
        sorted_segment = segment[order]
        start = torch.searchsorted(sorted_segment, sorted_segment)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - start
        return rank.view_as(ids_TK)


def _spill(ids_TK: Tensor, overflow_TK: Tensor, scores: Scores, pool: PoolShape) -> Tensor:
    """Send each overflow to the best zero-computation expert that its token has not chosen yet."""
    free_TN = pool.is_kind(*ZERO_COMPUTATION).to(ids_TK.device) & scores.select_TN.isfinite()
    for slot in range(ids_TK.shape[1]):
        chosen_TN = expert_mask(ids_TK, free_TN.shape[1])
        open_TN = scores.probs_TN.detach().masked_fill(~free_TN | chosen_TN, -1.0)
        best_T1 = open_TN.max(dim=1, keepdim=True)
        target_T = best_T1.indices[:, 0].masked_fill(best_T1.values[:, 0] < 0, -1)
        ids_TK = torch.where(
            (torch.arange(ids_TK.shape[1], device=ids_TK.device) == slot) & overflow_TK,
            target_T.unsqueeze(1),
            ids_TK,
        )
    return ids_TK
