"""SwiGLU experts over rows that are sorted by expert: no padding, no dropped row.

Shapes: R routed rows, E experts, D hidden, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_swiglu(
    rows_RD: Tensor, weights_R: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """`weight * down(silu(gate(x)) * up(x))` of each row by its expert, `[R, D]`.

    Rows `ends[e-1]:ends[e]` belong to expert e; a group may be empty. The router weight is folded
    into the activation before the second product: one pass over F instead of D channels, and its
    gradient needs no stored output. Forward FLOPs: `6 * R * D * F`.

    Under autocast the products run in its dtype (`grouped_mm` does not cast by itself). What
    `grouped_mm` refuses takes `grouped_swiglu_reference`: float64, and rows of D or F elements
    that are no multiple of 16 bytes.
    """
    device = rows_RD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows_RD.dtype
    _, hidden, width = down_EDF.shape
    aligned = hidden * dtype.itemsize % 16 == 0 and width * dtype.itemsize % 16 == 0
    if dtype not in GROUPED_MM_DTYPES or not aligned:
        return grouped_swiglu_reference(rows_RD, weights_R, gate_up_E2FD, down_EDF, ends_E)
    rows_RD, gate_up_E2FD, down_EDF = (t.to(dtype) for t in (rows_RD, gate_up_E2FD, down_EDF))
    gate_up = F.grouped_mm(rows_RD, gate_up_E2FD.transpose(1, 2), offs=ends_E)
    gate, up = gate_up.chunk(2, dim=-1)
    activation_RF = F.silu(gate) * up * weights_R.to(dtype).unsqueeze(1)
    return F.grouped_mm(activation_RF, down_EDF.transpose(1, 2), offs=ends_E)


def grouped_swiglu_reference(
    rows_RD: Tensor, weights_R: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """The definition: a loop over experts."""
    outputs = []
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        gate, up = (rows_RD[start:end] @ gate_up_E2FD[expert].T).chunk(2, dim=-1)
        activation = F.silu(gate) * up * weights_R[start:end].unsqueeze(1)
        outputs.append(activation @ down_EDF[expert].T)
        start = end
    return torch.cat(outputs)
