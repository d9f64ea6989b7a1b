"""The layer of a Dragon Hatchling (arXiv 2509.26507), whose model is one layer used many times."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.kernels.linear_attention import linear_attention
from moebius.kernels.rope import apply_rope
from moebius.model.carry import Carry
from moebius.model.config import BDHConfig, ModelConfig
from moebius.model.context import DepthContext
from moebius.model.extent import Extent
from moebius.model.parameters import ParameterModule, ParameterSpec, Role
from moebius.model.region import WHOLE, Region


class BDHLayer(ParameterModule):
    """Many positive, mostly silent neurons that attend to each other and gate what they hear.

    With x the stream, LN a LayerNorm without parameters, and per head: `u = relu(x E_h)`, `a =
    LN(sum_{s<t} (rope(u_t) rope(u_s)) x_s)`, `y = relu(a E_v)`; then `x = LN(x + LN((u * y) D))`.
    A token does not attend to itself.
    """

    encoder: nn.Parameter
    encoder_v: nn.Parameter
    decoder: nn.Parameter

    def __init__(self, model: ModelConfig, config: BDHConfig) -> None:
        super().__init__()
        self.eps = model.norm_eps
        self.region: Region = WHOLE
        heads, neurons, hidden = config.num_heads, config.neurons, model.hidden_size
        spec = ParameterSpec(Role.MATRIX, std=model.init_std)
        self.declare("encoder", (heads, hidden, neurons), spec)
        self.declare("encoder_v", (heads, hidden, neurons), spec)
        self.declare("decoder", (heads * neurons, hidden), spec)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """The residual stream after this visit; `carry` passes through."""
        x_BSD = ctx.step.run(lambda x_BSD: self._compute(x_BSD, ctx), x_BSD)
        return x_BSD, carry

    def _compute(self, x_BSD: Tensor, ctx: DepthContext) -> Tensor:
        seen_BQD = self.region.enter(x_BSD)
        u_BQHN = F.relu(torch.einsum("bsd,hdn->bshn", seen_BQD, self.encoder))
        key_BQHN = apply_rope(u_BQHN, *ctx.tokens.rope_BQC)
        a_BQHD = self._normed(self._attend(key_BQHN, seen_BQD, ctx))
        y_BQHN = F.relu(torch.einsum("bshd,hdn->bshn", a_BQHD, self.encoder_v))
        update_BSD = self.region.leave((u_BQHN * y_BQHN).flatten(2) @ self.decoder)
        return self._normed(x_BSD + self._normed(update_BSD).to(x_BSD.dtype))

    def _attend(self, key_BSHN: Tensor, x_BSD: Tensor, ctx: DepthContext) -> Tensor:
        """What each token hears of the earlier ones, `[B, S, H, D]`."""
        cache = ctx.step.cache
        if cache is None:
            spread, length = ctx.tokens.spread, ctx.tokens.num_slots
            before_SS = torch.ones(length, length, dtype=torch.bool, device=x_BSD.device).tril(-1)
            before_BQS = spread.part(before_SS.expand(len(x_BSD), -1, -1))
            mask_BQS = ctx.tokens.attention_mask_BQS & ctx.tokens.joined(before_BQS, empty=False)
            return linear_attention(key_BSHN, spread.join(key_BSHN), spread.join(x_BSD), mask_BQS)

        def hear(part: DepthContext, key: Tensor, x: Tensor) -> Tensor:
            k, v, mask = cache.extend(part, key, x.unsqueeze(2), "per_depth", strict=True)
            return linear_attention(key, k, v.squeeze(2), mask)

        heard: Tensor = ctx.by_visit(hear, key_BSHN, x_BSD)
        return heard

    def _normed(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def flops(self, extent: Extent) -> int:
        """Forward FLOPs: three maps and the products of linear attention."""
        maps = self.encoder.numel() + self.encoder_v.numel() + self.decoder.numel()
        heads, hidden, neurons = self.encoder.shape
        return 2 * extent.tokens * maps + 2 * extent.pairs * heads * (neurons + hidden)
