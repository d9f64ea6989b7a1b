"""Depth-Attention: a token's values mixed with those of its earlier layers (arXiv 2606.05014).

Before attention over the sequence, the query of a token also looks at the keys that earlier visits
made of the same token, and the weights mix those visits' values with the fresh one:
`v'_l = sum_{j<=l} a_j v'_j`, `a = softmax_j(q_l k_j / sqrt(C))`; queries and keys stay. The paper's
summary leaves open how the weights of several query heads combine for one value head, and whether
the own layer is inside the softmax: here their mean, and yes. Keys are compared after the rotation,
which cancels at equal positions. Products are elementwise: S * J * H * C of them, no more.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.config import DepthAttentionConfig
from moebius.model.context import DepthContext
from moebius.model.program import Visit


def mix_values(
    q_BSHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    carry: Carry,
    ctx: DepthContext,
    config: DepthAttentionConfig,
) -> Tensor:
    """The values that attention over the sequence uses, `[B, S, G, C]`."""

    def mix(part: DepthContext, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> Tensor:
        seen = _in_reach(carry, part.visit, config)
        return _mix(q, k, v, [carry.depth_values[visit] for visit in seen])

    mixed: Tensor = ctx.by_visit(mix, q_BSHC, k_BSGC, v_BSGC, carry)
    return mixed


def with_values(
    ctx: DepthContext,
    carry: Carry,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    config: DepthAttentionConfig,
) -> Carry:
    """The carry with this visit's keys and values, without those that are out of later reach."""
    one_BS1 = torch.ones_like(k_BSGC[:, :, 0, :1])
    state_BSX = torch.cat([k_BSGC.flatten(2), v_BSGC.flatten(2), one_BS1], dim=-1)
    values = {**carry.depth_values, ctx.visit: state_BSX}
    if config.scope == "window":
        first = ctx.visit.index + 2 - config.window
        values = {visit: state for visit, state in values.items() if visit.index >= first}
    return replace(carry, depth_values=values)


def _in_reach(carry: Carry, visit: Visit, config: DepthAttentionConfig) -> list[Visit]:
    """Earlier visits in order."""
    earlier = sorted(
        (other for other in carry.depth_values if other.index < visit.index),
        key=lambda other: other.index,
    )
    if config.scope == "window":
        return [other for other in earlier if other.index > visit.index - config.window]
    if config.scope == "recursions":
        return [other for other in earlier if other.layer == visit.layer]
    return earlier


def _mix(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, states: list[Tensor]) -> Tensor:
    """The weighted sum over depth; a token that skipped a visit has no part of it."""
    if not states:
        return v_BSGC
    size = k_BSGC.shape[2] * k_BSGC.shape[3]
    keys = [state[..., :size].view_as(k_BSGC) for state in states]
    values = [state[..., size : 2 * size].view_as(v_BSGC) for state in states]
    present = [state[..., -1] > 0 for state in states]
    k_BSJGC = torch.stack([*keys, k_BSGC], dim=2)
    v_BSJGC = torch.stack([*values, v_BSGC], dim=2)
    present_BSJ = torch.stack([*present, torch.ones_like(present[0])], dim=2)
    q_BSGMC = q_BSHC.unflatten(2, (k_BSGC.shape[2], -1))  # M query heads of each value head
    logits_BSJGM = (q_BSGMC.unsqueeze(2) * k_BSJGC.unsqueeze(4)).sum(dim=-1)
    logits_BSJGM = logits_BSJGM.to(torch.promote_types(logits_BSJGM.dtype, torch.float32))
    logits_BSJGM = logits_BSJGM * q_BSHC.shape[-1] ** -0.5
    logits_BSJGM = logits_BSJGM.masked_fill(~present_BSJ[..., None, None], float("-inf"))
    weight_BSJG = logits_BSJGM.softmax(dim=2).mean(dim=-1).to(v_BSGC.dtype)
    mixed_BSGC: Tensor = (weight_BSJG.unsqueeze(-1) * v_BSJGC).sum(dim=2)
    return mixed_BSGC
