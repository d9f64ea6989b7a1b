"""The mixture-of-experts sublayer: route, compute, attach losses."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from moebius.model.carry import Carry
from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext
from moebius.model.ffn import SwiGLU
from moebius.model.moe.config import MoEConfig
from moebius.model.moe.experts import ExpertPool
from moebius.model.moe.router import build_routers, route, router_at
from moebius.model.parameters import ParameterModule
from moebius.model.program import LayerPlace, Site, Visit

SUBLAYER = "ffn"
Executed = Mapping[Site, Sequence[float]]
"""assignments that each expert computed at each router call site"""


class MoE(ParameterModule):
    """A pool of experts, the routers that send tokens to it, and experts that are always on.

    With `reuse` the pool belongs to a group of layers and arrives in the context.
    """

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, place: LayerPlace, pool_name: str
    ) -> None:
        super().__init__()
        self.config = moe
        self.pool_name = pool_name
        chain_shares = moe.chain is not None and moe.chain.routers == "shared"
        self.routers = build_routers(
            config, moe.router, moe.pool, place, SUBLAYER, moe.iterations, chain_shares
        )
        self.experts = None
        if moe.reuse == 1:
            self.experts = ExpertPool(config.hidden_size, moe, config.init_std)
        self.shared = None
        if moe.shared is not None:
            width = moe.shared.count * moe.shared.intermediate_size
            self.shared = SwiGLU(config, width, place)

    def forward(
        self, x_BSD: Tensor, carry: Carry, ctx: DepthContext, iteration: int = 1
    ) -> tuple[Tensor, Carry]:
        """Weighted sum of each token's experts, `[B, S, D]`; empty slots get 0 from routed ones.

        The decision is made here, once; what is recomputed in the backward pass gets it.
        """
        routed = route(self.routers, x_BSD, carry, ctx, iteration)
        pool = self.pool(ctx.shared)
        ids_TK, own_weights_TK = routed.own(ctx.tokens)

        def compute(x_BSD: Tensor, weights_TK: Tensor) -> Tensor:
            def beside() -> Tensor | None:
                if self.shared is None or self.config.shared is None:
                    return None
                always_BSD: Tensor = self.config.shared.scale * self.shared.project(x_BSD, ctx)
                return always_BSD.flatten(0, 1)

            x_TD, kernels = x_BSD.flatten(0, 1), ctx.step.kernels
            y_TD: Tensor = pool(x_TD, ids_TK, weights_TK, ctx.tokens, beside, kernels)
            return y_TD.view_as(x_BSD)

        y_BSD = ctx.step.run(compute, x_BSD, own_weights_TK)
        return routed.attach_losses(y_BSD, ctx.step.ledger), routed.carry

    def pool(self, shared: nn.ModuleDict) -> ExpertPool:
        """The experts this layer routes to: its own or, with `reuse`, the group's in `shared`."""
        return cast(ExpertPool, shared[self.pool_name] if self.experts is None else self.experts)

    def flops(
        self,
        num_tokens: int,
        visit: Visit,
        has_predecessor: bool,
        shared: nn.ModuleDict,
        executed: Executed | None,
    ) -> int:
        """Forward FLOPs of a visit; without `executed` every token has its K costliest experts."""
        pool, total = self.pool(shared), 0
        for iteration in range(1, self.config.iterations + 1):
            router = router_at(self.routers, visit.site(SUBLAYER, iteration))
            total += router.flops(num_tokens, visit, has_predecessor or iteration > 1)
            rows_N = nominal_rows(pool.flops_per_row(), self.config.num_assignments, num_tokens)
            if executed is not None:
                rows_N = executed[visit.site(SUBLAYER, iteration)]
            total += pool.flops(num_tokens, rows_N)
            if self.shared is not None:
                total += self.shared.flops(num_tokens)
        return total


def nominal_rows(
    flops_per_row: Sequence[int], num_assignments: int, num_tokens: int
) -> Sequence[float]:
    """Rows of each expert if every token has all its assignments, at the costliest experts."""
    costliest = sorted(range(len(flops_per_row)), key=lambda i: -flops_per_row[i])
    chosen = set(costliest[:num_assignments])
    return [float(num_tokens if i in chosen else 0) for i in range(len(flops_per_row))]
