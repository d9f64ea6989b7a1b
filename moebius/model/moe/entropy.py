"""Entropies of routing distributions."""

import math
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["shannon", "tsallis", "renyi"]


def entropy(probs_TN: Tensor, measure: Measure, index: float, normalized: bool) -> Tensor:
    """Entropy of each row of probabilities, `[T]`; with `normalized` 1 for equal probabilities.

    shannon `-sum p log p`; tsallis `(1 - sum p^q) / (q - 1)`; renyi `log(sum p^q) / (1 - q)`, with
    q the `index`. Both tend to shannon as q goes to 1, where their digits cancel: within 0.001 of 1
    they are shannon.
    """
    num_experts = probs_TN.shape[-1]
    tiny = torch.finfo(probs_TN.dtype).tiny
    # At 0 the derivative of p log p is infinite; the clamped value is left out of sums of powers.
    clamped_TN = probs_TN.clamp(min=tiny)
    log_TN = clamped_TN.log()
    if measure == "shannon" or abs(index - 1) < 1e-3:
        values, largest = -(clamped_TN * log_TN).sum(dim=-1), math.log(num_experts)
    else:
        powers_TN = (index * log_TN).masked_fill(probs_TN < tiny, float("-inf"))
        log_sum_T = powers_TN.logsumexp(dim=-1)
        values, largest = log_sum_T / (1 - index), math.log(num_experts)
        if measure == "tsallis":
            values = -log_sum_T.expm1() / (index - 1)
            largest = (1 - num_experts ** (1 - index)) / (index - 1)
    if not normalized or num_experts == 1:
        return values
    return (values / largest).clamp(max=1.0)  # it may round above
