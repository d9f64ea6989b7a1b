"""From logits to scores."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moebius.model.moe.routing import RouteContext
from moebius.model.moe.stage import Stage
from moebius.model.schedule import NonNegativeScheduled, value_at


class ScoreNorm(Stage):
    """How logits become the scores that experts are chosen and weighted by."""

    adds_up: ClassVar[bool] = False
    """whether the scores of a token add up to 1"""

    temperature: float = Field(1.0, gt=0)
    """logits are divided by it"""
    row_std: float | None = Field(None, gt=0)
    """scale each token's logits to this standard deviation (MoE++ release: 1.0)"""
    noise: NonNegativeScheduled = 0.0
    """standard deviation of Gaussian noise added to the logits in training"""

    def scaled(self, logits_TN: Tensor, ctx: RouteContext) -> Tensor:
        """The logits that scores are made of, by `activate`.

        The standard deviation is the unbiased one and the mean is not subtracted: both are what the
        MoE++ release does.
        """
        if self.row_std is not None and logits_TN.shape[1] > 1:
            # The root of a variance of 0 has no gradient: equal logits count as almost equal.
            std_T1 = logits_TN.var(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()
            logits_TN = logits_TN * (self.row_std / std_T1)
        if self.temperature != 1:
            logits_TN = logits_TN / self.temperature
        noise = value_at(self.noise, ctx.step.step) if ctx.step.training else 0.0
        if noise:
            logits_TN = logits_TN + noise * ctx.normal("noise", logits_TN.shape[1])
        return logits_TN

    def affinity(self, logits_TN: Tensor, ctx: RouteContext) -> Tensor:
        """Scores `[T, N]`, not negative."""
        return self.activate(self.scaled(logits_TN, ctx))

    @abstractmethod
    def activate(self, logits_TN: Tensor) -> Tensor:
        """Scores of scaled logits, not negative."""

    def probabilities(self, affinity_TN: Tensor) -> Tensor:
        """Scores that add up to 1, for losses."""
        if self.adds_up:
            return affinity_TN
        tiny = torch.finfo(affinity_TN.dtype).tiny
        return affinity_TN / affinity_TN.sum(dim=-1, keepdim=True).clamp(min=tiny)


class Softmax(ScoreNorm):
    """Experts compete for a token."""

    adds_up: ClassVar[bool] = True

    kind: Literal["softmax"] = "softmax"

    def activate(self, logits_TN: Tensor) -> Tensor:
        """Over all experts."""
        return logits_TN.softmax(dim=-1)


class Sigmoid(ScoreNorm):
    """Each expert by itself (DeepSeek-V3)."""

    kind: Literal["sigmoid"] = "sigmoid"

    def activate(self, logits_TN: Tensor) -> Tensor:
        """Element by element."""
        return logits_TN.sigmoid()
