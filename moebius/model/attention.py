"""Grouped-query attention with rotary positions, causal inside documents."""

import math

from torch import Tensor

from moebius.kernels.attention import masked_attention
from moebius.kernels.rope import apply_rope
from moebius.model.config import ModelConfig
from moebius.model.context import TokenContext
from moebius.model.parameters import Linear, ParameterModule, Role


class Attention(ParameterModule):
    """Queries, keys, values and the output projection (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        attention, hidden, std = config.attention, config.hidden_size, config.init_std
        self.head_dim = attention.head_dim
        query_size = attention.num_heads * attention.head_dim
        kv_size = attention.num_kv_heads * attention.head_dim
        self.q = Linear(hidden, query_size, Role.MATRIX, std)
        self.k = Linear(hidden, kv_size, Role.MATRIX, std)
        self.v = Linear(hidden, kv_size, Role.MATRIX, std)
        self.out = Linear(query_size, hidden, Role.MATRIX, std)

    def forward(self, x_BSD: Tensor, tokens: TokenContext) -> Tensor:
        """Mix each token with the earlier present tokens of its document, `[B, S, D]`."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSHC = apply_rope(self.q(x_BSD).view(heads), tokens.cos_BSC, tokens.sin_BSC)
        k_BSGC = apply_rope(self.k(x_BSD).view(heads), tokens.cos_BSC, tokens.sin_BSC)
        v_BSGC = self.v(x_BSD).view(heads)
        mixed_BSHC = masked_attention(q_BSHC, k_BSGC, v_BSGC, tokens.attention_mask_BSS)
        out: Tensor = self.out(mixed_BSHC.flatten(2))
        return out

    def flops(self, num_rows: int, length: int) -> int:
        """Forward FLOPs for rows of `length` present tokens: projections and products over S^2."""
        projections = sum(
            linear.flops(num_rows * length) for linear in (self.q, self.k, self.v, self.out)
        )
        query_size = math.prod(self.q.weight.shape) // self.q.weight.shape[1]
        return projections + 4 * num_rows * length**2 * query_size
