"""Moving tokens to rows that are sorted by expert, and rows back to their tokens, in Triton.

A counting sort puts each assignment in its row without waiting for the device: R is what the rows
can be at most, and rows from `ends[-1]` on are padding. Both ways rows move, every row of the
result is written once, by the map that knows where it comes from: no atomics, the same sum each
time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import permute as definition
from moebius.kernels.permute import Order
from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

SORT_LANES, SORT_WARPS = 8192, 4
"""entries of the table (assignments x experts) of a program that sorts"""
ROW_BLOCK, CHANNEL_BLOCK, ROW_WARPS = 4, 1024, 4
"""the tile of a program that moves rows"""


def sort_by_expert(ids_TK: Tensor, num_experts: int, alignment: int = 1) -> Order:
    """Order of the assignments by expert, those of an expert by token.

    As `moebius.kernels.permute.sort_by_expert`, with `row_TK`, and with R as large as it can be: up
    to `alignment - 1` more than T * K for each expert. Bytes: the ids twice, two counts of 4 bytes
    per expert and program, `8 * (R + T * K)` written.
    """
    total, top_k = ids_TK.numel(), ids_TK.shape[1]
    groups = min(num_experts, total)
    num_rows = (total + groups * (alignment - 1)) // alignment * alignment if groups else 0
    assignment_R = ids_TK.new_full((num_rows,), -1, dtype=torch.int64)
    row_TK = ids_TK.new_full(ids_TK.shape, -1, dtype=torch.int64)
    if not num_rows:
        return Order(assignment_R, ids_TK.new_zeros(num_experts, dtype=torch.int32), top_k, row_TK)
    ids = ids_TK.contiguous()
    lanes = triton.next_power_of_2(num_experts)
    block = max(16, (64 if interpreted() else SORT_LANES) // lanes)
    num_blocks = triton.cdiv(total, block)
    constants = {"LANES": lanes, "BLOCK": block}
    counts_EN = ids.new_empty(num_experts, num_blocks, dtype=torch.int32)
    count_kernel[(num_blocks,)](
        ids, counts_EN, total, num_experts, **constants, num_warps=SORT_WARPS
    )
    up_to_EN = counts_EN.cumsum(1, dtype=torch.int32)
    padded_E = (up_to_EN[:, -1] + alignment - 1) // alignment * alignment
    ends_E = padded_E.cumsum(0, dtype=torch.int32)
    first_EN = up_to_EN - counts_EN + (ends_E - padded_E).unsqueeze(1)
    place_kernel[(num_blocks,)](
        ids, first_EN, assignment_R, row_TK, total, num_experts, **constants, num_warps=SORT_WARPS
    )
    return Order(assignment_R, ends_E, top_k, row_TK)


def permute(x_TD: Tensor, weights_TK: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """The token of each row and the weight of its assignment, `[R, D]` and `[R]`.

    As `moebius.kernels.permute.permute`. Bytes: at most `2 * R * D` elements, less for padding,
    which is only written; backward reads R and writes T rows, summed in fp32.
    """
    if not DTYPES.keys() >= {x_TD.dtype, weights_TK.dtype}:
        return definition.permute(x_TD, weights_TK, order)
    row_TK = order.rows_of(len(x_TD))
    moved: tuple[Tensor, Tensor] = _Permute.apply(  # type: ignore[no-untyped-call]
        x_TD, weights_TK, order.assignment_R, row_TK
    )
    return moved


def unpermute(rows_RD: Tensor, order: Order, y_TD: Tensor) -> Tensor:
    """`y` plus each row at its token, `[T, D]`; padding rows are not even read.

    As `moebius.kernels.permute.unpermute`, summed in fp32 and rounded once. Bytes:
    `(R + 2 * T) * D` elements; backward as `permute`.
    """
    if not DTYPES.keys() >= {rows_RD.dtype, y_TD.dtype}:
        return definition.unpermute(rows_RD, order, y_TD)
    row_TK = order.rows_of(len(y_TD))
    out_TD: Tensor = _Unpermute.apply(rows_RD, order.assignment_R, row_TK, y_TD)  # type: ignore[no-untyped-call]
    return out_TD


@triton.jit  # type: ignore[untyped-decorator]
def load_experts(
    ids: tl.tensor, at: tl.tensor, total: tl.tensor, num_experts: tl.tensor, LANES: tl.constexpr
) -> tl.tensor:
    """Expert of each assignment, LANES where it has none."""
    expert = tl.load(ids + at, mask=at < total, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, LANES).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def count_kernel(
    ids: tl.tensor,
    counts: tl.tensor,
    total: tl.tensor,
    num_experts: tl.tensor,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of assignments: how many each expert gets, `counts[expert, block]`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    expert = load_experts(ids, at, total, num_experts, LANES)
    mine = (expert[:, None] == lane[None, :]).to(tl.int32)
    where = lane * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + where, tl.sum(mine, axis=0), mask=lane < num_experts)


@triton.jit  # type: ignore[untyped-decorator]
def place_kernel(
    ids: tl.tensor,
    first: tl.tensor,
    assignment: tl.tensor,
    row: tl.tensor,
    total: tl.tensor,
    num_experts: tl.tensor,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of assignments: row = first row of the block at the expert + rank in the block."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = load_experts(ids, at, total, num_experts, LANES)
    mine = (expert[:, None] == tl.arange(0, LANES)[None, :]).to(tl.int32)
    rank = tl.sum((tl.cumsum(mine, axis=0) - 1) * mine, axis=1)
    has_row = expert < LANES
    where = expert * tl.num_programs(0) + tl.program_id(0)
    slot = (tl.load(first + where, mask=has_row, other=0) + rank).to(tl.int64)
    tl.store(row + at, slot, mask=has_row)
    tl.store(assignment + slot, at.to(tl.int64), mask=has_row)


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(
    x: tl.tensor,
    weights: tl.tensor,
    assignment: tl.tensor,
    rows: tl.tensor,
    row_weights: tl.tensor,
    num_rows: tl.tensor,
    channels: tl.tensor,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A tile of rows, each from its token, zeros for padding; weights by the first column."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    source = tl.load(assignment + row, mask=inside, other=-1)
    taken = source >= 0
    if HAS_WEIGHTS:
        is_first = tl.program_id(1) == 0
        weight = tl.load(weights + source, mask=taken & is_first, other=0)
        tl.store(row_weights + row, weight, mask=inside & is_first)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    from_token = (source // TOP_K)[:, None] * channels + channel
    tile = tl.load(x + from_token, mask=taken[:, None] & (channel < channels), other=0)
    to_row = row.to(tl.int64)[:, None] * channels + channel
    tile = tile.to(rows.dtype.element_ty)
    tl.store(rows + to_row, tile, mask=inside[:, None] & (channel < channels))


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(
    rows: tl.tensor,
    row_weights: tl.tensor,
    row_of: tl.tensor,
    y: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    num_tokens: tl.tensor,
    channels: tl.tensor,
    TOP_K: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A tile of tokens: the sum of their rows, with `y`; weights by the first column."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = token < num_tokens
    at = token.to(tl.int64)[:, None] * channels + channel
    mask = inside[:, None] & (channel < channels)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if HAS_Y:
        total += tl.load(y + at, mask=mask, other=0).to(tl.float32)
    for k in range(TOP_K):
        assignment = token * TOP_K + k
        row = tl.load(row_of + assignment, mask=inside, other=-1)
        taken = row >= 0
        if HAS_WEIGHTS:
            is_first = tl.program_id(1) == 0
            weight = tl.load(row_weights + row, mask=taken & is_first, other=0)
            tl.store(weights + assignment, weight, mask=inside & is_first)
        from_row = row[:, None] * channels + channel
        tile = tl.load(rows + from_row, mask=taken[:, None] & (channel < channels), other=0)
        total += tile.to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def _blocks() -> tuple[int, int]:
    """Rows and channels of a tile; the interpreter wants few programs."""
    return (16, 64) if interpreted() else (ROW_BLOCK, CHANNEL_BLOCK)


def _gather(
    x_TD: Tensor,
    assignment_R: Tensor,
    top_k: int,
    rows_RD: Tensor,
    weights: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill `rows` from `x`, and the second of `weights` from the first."""
    block_rows, block_channels = _blocks()
    num_rows, channels = rows_RD.shape
    if not num_rows:
        return
    from_TK, to_R = weights or (x_TD, rows_RD)
    grid = (triton.cdiv(num_rows, block_rows), max(triton.cdiv(channels, block_channels), 1))
    gather_kernel[grid](
        x_TD,
        from_TK,
        assignment_R,
        rows_RD,
        to_R,
        num_rows,
        channels,
        TOP_K=top_k,
        HAS_WEIGHTS=weights is not None,
        BLOCK_R=block_rows,
        BLOCK_D=block_channels,
        num_warps=ROW_WARPS,
    )


