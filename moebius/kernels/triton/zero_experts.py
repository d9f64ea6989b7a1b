"""`moebius.kernels.zero_experts` in Triton: activations are read once, forward and backward.

Shapes: T tokens, D hidden, C constant experts, P programs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels import zero_experts as definition
from moebius.kernels.triton.launch import DTYPES, Variant, interpreted

TOKENS, CHANNELS, WARPS = 16, 256, 4
"""the tile of a program forward"""
SUM_TOKENS, SUM_CHANNELS, SUM_WARPS = 64, 64, 16
"""backward, where a program goes through all channels and leaves `4 * C * D` bytes of sums"""


def affine_experts(
    x_TD: Tensor,
    copy_weight_T: Tensor,
    constant_weight_TC: Tensor,
    mix_logits_TC2: Tensor,
    constants_CD: Tensor,
) -> Tensor:
    """Weighted sum of the copy and constant experts' outputs, `[T, D]` in the dtype of `x`.

    As `moebius.kernels.zero_experts.affine_experts`. All sums are fp32, under autocast too, and are
    rounded once; the gradients are added up in an order that only the shapes determine.
    """
    tensors = (x_TD, copy_weight_T, constant_weight_TC, mix_logits_TC2, constants_CD)
    if not DTYPES.keys() >= {tensor.dtype for tensor in tensors}:
        return definition.affine_experts(*tensors)
    y_TD: Tensor = _AffineExperts.apply(*tensors)  # type: ignore[no-untyped-call]
    return y_TD


@triton.jit  # type: ignore[untyped-decorator]
def mixture(
    constant_weight: tl.tensor,
    mix_logits: tl.tensor,
    entry: tl.tensor,
    here: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The weights of a constant expert, and what it mixes of the input and of its constant."""
    weight = tl.load(constant_weight + entry, mask=here, other=0.0).to(tl.float32)
    of_input = tl.load(mix_logits + 2 * entry, mask=here, other=0.0).to(tl.float32)
    of_constant = tl.load(mix_logits + 2 * entry + 1, mask=here, other=0.0).to(tl.float32)
    return weight, tl.sigmoid(of_input - of_constant), tl.sigmoid(of_constant - of_input)


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(
    x: tl.tensor,
    copy_weight: tl.tensor,
    constant_weight: tl.tensor,
    mix_logits: tl.tensor,
    constants: tl.tensor,
    y: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """`y = a * x + b @ V` of a tile."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here, real = token < num_tokens, column < width
    inside = here[:, None] & real[None, :]
    at = token[:, None] * width + column[None, :]
    factor = tl.load(copy_weight + token, mask=here, other=0.0).to(tl.float32)
    result = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for expert in range(C):
        weight, of_x, of_v = mixture(constant_weight, mix_logits, token * C + expert, here)
        value = tl.load(constants + expert * width + column, mask=real, other=0.0).to(tl.float32)
        factor += weight * of_x
        result += (weight * of_v)[:, None] * value[None, :]
    result += factor[:, None] * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(
    x: tl.tensor,
    copy_weight: tl.tensor,
    constant_weight: tl.tensor,
    mix_logits: tl.tensor,
    constants: tl.tensor,
    dy: tl.tensor,
    dx: tl.tensor,
    d_copy_weight: tl.tensor,
    d_constant_weight: tl.tensor,
    d_mix_logits: tl.tensor,
    d_constants: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    C: tl.constexpr,
    EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """All gradients of a few tokens, and their part of the constants'."""
    program = tl.program_id(0).to(tl.int64)
    token = program * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    here = token < num_tokens
    entry = token[:, None] * C + expert[None, :]
    known = here[:, None] & (expert < C)[None, :]
    weight, of_x, of_v = mixture(constant_weight, mix_logits, entry, known)
    factor = tl.load(copy_weight + token, mask=here, other=0.0).to(tl.float32)
    factor += tl.sum(weight * of_x, axis=1)
    along_x = tl.zeros((TOKENS,), tl.float32)
    along_constants = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for block in range(COUNT):
        column = block * CHANNELS + tl.arange(0, CHANNELS)
        real = column < width
        inside = here[:, None] & real[None, :]
        at = token[:, None] * width + column[None, :]
        upstream = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        along_x += tl.sum(upstream * tl.load(x + at, mask=inside, other=0.0).to(tl.float32), axis=1)
        tl.store(dx + at, (factor[:, None] * upstream).to(dx.dtype.element_ty), mask=inside)
        for number in range(C):
            value = tl.load(constants + number * width + column, mask=real, other=0.0)
            product = tl.sum(upstream * value.to(tl.float32)[None, :], axis=1)
            chosen = (expert == number)[None, :]
            along_constants += tl.where(chosen, product[:, None], 0.0)
            mixed = tl.sum(tl.where(chosen, weight * of_v, 0.0), axis=1)
            part = tl.sum(upstream * mixed[:, None], axis=0)
            tl.store(d_constants + (program * C + number) * width + column, part, mask=real)
    tl.store(d_copy_weight + token, along_x.to(d_copy_weight.dtype.element_ty), mask=here)
    d_weight = along_x[:, None] * of_x + along_constants * of_v
    d_weight = d_weight.to(d_constant_weight.dtype.element_ty)
    tl.store(d_constant_weight + entry, d_weight, mask=known)
    d_logit = weight * of_x * of_v * (along_x[:, None] - along_constants)
    mix_type = d_mix_logits.dtype.element_ty
    tl.store(d_mix_logits + 2 * entry, d_logit.to(mix_type), mask=known)
    tl.store(d_mix_logits + 2 * entry + 1, (-d_logit).to(mix_type), mask=known)


class _AffineExperts(torch.autograd.Function):
    """The kernels, over tensors that are contiguous."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        ctx.save_for_backward(*inputs)
        x_TD, constants_CD = inputs[0], inputs[-1]
        y_TD = torch.empty_like(x_TD)
        if y_TD.numel():
            sizes, tile = x_TD.shape, _tile(x_TD.shape[1])
            grid = tuple(map(triton.cdiv, sizes, (tile["TOKENS"], tile["CHANNELS"])))
            forward_kernel[grid](
                *inputs, y_TD, *sizes, C=len(constants_CD), **tile, num_warps=WARPS
            )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        x_TD, constants_CD = inputs[0], inputs[-1]
        num_experts = len(constants_CD)
        tile = _sum_tile(num_experts, x_TD.shape[1])
        gradients = tuple(torch.empty_like(tensor) for tensor in inputs[:-1])
        programs = triton.cdiv(len(x_TD), tile["TOKENS"])
        parts_PCD = x_TD.new_empty(programs, *constants_CD.shape, dtype=torch.float32)
        if programs:
            tensors = (*inputs, dy_TD.contiguous(), *gradients, parts_PCD)
            backward_kernel[(programs,)](
                *tensors, *x_TD.shape, C=num_experts, **tile, num_warps=SUM_WARPS
            )
        return (*gradients, parts_PCD.sum(dim=0).to(constants_CD.dtype))


def _tile(width: int) -> dict[str, int]:
    """Tokens and channels of a program forward."""
    tokens = 64 if interpreted() else TOKENS
    return {"TOKENS": tokens, "CHANNELS": min(triton.next_power_of_2(width), CHANNELS)}


def _sum_tile(num_experts: int, width: int) -> dict[str, int]:
    """Backward: how many blocks of channels a program goes through, and their size."""
    channels = min(triton.next_power_of_2(max(width, 1)), SUM_CHANNELS)
    return {
        "EXPERTS": triton.next_power_of_2(max(num_experts, 1)),
        "COUNT": triton.cdiv(width, channels),
        "TOKENS": SUM_TOKENS,
        "CHANNELS": channels,
    }


def variants() -> Iterator[Variant]:
    """Activations of 4096 channels in bf16; weights and constants in fp32 or bf16."""
    activations = dict.fromkeys(("x", "y", "dy", "dx"), "*bf16")
    names = ("copy_weight", "constant_weight", "mix_logits", "constants")
    sizes = {"num_tokens": "i32", "width": "i32"}
    for num_experts, dtype in ((0, "*fp32"), (2, "*fp32"), (8, "*bf16")):
        weights = dict.fromkeys((*names, *(f"d_{name}" for name in names)), dtype)
        types = activations | weights | {"d_constants": "*fp32"} | sizes
        for kernel, tile, warps in (
            (forward_kernel, _tile(4096), WARPS),
            (backward_kernel, _sum_tile(num_experts, 4096), SUM_WARPS),
        ):
            constants = {"C": num_experts, **tile}
            taken = {name: types[name] for name in kernel.arg_names if name not in constants}
            yield Variant(kernel, taken, constants, num_warps=warps, divisible=("width",))
