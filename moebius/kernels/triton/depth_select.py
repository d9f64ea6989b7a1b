"""Choosing tokens along the sequence, taking them out and putting them back, in Triton.

Rows move in one pass: an inverse map says for each position which slot lists it, so that every row
of the result is written once, and the same way each time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import depth_select as definition
from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

ROW_TOKENS, ROW_CHANNELS, ROW_WARPS = 4, 1024, 4
"""the tile of a program where rows move"""
SUM_TOKENS = 2
"""rows of a program that goes through all channels"""
SCORES, SCORE_WARPS = 4096, 8
"""scores of a row that are looked at together"""
ENTRIES = 1024
"""entries of an index that a program inverts"""
INT_MIN = tl.constexpr(-(2**31))
INT_MAX = tl.constexpr(2**31 - 1)
IMAGE_OF_NOTHING = tl.constexpr(-2139095041)
"""the image of -inf, which no other number is below"""


def top_k_positions(scores_BS: Tensor, k: int) -> Tensor:
    """Positions of the k highest scores of each row, ascending, -1 where a row has fewer.

    As `moebius.kernels.depth_select.top_k_positions`, without a sort.
    """
    if scores_BS.dtype not in DTYPES:
        return definition.top_k_positions(scores_BS, k)
    batch, length = scores_BS.shape
    k = min(k, length)
    index_BK = torch.full((batch, k), -1, dtype=torch.int64, device=scores_BS.device)
    if index_BK.numel():
        constants = _score_blocks(length)
        positions_kernel[(batch,)](
            scores_BS.detach().contiguous(), index_BK, length, k, **constants, num_warps=SCORE_WARPS
        )
    return index_BK


def take_rows(x_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """`x[b, index[b, k]]`, `[B, K, D]`; empty slots read position 0 and must not be used.

    As `moebius.kernels.depth_select.take_rows`, for an index whose positions differ. Gradients that
    reach empty slots are dropped.
    """
    if x_BSD.dtype not in DTYPES:
        return definition.take_rows(x_BSD, index_BK)
    taken_BKD: Tensor = _TakeRows.apply(x_BSD, index_BK)  # type: ignore[no-untyped-call]
    return taken_BKD


def add_gated_rows(x_BSD: Tensor, index_BK: Tensor, gate_BK: Tensor, rows_BKD: Tensor) -> Tensor:
    """`x` with `gate * rows` added at their positions; rows of empty slots are ignored.

    As `moebius.kernels.depth_select.add_gated_rows`, rounded once.
    """
    if not DTYPES.keys() >= {x_BSD.dtype, gate_BK.dtype, rows_BKD.dtype}:
        return definition.add_gated_rows(x_BSD, index_BK, gate_BK, rows_BKD)
    added_BSD: Tensor = _AddGatedRows.apply(  # type: ignore[no-untyped-call]
        x_BSD, index_BK, gate_BK, rows_BKD
    )
    return added_BSD


@triton.jit  # type: ignore[untyped-decorator]
def order_image(x: tl.tensor) -> tl.tensor:
    """Integers in the order of fp32 numbers: equal for 0 and -0, the highest for every NaN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    image = bits ^ ((bits >> 31) & INT_MAX)
    return tl.where(x != x, INT_MAX, image)


