"""Token-choice routing over depth (Mixture-of-Recursions, arXiv 2507.10524, section 2.2)."""

from dataclasses import replace

import torch
from torch import Tensor

from moebius.kernels.depth_select import add_rows, compact, replace_rows, scatter_counts
from moebius.model.carry import Carry
from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.router import Routed, Router
from moebius.model.program import Segment, Site
from moebius.model.recursion.config import TokenChoiceConfig
from moebius.model.recursion.routing import DepthRouting, LoopState, Selection, everyone


class TokenChoice(DepthRouting):
    """One router in front of the loop, whose experts are the numbers of passes 1 to N_r.

    With H the stream in front of the loop, F the block, i a token's number of passes and g its
    gate, the token leaves with `H + g * F^i(H)`; with gating `every`, F is g * F in all passes.
    Choosing looks at the token alone, so it is causal.
    """

    def __init__(self, model: ModelConfig, config: TokenChoiceConfig, segment: Segment) -> None:
        super().__init__()
        self.config = config
        self.sites = tuple(segment.site(number + 1) for number in range(len(segment.passes)))
        self.choice_site = Site(f"{self.sites[0].module}.choice", 1)
        depths = PoolShape((("ffn", len(self.sites)),))
        self.router = Router(model, config.stages, depths, "depth", (self.choice_site,))

    def begin(self, x_BSD: Tensor, ctx: DepthContext, num_passes: int) -> LoopState:
        """Every token chooses; no more passes than there are."""
        routed: Routed = self.router(x_BSD, Carry(), ctx, self.choice_site)
        x_BSD = routed.attach_losses(x_BSD, ctx.step.ledger, prefix="depth_")
        depth_T, weight_T = routed.routing.ids_TK[:, 0] + 1, routed.routing.weights_TK[:, 0]
        if ctx.step.step < self.config.full_depth_steps:
            depth_T = torch.full_like(depth_T, len(self.sites))
            weight_T = routed.affinity_TN[:, -1]
        depth_BS = depth_T.clamp(max=num_passes).view(x_BSD.shape[:2])
        gate_BS = self.config.alpha * weight_T.view(x_BSD.shape[:2])
        return LoopState(x_BSD, x_BSD, everyone(x_BSD), depth_BS, gate_BS)

    def admit(
        self, state: LoopState, share: float, ctx: DepthContext
    ) -> tuple[LoopState, Selection]:
        """Those who have not reached their depth."""
        depth = ctx.visit.depth
        assert state.depth_BS is not None
        assert state.gate_BS is not None
        index_BK = state.active_BK
        if depth > 1:
            chosen_BS = state.depth_BS >= depth
            most = max(1, int(chosen_BS.sum(dim=1).max()))
            index_BK, _ = compact(everyone(state.stream_BSD), chosen_BS, most)
        ctx.step.ledger.record(
            self.sites[depth - 1],
            candidates=(state.active_BK >= 0).sum(),
            selected=(index_BK >= 0).sum(),
            places=scatter_counts(index_BK, ctx.tokens.row_length),
        )
        gate_BK = state.gate_BS.gather(1, index_BK.clamp(min=0))
        expected = share * state.stream_BSD[..., 0].numel()
        return replace(state, active_BK=index_BK), Selection(index_BK, gate_BK, expected)

    def absorb(
        self, state: LoopState, chosen: Selection, inner: Tensor, outer: Tensor, depth: int
    ) -> LoopState:
        """Tokens at their last pass leave with it; the others go on from it."""
        assert state.depth_BS is not None
        gate_BK1 = chosen.gate_BK.unsqueeze(-1)
        gated = gate_BK1 * outer
        last_BK = state.depth_BS.gather(1, chosen.index_BK.clamp(min=0)) == depth
        leaving_BK = chosen.index_BK.masked_fill(~last_BK, -1)
        stream_BSD = add_rows(state.stream_BSD, leaving_BK, gated)
        following = gated if self.config.gating == "every" else outer
        inner_BSD = replace_rows(
            state.inner_BSD, chosen.index_BK, following.to(state.inner_BSD.dtype)
        )
        return replace(state, stream_BSD=stream_BSD, inner_BSD=inner_BSD)

    def flops(self, num_candidates: int, depth: int) -> int:
        """The choice, in front of the first pass."""
        if depth > 1:
            return 0
        flops: int = self.router.scorer.flops(num_candidates, has_predecessor=False)
        return flops
