"""A mixture of attention experts: each token queries with its own experts' projections."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.kernels.grouped_linear import grouped_linear
from moebius.model.attention import attend, core_flops
from moebius.model.config import MixtureAttentionConfig, ModelConfig
from moebius.model.context import Carry, DepthContext
from moebius.model.moe.dispatch import LocalDispatcher
from moebius.model.moe.layer import Executed, nominal_rows
from moebius.model.moe.router import Router
from moebius.model.parameters import Linear, ParameterModule, ParameterSpec, Role
from moebius.model.program import LayerPlace, Visit

SUBLAYER = "attention"


class MixtureAttention(ParameterModule):
    """Attention experts with their own query and output projections.

    Keys and values are shared by all experts (ModuleFormer, arXiv 2306.04640), or each expert has
    its own (BAM, arXiv 2408.08274), which needs every expert to be chosen: an expert attends to
    the keys it makes of all tokens. A token's output is the weighted sum of its experts'.

    Further shapes: A channels of one expert (its heads times C), R routed rows.
    """

    q: torch.nn.Parameter
    out: torch.nn.Parameter

    def __init__(
        self, model: ModelConfig, config: MixtureAttentionConfig, place: LayerPlace
    ) -> None:
        super().__init__()
        self.config = config
        hidden, std, num_experts = model.hidden_size, model.init_std, config.num_experts
        size = config.num_heads * config.head_dim
        self.router = Router(model, config.router, config.pool, place, SUBLAYER)
        self.declare("q", (num_experts, size, hidden), ParameterSpec(Role.EXPERT, std=std))
        self.declare("out", (num_experts, hidden, size), ParameterSpec(Role.EXPERT, std=std))
        kv_size = config.num_kv_heads * config.head_dim
        if config.kv == "per_expert":
            kv_size *= num_experts
        self.k = Linear(hidden, kv_size, Role.MATRIX, std)
        self.v = Linear(hidden, kv_size, Role.MATRIX, std)
        self.dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """Mix each token with the earlier present tokens of its document, `[B, S, D]`."""
        routed = self.router(x_BSD, carry, ctx)
        ids_TK = routed.routing.ids_TK
        slots = ids_TK.shape[1]

        def compute(x_BSD: Tensor, weights_TK: Tensor) -> Tensor:
            x_TD = x_BSD.flatten(0, 1)
            dispatch = self.dispatcher.dispatch(x_TD, ids_TK, weights_TK, len(self.q))
            q_RA = grouped_linear(dispatch.rows_RD, self.q, dispatch.ends_E)
            q_XA = q_RA.new_zeros(ids_TK.numel(), q_RA.shape[1])
            q_XA = q_XA.index_copy(0, dispatch.assignment_R, q_RA)
            q_BSHC = self._to_heads(q_XA.view(*x_BSD.shape[:2], slots, -1))
            kv_heads = (*x_BSD.shape[:2], -1, self.config.head_dim)
            k_BSGC, v_BSGC = self.k(x_BSD).view(kv_heads), self.v(x_BSD).view(kv_heads)
            mixed_BSHC = attend(q_BSHC, k_BSGC, v_BSGC, ctx.tokens, self.config)
            mixed_XA = self._from_heads(mixed_BSHC, slots).reshape(ids_TK.numel(), -1)
            mixed_RA = mixed_XA.index_select(0, dispatch.assignment_R)
            mixed_RA = mixed_RA * dispatch.weights_R.to(mixed_RA.dtype).unsqueeze(1)
            rows_RD = grouped_linear(mixed_RA, self.out, dispatch.ends_E)
            y_TD = self.dispatcher.combine(rows_RD, dispatch, torch.zeros_like(x_TD))
            return y_TD.view_as(x_BSD)

        y_BSD = ctx.step.run(compute, x_BSD, routed.routing.weights_TK)
        return routed.attach_losses(y_BSD, ctx.step.ledger), routed.carry

    def _to_heads(self, q_BSKA: Tensor) -> Tensor:
        """Experts' heads as heads of one attention, those of one key-value head side by side."""
        q_BSKHC: Tensor = q_BSKA.unflatten(-1, (self.config.num_heads, -1))
        if self.config.kv == "shared":
            q_BSKHC = q_BSKHC.transpose(2, 3)
        return q_BSKHC.flatten(2, 3)

    def _from_heads(self, mixed_BSHC: Tensor, slots: int) -> Tensor:
        """The inverse of `_to_heads`."""
        is_shared = self.config.kv == "shared"
        mixed: Tensor = mixed_BSHC.unflatten(2, (-1, slots) if is_shared else (slots, -1))
        return mixed.transpose(2, 3) if is_shared else mixed

    def flops(
        self,
        num_rows: int,
        length: int,
        visit: Visit,
        has_predecessor: bool,
        executed: Executed | None,
    ) -> int:
        """Forward FLOPs of a visit; the core computes the slots of empty assignments too."""
        num_tokens = num_rows * length
        num_experts, size, hidden = self.q.shape
        slots = self.config.num_assignments
        per_row = [4 * size * hidden] * num_experts
        rows_N: Sequence[float] = nominal_rows(per_row, slots, num_tokens)
        if executed is not None:
            rows_N = executed[visit.site(SUBLAYER)]
        return (
            self.router.flops(num_tokens, has_predecessor)
            + round(sum(rows_N)) * per_row[0]
            + self.k.flops(num_tokens)
            + self.v.flops(num_tokens)
            + core_flops(num_rows, length, slots * self.config.num_heads, self.config)
        )
