"""One layer: pre-norm attention and a pre-norm feed-forward, each dense or routed."""

from torch import Tensor

from moebius.model.attention import Attention
from moebius.model.carry import Carry
from moebius.model.config import DenseConfig, MixtureAttentionConfig, ModelConfig
from moebius.model.context import DepthContext
from moebius.model.ffn import SwiGLU
from moebius.model.mixture_attention import MixtureAttention
from moebius.model.moe.chain import chain_of_experts
from moebius.model.moe.config import MoEConfig
from moebius.model.moe.layer import MoE
from moebius.model.parameters import ParameterModule
from moebius.model.program import LayerPlace
from moebius.model.visit import VisitNorm


class Block(ParameterModule):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`; or both beside each other, from one norm.

    A block may serve many visits and may be given any subset of a row's tokens: what depends on
    that arrives in `carry` and `ctx`.
    """

    def __init__(self, config: ModelConfig, place: LayerPlace, pool_name: str) -> None:
        super().__init__()
        self.is_parallel = config.block == "parallel"
        self.attention_norm = VisitNorm(config, place)
        self.attention: Attention | MixtureAttention
        attention = config.attention_in(place.index)
        if isinstance(attention, MixtureAttentionConfig):
            self.attention = MixtureAttention(config, attention, place)
        else:
            self.attention = Attention(config, attention, place)
        if not self.is_parallel:
            self.ffn_norm = VisitNorm(config, place)
        ffn = config.ffn_in(place.index, place.num_layers)
        self.ffn: SwiGLU | MoE
        if isinstance(ffn, MoEConfig):
            self.ffn = MoE(config, ffn, place, pool_name)
        else:
            assert isinstance(ffn, DenseConfig)
            self.ffn = SwiGLU(config, ffn.intermediate_size, place)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """The residual stream and the carry after this visit."""
        normed_BSD = self.attention_norm.at(x_BSD, ctx)
        attended_BSD, carry = self.attention(normed_BSD, carry, ctx)
        if self.is_parallel:
            update_BSD, carry = self.ffn(normed_BSD, carry, ctx)
            return x_BSD + attended_BSD + update_BSD, carry
        x_BSD = x_BSD + attended_BSD
        if isinstance(self.ffn, MoE) and self.ffn.config.chain is not None:
            moe = self.ffn
            return chain_of_experts(
                x_BSD,
                carry,
                lambda x: self.ffn_norm.at(x, ctx),
                lambda x, carry, number: moe(x, carry, ctx, number),
                self.ffn.config.chain,
            )
        update_BSD, carry = self.ffn(self.ffn_norm.at(x_BSD, ctx), carry, ctx)
        return x_BSD + update_BSD, carry
