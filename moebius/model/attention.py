"""Grouped-query attention, causal inside documents."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moebius.kernels.attention import Sight, stick_breaking_attention
from moebius.kernels.depth_select import replace_rows
from moebius.model.carry import Carry, RowKeys
from moebius.model.config import AttentionConfig, AttentionShape, ModelConfig
from moebius.model.context import DepthContext, TokenContext
from moebius.model.depth_attention import mix_values, with_values
from moebius.model.extent import Extent
from moebius.model.parameters import ParameterModule, Role
from moebius.model.program import LayerPlace, Visit
from moebius.model.recursion.config import KVSharing
from moebius.model.region import WHOLE, Region
from moebius.model.visit import VisitLinear


class Attention(ParameterModule):
    """Queries, keys, values and the output projection (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, model: ModelConfig, config: AttentionConfig, place: LayerPlace) -> None:
        super().__init__()
        self.config = config
        self.kv = kv_sharing(model, place)
        self.region: Region = WHOLE
        hidden, adapter = model.hidden_size, model.depth.adapter
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim

        def linear(in_size: int, out_size: int) -> VisitLinear:
            std, depths = model.init_std, place.num_depths
            return VisitLinear(in_size, out_size, Role.MATRIX, std, adapter, depths)

        self.q = linear(hidden, query_size)
        self.k = linear(hidden, kv_size)
        self.v = linear(hidden, kv_size)
        self.out = linear(query_size, hidden)

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext) -> tuple[Tensor, Carry]:
        """Mix each token with the earlier present tokens of its document, `[B, S, D]`."""
        rotates = self.config.positions == "rope"
        cos_BSC, sin_BSC = ctx.tokens.rope_BQC
        deep, apply_rope = self.config.depth_attention, ctx.step.kernels.apply_rope

        def compute(x_BSD: Tensor) -> tuple[Tensor, RowKeys | None, Tensor | None, Tensor | None]:
            x_BSD = self.region.enter(x_BSD)
            heads = (-1, self.config.head_dim)
            q_BSHC = self.q.at(x_BSD, ctx).unflatten(-1, heads)
            q_BSHC = apply_rope(q_BSHC, cos_BSC, sin_BSC) if rotates else q_BSHC
            k_BSGC = v_BSGC = None
            if makes_keys(self.kv, ctx):
                k_BSGC, v_BSGC = (p.at(x_BSD, ctx).unflatten(-1, heads) for p in (self.k, self.v))
                k_BSGC = apply_rope(k_BSGC, cos_BSC, sin_BSC) if rotates else k_BSGC
                if deep is not None:
                    v_BSGC = mix_values(q_BSHC, k_BSGC, v_BSGC, carry, ctx, deep)
            mixed_BSHC, keys = attend(q_BSHC, k_BSGC, v_BSGC, carry, ctx, self.config, self.kv)
            y_BSD = self.region.leave(self.out.at(mixed_BSHC.flatten(2), ctx))
            return y_BSD, keys, k_BSGC, v_BSGC

        y_BSD, keys, k_BSGC, v_BSGC = ctx.step.run(compute, x_BSD)
        after = carry  # `carry` itself is read again where `compute` is
        if keys is not None:
            after = replace(after, row_keys={**after.row_keys, ctx.visit.layer: keys})
        if deep is not None:
            after = ctx.by_visit(partial(with_values, config=deep), after, k_BSGC, v_BSGC)
        return y_BSD, after

    def flops(self, extent: Extent, visit: Visit) -> int:
        """Forward FLOPs of a visit: projections, and products with all keys of the mask."""
        linears = [self.q, self.out]
        if self.kv != "shared_first" or visit.depth == 1:
            linears += [self.k, self.v]
        projections = sum(linear.flops(extent.tokens) for linear in linears)
        return projections + core_flops(extent, visit, self.config.num_heads, self.config, self.kv)


def kv_sharing(model: ModelConfig, place: LayerPlace) -> KVSharing:
    """Whose keys the later visits of a layer attend to; a layer with one visit has its own."""
    return model.depth.kv if place.num_depths > 1 else "per_depth"


