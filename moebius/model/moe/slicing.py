"""Turning a dense feed-forward into experts."""

import torch
from torch import Tensor


def slice_dense(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Weights `gate_up [E, 2F/E, D]` and `down [E, D, F/E]` of experts that add up to a SwiGLU.

    Consecutive neurons form an expert, as in FactorLLM and SPT. All experts with weight 1 are the
    dense layer; with k of them weights `Ones(scale=E / k)` keeps its scale.
    Raises ValueError where the width is no multiple of the number of experts.
    """
    width, hidden = gate_FD.shape
    if width % num_experts:
        raise ValueError(f"a width of {width} cannot be cut into {num_experts} equal experts")
    parts = (num_experts, width // num_experts, hidden)
    gate_up = torch.cat([gate_FD.reshape(parts), up_FD.reshape(parts)], dim=1)
    down = down_DF.reshape(hidden, num_experts, -1).transpose(0, 1).contiguous()
    return gate_up, down
