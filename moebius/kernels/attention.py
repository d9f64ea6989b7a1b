"""Causal attention inside documents, over rows from which tokens may be missing.

Shapes: B rows, S tokens, J keys, L places of a full row, H query heads, G key-value heads, C
channels of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.kernels.block_attention import BLOCK, block_attention

KEPT_BYTES = 64 * 2**20
"""what the probabilities of all pairs of blocks of a layer may take at most"""


@dataclass(frozen=True)
class Sight:
    """Whom each of S queries may look at among J keys; what is needed of it is made once."""

    make_mask: Callable[[], Tensor]
    segment_ids_BS: Tensor | None = None
    """where keys are those of the queries, in order: the document of each slot, those of a document
    side by side. Then every slot sees the earlier ones of its document and itself; what empty slots
    at the end of a row see does not matter"""

    @cached_property
    def mask_BSJ(self) -> Tensor:
        """Bool; no row of it is all false."""
        return self.make_mask()

    @cached_property
    def begins_BS(self) -> Tensor:
        """Whether a document begins at a slot."""
        assert self.segment_ids_BS is not None
        return document_begins(self.segment_ids_BS)

    @cached_property
    def begins(self) -> list[list[int]]:
        """For each row the slots where a document begins, ascending; the host waits for them."""
        rows = self.begins_BS.tolist()
        return [[slot for slot, begins in enumerate(row) if begins] for row in rows]

    @cached_property
    def ends(self) -> Tensor:
        """0 and the ends of all documents, rows laid end to end, int32."""
        starts = self.begins_BS.flatten().nonzero().squeeze(1)
        return torch.cat([starts, starts.new_tensor([self.begins_BS.numel()])]).to(torch.int32)

    @cached_property
    def longest(self) -> int:
        """Slots of the longest document."""
        return int(self.ends.diff().max())


def sdpa(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: Sight) -> Tensor:
    """`masked_attention`: the definition, for any mask."""
    return masked_attention(q_BSHC, k_BJGC, v_BJGC, sight.mask_BSJ)


def blocks(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: Sight) -> Tensor:
    """`block_attention` where keys are those of the queries and rows are short, else `sdpa`."""
    rows, slots, heads, _ = q_BSHC.shape
    kept = 4 * rows * heads * slots * (slots + BLOCK) // 2
    if sight.segment_ids_BS is None or kept > KEPT_BYTES or not q_BSHC.numel():
        return sdpa(q_BSHC, k_BJGC, v_BJGC, sight)
    return block_attention(q_BSHC, k_BJGC, v_BJGC, sight.begins)


def document_begins(segment_ids_BS: Tensor) -> Tensor:
    """Whether a document begins at a slot, bool."""
    begins_BS = segment_ids_BS.new_ones(segment_ids_BS.shape, dtype=torch.bool)
    begins_BS[:, 1:] = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    return begins_BS


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


def seen_mask(
    place_BQ: Tensor, segment_ids_BQ: Tensor, row_segment_ids_BL: Tensor, present_BL: Tensor
) -> Tensor:
    """Who may look at whom where keys stand at their places in full rows, bool `[B, Q, L]`.

    A token at place p sees the present keys of its document at places up to p. Empty slots (place
    -1) see the first place only: a row of the mask is never all false.
    """
    place_L = torch.arange(row_segment_ids_BL.shape[1], device=place_BQ.device)
    mask = (place_L <= place_BQ.unsqueeze(2)) & present_BL.unsqueeze(1)
    mask &= segment_ids_BQ.unsqueeze(2) == row_segment_ids_BL.unsqueeze(1)
    return mask | ((place_BQ < 0).unsqueeze(2) & (place_L == 0))


def masked_attention(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, mask_BSJ: Tensor) -> Tensor:
    """`softmax(q k / sqrt(C) + mask) v` of S queries and J keys, grouped heads, `[B, S, H, C]`.

    Query head h reads key-value head `h // (H / G)`. Forward FLOPs: `4 * B * S * J * H * C`; the
    masked half of the scores is computed, and counted, as by every dense-mask backend.
    """
    out_BHSC = F.scaled_dot_product_attention(
        q_BSHC.transpose(1, 2),
        k_BJGC.transpose(1, 2),
        v_BJGC.transpose(1, 2),
        attn_mask=mask_BSJ.unsqueeze(1),
        enable_gqa=q_BSHC.shape[2] != k_BJGC.shape[2],
    )
    return out_BHSC.transpose(1, 2)


def stick_breaking_attention(
    q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, mask_BSJ: Tensor
) -> Tensor:
    """`sum_j a_ij v_j` with `a_ij = b_ij * prod_{j<l<=i} (1 - b_il)`, `[B, S, H, C]`.

    `b_ij = sigmoid(q_i k_j / sqrt(C))` (ModuleFormer, arXiv 2306.04640): going back from token i,
    each allowed token takes the share b of what is left of a stick. The weights of a row add up to
    at most 1, and recency is built in: no positional encoding. The product runs over the tokens
    that the mask allows. Computed in fp32 from logarithms; head h reads key-value head
    `h // (H / G)`. Forward FLOPs: `4 * B * S * J * H * C`.
    """
    groups = q_BSHC.shape[2] // k_BJGC.shape[2]
    k_BJHC, v_BJHC = (t.repeat_interleave(groups, dim=2) for t in (k_BJGC, v_BJGC))
    logits_BHSJ = torch.einsum("bihc,bjhc->bhij", q_BSHC, k_BJHC)
    logits_BHSJ = logits_BHSJ.to(torch.promote_types(logits_BHSJ.dtype, torch.float32))
    logits_BHSJ = logits_BHSJ * q_BSHC.shape[-1] ** -0.5
    mask_B1SJ = mask_BSJ.unsqueeze(1)
    left_BHSJ = F.logsigmoid(-logits_BHSJ).masked_fill(~mask_B1SJ, 0.0)
    # The sum over the tokens between j and i: all from j on, less j itself.
    later_BHSJ = left_BHSJ.flip(-1).cumsum(-1).flip(-1) - left_BHSJ
    log_weight = (F.logsigmoid(logits_BHSJ) + later_BHSJ).masked_fill(~mask_B1SJ, float("-inf"))
    return torch.einsum("bhij,bjhc->bihc", log_weight.exp().to(v_BJHC.dtype), v_BJHC)
