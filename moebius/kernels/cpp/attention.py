"""Attention in blocks with its softmax in C++: one pass over scores, in their precision.

Shapes: B rows, S tokens, J keys, H query heads, G key-value heads, C channels; X, M, J as in
`moebius.kernels.block_attention`.
"""

import torch
from torch import Tensor

from moebius.kernels import attention, block_attention
from moebius.kernels.block_attention import Softmax
from moebius.kernels.cpp.build import DTYPES


def blocks(q_BSHC: Tensor, k_BJGC: Tensor, v_BJGC: Tensor, sight: attention.Sight) -> Tensor:
    """As `moebius.kernels.attention.blocks`; probabilities of products in bf16 are kept in bf16."""
    return attention.blocks(q_BSHC, k_BJGC, v_BJGC, sight, SOFTMAX)


def _probabilities(scores_XMJ: Tensor, queries: int, scale: float) -> Tensor:
    if scores_XMJ.dtype not in DTYPES:
        return block_attention.PLAIN.probabilities(scores_XMJ, queries, scale)
    torch.ops.moebius_cpp.masked_softmax(scores_XMJ.flatten(0, 1), queries, scale)
    return scores_XMJ


def _gradients(d_probs_XMJ: Tensor, probs_XMJ: Tensor, scale: float) -> Tensor:
    if probs_XMJ.dtype not in DTYPES:
        return block_attention.PLAIN.gradients(d_probs_XMJ, probs_XMJ, scale)
    d_scores_XMJ = d_probs_XMJ.to(probs_XMJ.dtype)
    torch.ops.moebius_cpp.masked_softmax_backward(
        d_scores_XMJ.flatten(0, 1), probs_XMJ.flatten(0, 1), scale
    )
    return d_scores_XMJ


SOFTMAX = Softmax(_probabilities, _gradients)
