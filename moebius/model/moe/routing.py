"""The currency of routing over width, and the stages that only compute on it.

Stages in order (options in RouterConfig): scorer -> softmax -> selector -> weight policy. Numbers
are fp32 whatever the precision of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.model.config import SelectorConfig, WeightPolicyConfig


@dataclass(frozen=True)
class Routing:
    """Where tokens go. Ids are global expert ids; int64, as torch indexing wants them."""

    ids_TK: Tensor
    """chosen experts, -1 for an empty assignment"""
    weights_TK: Tensor
    """factor on each chosen expert's output, 0 for an empty assignment"""
    probs_TN: Tensor
    """differentiable probabilities over all experts, for losses"""
    scores_TN: Tensor
    """raw scores before normalisation; the carry of the next MoE layer"""


def select_experts(probs_TN: Tensor, selector: SelectorConfig) -> Tensor:
    """Ids of the K most probable experts, `[T, K]`; of equal ones the lower id wins."""
    order_TN = probs_TN.argsort(dim=-1, descending=True, stable=True)
    return order_TN[:, : selector.top_k]


def assignment_weights(
    probs_TN: Tensor, ids_TK: Tensor, is_null_N: Tensor, policy: WeightPolicyConfig
) -> Tensor:
    """Factors on the chosen experts' outputs, `[T, K]`.

    raw is eq. 1 of MoE++ (arXiv 2410.07348); drop_null_renormalize is what its release computes: a
    chosen zero expert (`is_null`) gets 0 and the others share 1, so {ffn, zero} weighs the ffn 1.
    """
    weights_TK = probs_TN.gather(1, ids_TK)
    if policy.kind == "raw":
        return weights_TK
    if policy.kind == "drop_null_renormalize":
        weights_TK = weights_TK.masked_fill(is_null_N[ids_TK], 0.0)
    total = weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK / total.clamp(min=torch.finfo(total.dtype).tiny)


def expert_counts(ids_TK: Tensor, group_T: Tensor, num_groups: int, num_experts: int) -> Tensor:
    """Assignments per group of tokens and expert, fp32 `[groups, N]`; empty ones count nowhere."""
    chosen = ids_TK >= 0
    slot_TK = group_T.unsqueeze(1) * num_experts + ids_TK.clamp(min=0)
    counts = torch.zeros(num_groups * num_experts, dtype=torch.float32, device=ids_TK.device)
    counts.scatter_add_(0, slot_TK.flatten(), chosen.flatten().float())
    return counts.view(num_groups, num_experts)
