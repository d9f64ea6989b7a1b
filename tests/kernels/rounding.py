"""Comparing an implementation with its definition in fp64: results and every gradient."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7}
"""relative to the largest number: rounding"""
dtypes = st.sampled_from(list(TOLERANCE))
some = settings(max_examples=40, deadline=None, derandomize=True)
Function = Callable[..., Tensor]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).to(dtype)


def results(function: Function, inputs: list[Tensor], *others: Any) -> list[Tensor]:
    """What a function returns, and the gradient of each input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves, *others)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def agree(
    function: Function, definition: Function, inputs: list[Tensor], *others: Any, loose: float = 1
) -> None:
    """Up to the rounding of each tensor, as if the inputs had been in fp64."""
    got = results(function, inputs, *others)
    exact = results(definition, [tensor.double() for tensor in inputs], *others)
    for ours, theirs, dtype in zip(
        got, exact, [inputs[0].dtype, *(t.dtype for t in inputs)], strict=True
    ):
        assert (ours.dtype, ours.shape) == (dtype, theirs.shape)
        coarsest = max(TOLERANCE[t.dtype] for t in inputs)
        bound = loose * coarsest * max([1.0, *theirs.detach().abs().flatten().tolist()])
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)
