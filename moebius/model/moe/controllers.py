"""State that steers selection: changed once per optimizer step from the counts of the whole batch.

A controller is configured by a node and built into a module whose buffers are fp32 and persistent,
one row for each use of its router (passes of a recursion, turns of a chain): the tokens that meet
a router at different depths are different ones. Everything a run must remember is in the buffers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moebius.model.moe.pool import ZERO_COMPUTATION, PoolShape
from moebius.model.moe.stage import Needs, Selector, Stage
from moebius.model.schedule import NonNegativeScheduled, value_at

BIAS_LIMIT = 1.0
"""most that the sum of errors may make of the bias of `budget`: scores are between 0 and 1"""
INTEGRAL_LIMIT = 0.02
"""most by which the sum of errors may move the threshold of `target_k` in a step"""
HISTOGRAM_BINS = 2048
LOWEST_LOG2 = -32.0
"""scores below 2 to this power share the first bin"""


@dataclass(frozen=True)
class Steering:
    """What controllers add to a selection; None: nothing."""

    bias_N: Tensor | None = None
    threshold: Tensor | None = None


class Controller(nn.Module, ABC):
    """The interface."""

    needs_histogram = False
    """whether `update` reads `score_histogram`, `[N, bins]`"""

    @abstractmethod
    def steer(self, use: int) -> Steering:
        """What selection gets at a use of the router."""

    @abstractmethod
    def update(self, use: int, sums: Mapping[str, Tensor], step: int) -> None:
        """Change the state from the sums over the step's tokens; `step` counts finished steps."""


