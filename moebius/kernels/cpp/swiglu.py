"""SwiGLU in one pass forward and one backward, alone and in experts; gate and up are all it keeps.

Shapes: R rows, E experts, D hidden, F width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import swiglu as definition
from moebius.kernels.cpp.build import DTYPES
from moebius.kernels.cpp.grouped_linear import grouped_linear


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded once; what is neither fp32 nor bf16 takes the definition."""
    if gate.dtype != up.dtype or gate.dtype not in DTYPES:
        return definition.swiglu(gate, up)
    y: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def grouped_swiglu(
    rows_RD: Tensor, weights_R: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """As `moebius.kernels.grouped_swiglu.grouped_swiglu`; router weights keep their precision."""
    gate_up_R2F = grouped_linear(rows_RD, gate_up_E2FD, ends_E)
    return grouped_linear(weighted_swiglu(gate_up_R2F, weights_R), down_EDF, ends_E)


def weighted_swiglu(gate_up_R2F: Tensor, weights_R: Tensor) -> Tensor:
    """`weight * silu(gate) * up`, `[R, F]`; what is neither fp32 nor bf16 takes the definition."""
    if gate_up_R2F.dtype not in DTYPES:
        return definition.weighted_swiglu(gate_up_R2F, weights_R)
    y_RF: Tensor = _WeightedSwiGLU.apply(gate_up_R2F.contiguous(), weights_R.float())  # type: ignore[no-untyped-call]
    return y_RF


class _SwiGLU(torch.autograd.Function):
    """Of any shape; rows are what has the last dimension."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate_RF, up_RF = (t.reshape(-1, t.shape[-1]).contiguous() for t in (gate, up))
        ctx.save_for_backward(gate_RF, up_RF)
        out_RF = torch.empty_like(gate_RF)
        torch.ops.moebius_cpp.swiglu(gate_RF, up_RF, None, out_RF)
        return out_RF.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = ctx.saved_tensors
        d_gate_RF, d_up_RF = torch.empty_like(gate_RF), torch.empty_like(up_RF)
        torch.ops.moebius_cpp.swiglu_backward(
            grad.reshape(gate_RF.shape).contiguous(), gate_RF, up_RF, None, d_gate_RF, d_up_RF, None
        )
        return d_gate_RF.view(grad.shape), d_up_RF.view(grad.shape)


class _WeightedSwiGLU(torch.autograd.Function):
    """Gate and up side by side, and so their gradients: nothing is put together."""

    @staticmethod
    def forward(ctx: Any, gate_up_R2F: Tensor, weights_R: Tensor) -> Tensor:
        gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up_R2F, weights_R)
        out_RF = torch.empty_like(gate_RF, memory_format=torch.contiguous_format)
        torch.ops.moebius_cpp.swiglu(gate_RF, up_RF, weights_R.contiguous(), out_RF)
        return out_RF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_R2F, weights_R = ctx.saved_tensors
        d_gate_up_R2F, d_weights_R = torch.empty_like(gate_up_R2F), torch.empty_like(weights_R)
        torch.ops.moebius_cpp.swiglu_backward(
            grad_RF.contiguous(),
            *gate_up_R2F.chunk(2, dim=-1),
            weights_R.contiguous(),
            *d_gate_up_R2F.chunk(2, dim=-1),
            d_weights_R,
        )
        return d_gate_up_R2F, d_weights_R
