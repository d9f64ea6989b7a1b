"""Expert-choice routing over depth (Mixture-of-Recursions, arXiv 2507.10524, section 2.2)."""

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.kernels.depth_select import (
    compact_shards,
    scatter_counts,
    top_k_mask,
    top_share_mask,
)
from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext
from moebius.model.moe.scorers import Scorer, ScorerShape
from moebius.model.parameters import Role
from moebius.model.program import Segment, kept_tokens
from moebius.model.recursion.config import (
    CausalLoss,
    CausalRouter,
    DepthScorer,
    ExpertChoiceConfig,
)
from moebius.model.recursion.routing import DepthRouting, LoopState, Selection, everyone, longest


class ExpertChoice(DepthRouting):
    """A router for each pass, which takes the best of the tokens that the pass before had.

    A token that was not selected once never returns. In `topk` mode the best are compared within a
    row or document; in `threshold` mode each token is judged by itself, and rows keep different
    numbers of tokens.
    """

    def __init__(self, model: ModelConfig, config: ExpertChoiceConfig, segment: Segment) -> None:
        super().__init__()
        self.config = config
        self.sites = tuple(segment.site(number + 1) for number in range(len(segment.passes)))

        def scorers(scorer: DepthScorer, role: Role) -> nn.ModuleList:
            shape = ScorerShape("depth", model.hidden_size, 1, None, model.init_std, role=role)
            return nn.ModuleList(scorer.build(shape) for _ in self.sites)

        self.scorers = scorers(config.scorer, Role.ROUTER)
        self.predictors = nn.ModuleList()
        if isinstance(config.causal, CausalRouter):
            self.predictors = scorers(config.causal.scorer, Role.AUX_ROUTER)

    def begin(self, x_BSD: Tensor, ctx: DepthContext, num_passes: int) -> LoopState:
        """Everyone is a candidate."""
        return LoopState(x_BSD, x_BSD, everyone(ctx.tokens))

    def admit(
        self, state: LoopState, share: float, ctx: DepthContext
    ) -> tuple[LoopState, Selection]:
        """Score the candidates and select; book statistics and losses."""
        number, step, spread = ctx.visit.depth - 1, ctx.step, ctx.tokens.spread
        candidates_BS, length = state.active_BK, ctx.tokens.num_slots
        present_BS = candidates_BS >= 0
        x_BSD = state.stream_BSD
        rows = step.kernels.take_rows(x_BSD, spread.own_places(candidates_BS, length))
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BS = spread.whole(self._score(self.scorers[number], rows))
            judged_BS = logits_BS
            if self.predictors:
                judged_BS = spread.whole(self._score(self.predictors[number], rows.detach()))
            causal_BS = (judged_BS >= 0) & present_BS
            keep_BS, index_BK, slot_BK = self._select(
                logits_BS.detach(), causal_BS, candidates_BS, share, ctx
            )
            if step.mode == "topk":
                errors_BS = F.binary_cross_entropy_with_logits(
                    judged_BS, keep_BS.to(judged_BS.dtype), reduction="none"
                )
                x_BSD = self._attach_losses(x_BSD, logits_BS, errors_BS, present_BS, ctx)
            gate_BK = self._gate(logits_BS.gather(1, slot_BK))
        step.ledger.record(
            self.sites[number],
            candidates=present_BS.sum(),
            selected=keep_BS.sum(),
            agreement=((causal_BS == keep_BS) & present_BS).sum(),
            gates=(gate_BK * (index_BK >= 0)).sum(),
            places=scatter_counts(ctx.tokens.places(index_BK), ctx.tokens.row_length),
        )
        state = replace(state, stream_BSD=x_BSD, inner_BSD=x_BSD, active_BK=index_BK)
        own_BK = spread.own_places(index_BK, length)
        expected = None
        if self.config.scope == "document":
            expected = share * ctx.tokens.num_row_tokens
        return state, Selection(index_BK, own_BK, spread.own(gate_BK), expected=expected)

    def absorb(
        self,
        state: LoopState,
        chosen: Selection,
        inner: Tensor,
        outer: Tensor,
        kernels: Kernels = PLAIN,
    ) -> LoopState:
        """`h + gate * F(h)`, or with additive gating `h + gate * (F(h) - h)`."""
        if self.config.gating == "additive":
            outer = outer - inner
        add_gated_rows = kernels.add_gated_rows
        x_BSD = add_gated_rows(state.stream_BSD, chosen.own_BK, chosen.gate_BK, outer)
        return replace(state, stream_BSD=x_BSD, inner_BSD=x_BSD)

    def _score(self, scorer: nn.Module, rows: Tensor) -> Tensor:
        """Logits `[B, S]` in fp32 or wider."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        logits_T1, _ = cast(Scorer, scorer)(
            rows.flatten(0, 1) / self.config.temperature, None, nn.ModuleDict()
        )
        return cast(Tensor, logits_T1).view(rows.shape[:2])

    def _select(
        self,
        logits_BS: Tensor,
        causal_BS: Tensor,
        candidates_BS: Tensor,
        share: float,
        ctx: DepthContext,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which candidates are selected, in slots `[B, K]`, and at which candidate each stood."""
        tokens, num_shards = ctx.tokens, ctx.tokens.spread.num_shards
        if ctx.step.mode == "threshold":
            return causal_BS, *compact_shards(
                candidates_BS, causal_BS, longest(causal_BS), num_shards
            )
        if self.config.scope == "document":
            documents_BL = (tokens.row or tokens).segment_ids_BS
            keep_BS = top_share_mask(logits_BS, tokens.places(candidates_BS), documents_BL, share)
            most = longest(keep_BS)
            return keep_BS, *compact_shards(candidates_BS, keep_BS, most, num_shards)
        k = kept_tokens(share, tokens.row_length, self.config.multiple_of)
        k = min(k, candidates_BS.shape[1])
        present_BS = candidates_BS >= 0
        logits_BS = logits_BS.masked_fill(~present_BS, float("-inf"))
        if num_shards > 1:
            keep_BS = top_k_mask(logits_BS, k) & present_BS
            return keep_BS, *compact_shards(candidates_BS, keep_BS, k, num_shards)
        slot_BK = ctx.step.kernels.top_k_positions(logits_BS, k)
        index_BK = candidates_BS.gather(1, slot_BK.clamp(min=0)).masked_fill(slot_BK < 0, -1)
        keep_BX = F.pad(torch.zeros_like(present_BS), (0, 1))  # -1 is the column that is cut off
        keep_BX = keep_BX.scatter(1, slot_BK.remainder(keep_BX.shape[1]), True)
        return keep_BX[:, :-1], index_BK, slot_BK.clamp(min=0)

    def _attach_losses(
        self,
        x_BSD: Tensor,
        logits_BS: Tensor,
        errors_BS: Tensor,
        present_BS: Tensor,
        ctx: DepthContext,
    ) -> Tensor:
        """The losses of the pass, means over its candidates.

        Where documents compete, how many candidates there are depends on the micro-batch. The mean
        is then over all tokens, those that have left counting 0: no cut changes the sum.
        """
        config, ledger = self.config, ctx.step.ledger
        count: Tensor | int = present_BS.sum().clamp(min=1)
        if config.scope == "document":
            count = max(1, ctx.tokens.num_row_tokens)

        def mean(values_BS: Tensor) -> Tensor:
            return (values_BS * present_BS).sum() / count

        if isinstance(config.causal, CausalLoss):
            x_BSD = ledger.attach(x_BSD, "depth", mean(errors_BS), config.causal.weight)
        elif isinstance(config.causal, CausalRouter):
            x_BSD = ledger.attach(x_BSD, "depth_predictor", mean(errors_BS), 1.0)
        if config.z_coefficient:
            z_loss = mean(logits_BS.square())
            x_BSD = ledger.attach(x_BSD, "depth_z", z_loss, config.z_coefficient)
        return x_BSD

    def _gate(self, logits_BK: Tensor) -> Tensor:
        alpha = self.config.alpha
        if self.config.activation == "sigmoid":
            return alpha * logits_BK.sigmoid()
        if self.config.activation == "tanh":
            return alpha * logits_BK.tanh()
        if self.config.activation == "none":
            return alpha * logits_BK
        return torch.full_like(logits_BK, alpha)

    def flops(self, num_candidates: int, depth: int) -> int:
        """A score for each candidate, and a prediction where there is a second router."""
        number = depth - 1
        scorers = [self.scorers[number], *(self.predictors and [self.predictors[number]])]
        return sum(cast(Scorer, s).flops(num_candidates, has_predecessor=False) for s in scorers)
