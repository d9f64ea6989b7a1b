"""Counter-based random numbers: a draw is a function of (key, counter, column), not of a state.

So a draw does not depend on how a batch is cut, on which rank holds a token, or on what was drawn
before, and nothing has to be saved to draw it again.

Shapes: T counters, C columns.
"""

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(key: int, counter_T: Tensor, columns: int) -> Tensor:
    """Uniform numbers strictly between 0 and 1, fp32 `[T, C]`.

    `key` is any integer, `counter` int64. SplitMix64 (Steele et al. 2014) applied to the key, then
    to its sum with the counter, then with the column; the upper 24 bits become the number.
    """
    column_C = torch.arange(columns, device=counter_T.device)
    start = torch.tensor(_signed(key), device=counter_T.device)
    bits_TC = _mix(_mix(_mix(start) + counter_T).unsqueeze(1) + column_C)
    # The middle of the last of 2**24 intervals is no fp32 number and would round to 1.
    middle_TC = ((bits_TC >> 40) & 0xFFFFFF).float() * 2.0**-24 + 2.0**-25
    return middle_TC.clamp(max=1 - 2.0**-24)


def gumbel(key: int, counter_T: Tensor, columns: int) -> Tensor:
    """Standard Gumbel noise `[T, C]`: argmax of `log p + noise` is a draw from p."""
    return -(-uniform(key, counter_T, columns).log()).log()


def normal(key: int, counter_T: Tensor, columns: int) -> Tensor:
    """Standard normal numbers `[T, C]` (Box & Muller 1958)."""
    radius, angle = uniform(key, counter_T, 2 * columns).chunk(2, dim=1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function after one increment; int64 wraps like uint64."""
    x = x + _signed(GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the lower 64 bits of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
