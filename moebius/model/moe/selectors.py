"""From scores to chosen experts, as learned routers choose them.

Every selector says beforehand how many experts a token can have at most, so that decisions have a
fixed shape `[T, K]`: what varies per token is how many of its K assignments are empty (-1).
"""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from moebius.config import IntPerLayer
from moebius.kernels.route import Activation, RouteRule, above, chosen, nucleus, ranked
from moebius.model.moe.entropy import Measure, entropy
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.routing import RouteContext, Scores
from moebius.model.moe.stage import Needs, Selector
from moebius.model.schedule import NonNegativeScheduled, value_at


class TopK(Selector):
    """The K best experts of each token."""

    fixed_k: ClassVar[bool] = True
    size_option: ClassVar[str] = "top_k"

    kind: Literal["top_k"] = "top_k"
    top_k: IntPerLayer = 2
    """experts per token, zero-computation ones included; a list has one number per layer (MoLA)"""
    sampled_tail: NonNegativeInt = 0
    """so many of the K are drawn in training in proportion to the scores of the experts left
    (ModuleFormer), a controller's bias included"""

    @property
    def accepts(self) -> tuple[Needs, ...]:
        """A bias, which moves ranks."""
        return ("bias",)

    def max_assignments(self, num_experts: int) -> int:
        """K, the most experts a token can have."""
        return per_layer_value(self.top_k)

    def min_candidates(self, num_experts: int) -> int:
        """All K."""
        return per_layer_value(self.top_k)

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """No more can be drawn than are chosen."""
        if self.sampled_tail > per_layer_value(self.top_k):
            yield "sampled_tail", f"{self.sampled_tail} of top_k = {self.top_k}"

    def rule(self, scores: Activation, num_experts: int, ctx: RouteContext) -> RouteRule | None:
        """Without a sampled tail."""
        if self._sampled(ctx):
            return None
        return RouteRule(scores, "top_k", per_layer_value(self.top_k))

    def _sampled(self, ctx: RouteContext) -> int:
        return self.sampled_tail if ctx.step.training else 0

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`, best first; of equal scores the lower id wins."""
        top_k, sampled = per_layer_value(self.top_k), self._sampled(ctx)
        order_TN = ranked(scores.select_TN)
        if not sampled:
            return order_TN[:, :top_k]
        head_TK = order_TN[:, : top_k - sampled]
        tiny = torch.finfo(scores.select_TN.dtype).tiny
        noisy_TN = scores.select_TN.clamp(min=tiny).log()
        noisy_TN = noisy_TN + ctx.gumbel("tail", order_TN.shape[1])
        noisy_TN = noisy_TN.masked_fill(scores.select_TN.isneginf(), float("-inf"))
        noisy_TN = noisy_TN.scatter(1, head_TK, float("-inf"))
        return torch.cat([head_TK, ranked(noisy_TN)[:, :sampled]], dim=1)


class TopP(Selector):
    """As many of a token's best experts as it takes to gather a share of the probability.

    Dynamic_MoE (arXiv 2403.07652). The controller `target_k` moves the threshold (DTop-p).
    """

    adds_up_scores: ClassVar[bool] = True
    size_option: ClassVar[str] = "min_k"

    kind: Literal["top_p"] = "top_p"
    threshold: float = Field(0.4, gt=0)
    """the share; from 1 on every expert is chosen"""
    crossing: Literal["include", "exclude"] = "include"
    """whether the expert that crosses the threshold is one of them"""
    min_k: PositiveInt = 1
    """so many are chosen however little they have"""
    max_threshold: float | None = Field(None, gt=0)
    """the highest share that a controller may ask for; default: `threshold`"""

    @property
    def accepts(self) -> tuple[Needs, ...]:
        """The share."""
        return ("share",)

    @property
    def highest_threshold(self) -> float:
        """The highest share."""
        return self.max_threshold or self.threshold

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """The highest share is not below the first."""
        if self.highest_threshold < self.threshold:
            yield "max_threshold", f"{self.max_threshold} is below threshold = {self.threshold}"

    def max_assignments(self, num_experts: int) -> int:
        """K: equal probabilities need the most experts."""
        most = math.floor(self.highest_threshold * num_experts + 1e-9) + (
            self.crossing == "include"
        )
        return min(max(most, self.min_k), num_experts)

    def min_candidates(self, num_experts: int) -> int:
        """Those it always gives."""
        return self.min_k

    def rule(self, scores: Activation, num_experts: int, ctx: RouteContext) -> RouteRule:
        """Always."""
        most = self.max_assignments(num_experts)
        return RouteRule(scores, "top_p", most, self.crossing, self.min_k)

    def limit(self, steered: Tensor | None) -> float | Tensor:
        """The share."""
        return self.threshold if steered is None else steered.clamp(max=self.highest_threshold)

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`, best first."""
        share = self.limit(scores.threshold)
        order_TN, keep_TN = nucleus(scores.select_TN, share, self.crossing, self.min_k)
        return chosen(order_TN, keep_TN, self.max_assignments(order_TN.shape[1]))


class Threshold(Selector):
    """Every expert whose score is above a bar; the best one where there is none.

    The controller `percentile_ema` moves the bar, one for all experts or one for each.
    """

    kind: Literal["threshold"] = "threshold"
    threshold: float | None = None
    """the bar; null: a controller sets it"""
    max_k: PositiveInt | None = None
    """never more than these; default: no cap"""

    @property
    def accepts(self) -> tuple[Needs, ...]:
        """The bar."""
        return ("bar",)

    @property
    def needs_controller(self) -> bool:
        """Whether no bar is given."""
        return self.threshold is None

    def max_assignments(self, num_experts: int) -> int:
        """K."""
        return min(self.max_k or num_experts, num_experts)

    def rule(self, scores: Activation, num_experts: int, ctx: RouteContext) -> RouteRule:
        """Always."""
        return RouteRule(scores, "threshold", self.max_assignments(num_experts))

    def limit(self, steered: Tensor | None) -> float | Tensor:
        """The bar."""
        bar = self.threshold if steered is None else steered
        if bar is None:
            raise ValueError("selector threshold: neither a threshold nor a controller")
        return bar

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`, best first."""
        most = self.max_assignments(scores.select_TN.shape[1])
        return above(scores.select_TN, self.limit(scores.threshold), most)


