"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), rotate-half convention.

Shapes: B rows, S tokens, H heads, C channels of one head.
"""

import torch
from torch import Tensor


def rope_tables(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, fp32 `[B, S, C]` each.

    Channel pair i of a token at position p turns by `p * theta**(-2i/C)`; both halves of the
    channels carry the same angles, so that applying the rotation needs no interleaving.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device)
    frequency = theta ** (-exponent / head_dim)
    angle = positions_BS.float().unsqueeze(-1) * frequency
    angle_BSC = torch.cat([angle, angle], dim=-1)
    return angle_BSC.cos(), angle_BSC.sin()


def apply_rope(x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Rotate queries or keys; computed in the tables' precision, returned in that of `x`."""
    first, second = x_BSHC.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    cos, sin = cos_BSC.unsqueeze(2), sin_BSC.unsqueeze(2)
    return (x_BSHC * cos + rotated * sin).to(x_BSHC.dtype)