def makes_keys(kv: KVSharing, ctx: DepthContext) -> bool:
    """Whether some row stands at a visit that makes keys."""
    return kv != "shared_first" or any(p.visit.depth == 1 for p in ctx.parts or (ctx,))


def attend(
    q_BSHC: Tensor,
    k_BSGC: Tensor | None,
    v_BSGC: Tensor | None,
    carry: Carry,
    ctx: DepthContext,
    config: AttentionShape,
    kv: KVSharing,
) -> tuple[Tensor, RowKeys | None]:
    """The core: the weighted sum `[B, S, H, C]` over the keys that the visit may see.

    Those are the fresh ones; with a cache the earlier tokens' too; at a later pass of a layer whose
    passes share keys, those that the row's tokens have left (Mixture-of-Recursions, section 2.3).
    Also returns what the row has left after this visit, where later passes want it.
    """
    core = ctx.step.kernels.attention if config.core == "softmax" else _stick_breaking
    cache = ctx.step.cache
    if cache is not None:

        def look(part: DepthContext, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
            k_BJGC, v_BJGC, mask_BSJ = cache.extend(part, k, v, kv)
            return core(q, k_BJGC, v_BJGC, Sight(lambda: mask_BSJ))

        mixed: Tensor = ctx.by_visit(look, q_BSHC, k_BSGC, v_BSGC)
        return mixed, None
    if kv == "per_depth":
        assert k_BSGC is not None
        assert v_BSGC is not None
        k_BJGC, v_BJGC = ctx.tokens.spread.join(k_BSGC), ctx.tokens.spread.join(v_BSGC)
        return ctx.step.run_core(core, q_BSHC, k_BJGC, v_BJGC, ctx.tokens.sight), None
    left = carry.row_keys.get(ctx.visit.layer)
    if k_BSGC is not None and v_BSGC is not None:
        k_BJGC, v_BJGC = ctx.tokens.spread.join(k_BSGC), ctx.tokens.spread.join(v_BSGC)
        left = _leave(left if ctx.visit.depth > 1 else None, k_BJGC, v_BJGC, ctx.tokens)
    assert left is not None
    mask_BQL = ctx.tokens.row_mask_BQL(left.present_BL)
    sight = Sight(lambda: mask_BQL)
    return ctx.step.run_core(core, q_BSHC, left.k_BLGC, left.v_BLGC, sight), left


def _stick_breaking(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: Sight) -> Tensor:
    return stick_breaking_attention(q_BSHC, k_BJGC, v_BJGC, sight.mask_BSJ)


def _leave(old: RowKeys | None, k_BSGC: Tensor, v_BSGC: Tensor, tokens: TokenContext) -> RowKeys:
    """What a row has left once its present tokens have left their fresh keys."""
    if tokens.row is None:  # full rows as they come, all slots of which are tokens
        present = torch.ones_like(tokens.place_BS, dtype=torch.bool)
        return RowKeys(k_BSGC, v_BSGC, present)
    shape = (len(k_BSGC), tokens.row_length, *k_BSGC.shape[2:])
    if old is None:
        nothing = k_BSGC.new_zeros(shape)
        absent = torch.zeros(shape[:2], dtype=torch.bool, device=k_BSGC.device)
        old = RowKeys(nothing, nothing, absent)
    index_BS = tokens.joined(tokens.place_BS, empty=-1)
    k, v = (
        replace_rows(kept.flatten(2), index_BS, fresh.flatten(2)).view(shape)
        for kept, fresh in ((old.k_BLGC, k_BSGC), (old.v_BLGC, v_BSGC))
    )
    here_BS1 = (index_BS >= 0).unsqueeze(-1)
    present_BL = replace_rows(old.present_BL.unsqueeze(-1), index_BS, here_BS1).squeeze(-1)
    return RowKeys(k, v, present_BL)


def core_flops(
    extent: Extent, visit: Visit, num_heads: int, config: AttentionShape, kv: KVSharing
) -> int:
    """Forward FLOPs of the two products, the masked part included."""
    pairs = extent.pairs if kv == "per_depth" else extent.row_pairs
    return 4 * pairs * num_heads * config.head_dim
