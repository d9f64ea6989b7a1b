"""A linear map per group of rows, in Triton: no padding, no dropped row, no waiting host.

Shapes: R rows sorted by group, E groups, I input and O output channels.

A program makes one tile of the output. Tiles of rows never cross groups: a table made on the
device says which group and which first row each has. The host launches as many as there can be,
`ceil(R / BLOCK_M) + E`; those left over return at once. The weights' gradient of a group is a loop
over its rows, in order: no atomics, and exactly 0 for a group without any.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import grouped_linear as definition
from moebius.kernels.precision import for_products
from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

TABLE_BLOCK = 32
"""tiles that a program writes into the table"""
SUPERTILE = 8
"""tiles of rows that go through the same columns together, so that these are read once"""


@dataclass(frozen=True)
class Blocks:
    """Shape of a program that multiplies."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.inner}

    def options(self) -> dict[str, int]:
        """As a launch names them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


HALF_BLOCKS = Blocks(128, 256, 64, num_warps=8, num_stages=3)
"""tensor cores: 128 fp32 sums for each thread, 144 KiB of operands on their way"""
FULL_BLOCKS = Blocks(64, 64, 32, num_warps=4, num_stages=2)
"""fp32 products are not made by tensor cores"""
INTERPRETED_BLOCKS = Blocks(32, 32, 32, num_warps=1, num_stages=1)


def blocks_of(dtype: torch.dtype) -> Blocks:
    """The shape of programs for operands of a precision."""
    if interpreted():
        return INTERPRETED_BLOCKS
    return FULL_BLOCKS if dtype == torch.float32 else HALF_BLOCKS


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`rows[ends[e-1]:ends[e]] @ weight[e].T` for every e, `[R, O]`; a group may be empty.

    As `moebius.kernels.grouped_linear.grouped_linear`. Rows from `ends[-1]` on belong to no group:
    they are not read, and those of the result and of the gradient are not written. FLOPs:
    `2 * R * I * O` forward, twice that backward. Bytes that must move, in elements:
    `R * (I + O) + E * I * O` forward, twice that backward; a weight is read again for every
    `SUPERTILE` tiles of rows of its group.
    """
    rows_RI, weight_EOI = for_products(rows_RI), for_products(weight_EOI)
    if rows_RI.dtype not in DTYPES or weight_EOI.dtype != rows_RI.dtype:
        return definition.grouped_linear(rows_RI, weight_EOI, ends_E)
    out_RO: Tensor = _GroupedLinear.apply(rows_RI, weight_EOI, ends_E)  # type: ignore[no-untyped-call]
    return out_RO


