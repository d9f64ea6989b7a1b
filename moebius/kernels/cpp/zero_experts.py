"""`moebius.kernels.zero_experts` in C++: activations are read once, forward and backward.

Shapes: T tokens, D hidden, C constant experts, P parts of the tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import zero_experts as definition
from moebius.kernels.cpp.build import DTYPES

PART = 64
"""tokens over which gradients of the constants are added up at a time"""


def affine_experts(
    x_TD: Tensor,
    copy_weight_T: Tensor,
    constant_weight_TC: Tensor,
    mix_logits_TC2: Tensor,
    constants_CD: Tensor,
) -> Tensor:
    """As the definition, which what is neither fp32 nor bf16 takes.

    Sums are in fp32 and rounded once, gradients added up in an order that only shapes determine.
    """
    tensors = (x_TD, copy_weight_T, constant_weight_TC, mix_logits_TC2, constants_CD)
    if not all(tensor.dtype in DTYPES for tensor in tensors):
        return definition.affine_experts(*tensors)
    y_TD: Tensor = _AffineExperts.apply(x_TD, *(t.float() for t in tensors[1:]))  # type: ignore[no-untyped-call]
    return y_TD


class _AffineExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        read = tuple(tensor.contiguous() for tensor in tensors)
        ctx.save_for_backward(*read)
        y_TD = torch.empty_like(read[0])
        torch.ops.moebius_cpp.affine_experts(*read, y_TD)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, ...]:
        read = ctx.saved_tensors
        *others, constants_CD = read
        grads = tuple(map(torch.empty_like, others))
        d_constants_PCD = constants_CD.new_zeros(-(-len(dy_TD) // PART), *constants_CD.shape)
        torch.ops.moebius_cpp.affine_experts_backward(
            dy_TD.contiguous(), *read, PART, *grads, d_constants_PCD
        )
        return *grads, d_constants_PCD.sum(0)
