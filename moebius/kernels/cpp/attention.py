"""`moebius.kernels.attention` in C++: pairs of queries and keys are never in memory all at once.

Shapes: B rows, S tokens, J keys, H query heads, G key-value heads, C channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import attention as definition
from moebius.kernels.attention import Sight
from moebius.kernels.cpp.build import DTYPES
from moebius.kernels.precision import for_products


def documents(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: Sight) -> Tensor:
    """`masked_attention` where keys are those of the queries, else `blocks`, `[B, S, H, C]`.

    Forward FLOPs: `4 * H * C` for each pair that sees each other, and for some that share a tile
    with them. Kept for the backward pass: the output, and 4 bytes for each query and head.
    """
    q, k, v = (for_products(t) for t in (q_BSHC, k_BJGC, v_BJGC))
    if sight.segment_ids_BS is None or not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return definition.blocks(q_BSHC, k_BJGC, v_BJGC, sight)
    out: Tensor = _Attention.apply(q, k, v, sight.begins_BS)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, begins_BS: Tensor) -> Tensor:
        q_BSHC, k_BSGC, v_BSGC = (t.contiguous() for t in (q, k, v))
        ctx.scale = q_BSHC.shape[-1] ** -0.5
        out_BSHC = torch.empty_like(q_BSHC)
        log_sums_BSH = q_BSHC.new_empty(q_BSHC.shape[:-1], dtype=torch.float32)
        read = (q_BSHC, k_BSGC, v_BSGC, begins_BS)
        torch.ops.moebius_cpp.attention(*read, ctx.scale, out_BSHC, log_sums_BSH)
        ctx.save_for_backward(*read, out_BSHC, log_sums_BSH)
        return out_BSHC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor | None, ...]:
        *read, out_BSHC, log_sums_BSH = ctx.saved_tensors
        grads = tuple(map(torch.empty_like, read[:3]))
        torch.ops.moebius_cpp.attention_backward(
            grad_BSHC.contiguous(), *read, ctx.scale, out_BSHC, log_sums_BSH, *grads
        )
        return *grads, None
