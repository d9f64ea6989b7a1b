"""A linear map per group of rows: no padding, no dropped row.

Shapes: R rows sorted by group, E groups, I input and O output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`rows[ends[e-1]:ends[e]] @ weight[e].T` for every e, `[R, O]`; a group may be empty.

    Forward FLOPs: `2 * R * I * O`. Under autocast the products run in its dtype (`grouped_mm` does
    not cast by itself). What `grouped_mm` refuses takes `grouped_linear_reference`: float64, and
    rows of I or O elements that are no multiple of 16 bytes.
    """
    device = rows_RI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows_RI.dtype
    aligned = all(size * dtype.itemsize % 16 == 0 for size in weight_EOI.shape[1:])
    if dtype not in GROUPED_MM_DTYPES or not aligned:
        return grouped_linear_reference(rows_RI, weight_EOI, ends_E)
    weight_EIO = weight_EOI.to(dtype).contiguous().transpose(1, 2)
    return F.grouped_mm(rows_RI.to(dtype).contiguous(), weight_EIO, offs=ends_E)


def grouped_linear_reference(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The definition: a loop over groups."""
    outputs = []
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        outputs.append(F.linear(rows_RI[start:end], weight_EOI[group]))
        start = end
    return torch.cat(outputs)
