"""Attention over packed documents, by kernels for GPUs that take ends of documents for a mask."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from moebius.kernels.attention import Sight, sdpa
from moebius.kernels.precision import for_products

Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""queries `[T, H, C]`, keys and values `[T, G, C]`, int32 ends of documents `[documents + 1]` that
begin with 0, tokens of the longest: causal attention inside of documents, `[T, H, C]`"""


def varlen(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: Sight) -> Tensor:
    """`sdpa` by `torch.nn.attention.varlen`: FlashAttention 2, or 3 or 4 where activated."""
    return packed(_varlen, q_BSHC, k_BJGC, v_BJGC, sight)


def flash_attn(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: Sight) -> Tensor:
    """`sdpa` by the package flash-attn (Dao 2023, arXiv 2307.08691)."""
    return packed(_flash_attn, q_BSHC, k_BJGC, v_BJGC, sight)


def packed(
    attention: Packed, q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: Sight
) -> Tensor:
    """Rows below each other; `sdpa` where keys are not those of the queries, in their order."""
    if sight.segment_ids_BS is None or not q_BSHC.numel():
        return sdpa(q_BSHC, k_BJGC, v_BJGC, sight)
    q, k, v = (for_products(t).flatten(0, 1) for t in (q_BSHC, k_BJGC, v_BJGC))
    return attention(q, k, v, sight.ends, sight.longest).view_as(q_BSHC)


def _varlen(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, ends: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Not `enable_gqa`, which torch 2.11 does not know.
    groups = q_THC.shape[1] // k_TGC.shape[1]
    k_THC, v_THC = (t.repeat_interleave(groups, dim=1) for t in (k_TGC, v_TGC))
    out = varlen_attn(q_THC, k_THC, v_THC, ends, ends, longest, longest, window_size=(-1, 0))
    return cast(Tensor, out)


def _flash_attn(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, ends: Tensor, longest: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q_THC, k_TGC, v_TGC, ends, ends, longest, longest, causal=True
    )
    return out