@triton.jit  # type: ignore[untyped-decorator]
def load_images(scores: tl.tensor, at: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Images of scores; that of -inf behind the end."""
    values = tl.load(scores + at, mask=at < length, other=float("-inf"))
    return order_image(values.to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def positions_kernel(
    scores: tl.tensor,
    index: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: the k-th highest image bit by bit, then the positions of what is above it."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * length
    index += row * k
    offset = tl.arange(0, BLOCK)
    bar = tl.full((), INT_MIN, tl.int32)
    for step in range(32):
        trial = bar ^ (tl.full((), 1, tl.int32) << (31 - step))
        reached = tl.zeros((BLOCK,), tl.int32)
        for block in range(COUNT):
            image = load_images(scores, block * BLOCK + offset, length)
            reached += (image >= trial).to(tl.int32)
        bar = tl.where(tl.sum(reached, axis=0) >= k, trial, bar)
    higher = tl.zeros((BLOCK,), tl.int32)
    for block in range(COUNT):
        higher += (load_images(scores, block * BLOCK + offset, length) > bar).to(tl.int32)
    open_slots = k - tl.sum(higher, axis=0)
    written = tl.zeros((), tl.int32)
    for block in range(COUNT):
        at = block * BLOCK + offset
        image = load_images(scores, at, length)
        tie = (image == bar).to(tl.int32)
        keep = (image > bar) | ((tie > 0) & (tl.cumsum(tie, axis=0) <= open_slots))
        keep = keep & (image > IMAGE_OF_NOTHING)
        kept = keep.to(tl.int32)
        slot = written + tl.cumsum(kept, axis=0) - 1
        tl.store(index + slot, at.to(tl.int64), mask=keep)
        open_slots -= tl.sum(tie, axis=0)
        written += tl.sum(kept, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def invert_kernel(
    index: tl.tensor,
    slots: tl.tensor,
    total: tl.tensor,
    k: tl.tensor,
    length: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`slots[b, index[b, k]] = k`; the rest has been filled before."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + entry, mask=entry < total, other=-1)
    row = (entry // k).to(tl.int64)
    tl.store(slots + row * length + place, entry % k, mask=place >= 0)


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(
    x: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    out_length: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    EMPTY_READS_FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """`out[b, i] = x[b, places[b, i]]`; for a place of -1 `x[b, 0]` or zeros."""
    entry = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (entry < total)[:, None] & (column < width)[None, :]
    place = tl.load(places + entry, mask=entry < total, other=-1).to(tl.int64)
    if EMPTY_READS_FIRST:
        place = tl.maximum(place, 0)
    source = (entry // out_length).to(tl.int64) * length + place
    read = inside & (place >= 0)[:, None]
    values = tl.load(x + source[:, None] * width + column[None, :], mask=read, other=0.0)
    tl.store(out + entry.to(tl.int64)[:, None] * width + column[None, :], values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def add_kernel(
    x: tl.tensor,
    slots: tl.tensor,
    gates: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """`out = x + gate * row` where a slot lists the position, `x` elsewhere."""
    entry = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (entry < total)[:, None] & (column < width)[None, :]
    at = entry.to(tl.int64)[:, None] * width + column[None, :]
    slot = tl.load(slots + entry, mask=entry < total, other=-1).to(tl.int64)
    source = (entry // length).to(tl.int64) * k + slot
    gate = tl.load(gates + source, mask=slot >= 0, other=0.0).to(tl.float32)
    read = inside & (slot >= 0)[:, None]
    row = tl.load(rows + source[:, None] * width + column[None, :], mask=read, other=0.0)
    before = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    after = before + gate[:, None] * row.to(tl.float32)
    tl.store(out + at, after.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def add_backward_kernel(
    d_out: tl.tensor,
    index: tl.tensor,
    gates: tl.tensor,
    rows: tl.tensor,
    d_gates: tl.tensor,
    d_rows: tl.tensor,
    total: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """`d_row = gate * d_out` and `d_gate = row . d_out` at the positions, 0 for empty slots."""
    entry = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = entry < total
    place = tl.load(index + entry, mask=here, other=-1)
    gate = tl.load(gates + entry, mask=here, other=0.0).to(tl.float32)
    source = (entry // k).to(tl.int64) * length + place
    products = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for block in range(COUNT):
        column = block * CHANNELS + tl.arange(0, CHANNELS)
        inside = here[:, None] & (column < width)[None, :]
        read = inside & (place >= 0)[:, None]
        at = entry.to(tl.int64)[:, None] * width + column[None, :]
        upstream = tl.load(d_out + source[:, None] * width + column[None, :], mask=read, other=0.0)
        upstream = upstream.to(tl.float32)
        row = tl.load(rows + at, mask=read, other=0.0).to(tl.float32)
        products += upstream * row
        d_row = gate[:, None] * upstream
        tl.store(d_rows + at, d_row.to(d_rows.dtype.element_ty), mask=inside)
    d_gate = tl.sum(products, axis=1)
    tl.store(d_gates + entry, d_gate.to(d_gates.dtype.element_ty), mask=here)


class _TakeRows(torch.autograd.Function):
    """The gathers, over rows that are contiguous."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, index_BK: Tensor) -> Tensor:
        index_BK = index_BK.contiguous()
        ctx.save_for_backward(index_BK)
        ctx.length = x_BSD.shape[1]
        return _gather(x_BSD, index_BK, empty_reads_first=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BKD: Tensor) -> tuple[Tensor, None]:
        (index_BK,) = ctx.saved_tensors
        slots_BS = _invert(index_BK, ctx.length)
        return _gather(d_out_BKD, slots_BS, empty_reads_first=False), None


class _AddGatedRows(torch.autograd.Function):
    """The sum; its gradient of x is the one that comes in."""

    @staticmethod
    def forward(
        ctx: Any, x_BSD: Tensor, index_BK: Tensor, gate_BK: Tensor, rows_BKD: Tensor
    ) -> Tensor:
        x_BSD, index_BK = x_BSD.contiguous(), index_BK.contiguous()
        gate_BK, rows_BKD = gate_BK.contiguous(), rows_BKD.contiguous()
        ctx.save_for_backward(index_BK, gate_BK, rows_BKD)
        out_BSD = torch.empty_like(x_BSD)
        if out_BSD.numel():
            batch, length, width = x_BSD.shape
            tensors = (x_BSD, _invert(index_BK, length), gate_BK, rows_BKD, out_BSD)
            sizes = (batch * length, length, index_BK.shape[1], width)
            grid, tile = _tiles(batch * length, width)
            add_kernel[grid](*tensors, *sizes, **tile, num_warps=ROW_WARPS)
        return out_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BSD: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        index_BK, gate_BK, rows_BKD = ctx.saved_tensors
        d_gate_BK, d_rows_BKD = torch.zeros_like(gate_BK), torch.empty_like(rows_BKD)
        if rows_BKD.numel():
            _, length, width = d_out_BSD.shape
            tensors = (d_out_BSD.contiguous(), index_BK, gate_BK, rows_BKD, d_gate_BK, d_rows_BKD)
            sizes = (index_BK.numel(), length, index_BK.shape[1], width)
            tile = _sum_tile(width)
            grid = (triton.cdiv(index_BK.numel(), tile["TOKENS"]),)
            add_backward_kernel[grid](*tensors, *sizes, **tile, num_warps=ROW_WARPS)
        return d_out_BSD, None, d_gate_BK, d_rows_BKD


def _gather(x_BLD: Tensor, places_BI: Tensor, empty_reads_first: bool) -> Tensor:
    batch, length, width = x_BLD.shape
    out_BID = x_BLD.new_empty(batch, places_BI.shape[1], width)
    if out_BID.numel():
        tensors = (x_BLD.contiguous(), places_BI, out_BID)
        sizes = (places_BI.numel(), places_BI.shape[1], length, width)
        grid, tile = _tiles(places_BI.numel(), width)
        constants = {"EMPTY_READS_FIRST": empty_reads_first, **tile}
        gather_kernel[grid](*tensors, *sizes, **constants, num_warps=ROW_WARPS)
    return out_BID


def _invert(index_BK: Tensor, length: int) -> Tensor:
    """Which slot lists each position, int32 `[B, length]`, -1 where none does."""
    batch, k = index_BK.shape
    slots_BS = torch.full((batch, length), -1, dtype=torch.int32, device=index_BK.device)
    if index_BK.numel():
        block = triton.next_power_of_2(index_BK.numel()) if interpreted() else ENTRIES
        grid = (triton.cdiv(index_BK.numel(), block),)
        invert_kernel[grid](index_BK, slots_BS, index_BK.numel(), k, length, BLOCK=block)
    return slots_BS


def _score_blocks(length: int) -> dict[str, int]:
    """Scores at once and how often, a power of two: few are compiled."""
    most = triton.next_power_of_2(length)
    block = most if interpreted() else min(SCORES, most)
    return {"COUNT": most // block, "BLOCK": block}


def _tiles(tokens: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the tile of programs where rows move."""
    rows = triton.next_power_of_2(tokens) if interpreted() else ROW_TOKENS
    channels = min(triton.next_power_of_2(width), ROW_CHANNELS)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(width, channels))
    return grid, {"TOKENS": rows, "CHANNELS": channels}


def _sum_tile(width: int) -> dict[str, int]:
    """The tile where a program goes through all channels."""
    channels = min(triton.next_power_of_2(width), ROW_CHANNELS)
    rows = 64 if interpreted() else SUM_TOKENS
    return {"COUNT": triton.cdiv(width, channels), "TOKENS": rows, "CHANNELS": channels}


def variants() -> Iterator[Variant]:
    """Rows of 4096 channels in bf16, gates and scores in fp32."""
    rows = dict.fromkeys(("x", "rows", "out", "d_out", "d_rows"), "*bf16")
    scalars = dict.fromkeys(("gates", "d_gates", "scores"), "*fp32")
    types = rows | scalars | {"index": "*i64", "slots": "*i32", "places": "*i64"}
    sizes = ("total", "out_length", "length", "k", "width")
    types |= dict.fromkeys(sizes, "i32")
    _, tile = _tiles(65536, 4096)
    for kernel, constants, warps, changes in (
        (positions_kernel, _score_blocks(4096), SCORE_WARPS, {}),
        (positions_kernel, _score_blocks(32768), SCORE_WARPS, {}),
        (invert_kernel, {"BLOCK": ENTRIES}, 4, {}),
        (gather_kernel, {"EMPTY_READS_FIRST": True, **tile}, ROW_WARPS, {}),
        (gather_kernel, {"EMPTY_READS_FIRST": False, **tile}, ROW_WARPS, {"places": "*i32"}),
        (add_kernel, tile, ROW_WARPS, {}),
        (add_backward_kernel, _sum_tile(4096), ROW_WARPS, {}),
    ):
        taken = {n: (types | changes)[n] for n in kernel.arg_names if n not in constants}
        divisible = tuple(name for name in sizes if name in taken)
        yield Variant(kernel, taken, constants, num_warps=warps, divisible=divisible)
