"""The dense feed-forward sublayer."""

import torch.nn.functional as F
from torch import Tensor

from moebius.model.context import Carry, DepthContext
from moebius.model.parameters import Linear, ParameterModule, Role


class SwiGLU(ParameterModule):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, intermediate_size, Role.MATRIX, std)
        self.up = Linear(hidden_size, intermediate_size, Role.MATRIX, std)
        self.down = Linear(intermediate_size, hidden_size, Role.MATRIX, std)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """The same for every token; `carry` passes through."""
        return ctx.step.run(self.project, x_BSD), carry

    def project(self, x_BSD: Tensor) -> Tensor:
        """The function itself."""
        out: Tensor = self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))
        return out

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of the three projections."""
        return sum(linear.flops(num_tokens) for linear in (self.gate, self.up, self.down))
