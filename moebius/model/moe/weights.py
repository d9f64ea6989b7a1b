"""How the chosen experts' outputs are weighted."""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moebius.model.moe.stage import Stage


class WeightPolicy(Stage):
    """From the scores of the chosen experts to factors on their outputs."""

    scale: float = Field(1.0, gt=0)
    """factor on all (DeepSeek-V3: 2.5; sliced experts: slices over top_k)"""

    def weights(self, affinity_TN: Tensor, ids_TK: Tensor, is_null_N: Tensor) -> Tensor:
        """Factors `[T, K]`, 0 for an empty assignment; `is_null` marks the zero experts."""
        score_TK = affinity_TN.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0.0)
        return self.scale * self.unscaled(score_TK, ids_TK, is_null_N)

    @abstractmethod
    def unscaled(self, score_TK: Tensor, ids_TK: Tensor, is_null_N: Tensor) -> Tensor:
        """The factors before `scale`; `score` is 0 for an empty assignment."""


class Raw(WeightPolicy):
    """The score itself (eq. 1 of MoE++, arXiv 2410.07348)."""

    kind: Literal["raw"] = "raw"

    def unscaled(self, score_TK: Tensor, ids_TK: Tensor, is_null_N: Tensor) -> Tensor:
        """Scores."""
        return score_TK


class Renormalize(WeightPolicy):
    """The score divided by the sum over the chosen (Mixtral)."""

    kind: Literal["renormalize"] = "renormalize"

    def unscaled(self, score_TK: Tensor, ids_TK: Tensor, is_null_N: Tensor) -> Tensor:
        """Shares."""
        return _shares(score_TK)


class DropNullRenormalize(WeightPolicy):
    """What the release of MoE++ computes: a chosen zero expert gets 0 and the others share 1, so
    {ffn, zero} weighs the ffn 1."""

    kind: Literal["drop_null_renormalize"] = "drop_null_renormalize"

    def unscaled(self, score_TK: Tensor, ids_TK: Tensor, is_null_N: Tensor) -> Tensor:
        """Shares of what is not null."""
        return _shares(score_TK.masked_fill(is_null_N[ids_TK.clamp(min=0)], 0.0))


class Ones(WeightPolicy):
    """1 for every chosen expert."""

    kind: Literal["ones"] = "ones"
    straight_through: bool = False
    """let the router learn as if the weight were the score"""

    def unscaled(self, score_TK: Tensor, ids_TK: Tensor, is_null_N: Tensor) -> Tensor:
        """Ones, with the gradient of the scores if wanted."""
        ones_TK = (ids_TK >= 0).to(score_TK.dtype)
        return ones_TK + score_TK - score_TK.detach() if self.straight_through else ones_TK


def _shares(score_TK: Tensor) -> Tensor:
    total_T1 = score_TK.sum(dim=-1, keepdim=True)
    return score_TK / total_T1.clamp(min=torch.finfo(total_T1.dtype).tiny)
