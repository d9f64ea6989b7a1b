"""The expert pool. Global ids: FFN experts first (they alone are ever dispatched), then constant,
copy and zero experts."""

import torch
from torch import Tensor, nn

from moebius.kernels.grouped_swiglu import grouped_swiglu
from moebius.kernels.zero_experts import affine_experts
from moebius.model.config import ModelConfig, MoEConfig
from moebius.model.moe.routing import Routing
from moebius.model.parameters import ParameterModule, ParameterSpec, Role


class FFNExperts(ParameterModule):
    """E SwiGLU experts; dimension 0 of both weights is the global expert id."""

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        (spec,) = (spec for spec in moe.experts if spec.kind == "ffn")
        if spec.intermediate_size is None:
            raise ValueError("an ffn expert needs intermediate_size")
        hidden, width = config.hidden_size, spec.intermediate_size
        expert = ParameterSpec(Role.EXPERT, std=config.init_std)
        self.declare("gate_up", (spec.count, 2 * width, hidden), expert)
        self.declare("down", (spec.count, hidden, width), expert)

    def forward(self, rows_RD: Tensor, weights_R: Tensor, ends_E: Tensor) -> Tensor:
        """Weighted outputs of rows sorted by expert, see `grouped_swiglu`."""
        return grouped_swiglu(rows_RD, weights_R, self.gate_up, self.down, ends_E)

    def flops(self, num_rows: int) -> int:
        """Forward FLOPs of the three products per routed row."""
        _, hidden, width = self.down.shape
        return 6 * num_rows * hidden * width


class ZeroComputationExperts(ParameterModule):
    """Constant, copy and zero experts of MoE++, replicated on every rank and never dispatched."""

    mix: nn.Parameter
    constants: nn.Parameter

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.first_constant = moe.count("ffn")
        self.first_copy = self.first_constant + moe.count("constant")
        self.first_zero = self.first_copy + moe.count("copy")
        num_constant, hidden = moe.count("constant"), config.hidden_size
        self.declare(
            "mix", (num_constant, 2, hidden), ParameterSpec(Role.ROUTER, std=config.init_std)
        )
        self.declare(
            "constants", (num_constant, hidden), ParameterSpec(Role.BIAS, std=config.init_std)
        )

    def forward(self, x_TD: Tensor, mix_logits_TM: Tensor, routing: Routing) -> Tensor:
        """The pool's part of the layer's output, `[T, D]`; `mix_logits` is `x @ mix.T`, M = 2C."""
        weights = torch.zeros_like(routing.probs_TN)
        assigned = routing.ids_TK >= 0
        weights = weights.scatter_add(1, routing.ids_TK.clamp(min=0), routing.weights_TK * assigned)
        return affine_experts(
            x_TD,
            weights[:, self.first_copy : self.first_zero].sum(dim=-1),
            weights[:, self.first_constant : self.first_copy],
            mix_logits_TM.unflatten(-1, (-1, 2)),
            self.constants,
        )

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of the constants' product; the mixing logits are the router's columns."""
        return 2 * num_tokens * self.constants.numel()