class ControllerConfig(Stage):
    """What the configurations of all controllers have in common."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the selector must understand."""

    def problems_with(self, selector: Selector, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """(option, what is wrong) where the options do not fit the selector."""
        return iter(())

    @abstractmethod
    def build(self, pool: PoolShape, selector: Selector, num_uses: int) -> Controller:
        """The state, for so many uses of the router."""


class BiasControl(ControllerConfig):
    """Load balance without a loss: a bias per expert in selection, moved against its overload.

    arXiv 2408.15664 and DeepSeek-V3: `b_i += rate * sign(mean count - count_i)`.
    """

    kind: Literal["bias"] = "bias"
    rate: NonNegativeScheduled = 1e-3
    """step of the bias; DeepSeek-V3 ends with 0"""
    centered: bool = False
    """subtract the mean of each change, so that the biases keep adding up to 0"""
    experts: Literal["all", "computing"] = "all"
    """which experts are to have the same load"""

    @property
    def needs(self) -> Needs:
        """What the selector must understand."""
        return "bias"

    def build(self, pool: PoolShape, selector: Selector, num_uses: int) -> Controller:
        """Its state."""
        return _Bias(self, pool, num_uses)


class _Bias(Controller):
    bias_UN: Tensor

    def __init__(self, config: BiasControl, pool: PoolShape, num_uses: int) -> None:
        super().__init__()
        self.config = config
        self.num_balanced = pool.num_experts if config.experts == "all" else pool.num_computing
        self.register_buffer("bias_UN", torch.zeros(num_uses, pool.num_experts))

    def steer(self, use: int) -> Steering:
        return Steering(bias_N=self.bias_UN[use])

    def update(self, use: int, sums: Mapping[str, Tensor], step: int) -> None:
        counts = sums["expert_tokens"][: self.num_balanced]
        change = value_at(self.config.rate, step) * (counts.mean() - counts).sign()
        if self.config.centered:
            change = change - change.mean()
        self.bias_UN[use, : self.num_balanced] += change


class BudgetControl(ControllerConfig):
    """A share of all assignments for the experts of one kind: one bias for all of them, moved by a
    PI controller. Bounds the compute of a pool with cheap experts (Duo-LLM, null experts)."""

    kind: Literal["budget"] = "budget"
    group: int = Field(0, ge=0)
    """number of the expert group in the order of ids, from 0"""
    share: float = Field(gt=0, lt=1)
    """their share of all assignments"""
    proportional: float = Field(0.1, ge=0)
    """gain on the present error"""
    integral: float = Field(0.05, ge=0)
    """gain on the sum of errors"""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """The group must be there."""
        if self.group >= len(pool.groups):
            yield "group", f"{self.group}; allowed: 0 to {len(pool.groups) - 1}"

    def computing_share(self, pool: PoolShape) -> float | None:
        """Known where the group has all experts that compute, or all others."""
        kind, count = pool.groups[self.group]
        if kind in ZERO_COMPUTATION:
            return 1 - self.share if count == pool.count(*ZERO_COMPUTATION) else None
        return self.share if count == pool.num_computing else None

    @property
    def needs(self) -> Needs:
        """What the selector must understand."""
        return "bias"

    def build(self, pool: PoolShape, selector: Selector, num_uses: int) -> Controller:
        """Its state."""
        return _Budget(self, pool, num_uses)


class _Budget(Controller):
    bias_U: Tensor
    error_sum_U: Tensor
    member_N: Tensor

    def __init__(self, config: BudgetControl, pool: PoolShape, num_uses: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("bias_U", torch.zeros(num_uses))
        self.register_buffer("error_sum_U", torch.zeros(num_uses))
        first = sum(count for _, count in pool.groups[: config.group])
        member_N = torch.zeros(pool.num_experts)
        member_N[first : first + pool.groups[config.group][1]] = 1
        self.register_buffer("member_N", member_N, persistent=False)

    def steer(self, use: int) -> Steering:
        return Steering(bias_N=self.bias_U[use] * self.member_N)

    def update(self, use: int, sums: Mapping[str, Tensor], step: int) -> None:
        counts = sums["expert_tokens"]
        error = self.config.share - (counts * self.member_N).sum() / counts.sum().clamp(min=1)
        limit = BIAS_LIMIT / max(self.config.integral, 1e-12)
        self.error_sum_U[use] = (self.error_sum_U[use] + error).clamp(-limit, limit)
        self.bias_U[use] = (
            self.config.proportional * error + self.config.integral * self.error_sum_U[use]
        )


class TargetKControl(ControllerConfig):
    """A mean number of experts per token: a PI controller on the threshold of `top_p` (DTop-p,
    arXiv 2512.13996): `theta -= proportional * e + integral * sum(e)`, e the mean K less its
    target, as the paper's summary has it."""

    kind: Literal["target_k"] = "target_k"
    target: float = Field(gt=0)
    """mean experts per token"""
    start: float = Field(0.4, gt=0, lt=1)
    """threshold of the first step"""
    proportional: float = Field(0.02, ge=0)
    """gain on the present error"""
    integral: float = Field(0.0005, ge=0)
    """gain on the sum of errors"""

    def problems_with(self, selector: Selector, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """The target and the start must be within reach."""
        most = selector.max_assignments(pool.num_experts)
        if not selector.min_candidates(pool.num_experts) <= self.target <= most:
            yield (
                "target",
                f"{self.target}, but the selector gives "
                f"{selector.min_candidates(pool.num_experts)} to {most} experts",
            )
        if self.start > selector.highest_threshold:
            yield "start", f"{self.start}, but the highest is {selector.highest_threshold}"

    @property
    def needs(self) -> Needs:
        """What the selector must understand."""
        return "share"

    def build(self, pool: PoolShape, selector: Selector, num_uses: int) -> Controller:
        """Its state."""
        return _TargetK(self, selector.highest_threshold, num_uses)


class _TargetK(Controller):
    threshold_U: Tensor
    error_sum_U: Tensor

    def __init__(self, config: TargetKControl, highest: float, num_uses: int) -> None:
        super().__init__()
        self.config = config
        self.highest = highest
        self.register_buffer("threshold_U", torch.full((num_uses,), config.start))
        self.register_buffer("error_sum_U", torch.zeros(num_uses))

    def steer(self, use: int) -> Steering:
        return Steering(threshold=self.threshold_U[use : use + 1])

    def update(self, use: int, sums: Mapping[str, Tensor], step: int) -> None:
        mean_k = sums["expert_tokens"].sum() / sums["tokens"].clamp(min=1)
        error = mean_k - self.config.target
        # An unreachable target must not pile up a sum that takes as long to come down again.
        limit = INTEGRAL_LIMIT / max(self.config.integral, 1e-12)
        self.error_sum_U[use] = (self.error_sum_U[use] + error).clamp(-limit, limit)
        change = self.config.proportional * error + self.config.integral * self.error_sum_U[use]
        self.threshold_U[use] = (self.threshold_U[use] - change).clamp(0.0, self.highest)


class PercentileControl(ControllerConfig):
    """A bar at a percentile of all scores, averaged over steps: our reading of DynaMoE, in which
    the number of experts varies with the token, about `(1 - percentile) N` on average.

    With `per_expert` each expert has a bar at the percentile of its own scores (Expert Threshold
    routing, arXiv 2603.11535), or, `applied_as: bias`, the negative of it as a bias: a dual
    variable that gives experts the same number of tokens under top-k.
    """

    kind: Literal["percentile_ema"] = "percentile_ema"
    percentile: float = Field(0.5, gt=0, lt=1)
    """tau, the share of scores that are below the bar"""
    momentum: float = Field(0.99, ge=0, lt=1)
    """weight of the old bar; the first step sets it alone"""
    per_expert: bool = False
    """one bar for each expert"""
    applied_as: Literal["threshold", "bias"] = "threshold"
    """threshold: for the selector `threshold`; bias: for `top_k`, with `per_expert`"""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """One bias for all experts changes nothing."""
        if self.applied_as == "bias" and not self.per_expert:
            yield "applied_as", "bias needs per_expert: true"

    @property
    def needs(self) -> Needs:
        """What the selector must understand."""
        return "bias" if self.applied_as == "bias" else "bar"

    def build(self, pool: PoolShape, selector: Selector, num_uses: int) -> Controller:
        """Its state."""
        return _Percentile(self, pool, num_uses)


class _Percentile(Controller):
    needs_histogram = True
    bar_UM: Tensor
    updates_U: Tensor

    def __init__(self, config: PercentileControl, pool: PoolShape, num_uses: int) -> None:
        super().__init__()
        self.config = config
        bars = pool.num_experts if config.per_expert else 1
        # Before the first update nothing is above the bar but each token's best expert.
        self.register_buffer("bar_UM", torch.ones(num_uses, bars))
        self.register_buffer("updates_U", torch.zeros(num_uses))

    def steer(self, use: int) -> Steering:
        if self.config.applied_as == "bias":
            return Steering(bias_N=-self.bar_UM[use])
        return Steering(threshold=self.bar_UM[use])

    def update(self, use: int, sums: Mapping[str, Tensor], step: int) -> None:
        histogram_MB = sums["score_histogram"]
        if not self.config.per_expert:
            histogram_MB = histogram_MB.sum(dim=0, keepdim=True)
        momentum = torch.where(self.updates_U[use] > 0, self.config.momentum, 0.0)
        new_M = histogram_percentile(histogram_MB, self.config.percentile)
        self.bar_UM[use] = momentum * self.bar_UM[use] + (1 - momentum) * new_M
        self.updates_U[use] += 1


def score_histogram(scores_TN: Tensor, valid_T: Tensor) -> Tensor:
    """How many tokens have a score in each bin, by expert, fp32 `[N, bins]`.

    Bins are equal on the scale of log2 from -32 to 0: 1.1 % wide, whatever the number of experts.
    """
    position = (scores_TN.clamp(min=2.0**LOWEST_LOG2, max=1.0).log2() / -LOWEST_LOG2 + 1) * (
        HISTOGRAM_BINS
    )
    bin_TN = position.long().clamp(0, HISTOGRAM_BINS - 1)
    histogram = scores_TN.new_zeros(scores_TN.shape[1], HISTOGRAM_BINS)
    weight_NT = valid_T.to(histogram.dtype).expand(scores_TN.shape[1], -1)
    return histogram.scatter_add_(1, bin_TN.T, weight_NT)


def histogram_percentile(histogram_MB: Tensor, percentile: float) -> Tensor:
    """The score below which a share `percentile` of each histogram lies, `[M]`."""
    sums_MB = histogram_MB.cumsum(dim=1)
    wanted_M1 = percentile * sums_MB[:, -1:]
    bin_M1 = (sums_MB < wanted_M1).sum(dim=1, keepdim=True).clamp(max=HISTOGRAM_BINS - 1)
    inside_M1 = histogram_MB.gather(1, bin_M1)
    before_M1 = sums_MB.gather(1, bin_M1) - inside_M1
    position_M1 = bin_M1 + (wanted_M1 - before_M1) / inside_M1.clamp(min=1)
    return 2.0 ** (LOWEST_LOG2 * (1 - position_M1[:, 0] / HISTOGRAM_BINS))
