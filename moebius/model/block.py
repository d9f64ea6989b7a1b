"""One layer: pre-norm attention, then a pre-norm feed-forward of any kind."""

from torch import Tensor

from moebius.model.attention import Attention
from moebius.model.config import DenseConfig, ModelConfig
from moebius.model.context import Carry, DepthContext
from moebius.model.ffn import SwiGLU
from moebius.model.moe.layer import MoE
from moebius.model.parameters import ParameterModule, RMSNorm


class Block(ParameterModule):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`.

    A block may serve many visits and may be given any subset of a row's tokens: what depends on
    that arrives in `carry` and `ctx`. `predecessor_experts` is explained in `Router`.
    """

    def __init__(self, config: ModelConfig, predecessor_experts: int | None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn: SwiGLU | MoE
        if isinstance(config.ffn, DenseConfig):
            self.ffn = SwiGLU(config, config.ffn)
        else:
            self.ffn = MoE(config, config.ffn, predecessor_experts)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """The residual stream and the carry after this visit."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), ctx.tokens)
        update_BSD, carry = self.ffn(self.ffn_norm(x_BSD), carry, ctx)
        return x_BSD + update_BSD, carry
