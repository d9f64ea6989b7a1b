"""The dense feed-forward sublayer."""

from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext
from moebius.model.parameters import ParameterModule, Role
from moebius.model.program import LayerPlace
from moebius.model.region import WHOLE, Region
from moebius.model.visit import VisitLinear


class SwiGLU(ParameterModule):
    """`down(silu(gate(x)) * up(x))` by `moebius.kernels.swiglu`."""

    def __init__(self, model: ModelConfig, intermediate_size: int, place: LayerPlace) -> None:
        super().__init__()
        self.region: Region = WHOLE

        def linear(in_size: int, out_size: int) -> VisitLinear:
            adapter, depths = model.depth.adapter, place.num_depths
            return VisitLinear(in_size, out_size, Role.MATRIX, model.init_std, adapter, depths)

        self.gate = linear(model.hidden_size, intermediate_size)
        self.up = linear(model.hidden_size, intermediate_size)
        self.down = linear(intermediate_size, model.hidden_size)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """The same for every token; `carry` passes through."""
        y_BSD: Tensor = ctx.step.run(lambda x_BSD: self.project(x_BSD, ctx), x_BSD)
        return y_BSD, carry

    def project(self, x_BSD: Tensor, ctx: DepthContext) -> Tensor:
        """The function itself."""
        swiglu = ctx.step.kernels.swiglu
        x_BSD = self.region.enter(x_BSD)
        inner = ctx.step.run_core(swiglu, self.gate.at(x_BSD, ctx), self.up.at(x_BSD, ctx))
        return self.region.leave(self.down.at(inner, ctx))

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of the three projections."""
        return sum(linear.flops(num_tokens) for linear in (self.gate, self.up, self.down))
