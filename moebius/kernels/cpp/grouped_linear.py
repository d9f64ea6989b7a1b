"""`moebius.kernels.grouped_linear` with groups side by side on the threads of a CPU.

Shapes: R rows sorted by group, E groups, I input and O output channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import grouped_linear as definition
from moebius.kernels.cpp.build import DTYPES
from moebius.kernels.precision import for_products


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """As the definition, which what is neither fp32 nor bf16 takes.

    Each product runs on one thread: what they share out is groups and pieces of groups. torch's
    FlopCounterMode does not see them.
    """
    rows_RI, weight_EOI = for_products(rows_RI), for_products(weight_EOI)
    if rows_RI.dtype not in DTYPES or weight_EOI.dtype != rows_RI.dtype:
        return definition.grouped_linear(rows_RI, weight_EOI, ends_E)
    out_RO: Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        rows_RI.contiguous(), weight_EOI.contiguous(), ends_E.contiguous()
    )
    return out_RO


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_EOI, ends_E)
        out_RO = rows_RI.new_empty(len(rows_RI), weight_EOI.shape[1])
        # Detached: threads of their own would record what they do to tensors that need gradients.
        torch.ops.moebius_cpp.grouped_product(
            rows_RI.detach(), weight_EOI.detach().transpose(1, 2), ends_E, out_RO
        )
        return out_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_EOI, ends_E = ctx.saved_tensors
        grad_RO, d_rows_RI, d_weight_EOI = grad_RO.contiguous(), None, None
        rows_RI, weight_EOI = rows_RI.detach(), weight_EOI.detach()
        if ctx.needs_input_grad[0]:
            d_rows_RI = torch.empty_like(rows_RI)
            torch.ops.moebius_cpp.grouped_product(grad_RO, weight_EOI, ends_E, d_rows_RI)
        if ctx.needs_input_grad[1]:
            d_weight_EOI = torch.empty_like(weight_EOI)
            torch.ops.moebius_cpp.grouped_weight_gradient(grad_RO, rows_RI, ends_E, d_weight_EOI)
        return d_rows_RI, d_weight_EOI, None
