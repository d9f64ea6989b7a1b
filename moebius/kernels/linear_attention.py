"""Attention without softmax over rows from which tokens may be missing.

Shapes: B rows, S queries, J keys, H heads, N channels of queries and keys, D of values.
"""

import torch
from torch import Tensor


def linear_attention(q_BSHN: Tensor, k_BJHN: Tensor, v_BJD: Tensor, mask_BSJ: Tensor) -> Tensor:
    """`sum_j (q_i k_j) v_j` over the allowed keys, `[B, S, H, D]`; all heads mix the same values.

    Forward FLOPs: `2 * B * S * J * H * (N + D)`; the masked half is computed too.
    """
    scores_BHSJ = torch.einsum("bihn,bjhn->bhij", q_BSHN, k_BJHN)
    scores_BHSJ = scores_BHSJ.masked_fill(~mask_BSJ.unsqueeze(1), 0.0)
    return torch.einsum("bhij,bjd->bihd", scores_BHSJ, v_BJD)
