"""`moebius.kernels.rope` in C++: one pass instead of five, forward and backward.

Shapes: B rows, S tokens, H heads, C channels of one head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import rope as definition
from moebius.kernels.cpp.build import DTYPES


def apply_rope(x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """As `moebius.kernels.rope.apply_rope`, which what is neither fp32 nor bf16 takes."""
    if x_BSHC.dtype not in DTYPES or cos_BSC.dtype != torch.float32:
        return definition.apply_rope(x_BSHC, cos_BSC, sin_BSC)
    y_BSHC: Tensor = _Rope.apply(x_BSHC, cos_BSC, sin_BSC)  # type: ignore[no-untyped-call]
    return y_BSHC


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BSC, sin_BSC)
        return _turned(x_BSHC, cos_BSC, sin_BSC, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSHC: Tensor) -> tuple[Tensor, None, None]:
        cos_BSC, sin_BSC = ctx.saved_tensors
        return _turned(dy_BSHC, cos_BSC, sin_BSC, backward=True), None, None


def _turned(x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor, backward: bool) -> Tensor:
    heads, width = x_BSHC.shape[2:]
    x_RHC = x_BSHC.reshape(-1, heads, width).contiguous()
    cos_RC, sin_RC = (
        t.expand(*x_BSHC.shape[:2], width).reshape(-1, width).contiguous()
        for t in (cos_BSC, sin_BSC)
    )
    y_RHC = torch.empty_like(x_RHC)
    torch.ops.moebius_cpp.rope(x_RHC, cos_RC, sin_RC, y_RHC, backward)
    return y_RHC.view(x_BSHC.shape)
