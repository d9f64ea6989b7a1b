"""Linear maps and norms of a layer that is visited several times and may differ by visit.

What differs is a parameter with one entry per depth (adapters) or a number that follows from the
visit (LayerNorm Scaling). `plain(visit)` is the ordinary weight that a visit amounts to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext
from moebius.model.parameters import Linear, ParameterSpec, RMSNorm, Role
from moebius.model.program import LayerPlace, Visit
from moebius.model.recursion.config import AdapterConfig, DoraConfig, LowRankConfig


class VisitLinear(Linear):
    """`W_r x`: a shared weight, relaxed by an adapter of low rank for each depth r.

    Relaxed Recursive Transformers (arXiv 2410.20672): `W_r = W + scale * B_r A_r`. With DoRA
    (arXiv 2402.09353) each output row of that has the learned norm `m_r`. B begins with zeros and
    m_r with the norms of W, so at the first step all depths are alike.
    """

    down: nn.Parameter
    up: nn.Parameter
    magnitude: nn.Parameter

    def __init__(
        self,
        in_size: int,
        out_size: int,
        role: Role,
        std: float,
        adapter: AdapterConfig | None = None,
        num_depths: int = 1,
    ) -> None:
        super().__init__(in_size, out_size, role, std)
        self.adapter: LowRankConfig | None = None
        if not isinstance(adapter, LowRankConfig) or num_depths == 1:
            return
        self.adapter = adapter
        spec = ParameterSpec(Role.ADAPTER, std=in_size**-0.5)
        self.declare("down", (num_depths, adapter.rank, in_size), spec)
        self.declare("up", (num_depths, out_size, adapter.rank), ParameterSpec(Role.ADAPTER))
        if isinstance(adapter, DoraConfig):
            self.declare("magnitude", (num_depths, out_size), ParameterSpec(Role.GAIN))

    @torch.no_grad()
    def derive(self) -> None:
        """Initial values that follow from those of other parameters."""
        if isinstance(self.adapter, DoraConfig):
            self.magnitude.copy_(self.weight.norm(dim=1).expand_as(self.magnitude))

    def at(self, x: Tensor, ctx: DepthContext) -> Tensor:
        """Project the last dimension as the visit does."""
        if self.adapter is None:
            return self(x)  # type: ignore[no-any-return]
        if isinstance(self.adapter, DoraConfig):
            y: Tensor = ctx.by_visit(lambda part, x: F.linear(x, self.plain(part.visit)), x)
            return y
        scale = self.adapter.scale
        low: Tensor = ctx.by_visit(
            lambda part, x: F.linear(
                F.linear(x, self.down[part.visit.depth - 1]), self.up[part.visit.depth - 1]
            ),
            x,
        )
        return self(x) + scale * low  # type: ignore[no-any-return]

    def plain(self, visit: Visit) -> Tensor:
        """The weight of a visit, `[out, in]`."""
        if self.adapter is None:
            return self.weight
        number = visit.depth - 1
        weight = self.weight + self.adapter.scale * (self.up[number] @ self.down[number])
        if isinstance(self.adapter, DoraConfig):
            weight = weight * (self.magnitude[number] / weight.norm(dim=1)).unsqueeze(1)
        return weight

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs, the adapter included; DoRA makes the visit's weight first."""
        flops = super().flops(num_tokens)
        if self.adapter is None:
            return flops
        out_size, in_size = self.weight.shape
        rank = self.adapter.rank
        if isinstance(self.adapter, DoraConfig):
            return flops + 2 * out_size * rank * in_size
        return flops + 2 * num_tokens * rank * (in_size + out_size)


class VisitNorm(RMSNorm):
    """RMSNorm in front of a sublayer, scaled by visit.

    With `layer_norm_scaling` the result is divided by the root of the layer's number (Curse of
    Depth, arXiv 2502.05795), counted unrolled or among unique layers. With gains it is multiplied
    by a vector of the depth, which begins with ones.
    """

    gain: nn.Parameter

    def __init__(self, model: ModelConfig, place: LayerPlace) -> None:
        super().__init__(model.hidden_size, model.norm_eps)
        self.scaling = model.layer_norm_scaling
        self.unique_number = place.index + 1
        adapter = model.depth.adapter
        self.has_gain = adapter is not None and adapter.gains and place.num_depths > 1
        if self.has_gain:
            shape = (place.num_depths, model.hidden_size)
            self.declare("gain", shape, ParameterSpec(Role.GAIN, mean=1.0))

    def at(self, x: Tensor, ctx: DepthContext) -> Tensor:
        """Normalise the last dimension as the visit does; the result has the precision of `x`."""
        rms_norm = ctx.step.kernels.rms_norm
        if self.scaling == "none" and not self.has_gain:
            normed: Tensor = rms_norm(x, self.weight, self.eps)
            return normed
        scaled: Tensor = ctx.by_visit(
            lambda part, x: rms_norm(x, self.weight, self.eps, self._factor(part.visit)), x
        )
        return scaled

    def plain(self, visit: Visit) -> Tensor:
        """The weight of a visit, `[D]`, without LayerNorm Scaling, which any model can have."""
        return self.weight * self.gain[visit.depth - 1] if self.has_gain else self.weight

    def _factor(self, visit: Visit) -> Tensor | float:
        factor = 1.0
        if self.scaling != "none":
            number = visit.index + 1 if self.scaling == "unrolled" else self.unique_number
            factor = float(number) ** -0.5
        return self.gain[visit.depth - 1] * factor if self.has_gain else factor
