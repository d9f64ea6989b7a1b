"""Entropies of routing distributions."""

import math
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["shannon", "tsallis", "renyi"]


def entropy(probs_TN: Tensor, measure: Measure, index: float, normalized: bool) -> Tensor:
    """Entropy of each row of probabilities, `[T]`; with `normalized` 1 for equal probabilities.

    shannon `-sum p log p`; tsallis `(1 - sum p^q) / (q - 1)`; renyi `log(sum p^q) / (1 - q)`, with
    q the `index`. Both tend to shannon as q goes to 1, where they are replaced by it.
    """
    num_experts = probs_TN.shape[-1]
    # At 0 the derivative of p log p is infinite; a value that small changes no sum.
    probs_TN = probs_TN.clamp(min=torch.finfo(probs_TN.dtype).tiny)
    if measure == "shannon" or index == 1.0:
        values, largest = -(probs_TN * probs_TN.log()).sum(dim=-1), math.log(num_experts)
    elif measure == "tsallis":
        values = (1 - probs_TN.pow(index).sum(dim=-1)) / (index - 1)
        largest = (1 - num_experts ** (1 - index)) / (index - 1)
    else:
        values = probs_TN.pow(index).sum(dim=-1).log() / (1 - index)
        largest = math.log(num_experts)
    if not normalized or num_experts == 1:
        return values
    return values / largest
