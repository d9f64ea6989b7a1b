"""Grouped-query attention, causal inside documents."""

from torch import Tensor

from moebius.kernels.attention import masked_attention, stick_breaking_attention
from moebius.kernels.rope import apply_rope
from moebius.model.config import AttentionConfig, AttentionShape
from moebius.model.context import Carry, DepthContext, TokenContext
from moebius.model.parameters import Linear, ParameterModule, Role


class Attention(ParameterModule):
    """Queries, keys, values and the output projection (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, hidden_size: int, config: AttentionConfig, std: float) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q = Linear(hidden_size, query_size, Role.MATRIX, std)
        self.k = Linear(hidden_size, kv_size, Role.MATRIX, std)
        self.v = Linear(hidden_size, kv_size, Role.MATRIX, std)
        self.out = Linear(query_size, hidden_size, Role.MATRIX, std)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """Mix each token with the earlier present tokens of its document, `[B, S, D]`."""

        def compute(x_BSD: Tensor) -> Tensor:
            heads = (*x_BSD.shape[:2], -1, self.config.head_dim)
            q_BSHC, k_BSGC, v_BSGC = (
                projection(x_BSD).view(heads) for projection in (self.q, self.k, self.v)
            )
            mixed_BSHC = attend(q_BSHC, k_BSGC, v_BSGC, ctx.tokens, self.config)
            out: Tensor = self.out(mixed_BSHC.flatten(2))
            return out

        return ctx.step.run(compute, x_BSD), carry

    def flops(self, num_rows: int, length: int) -> int:
        """Forward FLOPs for rows of `length` present tokens: projections and products over S^2."""
        projections = sum(
            linear.flops(num_rows * length) for linear in (self.q, self.k, self.v, self.out)
        )
        return projections + core_flops(num_rows, length, self.config.num_heads, self.config)


def attend(
    q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, tokens: TokenContext, config: AttentionShape
) -> Tensor:
    """The core: positions, then the weighted sum over the mask of `tokens`, `[B, S, H, C]`."""
    if config.positions == "rope":
        q_BSHC = apply_rope(q_BSHC, tokens.cos_BSC, tokens.sin_BSC)
        k_BSGC = apply_rope(k_BSGC, tokens.cos_BSC, tokens.sin_BSC)
    core = masked_attention if config.core == "softmax" else stick_breaking_attention
    return core(q_BSHC, k_BSGC, v_BSGC, tokens.attention_mask_BSS)


def core_flops(num_rows: int, length: int, num_heads: int, config: AttentionShape) -> int:
    """Forward FLOPs of the two products over the full square of present tokens."""
    return 4 * num_rows * length**2 * num_heads * config.head_dim
