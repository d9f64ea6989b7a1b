"""`moebius.kernels.rms_norm` in C++: each row is read once, forward and backward.

Shapes: D channels, N rows, P parts of the rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import rms_norm as definition
from moebius.kernels.cpp.build import DTYPES

PART = 64
"""rows over which the gradient of the gain is summed up at a time"""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, scale: Tensor | float = 1.0) -> Tensor:
    """As `moebius.kernels.rms_norm.rms_norm`, which what is neither fp32 nor bf16 takes.

    The gradients of weight and scale are added up in an order that only the shape determines.
    """
    if x.dtype not in DTYPES:
        return definition.rms_norm(x, weight_D, eps, scale)
    gain_D = definition.gain(weight_D, scale, x.dtype).float()
    y: Tensor = _RMSNorm.apply(x, gain_D, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        x_ND, gain_D = x.reshape(-1, x.shape[-1]).contiguous(), gain_D.contiguous()
        y_ND, rstd_N = torch.empty_like(x_ND), gain_D.new_empty(len(x_ND))
        torch.ops.moebius_cpp.rms_norm(x_ND, gain_D, eps, y_ND, rstd_N)
        ctx.save_for_backward(x_ND, gain_D, rstd_N)
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, gain_D, rstd_N = ctx.saved_tensors
        dy_ND, dx_ND = dy.reshape(x_ND.shape).contiguous(), torch.empty_like(x_ND)
        d_gain_PD = gain_D.new_zeros(-(-len(x_ND) // PART), len(gain_D))
        torch.ops.moebius_cpp.rms_norm_backward(dy_ND, x_ND, gain_D, rstd_N, dx_ND, d_gain_PD, PART)
        return dx_ND.view(dy.shape), d_gain_PD.sum(0), None
