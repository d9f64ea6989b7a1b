"""Which experts a token may choose from; several rules apply together."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from moebius.model.moe.pool import PoolShape
from moebius.model.moe.routing import RouteContext
from moebius.model.moe.stage import Candidates


class GroupLimited(Candidates):
    """Only experts of a token's best groups (DeepSeek-V2 and V3).

    Groups are equal ranges of the dispatched experts' ids, as they would lie on nodes. Experts that
    are computed where the token is belong to no group and stay candidates.
    """

    kind: Literal["groups"] = "groups"
    num_groups: PositiveInt
    """into how many groups the dispatched experts are divided"""
    keep: PositiveInt
    """how many groups a token may use"""
    score_top: PositiveInt = 1
    """a group's score is the sum of its so many best experts' scores: 1 is DeepSeek-V2's, experts
    per token over `keep` is V3's, 2 is what some implementations fix"""

    def mask(self, select_TN: Tensor, pool: PoolShape, ctx: RouteContext) -> Tensor:
        """Bool `[T, N]`; of equal groups the lower one wins."""
        num_tokens, num_dispatched = len(select_TN), pool.num_dispatched
        grouped = select_TN[:, :num_dispatched].unflatten(1, (self.num_groups, -1))
        score_TG = grouped.topk(self.score_top, dim=-1).values.sum(dim=-1)
        best_TM = score_TG.argsort(dim=-1, descending=True, stable=True)[:, : self.keep]
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, best_TM, True)
        mask_TN = torch.ones_like(select_TN, dtype=torch.bool)
        size = num_dispatched // self.num_groups
        mask_TN[:, :num_dispatched] = (
            kept_TG.unsqueeze(-1).expand(-1, -1, size).reshape(num_tokens, num_dispatched)
        )
        return mask_TN

    def fewest(self, pool: PoolShape) -> int:
        """How many candidates a token has at least."""
        size = pool.num_dispatched // self.num_groups
        return pool.num_experts - pool.num_dispatched + self.keep * size

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """Groups must be equal and large enough."""
        if pool.num_dispatched % self.num_groups:
            yield (
                "num_groups",
                f"{self.num_groups} groups do not divide {pool.num_dispatched} experts evenly",
            )
            return
        if self.keep > self.num_groups:
            yield "keep", f"{self.keep} of {self.num_groups} groups"
        size = pool.num_dispatched // self.num_groups
        if self.score_top > size:
            yield "score_top", f"{self.score_top}, but a group has {size} experts"


class Progressive(Candidates):
    """Progressive scaling of reused experts (ReXMoE, arXiv 2510.17483).

    With experts of r layers in the pool, r * N candidates, a random choice of so many are open:
    N up to `start_step`, growing linearly to r * N at `end_step`. The choice is new at every step
    and the same for all tokens.
    """

    kind: Literal["progressive"] = "progressive"
    start_step: NonNegativeInt
    """last step with as many candidates as a layer has experts of its own"""
    end_step: PositiveInt
    """first step with all"""

    def num_open(self, pool: PoolShape, step: int) -> int:
        """N_t of the paper."""
        own = pool.num_experts // pool.num_owners
        progress = (step - self.start_step) / (self.end_step - self.start_step)
        factor = 1 + (pool.num_owners - 1) * min(max(progress, 0.0), 1.0)
        return math.floor(factor * own + 1e-9)

    def mask(self, select_TN: Tensor, pool: PoolShape, ctx: RouteContext) -> Tensor:
        """Bool `[N]`, a function of seed, step and site."""
        order_N = ctx.uniform_per_step("progressive", pool.num_experts).argsort(stable=True)
        mask_N = torch.zeros_like(order_N, dtype=torch.bool)
        mask_N[order_N[: self.num_open(pool, ctx.step.step)]] = True
        return mask_N

    def fewest(self, pool: PoolShape) -> int:
        """How many candidates a token has at least."""
        return self.num_open(pool, 0)

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """There must be experts to open, and time to do it in."""
        if pool.num_owners == 1:
            yield "kind", "progressive opens the experts of other layers; set reuse to 2 or more"
        if self.end_step <= self.start_step:
            yield "end_step", f"{self.end_step} is not after start_step = {self.start_step}"


class Exclude(Candidates):
    """Never these experts: pruned ones, or to see what they are worth."""

    kind: Literal["exclude"] = "exclude"
    ids: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    """ids of the experts that no token gets"""

    def mask(self, select_TN: Tensor, pool: PoolShape, ctx: RouteContext) -> Tensor:
        """Bool `[N]`."""
        mask_N = torch.ones(pool.num_experts, dtype=torch.bool, device=select_TN.device)
        mask_N[list(self.ids)] = False
        return mask_N

    def fewest(self, pool: PoolShape) -> int:
        """How many candidates a token has at least."""
        return pool.num_experts - len(set(self.ids))

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """The ids must be there."""
        if max(self.ids) >= pool.num_experts:
            yield "ids", f"{max(self.ids)}; allowed: 0 to {pool.num_experts - 1}"
