"""A mixture of attention experts: each token queries with its own experts' projections."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moebius.kernels.permute import permute, sort_by_expert, unpermute
from moebius.model.attention import attend, core_flops, kv_sharing, makes_keys
from moebius.model.carry import Carry, RowKeys
from moebius.model.config import MixtureAttentionConfig, ModelConfig
from moebius.model.context import DepthContext
from moebius.model.extent import Extent
from moebius.model.moe.layer import Executed, nominal_rows
from moebius.model.moe.router import build_routers, route, router_at
from moebius.model.parameters import ParameterModule, ParameterSpec, Role
from moebius.model.program import LayerPlace, Visit
from moebius.model.visit import VisitLinear

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
        self.kv = kv_sharing(model, place)
        self.routers = build_routers(model, config.router, config.pool, place, SUBLAYER)
        self.declare("q", (num_experts, size, hidden), ParameterSpec(Role.EXPERT, std=std))
        self.declare("out", (num_experts, hidden, size), ParameterSpec(Role.EXPERT, std=std))
        kv_size = config.num_kv_heads * config.head_dim
        if config.kv == "per_expert":
            kv_size *= num_experts
        adapter, depths = model.depth.adapter, place.num_depths
        self.k = VisitLinear(hidden, kv_size, Role.MATRIX, std, adapter, depths)
        self.v = VisitLinear(hidden, kv_size, Role.MATRIX, std, adapter, depths)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """Mix each token with the earlier present tokens of its document, `[B, S, D]`."""
        routed = route(self.routers, x_BSD, carry, ctx)
        ids_TK, own_weights_TK = routed.own(ctx.tokens)
        slots = ids_TK.shape[1]
        rotates = self.config.positions == "rope"
        cos_BSC, sin_BSC = ctx.tokens.rope_BQC
        apply_rope, linear = ctx.step.kernels.apply_rope, ctx.step.kernels.grouped_linear

        def compute(x_BSD: Tensor, weights_TK: Tensor) -> tuple[Tensor, RowKeys | None]:
            x_TD = x_BSD.flatten(0, 1)
            order = sort_by_expert(ids_TK, len(self.q))
            rows_RD, weights_R = permute(x_TD, weights_TK, order)
            q_RA = linear(rows_RD, self.q, order.ends_E)
            q_XA = q_RA.new_zeros(ids_TK.numel(), q_RA.shape[1])
            q_XA = q_XA.index_copy(0, order.assignment_R, q_RA)
            q_BSHC = self._to_heads(q_XA.view(*x_BSD.shape[:2], slots, q_RA.shape[1]))
            q_BSHC = apply_rope(q_BSHC, cos_BSC, sin_BSC) if rotates else q_BSHC
            k_BSGC = v_BSGC = None
            if makes_keys(self.kv, ctx):
                heads = (-1, self.config.head_dim)
                k_BSGC, v_BSGC = (p.at(x_BSD, ctx).unflatten(-1, heads) for p in (self.k, self.v))
                k_BSGC = apply_rope(k_BSGC, cos_BSC, sin_BSC) if rotates else k_BSGC
            mixed_BSHC, keys = attend(q_BSHC, k_BSGC, v_BSGC, carry, ctx, self.config, self.kv)
            mixed_XA = self._from_heads(mixed_BSHC, slots).reshape(q_XA.shape)
            mixed_RA = mixed_XA.index_select(0, order.assignment_R)
            mixed_RA = mixed_RA * weights_R.to(mixed_RA.dtype).unsqueeze(1)
            rows_RD = linear(mixed_RA, self.out, order.ends_E)
            y_TD = unpermute(rows_RD, order, torch.zeros_like(x_TD))
            return y_TD.view_as(x_BSD), keys

        y_BSD, keys = ctx.step.run(compute, x_BSD, own_weights_TK)
        after = routed.carry
        if keys is not None:
            after = replace(after, row_keys={**after.row_keys, ctx.visit.layer: keys})
        return routed.attach_losses(y_BSD, ctx.step.ledger), after

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
        extent: Extent,
        visit: Visit,
        has_predecessor: bool,
        executed: Executed | None,
    ) -> int:
        """Forward FLOPs of a visit; the core computes the slots of empty assignments too."""
        num_experts, size, hidden = self.q.shape
        slots = self.config.num_assignments
        per_row = [4 * size * hidden] * num_experts
        rows_N: Sequence[float] = nominal_rows(per_row, slots, extent.tokens)
        if executed is not None:
            rows_N = executed[visit.site(SUBLAYER)]
        router = router_at(self.routers, visit.site(SUBLAYER))
        flops = router.flops(extent.tokens, visit, has_predecessor)
        flops += round(sum(rows_N)) * per_row[0]
        if self.kv != "shared_first" or visit.depth == 1:
            flops += self.k.flops(extent.tokens) + self.v.flops(extent.tokens)
        heads = slots * self.config.num_heads
        return flops + core_flops(extent, visit, heads, self.config, self.kv)
