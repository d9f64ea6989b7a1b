"""How the chosen experts' outputs are weighted."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moebius.model.moe.pool import PoolShape
from moebius.model.moe.stage import Stage


class WeightPolicy(Stage):
    """From the scores of the chosen experts to factors on their outputs."""

    kind: Literal["raw", "renormalize", "drop_null_renormalize", "ones"] = "raw"
    """raw: the score (MoE++ paper); renormalize: divided by the sum over the chosen (Mixtral);
    drop_null_renormalize: likewise, zero experts counting as 0 (MoE++ release); ones: 1, with the
    score's gradient if `straight_through`"""
    scale: float = Field(1.0, gt=0)
    """factor on all (DeepSeek-V3: 2.5; sliced experts: slices over top_k)"""
    straight_through: bool = False
    """for `ones`: let the router learn as if the weight were the score"""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """Weights that are scores have their gradient anyway."""
        if self.straight_through and self.kind != "ones":
            yield "straight_through", f"is for weights of kind ones, not {self.kind}"

    def weights(self, affinity_TN: Tensor, ids_TK: Tensor, is_null_N: Tensor) -> Tensor:
        """Factors `[T, K]`, 0 for an empty assignment; `is_null` marks the zero experts.

        raw is eq. 1 of MoE++ (arXiv 2410.07348); drop_null_renormalize is what its release
        computes: a chosen zero expert gets 0 and the others share 1, so {ffn, zero} weighs the
        ffn 1.
        """
        empty_TK = ids_TK < 0
        score_TK = affinity_TN.gather(1, ids_TK.clamp(min=0)).masked_fill(empty_TK, 0.0)
        if self.kind == "ones":
            ones_TK = (~empty_TK).to(score_TK.dtype)
            if self.straight_through:
                ones_TK = ones_TK + score_TK - score_TK.detach()
            return self.scale * ones_TK
        if self.kind == "raw":
            return self.scale * score_TK
        if self.kind == "drop_null_renormalize":
            score_TK = score_TK.masked_fill(is_null_N[ids_TK.clamp(min=0)], 0.0)
        total_T1 = score_TK.sum(dim=-1, keepdim=True)
        return self.scale * score_TK / total_T1.clamp(min=torch.finfo(total_T1.dtype).tiny)
