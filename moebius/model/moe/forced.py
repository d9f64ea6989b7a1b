"""Selectors that do not ask the router: for benchmarks, debugging, oracles and random training."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from moebius.kernels.route import ranked
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.routing import RouteContext, Scores
from moebius.model.moe.stage import Selector


class Forced(Selector):
    """What they have in common."""

    asks_router: ClassVar[bool] = False
    fixed_k: ClassVar[bool] = True
    size_option: ClassVar[str] = "top_k"

    def min_candidates(self, num_experts: int) -> int:
        """All K."""
        return self.max_assignments(num_experts)


class Random(Forced):
    """Distinct experts drawn for each token (stage one of Duo-LLM, arXiv 2410.10846)."""

    kind: Literal["random"] = "random"
    top_k: PositiveInt = 1
    """experts per token"""
    shares: Annotated[tuple[NonNegativeFloat, ...], Field(strict=False)] | None = None
    """relative frequency of each expert, which sets the compute; default: equal"""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """A frequency for every expert, and enough that are not 0."""
        if self.shares is None:
            return
        if len(self.shares) != pool.num_experts:
            yield "shares", f"{len(self.shares)} numbers for {pool.num_experts} experts"
        elif sum(share > 0 for share in self.shares) < self.top_k:
            yield "shares", f"{list(self.shares)}: fewer than top_k = {self.top_k} are above 0"

    def max_assignments(self, num_experts: int) -> int:
        """K."""
        return self.top_k

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`; the same for a token of the same step, wherever it is computed."""
        noise_TN = ctx.gumbel("random", scores.select_TN.shape[1])
        if self.shares is not None:
            noise_TN = noise_TN + torch.tensor(self.shares, device=noise_TN.device).log()
        return ranked(noise_TN)[:, : self.top_k]


class Balanced(Forced):
    """Experts in turn: the same load for all, to measure speed and memory without imbalance."""

    kind: Literal["balanced"] = "balanced"
    top_k: PositiveInt = 2
    """experts per token"""

    @property
    def splits_documents(self) -> bool:
        """It decides by token."""
        return True

    def max_assignments(self, num_experts: int) -> int:
        """K."""
        return self.top_k

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`: assignment j of token i of the stream goes to `i * K + j mod N`."""
        num_experts = scores.select_TN.shape[1]
        tokens = ctx.tokens
        number_BS = tokens.sample_ids_B.unsqueeze(1) * tokens.row_length + tokens.place_BS
        first_T = number_BS.flatten() * self.top_k
        slot_K = torch.arange(self.top_k, device=first_T.device)
        return (first_T.unsqueeze(1) + slot_K) % num_experts


class Fixed(Forced):
    """The same experts for every token."""

    size_option: ClassVar[str] = "ids"

    kind: Literal["fixed"] = "fixed"
    ids: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    """ids of the experts that every token gets"""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """Different experts that are there."""
        if max(self.ids) >= pool.num_experts:
            yield "ids", f"{max(self.ids)}; allowed: 0 to {pool.num_experts - 1}"
        if len(set(self.ids)) < len(self.ids):
            yield "ids", f"{list(self.ids)}: an expert is named twice"

    def max_assignments(self, num_experts: int) -> int:
        """K."""
        return len(self.ids)

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`."""
        ids_K = torch.tensor(self.ids, device=scores.select_TN.device)
        return ids_K.expand(len(scores.select_TN), -1)


class Replay(Forced):
    """In training the recorded decisions of another run; elsewhere the K best experts."""

    kind: Literal["replay"] = "replay"
    path: str
    """folder that `log.record_routing` of a run has written: `<run_dir>/routing`"""
    top_k: PositiveInt = 1
    """experts per token, those of the recorded run"""

    @property
    def splits_documents(self) -> bool:
        """It decides by token."""
        return True

    def max_assignments(self, num_experts: int) -> int:
        """K."""
        return self.top_k

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`. see `RoutingTable.decisions` for what it raises."""
        table = ctx.step.replay.get(self.path)
        if table is None or not ctx.step.training:
            return ranked(scores.select_TN)[:, : self.top_k]
        return table.decisions(ctx.site, ctx.tokens, self.top_k, scores.select_TN.shape[1])
