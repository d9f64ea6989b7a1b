"""The load-balance loss: one function, 1 at perfect balance for any pool, K and sharing of load."""

import torch
from torch import Tensor

from moebius.model.config import MoEConfig, SwitchBalanceConfig


def balance_weights(moe: MoEConfig, tau: float) -> Tensor:
    """eta, fp32 `[N]`: 1 for FFN experts, tau for zero-computation ones (MoE++ eq. 7)."""
    eta = torch.full((moe.num_experts,), tau)
    eta[: moe.count("ffn")] = 1.0
    return eta


def paper_coefficient(balance: SwitchBalanceConfig, moe: MoEConfig) -> float:
    """The coefficient of a loss that is 1 at balance, from the config's.

    MoE++ leaves its loss at `K / sum(1/eta) = K*tau / (tau*E + Z)` at balance; with `paper_scale` a
    published beta is converted by that factor.
    """
    if not balance.paper_scale:
        return balance.coefficient
    inverse_eta = float((1 / balance_weights(moe, balance.tau)).sum())
    return balance.coefficient * moe.router.selector.top_k / inverse_eta


def switch_loss(counts_GN: Tensor, prob_sums_GN: Tensor, tokens_G: Tensor, eta_N: Tensor) -> Tensor:
    """`sum_i(eta_i f_i P_i) * sum_i(1/eta_i)`, averaged over groups by their tokens.

    Switch Transformer (Fedus et al. 2021) with the weights eta of MoE++: f is an expert's share of
    the group's assignments, P its mean probability. Minimising it drives `eta_i * f_i` to the same
    value for all experts, where the loss is 1. Gradients flow through P.
    Groups without tokens contribute nothing.
    """
    share_GN = counts_GN / counts_GN.sum(dim=1, keepdim=True).clamp(min=1)
    mean_prob_GN = prob_sums_GN / tokens_G.clamp(min=1).unsqueeze(1)
    loss_G = (eta_N * share_GN * mean_prob_GN).sum(dim=1) * (1 / eta_N).sum()
    return (loss_G * tokens_G).sum() / tokens_G.sum().clamp(min=1)
