"""The precision of matrix products."""

import torch
from torch import Tensor


def for_products(x: Tensor) -> Tensor:
    """The operand as autocast would hand it to a matrix product."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
