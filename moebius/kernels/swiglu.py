"""The activation of feed-forwards: SwiGLU (Shazeer 2020, arXiv 2002.05202).

Shapes: R rows, F width.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise.

    Bytes that have to be moved, at b per element of the result: `3 * b`, and `5 * b` backward.
    """
    return F.silu(gate) * up


def weighted_swiglu(gate_up_R2F: Tensor, weights_R: Tensor) -> Tensor:
    """`weight * silu(gate) * up` of rows that hold gate and up side by side, `[R, F]`."""
    gate, up = gate_up_R2F.chunk(2, dim=-1)
    return swiglu(gate, up) * weights_R.to(gate.dtype).unsqueeze(1)
