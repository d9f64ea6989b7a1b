"""From a token to its experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.model.config import ModelConfig, MoEConfig
from moebius.model.moe.routing import Routing, assignment_weights, select_experts
from moebius.model.parameters import ParameterModule, ParameterSpec, Role


class Router(ParameterModule):
    """Linear scorer, optionally with the gating residual of MoE++; always computed in fp32.

    `predecessor_experts` is the size of the previous MoE layer's pool, None where no visit of this
    layer has one: then there is no `W_g` that would never receive a gradient.
    """

    weight: nn.Parameter
    residual: nn.Parameter | None
    is_null_N: Tensor

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, predecessor_experts: int | None
    ) -> None:
        super().__init__()
        self.config = moe.router
        scorer = moe.router.scorer
        std = config.init_std if scorer.init_std is None else scorer.init_std
        self.declare(
            "weight", (moe.num_experts, config.hidden_size), ParameterSpec(Role.ROUTER, std=std)
        )
        self.residual = None
        if scorer.gating_residual and predecessor_experts is not None:
            # Zeros: at the first step the layer routes like one without the residual.
            self.declare(
                "residual", (moe.num_experts, predecessor_experts), ParameterSpec(Role.ROUTER)
            )
        is_null = torch.zeros(moe.num_experts, dtype=torch.bool)
        is_null[moe.num_experts - moe.count("zero") :] = True
        self.register_buffer("is_null_N", is_null, persistent=False)

    def forward(
        self, x_TD: Tensor, previous_scores_TN: Tensor | None, extra_weight_MD: Tensor
    ) -> tuple[Routing, Tensor]:
        """Route each token; also return `x @ extra_weight.T` in fp32, from the same product."""
        num_experts = self.weight.shape[0]
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            columns = torch.cat([self.weight, extra_weight_MD]).to(dtype)
            projected = F.linear(x_TD.to(dtype), columns)
            scores_TN, extra_TM = projected.split([num_experts, len(extra_weight_MD)], dim=-1)
            if self.residual is not None and previous_scores_TN is not None:
                scores_TN = scores_TN + F.linear(previous_scores_TN, self.residual.to(dtype))
            probs_TN = scores_TN.softmax(dim=-1)
            ids_TK = select_experts(probs_TN, self.config.selector)
            weights_TK = assignment_weights(probs_TN, ids_TK, self.is_null_N, self.config.weights)
        return Routing(ids_TK, weights_TK, probs_TN, scores_TN), extra_TM

    def flops(self, num_tokens: int, extra_columns: int, has_predecessor: bool) -> int:
        """Forward FLOPs of the score product and, after another MoE layer, the residual's."""
        num_experts, hidden = self.weight.shape
        residual = self.residual.numel() if has_predecessor and self.residual is not None else 0
        return 2 * num_tokens * ((num_experts + extra_columns) * hidden + residual)
