"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467) with a gain.

Shapes: D channels; the leading dimensions are any, N rows in all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, scale: Tensor | float = 1.0) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight * scale` over the last dimension, in the dtype of `x`.

    `scale` is what a visit of a shared layer multiplies by: a number, or a vector `[D]`, which
    takes a gradient as the weight does. Computed in fp32 (fp64 stays fp64) and rounded once.

    FLOPs: about `4 * N * D`, and `9 * N * D` backward. Bytes that have to be moved, at b per
    element: forward reads x and writes y, `2 * b * N * D`; backward reads x and dy and writes dx,
    `3 * b * N * D`; only x and 4 bytes of each row are kept in between. There are no second
    derivatives on a CPU.
    """
    gain_D = gain(weight_D, scale, x.dtype)
    if x.device.type == "cpu":
        y: Tensor = _RMSNormFunction.apply(x, gain_D, eps)  # type: ignore[no-untyped-call]
        return y
    return F.rms_norm(x.to(gain_D.dtype), gain_D.shape, gain_D, eps).to(x.dtype)


def gain(weight_D: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """`weight * scale` in the precision in which rows of `dtype` are normalised."""
    gain_D = weight_D.to(torch.promote_types(dtype, torch.float32))
    if isinstance(scale, Tensor) or scale != 1:
        gain_D = gain_D * scale
    return gain_D


class _RMSNormFunction(torch.autograd.Function):
    """What autograd makes of `F.rms_norm` on a CPU takes twice to four times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        exact = x.to(gain_D.dtype)
        y = exact * exact
        rstd = y.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(exact, rstd, out=y).mul_(gain_D)
        ctx.save_for_backward(x, gain_D, rstd)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, rstd = ctx.saved_tensors
        exact, dy = x.to(gain_D.dtype), dy.to(gain_D.dtype)
        product = (dy * exact).mul_(rstd)
        d_gain_D = product.reshape(-1, len(gain_D)).sum(0)
        along = product.mul_(gain_D).mean(-1, keepdim=True).mul_(rstd).mul_(rstd)
        dx = torch.mul(dy, gain_D, out=product).mul_(rstd).addcmul_(exact, along, value=-1)
        return dx.to(x.dtype), d_gain_D, None
