"""`moebius.kernels.rms_norm` in Triton: each row is read once, forward and backward.

Shapes: D channels, N rows, P programs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import rms_norm as reference
from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

WIDEST = 8192
"""channels of the widest row whose backward fits into the registers of a program"""
TILE = 2048
"""elements that a program holds at a time, in several rows where they are short"""
WARPS = 4096
"""at most so many run backward, some 31 on each processor of an H100: a program of more than one
tile leaves fewer partial sums of the gain's gradient"""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, scale: Tensor | float = 1.0) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight * scale` over the last dimension, in the dtype of `x`.

    As `moebius.kernels.rms_norm.rms_norm`, which also takes rows of more than `WIDEST` channels.
    The gradients of weight and scale are added up in an order that only the shape determines.
    """
    if x.shape[-1] > WIDEST:
        return reference.rms_norm(x, weight_D, eps, scale)
    gain_D = reference.gain(weight_D, scale, x.dtype)
    y: Tensor = _RMSNormFunction.apply(x, gain_D, eps)  # type: ignore[no-untyped-call]
    return y


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(
    x: tl.tensor,
    gain: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS rows; keeps the inverse of each one's root mean square."""
    exact = gain.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(exact)
    factor = tl.load(gain + column, mask=column < width, other=0.0)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / width + EPS)
    tl.store(rstd + row, inverse, mask=row < num_rows)
    normed = values * inverse[:, None] * factor[None, :]
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(
    x: tl.tensor,
    gain: tl.tensor,
    rstd: tl.tensor,
    dy: tl.tensor,
    dx: tl.tensor,
    d_gain: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """STEPS times ROWS rows, and what they add to the gain's gradient."""
    exact = gain.dtype.element_ty
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    factor = tl.load(gain + column, mask=column < width, other=0.0)
    total = tl.zeros((ROWS, BLOCK), dtype=exact)
    for step in range(STEPS):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        inverse = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        normed = tl.load(x + at, mask=inside, other=0.0).to(exact) * inverse
        upstream = tl.load(dy + at, mask=inside, other=0.0).to(exact)
        total += upstream * normed
        upstream *= factor[None, :]
        along = tl.sum(upstream * normed, 1)[:, None] / width
        result = (upstream - normed * along) * inverse
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(d_gain + program * width + column, tl.sum(total, 0), mask=column < width)


class _RMSNormFunction(torch.autograd.Function):
    """The kernels, over rows that are contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        x, gain_D = x.contiguous(), gain_D.contiguous()
        y = torch.empty_like(x)
        width = len(gain_D)
        rstd_N = x.new_empty(x.numel() // width, dtype=gain_D.dtype)
        rows, block, warps = _tile(width)
        if len(rstd_N):
            grid = (triton.cdiv(len(rstd_N), rows),)
            constants = {"EPS": eps, "ROWS": rows, "BLOCK": block}
            forward_kernel[grid](
                x, gain_D, y, rstd_N, len(rstd_N), width, **constants, num_warps=warps
            )
        ctx.save_for_backward(x, gain_D, rstd_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, rstd_N = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        rows, block, warps = _tile(len(gain_D))
        steps = _steps(len(rstd_N), rows, warps)
        d_gain_PD = gain_D.new_empty(triton.cdiv(len(rstd_N), rows * steps), len(gain_D))
        if len(rstd_N):
            constants = {"STEPS": steps, "ROWS": rows, "BLOCK": block}
            tensors = (x, gain_D, rstd_N, dy, dx, d_gain_PD)
            backward_kernel[(len(d_gain_PD),)](
                *tensors, len(rstd_N), len(gain_D), **constants, num_warps=warps
            )
        return dx, d_gain_PD.sum(0), None


def _tile(width: int) -> tuple[int, int, int]:
    """Rows at a time, the power of two that holds one, and warps: 16 elements for each thread."""
    block = triton.next_power_of_2(width)
    rows = 64 if interpreted() else max(TILE // block, 1)
    return rows, block, min(max(rows * block // 512, 1), 32)


def _steps(num_rows: int, rows: int, warps: int) -> int:
    """How many tiles a program goes through backward: a power of two, so that few are compiled."""
    programs = WARPS // warps
    steps: int = triton.next_power_of_2(triton.cdiv(max(num_rows, 1), rows * programs))
    return steps


def variants() -> Iterator[Variant]:
    """Rows of a model of each size, in bf16 and fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (512, 4096, WIDEST):
            rows, block, warps = _tile(width)
            io, exact = f"*{DTYPES[dtype]}", "*fp32"
            sizes = {"num_rows": "i32", "width": "i32"}
            yield Variant(
                forward_kernel,
                {"x": io, "gain": exact, "y": io, "rstd": exact} | sizes,
                {"EPS": 1e-6, "ROWS": rows, "BLOCK": block},
                num_warps=warps,
                divisible=("width",),
            )
            yield Variant(
                backward_kernel,
                {"x": io, "gain": exact, "rstd": exact, "dy": io, "dx": io, "d_gain": exact}
                | sizes,
                {"STEPS": _steps(65536, rows, warps), "ROWS": rows, "BLOCK": block},
                num_warps=warps,
                divisible=("width",),
            )
