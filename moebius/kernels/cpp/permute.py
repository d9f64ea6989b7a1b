"""`moebius.kernels.permute` in C++: rows move once, and what is added to them is there already.

Shapes: T tokens, K assignments of a token, R rows, D hidden.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import permute as definition
from moebius.kernels.cpp.build import DTYPES
from moebius.kernels.permute import Order


def sort_by_expert(ids_TK: Tensor, num_experts: int, alignment: int = 1) -> Order:
    """As the definition of int64 ids, with `row_TK`: a counting sort on one thread."""
    most = ids_TK.numel() + min(num_experts, ids_TK.numel()) * (alignment - 1)
    assignment_R, row_TK = ids_TK.new_empty(most), ids_TK.new_empty(ids_TK.shape)
    ends_E = ids_TK.new_empty(num_experts, dtype=torch.int32)
    rows = torch.ops.moebius_cpp.sort_by_expert(
        ids_TK.contiguous(), alignment, assignment_R, row_TK, ends_E
    )
    padded = alignment > 1 and rows > 0
    return Order(assignment_R[:rows], ends_E, ids_TK.shape[1], row_TK, has_padding=padded)


def permute(x_TD: Tensor, weights_TK: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """As the definition; gradients are added up in fp32 and rounded once."""
    if x_TD.dtype not in DTYPES or weights_TK.dtype not in DTYPES:
        return definition.permute(x_TD, weights_TK, order)
    row_TK = order.rows_of(len(x_TD))
    moved: tuple[Tensor, Tensor] = _Permute.apply(  # type: ignore[no-untyped-call]
        x_TD, weights_TK, order.assignment_R, row_TK
    )
    return moved


def unpermute(rows_RD: Tensor, order: Order, y_TD: Tensor) -> Tensor:
    """As the definition, added up in fp32 and rounded once; padding rows are not even read."""
    if rows_RD.dtype not in DTYPES or y_TD.dtype not in DTYPES:
        return definition.unpermute(rows_RD, order, y_TD)
    out_TD: Tensor = _Unpermute.apply(  # type: ignore[no-untyped-call]
        rows_RD.to(y_TD.dtype), order.assignment_R, order.rows_of(len(y_TD)), y_TD
    )
    return out_TD


def _gather(x_TD: Tensor, source_R: Tensor, share: int = 1) -> Tensor:
    out_RD = x_TD.new_empty(len(source_R), x_TD.shape[1])
    torch.ops.moebius_cpp.gather_rows(x_TD.contiguous(), source_R.contiguous(), share, out_RD)
    return out_RD


def _sum(rows_RD: Tensor, row_TK: Tensor, base_TD: Tensor | None = None) -> Tensor:
    out_TD = rows_RD.new_empty(len(row_TK), rows_RD.shape[1])
    torch.ops.moebius_cpp.sum_rows(rows_RD.contiguous(), row_TK.contiguous(), base_TD, out_TD)
    return out_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, assignment_R: Tensor, row_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(row_TK)
        rows_RD = _gather(x_TD, assignment_R, row_TK.shape[1])
        return rows_RD, _gather(weights_TK.reshape(-1, 1), assignment_R).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RD: Tensor, grad_weights_R: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        grad_weights = _gather(grad_weights_R.unsqueeze(1), row_TK.flatten())
        return _sum(grad_RD, row_TK), grad_weights.view(row_TK.shape), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, assignment_R: Tensor, row_TK: Tensor, y_TD: Tensor
    ) -> Tensor:
        ctx.save_for_backward(assignment_R)
        ctx.top_k = row_TK.shape[1]
        return _sum(rows_RD, row_TK, y_TD.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (assignment_R,) = ctx.saved_tensors
        return _gather(grad_TD, assignment_R, ctx.top_k), None, None, grad_TD
