"""SwiGLU experts over rows that are sorted by expert, in Triton.

Shapes: R routed rows, E experts, D hidden, F expert width.

The first kernel makes a tile of gate and of up side by side, and of them the weighted activation;
the second is a grouped product. Backward keeps rows, gate and up only: the activation is made again
where its gradient is used, in the same buffer. The weights of experts are read as they are stored.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import grouped_swiglu as definition
from moebius.kernels.precision import for_products
from moebius.kernels.triton.grouped_linear import (
    SUPERTILE,
    Blocks,
    blocks_of,
    grouped_product,
    supertile,
    tile_table,
    weight_gradient,
)
from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

HALF_BLOCKS = Blocks(128, 128, 64, num_warps=8, num_stages=3)
"""two tiles of sums: as many registers and as much shared memory as one of 256 columns"""
FULL_BLOCKS = Blocks(64, 32, 16, num_warps=4, num_stages=2)
ACTIVATION_ROWS, ACTIVATION_COLUMNS, ACTIVATION_WARPS = 4, 512, 4
"""rows of a program that makes the gradient of an activation, and how much of them at a time"""


def grouped_swiglu(
    rows_RD: Tensor, weights_R: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """`weight * down(silu(gate(x)) * up(x))` of each row by its expert, `[R, D]`.

    As `moebius.kernels.grouped_swiglu.grouped_swiglu`; router weights keep their precision. Rows
    from `ends[-1]` on are not read, and theirs in the result and the gradients are not written.
    FLOPs: `6 * R * D * F` forward, twice that backward. Bytes that must move, in elements: forward
    `2 * R * D + 4 * R * F + 3 * E * D * F` (2 RF of them only for backward), backward
    `4 * R * D + 12 * R * F + 6 * E * D * F`.
    """
    rows_RD, gate_up_E2FD, down_EDF = map(for_products, (rows_RD, gate_up_E2FD, down_EDF))
    dtypes = {rows_RD.dtype, gate_up_E2FD.dtype, down_EDF.dtype}
    if len(dtypes) > 1 or not DTYPES.keys() >= dtypes | {weights_R.dtype}:
        return definition.grouped_swiglu(rows_RD, weights_R, gate_up_E2FD, down_EDF, ends_E)
    inputs = (rows_RD, weights_R, gate_up_E2FD, down_EDF)
    is_trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    out_RD: Tensor = _GroupedSwiglu.apply(*inputs, ends_E, is_trained)  # type: ignore[no-untyped-call]
    return out_RD


@triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator]
def gate_up_kernel(
    rows: tl.tensor,
    row_weights: tl.tensor,
    gate_up: tl.tensor,
    products: tl.tensor,
    activation: tl.tensor,
    ends: tl.tensor,
    table: tl.tensor,
    num_tiles: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIZE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """A tile of `weight * silu(gate) * up`, `[R, F]`; gate and up are kept side by side."""
    columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile, column_block = supertile(tl.program_id(0), num_tiles, columns, SIZE)
    group = tl.load(table + tile)
    if group < 0:
        return
    row = tl.load(table + num_tiles + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(ends + group)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    rows += row.to(tl.int64)[:, None] * D + inner[None, :]
    gate_up += group.to(tl.int64) * (2 * F * D) + inner[:, None] + column[None, :] * D
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        left = inner < D - k
        weight_mask = left[:, None] & (column < F)[None, :]
        x = tl.load(rows, mask=row_mask[:, None] & left[None, :], other=0)
        w_gate = tl.load(gate_up, mask=weight_mask, other=0)
        w_up = tl.load(gate_up + F * D, mask=weight_mask, other=0)
        if UPCAST:
            x, w_gate, w_up = x.to(tl.float32), w_gate.to(tl.float32), w_up.to(tl.float32)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
        rows += BLOCK_K
        gate_up += BLOCK_K
    dtype: tl.constexpr = activation.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)
    mask = row_mask[:, None] & (column < F)[None, :]
    if KEEP:
        kept = products + row.to(tl.int64)[:, None] * (2 * F) + column[None, :]
        tl.store(kept, gate, mask=mask)
        tl.store(kept + F, up, mask=mask)
    # From gate and up as they are kept, so that backward makes the same activation.
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    weight = tl.load(row_weights + row, mask=row_mask, other=0).to(tl.float32)
    made = gate * tl.sigmoid(gate) * up * weight[:, None]
    activation += row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(activation, made.to(dtype), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def activation_gradient_kernel(
    products: tl.tensor,
    row_weights: tl.tensor,
    activation: tl.tensor,
    grad_products: tl.tensor,
    grad_weights: tl.tensor,
    last_end: tl.tensor,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """Whole rows: gradients of gate, up and weight; the activation replaces its gradient."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = row < tl.load(last_end)
    weight = tl.load(row_weights + row, mask=row_mask, other=0).to(tl.float32)[:, None]
    grad_weight = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    dtype: tl.constexpr = activation.dtype.element_ty
    for f in range(0, F, BLOCK_F):
        column = f + tl.arange(0, BLOCK_F)[None, :]
        mask = row_mask[:, None] & (column < F)
        at = row.to(tl.int64)[:, None] * F + column
        of_pair = row.to(tl.int64)[:, None] * (2 * F) + column
        gate = tl.load(products + of_pair, mask=mask, other=0).to(tl.float32)
        up = tl.load(products + of_pair + F, mask=mask, other=0).to(tl.float32)
        grad = tl.load(activation + at, mask=mask, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight += grad * silu * up
        grad_up = grad * weight * silu
        grad_gate = grad * weight * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(activation + at, (silu * up * weight).to(dtype), mask=mask)
        tl.store(grad_products + of_pair, grad_gate.to(dtype), mask=mask)
        tl.store(grad_products + of_pair + F, grad_up.to(dtype), mask=mask)
    total = tl.sum(grad_weight, axis=1).to(grad_weights.dtype.element_ty)
    tl.store(grad_weights + row, total, mask=row_mask)


def _gate_up_blocks(dtype: torch.dtype) -> Blocks:
    if interpreted():
        return blocks_of(dtype)
    return FULL_BLOCKS if dtype == torch.float32 else HALF_BLOCKS


def _gate_up(
    rows_RD: Tensor, weights_R: Tensor, gate_up_E2FD: Tensor, ends_E: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Activation `[R, F]` and what it is made of, `[R, 2F]`, if that is to be kept."""
    double_width, hidden = gate_up_E2FD.shape[1:]
    width = double_width // 2
    blocks = _gate_up_blocks(rows_RD.dtype)
    table = tile_table(ends_E, len(rows_RD), blocks.rows)
    activation_RF = rows_RD.new_empty(len(rows_RD), width)
    products = rows_RD.new_empty(len(rows_RD), double_width) if keep else activation_RF
    num_tiles = table.shape[1]
    gate_up_kernel[(num_tiles * triton.cdiv(width, blocks.columns),)](
        rows_RD,
        weights_R,
        gate_up_E2FD,
        products,
        activation_RF,
        ends_E,
        table,
        num_tiles,
        D=hidden,
        F=width,
        KEEP=keep,
        SIZE=SUPERTILE,
        UPCAST=interpreted(),
        **blocks.constants(),
        **blocks.options(),
    )
    return activation_RF, products


def _activation_gradient_(
    activation_RF: Tensor, products_R2F: Tensor, weights_R: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, and of the weights; turns the gradient into the activation."""
    grad_products = torch.empty_like(products_R2F)
    grad_weights = torch.empty_like(weights_R)
    rows, columns = (16, 64) if interpreted() else (ACTIVATION_ROWS, ACTIVATION_COLUMNS)
    activation_gradient_kernel[(triton.cdiv(len(weights_R), rows),)](
        products_R2F,
        weights_R,
        activation_RF,
        grad_products,
        grad_weights,
        ends_E[-1:],
        F=activation_RF.shape[1],
        BLOCK_R=rows,
        BLOCK_F=columns,
        num_warps=ACTIVATION_WARPS,
    )
    return grad_products, grad_weights


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_R: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        ends_E: Tensor,
        is_trained: bool,
    ) -> Tensor:
        rows_RD, weights_R = rows_RD.contiguous(), weights_R.contiguous()
        gate_up_E2FD, down_EDF = gate_up_E2FD.contiguous(), down_EDF.contiguous()
        ctx.is_empty = not down_EDF.numel() or not len(rows_RD)
        if ctx.is_empty:
            ctx.save_for_backward(rows_RD, weights_R, gate_up_E2FD, down_EDF)
            return torch.zeros_like(rows_RD)
        activation_RF, products = _gate_up(rows_RD, weights_R, gate_up_E2FD, ends_E, is_trained)
        if is_trained:
            ctx.save_for_backward(rows_RD, weights_R, gate_up_E2FD, down_EDF, ends_E, products)
        table = tile_table(ends_E, len(rows_RD), blocks_of(rows_RD.dtype).rows)
        return grouped_product(activation_RF, down_EDF, ends_E, table, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_empty:
            return *map(torch.zeros_like, ctx.saved_tensors), None, None
        rows_RD, weights_R, gate_up_E2FD, down_EDF, ends_E, products = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()
        table = tile_table(ends_E, len(rows_RD), blocks_of(rows_RD.dtype).rows)
        activation_RF = grouped_product(grad_RD, down_EDF, ends_E, table, transposed=False)
        grad_products, grad_weights = _activation_gradient_(
            activation_RF, products, weights_R, ends_E
        )
        grad_down = weight_gradient(grad_RD, activation_RF, ends_E)
        grad_gate_up = weight_gradient(grad_products, rows_RD, ends_E)
        grad_rows = grouped_product(grad_products, gate_up_E2FD, ends_E, table, transposed=False)
        return grad_rows, grad_weights, grad_gate_up, grad_down, None, None


def variants() -> Iterator[Variant]:
    """4096 channels, experts of 14336; the other products are those of `grouped_linear`."""
    sides = {"D": 4096, "F": 14336, "SIZE": SUPERTILE, "UPCAST": False}
    for dtype, blocks in (("bf16", HALF_BLOCKS), ("fp32", FULL_BLOCKS)):
        types = {name: f"*{dtype}" for name in ("rows", "gate_up", "products", "activation")}
        types |= {"row_weights": "*fp32", "ends": "*i32", "table": "*i32", "num_tiles": "i32"}
        kind: dict[str, Any] = {"has_products": dtype == "bf16"} | blocks.options()
        for keep in (True, False):
            constants = sides | {"KEEP": keep} | blocks.constants()
            yield Variant(gate_up_kernel, types, constants, **kind)
    pointers = dict.fromkeys(("products", "activation", "grad_products"), "*bf16")
    pointers |= {"row_weights": "*fp32", "grad_weights": "*fp32", "last_end": "*i32"}
    constants = {"F": 14336, "BLOCK_R": ACTIVATION_ROWS, "BLOCK_F": ACTIVATION_COLUMNS}
    yield Variant(activation_gradient_kernel, pointers, constants, ACTIVATION_WARPS)
