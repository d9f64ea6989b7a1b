"""The dense feed-forward sublayer."""

import torch.nn.functional as F
from torch import Tensor

from moebius.model.config import DenseConfig, ModelConfig
from moebius.model.context import Carry, DepthContext
from moebius.model.parameters import Linear, ParameterModule, Role


class SwiGLU(ParameterModule):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, ffn: DenseConfig) -> None:
        super().__init__()
        hidden, width, std = config.hidden_size, ffn.intermediate_size, config.init_std
        self.gate = Linear(hidden, width, Role.MATRIX, std)
        self.up = Linear(hidden, width, Role.MATRIX, std)
        self.down = Linear(width, hidden, Role.MATRIX, std)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """The same for every token; `carry` passes through."""
        return self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD)), carry

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of the three projections."""
        return sum(linear.flops(num_tokens) for linear in (self.gate, self.up, self.down))