@triton.jit  # type: ignore[untyped-decorator]
def tiles_kernel(
    ends: tl.tensor,
    table: tl.tensor,
    num_groups: tl.tensor,
    num_tiles: tl.tensor,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Group and first row of a block of tiles; group -1 for those left over."""
    group = tl.arange(0, LANES)
    inside = group < num_groups
    end = tl.load(ends + group, mask=inside, other=0)
    start = tl.load(ends + group - 1, mask=inside & (group > 0), other=0)
    count = tl.where(inside, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    up_to = tl.cumsum(count, axis=0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = (up_to[None, :] > tile[:, None]) & (up_to - count <= tile[:, None])
    first = start[None, :] + (tile[:, None] - (up_to - count)[None, :]) * BLOCK_M
    found = tl.sum(tl.where(mine, group[None, :] + 1, 0), axis=1) - 1
    tl.store(table + tile, found, mask=tile < num_tiles)
    row = tl.sum(tl.where(mine, first, 0), axis=1)
    tl.store(table + num_tiles + tile, row, mask=tile < num_tiles)


@triton.jit  # type: ignore[untyped-decorator]
def supertile(
    program: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor, SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of a program's tile: SIZE rows go through the columns together."""
    per_group = SIZE * num_columns
    first = program // per_group * SIZE
    height = tl.minimum(num_rows - first, SIZE)
    return first + program % per_group % height, program % per_group // height


@triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator]
def product_kernel(
    a: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    ends: tl.tensor,
    table: tl.tensor,
    num_tiles: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIZE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """A tile of `a[R, K] @ weight[e]`, a weight being `[N, K]` if transposed, else `[K, N]`."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, column_block = supertile(tl.program_id(0), num_tiles, columns, SIZE)
    group = tl.load(table + tile)
    if group < 0:
        return
    row = tl.load(table + num_tiles + tile) + tl.arange(0, BLOCK_M)
    row_mask = row < tl.load(ends + group)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < N
    inner = tl.arange(0, BLOCK_K)
    a += row.to(tl.int64)[:, None] * K + inner[None, :]
    weight += group.to(tl.int64) * (N * K)
    if TRANSPOSED:
        weight += inner[:, None] + column[None, :] * K
    else:
        weight += inner[:, None] * N + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = inner < K - k
        x = tl.load(a, mask=row_mask[:, None] & left[None, :], other=0)
        w = tl.load(weight, mask=left[:, None] & column_mask[None, :], other=0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        a += BLOCK_K
        weight += BLOCK_K if TRANSPOSED else BLOCK_K * N
    out += row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def weight_gradient_kernel(
    grad: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    ends: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIZE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """A tile of `grad[e].T @ rows[e]`, `[M, N]`, for one group: a loop over its rows."""
    row_blocks: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(1)
    row_block, column_block = supertile(tl.program_id(0), row_blocks, column_blocks, SIZE)
    end = tl.load(ends + group)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = start + tl.arange(0, BLOCK_K)
    grad += row.to(tl.int64)[None, :] * M + m[:, None]
    rows += row.to(tl.int64)[:, None] * N + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, end - start, BLOCK_K):
        left = row < end - k
        g = tl.load(grad, mask=(m < M)[:, None] & left[None, :], other=0)
        x = tl.load(rows, mask=left[:, None] & (n < N)[None, :], other=0)
        if UPCAST:
            g, x = g.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(g, x, acc, input_precision="ieee")
        grad += BLOCK_K * M
        rows += BLOCK_K * N
    out += group.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def tile_table(ends_E: Tensor, num_rows: int, block_rows: int) -> Tensor:
    """Group and first row of each tile, `[2, tiles]` int32, for as many as there can be."""
    num_groups = len(ends_E)
    num_tiles = triton.cdiv(num_rows, block_rows) + num_groups
    table = ends_E.new_empty(2, num_tiles, dtype=torch.int32)
    tiles_kernel[(triton.cdiv(num_tiles, TABLE_BLOCK),)](
        ends_E,
        table,
        num_groups,
        num_tiles,
        LANES=triton.next_power_of_2(num_groups),
        BLOCK_M=block_rows,
        BLOCK=TABLE_BLOCK,
    )
    return table


def grouped_product(
    a_RK: Tensor, weight: Tensor, ends_E: Tensor, table: Tensor, transposed: bool
) -> Tensor:
    """`a @ weight[e].T` if transposed, else `a @ weight[e]`; operands and table are contiguous."""
    inner, columns = weight.shape[1:]
    if transposed:
        inner, columns = columns, inner
    blocks = blocks_of(a_RK.dtype)
    out = a_RK.new_empty(len(a_RK), columns)
    num_tiles = table.shape[1]
    product_kernel[(num_tiles * triton.cdiv(columns, blocks.columns),)](
        a_RK,
        weight,
        out,
        ends_E,
        table,
        num_tiles,
        K=inner,
        N=columns,
        TRANSPOSED=transposed,
        SIZE=SUPERTILE,
        UPCAST=interpreted(),
        **blocks.constants(),
        **blocks.options(),
    )
    return out


def weight_gradient(grad_RO: Tensor, rows_RI: Tensor, ends_E: Tensor) -> Tensor:
    """`grad[e].T @ rows[e]` for every group, `[E, O, I]`; operands are contiguous."""
    outputs, inputs = grad_RO.shape[1], rows_RI.shape[1]
    blocks = blocks_of(rows_RI.dtype)
    out_EOI = rows_RI.new_empty(len(ends_E), outputs, inputs)
    tiles = triton.cdiv(outputs, blocks.rows) * triton.cdiv(inputs, blocks.columns)
    weight_gradient_kernel[(tiles, len(ends_E))](
        grad_RO,
        rows_RI,
        out_EOI,
        ends_E,
        M=outputs,
        N=inputs,
        SIZE=SUPERTILE,
        UPCAST=interpreted(),
        **blocks.constants(),
        **blocks.options(),
    )
    return out_EOI


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        rows_RI, weight_EOI = rows_RI.contiguous(), weight_EOI.contiguous()
        ctx.save_for_backward(rows_RI, weight_EOI, ends_E)
        if not weight_EOI.numel() or not len(rows_RI):
            return rows_RI.new_zeros(len(rows_RI), weight_EOI.shape[1])
        table = tile_table(ends_E, len(rows_RI), blocks_of(rows_RI.dtype).rows)
        return grouped_product(rows_RI, weight_EOI, ends_E, table, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_EOI, ends_E = ctx.saved_tensors
        if not weight_EOI.numel() or not len(rows_RI):
            return torch.zeros_like(rows_RI), torch.zeros_like(weight_EOI), None
        grad_RO = grad_RO.contiguous()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            table = tile_table(ends_E, len(rows_RI), blocks_of(rows_RI.dtype).rows)
            grad_rows = grouped_product(grad_RO, weight_EOI, ends_E, table, transposed=False)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad_RO, rows_RI, ends_E)
        return grad_rows, grad_weight, None


def variants() -> Iterator[Variant]:
    """4096 to 14336 channels in the precisions that differ."""
    table = {"ends": "*i32", "table": "*i32"}
    sizes = {"num_groups": "i32", "num_tiles": "i32"}
    yield Variant(tiles_kernel, table | sizes, {"LANES": 256, "BLOCK_M": 128, "BLOCK": TABLE_BLOCK})
    for dtype, blocks in (("bf16", HALF_BLOCKS), ("fp32", FULL_BLOCKS)):
        shape = blocks.constants() | {"SIZE": SUPERTILE, "UPCAST": False}
        kind: dict[str, Any] = {"has_products": dtype == "bf16"} | blocks.options()
        product = {name: f"*{dtype}" for name in ("a", "weight", "out")} | table
        for transposed in (True, False):
            sides = {"K": 4096, "N": 14336, "TRANSPOSED": transposed}
            yield Variant(product_kernel, product | {"num_tiles": "i32"}, sides | shape, **kind)
        grads = {name: f"*{dtype}" for name in ("grad", "rows", "out")} | {"ends": "*i32"}
        yield Variant(weight_gradient_kernel, grads, {"M": 14336, "N": 4096} | shape, **kind)