def _sum(
    rows_RD: Tensor,
    row_TK: Tensor,
    out_TD: Tensor,
    y_TD: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill `out` with the sums of rows and `y`, and the second of `weights` from the first."""
    block_tokens, block_channels = _blocks()
    num_tokens, channels = out_TD.shape
    if not num_tokens:
        return
    from_R, to_TK = weights or (rows_RD, out_TD)
    grid = (triton.cdiv(num_tokens, block_tokens), max(triton.cdiv(channels, block_channels), 1))
    sum_kernel[grid](
        rows_RD,
        from_R,
        row_TK,
        out_TD if y_TD is None else y_TD,
        out_TD,
        to_TK,
        num_tokens,
        channels,
        TOP_K=row_TK.shape[1],
        HAS_Y=y_TD is not None,
        HAS_WEIGHTS=weights is not None,
        BLOCK_T=block_tokens,
        BLOCK_D=block_channels,
        num_warps=ROW_WARPS,
    )


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, assignment_R: Tensor, row_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(row_TK)
        rows_RD = x_TD.new_empty(len(assignment_R), x_TD.shape[1])
        weights_R = weights_TK.new_empty(len(assignment_R))
        weights = (weights_TK.contiguous(), weights_R)
        _gather(x_TD.contiguous(), assignment_R, row_TK.shape[1], rows_RD, weights)
        return rows_RD, weights_R

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RD: Tensor, grad_weights_R: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        grad_TD = grad_RD.new_empty(len(row_TK), grad_RD.shape[1])
        grad_weights_TK = grad_weights_R.new_empty(row_TK.shape)
        weights = (grad_weights_R.contiguous(), grad_weights_TK)
        _sum(grad_RD.contiguous(), row_TK, grad_TD, weights=weights)
        return grad_TD, grad_weights_TK, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, assignment_R: Tensor, row_TK: Tensor, y_TD: Tensor
    ) -> Tensor:
        ctx.save_for_backward(assignment_R)
        ctx.top_k, ctx.dtype = row_TK.shape[1], rows_RD.dtype
        out_TD = torch.empty_like(y_TD, memory_format=torch.contiguous_format)
        _sum(rows_RD.contiguous(), row_TK, out_TD, y_TD.contiguous())
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (assignment_R,) = ctx.saved_tensors
        shape = len(assignment_R), grad_TD.shape[1]
        grad_RD = grad_TD.new_empty(shape, dtype=ctx.dtype)
        _gather(grad_TD.contiguous(), assignment_R, ctx.top_k, grad_RD)
        return grad_RD, None, None, grad_TD


def variants() -> Iterator[Variant]:
    """A layer of 4096 channels, top 8 of 256 experts."""
    sizes = {"total": "i32", "num_experts": "i32"}
    counts = {"ids": "*i64", "counts": "*i32"} | sizes
    places = {"ids": "*i64", "first": "*i32", "assignment": "*i64", "row": "*i64"} | sizes
    table = {"LANES": 256, "BLOCK": SORT_LANES // 256}
    yield Variant(count_kernel, counts, table, SORT_WARPS, divisible=tuple(sizes))
    yield Variant(place_kernel, places, table, SORT_WARPS, divisible=tuple(sizes))
    gather = {"x": "*bf16", "weights": "*fp32", "assignment": "*i64", "rows": "*bf16"}
    gather |= {"row_weights": "*fp32", "num_rows": "i32", "channels": "i32"}
    sums = {"rows": "*bf16", "row_weights": "*fp32", "row_of": "*i64", "y": "*bf16"}
    sums |= {"out": "*bf16", "weights": "*fp32", "num_tokens": "i32", "channels": "i32"}
    tile = {"TOP_K": 8, "BLOCK_D": CHANNEL_BLOCK}
    for flag in (True, False):
        rows = {"HAS_WEIGHTS": flag, "BLOCK_R": ROW_BLOCK} | tile
        tokens = {"HAS_Y": not flag, "HAS_WEIGHTS": flag, "BLOCK_T": ROW_BLOCK} | tile
        yield Variant(gather_kernel, gather, rows, ROW_WARPS, divisible=("channels",))
        yield Variant(sum_kernel, sums, tokens, ROW_WARPS, divisible=("channels",))
