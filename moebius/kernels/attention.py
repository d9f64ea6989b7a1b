"""Causal attention inside documents, over rows from which tokens may be missing.

Shapes: B rows, S tokens, H query heads, G key-value heads, C channels of one head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_mask(segment_ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
    """Who may look at whom, bool `[B, S, S]` (query, key).

    A token sees itself and every earlier *present* token of its own document. Order in the row
    stands for order in time, so the mask of a selection with sorted indices is causal too.
    Empty slots (`valid` false) see only themselves: a row of the mask is never all false, which
    would turn softmax into NaN.
    """
    length = segment_ids_BS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BS.device).tril()
    mask = causal & (segment_ids_BS.unsqueeze(2) == segment_ids_BS.unsqueeze(1))
    if valid_BS is not None:
        mask &= valid_BS.unsqueeze(1) & valid_BS.unsqueeze(2)
        mask |= torch.eye(length, dtype=torch.bool, device=mask.device)
    return mask


def masked_attention(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask_BSS: Tensor) -> Tensor:
    """`softmax(q k / sqrt(C) + mask) v` with grouped heads, `[B, S, H, C]`.

    Query head h reads key-value head `h // (H / G)`. Forward FLOPs: `4 * B * S**2 * H * C`; the
    masked half of the scores is computed, and counted, as by every dense-mask backend.
    """
    out_BHSC = F.scaled_dot_product_attention(
        q_BSHC.transpose(1, 2),
        k_BSGC.transpose(1, 2),
        v_BSGC.transpose(1, 2),
        attn_mask=mask_BSS.unsqueeze(1),
        enable_gqa=q_BSHC.shape[2] != k_BSGC.shape[2],
    )
    return out_BHSC.transpose(1, 2)


def stick_breaking_attention(
    q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask_BSS: Tensor
) -> Tensor:
    """`sum_j a_ij v_j` with `a_ij = b_ij * prod_{j<l<=i} (1 - b_il)`, `[B, S, H, C]`.

    `b_ij = sigmoid(q_i k_j / sqrt(C))` (ModuleFormer, arXiv 2306.04640): going back from token i,
    each allowed token takes the share b of what is left of a stick. The weights of a row add up to
    at most 1, and recency is built in: no positional encoding. The product runs over the tokens
    that the mask allows. Computed in fp32 from logarithms; head h reads key-value head
    `h // (H / G)`. Forward FLOPs: `4 * B * S**2 * H * C`.
    """
    groups = q_BSHC.shape[2] // k_BSGC.shape[2]
    k_BSHC, v_BSHC = (t.repeat_interleave(groups, dim=2) for t in (k_BSGC, v_BSGC))
    logits_BHSS = torch.einsum("bihc,bjhc->bhij", q_BSHC, k_BSHC)
    logits_BHSS = logits_BHSS.to(torch.promote_types(logits_BHSS.dtype, torch.float32))
    logits_BHSS = logits_BHSS * q_BSHC.shape[-1] ** -0.5
    mask_B1SS = mask_BSS.unsqueeze(1)
    left_BHSS = F.logsigmoid(-logits_BHSS).masked_fill(~mask_B1SS, 0.0)
    # The sum over the tokens between j and i: all from j on, less j itself.
    later_BHSS = left_BHSS.flip(-1).cumsum(-1).flip(-1) - left_BHSS
    log_weight = (F.logsigmoid(logits_BHSS) + later_BHSS).masked_fill(~mask_B1SS, float("-inf"))
    return torch.einsum("bhij,bjhc->bihc", log_weight.exp().to(v_BSHC.dtype), v_BSHC)
