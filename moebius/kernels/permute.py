"""Moving tokens to rows that are sorted by expert, and rows back to their tokens.

Shapes: T tokens, K assignments of a token, E experts, D channels, R rows. A row belongs to one
assignment, or to none: then it is padding, `assignment_R` is -1.

A padding row is a row of zeros with weight 0: its expert makes exactly 0 of it, and writing the
few of them costs less than masking the result. What an expert makes of it never reaches a token,
and no gradient of it reaches `x` or a weight, not even one that is not finite.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Order:
    """Where the row of each assignment is."""

    assignment_R: Tensor
    """int64; which of the T * K assignments each row is, -1 for padding. Rows from `ends[-1]` on,
    which a backend leaves that does not wait for the device to know R, are padding of no expert"""
    ends_E: Tensor
    """int32; rows `ends[e-1]:ends[e]` go to expert e, padding included"""
    top_k: int
    """K; a row comes from token `assignment // K`"""
    row_TK: Tensor | None = None
    """int64; row of each assignment, -1 if it has none; for backends that need it"""
    has_padding: bool = True
    """whether a row may be padding; what masks it is left out if none is"""

    def rows_of(self, num_tokens: int) -> Tensor:
        """`row_TK`, made from `assignment_R` if the order came without."""
        if self.row_TK is not None:
            return self.row_TK
        assignment_R, total = self.assignment_R, num_tokens * self.top_k
        row = assignment_R.new_full((total + 1,), -1)
        rows = torch.arange(len(assignment_R), device=row.device)
        row.index_copy_(0, assignment_R.masked_fill(assignment_R < 0, total), rows)
        return row[:total].view(num_tokens, self.top_k)


def sort_by_expert(ids_TK: Tensor, num_experts: int, alignment: int = 1) -> Order:
    """Order of the assignments by expert, those of an expert by token.

    An id below 0 or from `num_experts` on gets no row. The rows of an expert that has any are
    padded to a multiple of `alignment`. Bytes: `8 * T * K` read, `O(R)` sorted and written.
    """
    ids = ids_TK.flatten()
    assignment_R = ((ids >= 0) & (ids < num_experts)).nonzero().squeeze(1)
    expert_R, order_R = ids[assignment_R].sort(stable=True)
    assignment_R = assignment_R[order_R]
    experts = torch.arange(num_experts, device=ids.device)
    ends_E = torch.searchsorted(expert_R, experts, right=True)
    has_padding = alignment > 1 and len(assignment_R) > 0
    if has_padding:
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        padded_E = (counts_E + alignment - 1) // alignment * alignment
        padded_ends_E = padded_E.cumsum(0)
        shift_E = (padded_ends_E - padded_E) - (ends_E - counts_E)
        row_R = torch.arange(len(expert_R), device=ids.device) + shift_E[expert_R]
        padded_R = assignment_R.new_full((int(padded_ends_E[-1]),), -1)
        assignment_R, ends_E = padded_R.index_copy_(0, row_R, assignment_R), padded_ends_E
    ends_E = ends_E.to(torch.int32)
    return Order(assignment_R, ends_E, ids_TK.shape[1], has_padding=has_padding)


def permute(x_TD: Tensor, weights_TK: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """The token of each row and the weight of its assignment, `[R, D]` and `[R]`.

    Bytes: `2 * R * D` elements forward; backward reads as many and adds them to `[T, D]`.
    """
    if not order.has_padding:
        weights_R = weights_TK.flatten().index_select(0, order.assignment_R)
        # Not `x[source]`: the gradient of indexing adds rows in the order threads get to them.
        return x_TD.index_select(0, _source(order)), weights_R
    weights_R = weights_TK.flatten().index_select(0, order.assignment_R.clamp(min=0))
    rows_RD: Tensor = _Gather.apply(x_TD, _source(order))  # type: ignore[no-untyped-call]
    return rows_RD, weights_R.masked_fill(order.assignment_R < 0, 0)


def unpermute(rows_RD: Tensor, order: Order, y_TD: Tensor) -> Tensor:
    """`y` plus each row at its token, `[T, D]`; padding rows are ignored, finite or not.

    Bytes: `(R + 2 * T) * D` elements read and `(R + T) * D` written; backward gathers as `permute`.
    """
    rows_RD = rows_RD.to(y_TD.dtype)
    if not order.has_padding:
        return y_TD.index_add(0, _source(order), rows_RD)
    out_TD: Tensor = _Scatter.apply(rows_RD, _source(order), y_TD)  # type: ignore[no-untyped-call]
    return out_TD


def _source(order: Order) -> Tensor:
    """Token of each row, -1 for padding: the division rounds down."""
    return order.assignment_R // order.top_k


def _gather(x_TD: Tensor, source_R: Tensor) -> Tensor:
    """The token of each row, zeros for padding."""
    rows_RD = x_TD.index_select(0, source_R.clamp(min=0))
    return rows_RD.index_fill_(0, (source_R < 0).nonzero().squeeze(1), 0)


def _scatter_(sum_TD: Tensor, rows_RD: Tensor, source_R: Tensor) -> Tensor:
    """Add each row to its token; padding goes to the last row of `sum`, which is cut off."""
    last = len(sum_TD) - 1
    return sum_TD.index_add_(0, source_R.masked_fill(source_R < 0, last), rows_RD)[:last]


class _Gather(torch.autograd.Function):
    """Tokens to rows; the graph of plain operations would copy the gradient to mask padding."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_R: Tensor) -> Tensor:
        ctx.save_for_backward(source_R)
        ctx.num_tokens = len(x_TD)
        return _gather(x_TD, source_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        (source_R,) = ctx.saved_tensors
        sum_TD = grad_RD.new_zeros(ctx.num_tokens + 1, *grad_RD.shape[1:])
        return _scatter_(sum_TD, grad_RD, source_R), None


class _Scatter(torch.autograd.Function):
    """Rows to tokens, in the one copy of `y` that is made anyway."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, source_R: Tensor, y_TD: Tensor) -> Tensor:
        ctx.save_for_backward(source_R)
        sum_TD = y_TD.new_empty(len(y_TD) + 1, *y_TD.shape[1:])
        sum_TD[:-1] = y_TD
        return _scatter_(sum_TD, rows_RD, source_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor]:
        (source_R,) = ctx.saved_tensors
        return _gather(grad_TD, source_R), None, grad_TD
