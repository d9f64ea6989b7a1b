"""`moebius.kernels.rope` in Triton: queries or keys are read once and written once.

Shapes: B rows, S tokens, H heads, C channels of one head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

TILE = 1024
"""pairs of channels that a program turns"""
WARPS = 4


def apply_rope(x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Rotate queries or keys; computed in the tables' precision, returned in that of `x`.

    As `moebius.kernels.rope.apply_rope` with tables of `rope_tables`: both of their halves carry
    the same angles, of which the first is read. They get no gradient; that of x is the rotation
    back.
    """
    rotated: Tensor = _RopeFunction.apply(x_BSHC, cos_BSC, sin_BSC)  # type: ignore[no-untyped-call]
    return rotated


@triton.jit  # type: ignore[untyped-decorator]
def rotate_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    pairs: tl.tensor,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK pairs of channels of ROWS heads: channel c of the first half with c of the second."""
    exact = cos.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (pair < pairs)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * pairs) + pair[None, :]
    at_table = (row // num_heads).to(tl.int64)[:, None] * (2 * pairs) + pair[None, :]
    c = tl.load(cos + at_table, mask=inside, other=0.0)
    s = tl.load(sin + at_table, mask=inside, other=0.0)
    if BACK:
        s = -s
    first = tl.load(x + at, mask=inside, other=0.0).to(exact)
    second = tl.load(x + at + pairs, mask=inside, other=0.0).to(exact)
    tl.store(y + at, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + pairs, (second * c + first * s).to(y.dtype.element_ty), mask=inside)


class _RopeFunction(torch.autograd.Function):
    """The rotation, and the one back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
        rows, tokens, _, channels = x_BSHC.shape
        exact = torch.promote_types(x_BSHC.dtype, torch.float32)
        cos_BSC, sin_BSC = (
            table.to(exact).expand(rows, tokens, channels).contiguous()
            for table in (cos_BSC, sin_BSC)
        )
        ctx.save_for_backward(cos_BSC, sin_BSC)
        return _rotate(x_BSHC, cos_BSC, sin_BSC, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSHC: Tensor) -> tuple[Tensor, None, None]:
        cos_BSC, sin_BSC = ctx.saved_tensors
        return _rotate(dy_BSHC, cos_BSC, sin_BSC, back=True), None, None


def _rotate(x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor, back: bool) -> Tensor:
    x_BSHC = x_BSHC.contiguous()
    y_BSHC = torch.empty_like(x_BSHC)
    if not x_BSHC.numel():
        return y_BSHC
    num_heads, pairs = x_BSHC.shape[2], x_BSHC.shape[3] // 2
    num_rows = x_BSHC.numel() // (2 * pairs)
    rows, block = _tile(pairs)
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(pairs, block))
    tensors, sizes = (x_BSHC, cos_BSC, sin_BSC, y_BSHC), (num_rows, num_heads, pairs)
    rotate_kernel[grid](*tensors, *sizes, BACK=back, ROWS=rows, BLOCK=block, num_warps=WARPS)
    return y_BSHC


def _tile(pairs: int) -> tuple[int, int]:
    """Heads and pairs of channels of a program."""
    block = min(triton.next_power_of_2(pairs), TILE)
    return (64 if interpreted() else TILE // block), block


def variants() -> Iterator[Variant]:
    """Heads of 128 channels and the wide ones of BDH, forward and backward."""
    for dtype in (torch.bfloat16, torch.float32):
        for pairs in (64, 4096):
            rows, block = _tile(pairs)
            io = f"*{DTYPES[dtype]}"
            yield Variant(
                rotate_kernel,
                {"x": io, "cos": "*fp32", "sin": "*fp32", "y": io}
                | dict.fromkeys(("num_rows", "num_heads", "pairs"), "i32"),
                {"BACK": pairs == 64, "ROWS": rows, "BLOCK": block},
                num_warps=WARPS,
                divisible=("num_rows", "num_heads", "pairs"),
            )
