"""The mixture-of-experts sublayer: route, compute, combine, report."""

import torch
from torch import Tensor

from moebius.model.config import ModelConfig, MoEConfig
from moebius.model.context import Carry, DepthContext
from moebius.model.moe.balance import balance_weights, paper_coefficient, switch_loss
from moebius.model.moe.dispatch import LocalDispatcher
from moebius.model.moe.experts import FFNExperts, ZeroComputationExperts
from moebius.model.moe.router import Router
from moebius.model.moe.routing import Routing, expert_counts
from moebius.model.parameters import ParameterModule


class MoE(ParameterModule):
    """Dropless mixture of FFN and zero-computation experts.

    The zero-computation part is an affine epilogue over all tokens; only FFN assignments are
    dispatched. The input carry holds the previous MoE layer's scores, the output carry its own.
    """

    eta_N: Tensor

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, predecessor_experts: int | None
    ) -> None:
        super().__init__()
        self.config = moe
        self.router = Router(config, moe, predecessor_experts)
        self.experts = FFNExperts(config, moe)
        self.zero_experts = ZeroComputationExperts(config, moe)
        self.dispatcher = LocalDispatcher()
        tau = moe.balance.tau if moe.balance else 1.0
        self.register_buffer("eta_N", balance_weights(moe, tau), persistent=False)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """Weighted sum of each token's experts, `[B, S, D]`; empty slots get 0."""
        x_TD = x_BSD.flatten(0, 1)
        previous = carry.router_scores_BSN
        routing, mix_logits_TM = self.router(
            x_TD,
            None if previous is None else previous.flatten(0, 1),
            self.zero_experts.mix.flatten(0, 1),
        )
        if ctx.tokens.valid_BS is not None:
            routing = _without(routing, ~ctx.tokens.valid_BS.flatten())
        y_TD = self.zero_experts(x_TD, mix_logits_TM, routing)
        dispatch = self.dispatcher.dispatch(x_TD, routing, self.config.count("ffn"))
        rows_RD = self.experts(dispatch.rows_RD, dispatch.weights_R, dispatch.ends_E)
        y_TD = self.dispatcher.combine(rows_RD, dispatch, y_TD)
        y_TD = self._report(y_TD, routing, ctx)
        return y_TD.view_as(x_BSD), Carry(routing.scores_TN.unflatten(0, x_BSD.shape[:2]))

    def _report(self, y_TD: Tensor, routing: Routing, ctx: DepthContext) -> Tensor:
        """Book this site's statistics; return `y` with the balance loss attached."""
        segment_ids_BS, valid_BS = ctx.tokens.segment_ids_BS, ctx.tokens.valid_BS
        num_rows, length = segment_ids_BS.shape
        group_T = torch.arange(num_rows, device=y_TD.device).repeat_interleave(length)
        probs_BSN = routing.probs_TN.unflatten(0, (num_rows, length))
        if valid_BS is None:
            tokens_B = torch.full((num_rows,), length, device=y_TD.device)
        else:
            probs_BSN = probs_BSN * valid_BS.unsqueeze(-1)
            tokens_B = valid_BS.sum(dim=1)
        counts_BN = expert_counts(routing.ids_TK, group_T, num_rows, probs_BSN.shape[-1])
        prob_sums_BN = probs_BSN.sum(dim=1)
        ctx.step.ledger.record(
            ctx.visit.site, tokens=tokens_B.sum(), expert_tokens=counts_BN.sum(dim=0)
        )
        balance = self.config.balance
        if balance is None:
            return y_TD
        if balance.scope == "micro_batch":
            counts_BN, prob_sums_BN = counts_BN.sum(0, True), prob_sums_BN.sum(0, True)
            tokens_B = tokens_B.sum(0, True)
        loss = switch_loss(counts_BN, prob_sums_BN, tokens_B, self.eta_N)
        return ctx.step.ledger.attach(
            y_TD, "balance", loss, paper_coefficient(balance, self.config)
        )

    def flops(self, num_tokens: int, num_ffn_rows: int, has_predecessor: bool) -> int:
        """Forward FLOPs for tokens of whose assignments `num_ffn_rows` went to FFN experts."""
        extra_columns = self.zero_experts.mix.shape[0] * 2
        return (
            self.router.flops(num_tokens, extra_columns, has_predecessor)
            + self.experts.flops(num_ffn_rows)
            + self.zero_experts.flops(num_tokens)
        )


def _without(routing: Routing, absent_T: Tensor) -> Routing:
    """The routing with the assignments of absent tokens emptied."""
    return Routing(
        routing.ids_TK.masked_fill(absent_T.unsqueeze(1), -1),
        routing.weights_TK.masked_fill(absent_T.unsqueeze(1), 0.0),
        routing.probs_TN,
        routing.scores_TN,
    )