class PercentileRow(Selector):
    """Experts above a percentile of the token's own scores (DynaMoE as published, 2603.01697).

    A percentile of a row is a rank: with distinct scores exactly `ceil((1 - tau) (N - 1))` of N are
    above it, for every token. So this is top-k with K tied to N; the published rule does not make K
    depend on the token. `threshold` with `percentile_ema` does.
    """

    fixed_k: ClassVar[bool] = True
    size_option: ClassVar[str] = "percentile"

    kind: Literal["percentile_row"] = "percentile_row"
    percentile: float = Field(0.5, ge=0, lt=1)
    """tau, the share of a token's experts that are below its threshold"""

    def max_assignments(self, num_experts: int) -> int:
        """K, at least 1."""
        return max(1, math.ceil((1 - self.percentile) * (num_experts - 1) - 1e-9))

    def min_candidates(self, num_experts: int) -> int:
        """All K."""
        return self.max_assignments(num_experts)

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`, best first."""
        order_TN = ranked(scores.select_TN)
        return order_TN[:, : self.max_assignments(order_TN.shape[1])]


class EntropyHybrid(Selector):
    """All experts for a token whose router is undecided, top-p for the others (DynMoLE).

    An untrained router is undecided about every token. Two ways to keep that from costing N / K
    times the compute: a schedule of the threshold, and `dense_share`.
    """

    adds_up_scores: ClassVar[bool] = True
    size_option: ClassVar[str] = "min_k"

    kind: Literal["entropy_hybrid"] = "entropy_hybrid"
    measure: Measure = "tsallis"
    """normalised entropy of the probabilities"""
    index: float = Field(1.1, gt=0)
    """q of tsallis and renyi"""
    entropy_threshold: NonNegativeScheduled = 0.9
    """above it a token gets all experts; at 1 none does"""
    top_p: float = Field(0.75, gt=0)
    """threshold of the others, whose crossing expert is excluded"""
    min_k: PositiveInt = 2
    """so many they get at least"""
    dense_share: float = Field(1.0, ge=0, le=1)
    """of a document's undecided tokens this share gets all experts: at 0.5 every second one"""

    @property
    def splits_documents(self) -> bool:
        """Where some undecided tokens do not get all experts."""
        return self.dense_share < 1

    @property
    def looks_at_row(self) -> bool:
        """Undecided tokens are counted."""
        return self.dense_share < 1

    def max_assignments(self, num_experts: int) -> int:
        """K."""
        return num_experts

    def min_candidates(self, num_experts: int) -> int:
        """Those it always gives."""
        return self.min_k

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`, best first."""
        probs_TN = scores.probs_TN.detach()
        value_T = entropy(probs_TN, self.measure, self.index, normalized=True)
        undecided_T = (value_T > value_at(self.entropy_threshold, ctx.step.step)) & ctx.valid_T
        dense_T = undecided_T & self._is_due(undecided_T.view(ctx.shape), ctx).flatten()
        order_TN, keep_TN = nucleus(scores.select_TN, self.top_p, "exclude", self.min_k)
        keep_TN = keep_TN | dense_T.unsqueeze(1)
        keep_TN &= scores.select_TN.gather(1, order_TN).isfinite()
        return chosen(order_TN, keep_TN, order_TN.shape[1])

    def _is_due(self, undecided_BS: Tensor, ctx: RouteContext) -> Tensor:
        """True where the number of undecided tokens of the document, up to this one, times the
        share passes a whole number. Counting in order is causal, and by document it does not
        depend on what else is in the row."""
        counts_BS = undecided_BS.cumsum(dim=1)
        before_BS = counts_BS - undecided_BS.long()
        start_BS = before_BS.gather(1, ctx.tokens.document_start_BS)
        now, before = (
            ((counts - start_BS) * self.dense_share + 1e-6).floor()
            for counts in (counts_BS, before_BS)
        )
        return now > before


class All(Selector):
    """Every expert, in the order of ids: soft routing (BAM's attention experts)."""

    fixed_k: ClassVar[bool] = True

    kind: Literal["all"] = "all"

    def max_assignments(self, num_experts: int) -> int:
        """K = N."""
        return num_experts

    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, N]`."""
        num_tokens, num_experts = scores.select_TN.shape
        ids_N = torch.arange(num_experts, device=scores.select_TN.device)
        return ids_N.expand(num_tokens, -1).masked_fill(~scores.select_TN.isfinite(), -1)


def per_layer_value(value: int | tuple[int, ...]) -> int:
    """The number of a layer's configuration, in which lists have been resolved."""
    if isinstance(value, tuple):
        raise TypeError("a list per layer, where one layer's number is needed")
    return value
