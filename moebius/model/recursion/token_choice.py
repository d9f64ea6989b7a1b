"""Token-choice routing over depth (Mixture-of-Recursions, arXiv 2507.10524, section 2.2)."""

from dataclasses import replace

import torch
from torch import Tensor

from moebius.kernels.depth_select import add_rows, compact_shards, replace_rows, scatter_counts
from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.carry import Carry
from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.router import Routed, Router
from moebius.model.program import Segment, Site
from moebius.model.recursion.config import TokenChoiceConfig
from moebius.model.recursion.routing import DepthRouting, LoopState, Selection, everyone, longest


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
        tokens = ctx.tokens
        depth_BS = depth_T.clamp(max=num_passes).view(tokens.place_BS.shape)
        index_BS = everyone(tokens)
        depth_BS = depth_BS.masked_fill(index_BS < 0, 0)
        gate_BS = tokens.spread.own(self.config.alpha * weight_T.view(tokens.place_BS.shape))
        return LoopState(x_BSD, x_BSD, index_BS, depth_BS, gate_BS)

    def admit(
        self, state: LoopState, share: float, ctx: DepthContext
    ) -> tuple[LoopState, Selection]:
        """Those who have not reached their depth."""
        depth, tokens, spread = ctx.visit.depth, ctx.tokens, ctx.tokens.spread
        assert state.depth_BS is not None
        assert state.gate_BS is not None
        index_BK = state.active_BK
        if depth > 1:
            chosen_BS = state.depth_BS >= depth
            multiple = self.config.multiple_of
            most = min(-(-longest(chosen_BS) // multiple) * multiple, tokens.num_slots)
            index_BK, _ = compact_shards(everyone(tokens), chosen_BS, most, spread.num_shards)
        ctx.step.ledger.record(
            self.sites[depth - 1],
            candidates=(state.active_BK >= 0).sum(),
            selected=(index_BK >= 0).sum(),
            places=scatter_counts(tokens.places(index_BK), tokens.row_length),
        )
        own_BK = spread.own_places(index_BK, tokens.num_slots)
        gate_BK = state.gate_BS.gather(1, own_BK.clamp(min=0))
        last_BK = spread.own(state.depth_BS.gather(1, index_BK.clamp(min=0)) == depth)
        expected = share * tokens.num_row_tokens
        chosen = Selection(index_BK, own_BK, gate_BK, last_BK, expected)
        return replace(state, active_BK=index_BK), chosen

    def absorb(
        self,
        state: LoopState,
        chosen: Selection,
        inner: Tensor,
        outer: Tensor,
        kernels: Kernels = PLAIN,
    ) -> LoopState:
        """Tokens at their last pass leave with it; the others go on from it."""
        assert chosen.last_BK is not None
        gate_BK1 = chosen.gate_BK.unsqueeze(-1)
        gated = gate_BK1 * outer
        leaving_BK = chosen.own_BK.masked_fill(~chosen.last_BK, -1)
        stream_BSD = add_rows(state.stream_BSD, leaving_BK, gated)
        following = gated if self.config.gating == "every" else outer
        inner_BSD = replace_rows(
            state.inner_BSD, chosen.own_BK, following.to(state.inner_BSD.dtype)
        )
        return replace(state, stream_BSD=stream_BSD, inner_BSD=inner_BSD)

    def flops(self, num_candidates: int, depth: int) -> int:
        """The choice, in front of the first pass."""
        if depth > 1:
            return 0
        flops: int = self.router.scorer.flops(num_candidates, has_predecessor=False)
        return flops
