"""A linear map per group of rows: no padding, no dropped row.

Shapes: R rows sorted by group, E groups, I input and O output channels.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`rows[ends[e-1]:ends[e]] @ weight[e].T` for every e, `[R, O]`; a group may be empty.

    Rows may follow `ends[-1]`, of no group; what stands there in the result does not count. Forward
    FLOPs: `2 * R * I * O`; bytes that have to be moved, at b per element: `b * (R * (I + O) + E * I
    * O)`. Under autocast the products run in its dtype (`grouped_mm` does not cast by itself). What
    `grouped_mm` refuses takes `grouped_linear_reference`: float64, and rows of I or O elements that
    are no multiple of 16 bytes.
    """
    device = rows_RI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows_RI.dtype
    aligned = all(size * dtype.itemsize % 16 == 0 for size in weight_EOI.shape[1:])
    if dtype not in GROUPED_MM_DTYPES or not aligned:
        return grouped_linear_reference(rows_RI, weight_EOI, ends_E)
    rows_RI, weight_EOI = rows_RI.to(dtype).contiguous(), weight_EOI.to(dtype).contiguous()
    if torch.compiler.is_compiling():
        return cast(Tensor, _grouped_linear(rows_RI, weight_EOI, ends_E))
    return F.grouped_mm(rows_RI, weight_EOI.transpose(1, 2), offs=ends_E)


def grouped_linear_reference(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The definition: a loop over groups."""
    outputs = []
    start = 0
    # Not `[group]`: the gradient of each index would be as large as all groups.
    for weight_OI, end in zip(weight_EOI.unbind(), ends_E.tolist(), strict=True):
        outputs.append(F.linear(rows_RI[start:end], weight_OI))
        start = end
    outputs.append(outputs[-1].new_zeros(len(rows_RI) - start, weight_EOI.shape[1]))
    return torch.cat(outputs)


@torch.library.custom_op("moebius::grouped_linear", mutates_args=())
def _grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_mm` for compiled code, which believes that there is none in fp32."""
    return F.grouped_mm(rows_RI, weight_EOI.transpose(1, 2), offs=ends_E)


@torch.library.custom_op("moebius::grouped_linear_backward", mutates_args=())
def _gradients(
    grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    grad_RO = grad_RO.contiguous()
    d_rows_RI = F.grouped_mm(grad_RO, weight_EOI, offs=ends_E)
    return d_rows_RI, F.grouped_mm(grad_RO.transpose(0, 1), rows_RI, offs=ends_E)


@_grouped_linear.register_fake
def _(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return rows_RI.new_empty(rows_RI.shape[0], weight_EOI.shape[1])


@_gradients.register_fake
def _(
    grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_RI), torch.empty_like(weight_EOI)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gradients(grad_RO, *ctx.saved_tensors), None


_grouped_linear.register_autograd(_backward, setup_context=_setup)
