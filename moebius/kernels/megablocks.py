"""Grouped products by MegaBlocks (Gale et al. 2022, arXiv 2211.15841), where it is installed."""

import torch
from torch import Tensor

from moebius.kernels.precision import for_products
from moebius.kernels.swiglu import weighted_swiglu


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """See `moebius.kernels.grouped_linear`; the host waits for the sizes of groups."""
    from megablocks import grouped_gemm_util

    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1)).to("cpu", torch.int64)
    out: Tensor = grouped_gemm_util.ops.gmm(
        for_products(rows_RI).contiguous(),
        for_products(weight_EOI).contiguous(),
        sizes_E,
        trans_b=True,
    )
    return out


def grouped_swiglu(
    rows_RD: Tensor, weights_R: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Tensor:
    """See `moebius.kernels.grouped_swiglu`."""
    activation_RF = weighted_swiglu(grouped_linear(rows_RD, gate_up_E2FD, ends_E), weights_R)
    return grouped_linear(activation_RF, down_EDF, ends_E)
