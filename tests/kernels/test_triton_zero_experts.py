"""The affine epilogue in Triton against its definition in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from moebius.kernels import zero_experts as definition
from moebius.kernels.triton import zero_experts as kernels

device = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-5}
"""in bf16 the definition rounds each of its two terms and their factors"""
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def arguments(
    tokens: int, width: int, experts: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Every second token has picked none of the experts."""
    picked = (torch.arange(tokens) % 2).float()
    x = torch.randn(width, tokens).t()
    weights = torch.rand(tokens) * picked, torch.rand(tokens, experts) * picked[:, None]
    mixes, constants = 3 * torch.randn(tokens, experts, 2), torch.randn(experts, width)
    given = (x.to(dtype), *(t.to(weight_dtype) for t in (*weights, mixes, constants)))
    return tuple(tensor.to(device).requires_grad_() for tensor in given)


def assert_equal_results(inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """The output and all five gradients."""
    same = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    got, expected = kernels.affine_experts(*inputs), definition.affine_experts(*same)
    direction = torch.randn_like(expected)
    got.backward(direction)
    expected.backward(direction)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for mine, reference in zip(inputs, same, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert mine.grad.dtype == mine.dtype
        # Sums over channels or tokens: the errors belong to their terms.
        size = float(reference.grad.abs().max()) if reference.grad.numel() else 0.0
        torch.testing.assert_close(
            mine.grad, reference.grad, rtol=tolerance, atol=tolerance * max(size, 1.0)
        )


@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 3), dtypes, st.integers(0, 2**31))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_affine_experts_by_definition(
    tokens: int, width: int, experts: int, dtype: torch.dtype, seed: int
) -> None:
    """Sizes that are multiples of nothing, no tokens, no channels and no constants."""
    torch.manual_seed(seed)
    assert_equal_results(arguments(tokens, width, experts, dtype, dtype), TOLERANCE[dtype])


def test_weights_in_fp32_beside_activations_in_bf16() -> None:
    """As under autocast."""
    torch.manual_seed(0)
    inputs = arguments(70, 96, 2, torch.bfloat16, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_equal_results(inputs, TOLERANCE[torch.bfloat16])


def test_more_channels_than_a_tile_has() -> None:
    torch.manual_seed(0)
    assert_equal_results(arguments(9, 300, 2, torch.float32, torch.float32), 2e-5)


def test_double_precision_is_differentiated_exactly() -> None:
    inputs = arguments(4, 3, 2, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(kernels.affine_experts, inputs)


def test_by_hand() -> None:
    """One copy at 0.5, and a constant at 2 that mixes three quarters of the input."""
    x = torch.tensor([[4.0, 8.0]], device=device)
    copy = torch.tensor([0.5], device=device)
    weight = torch.tensor([[2.0]], device=device)
    mix = torch.tensor([[[3.0, 1.0]]], device=device).log()
    got = kernels.affine_experts(x, copy, weight, mix, torch.tensor([[10.0, -10.0]], device=device))
    torch.testing.assert_close(got, torch.tensor([[2 + 6 + 5.0, 4 + 12 - 5.0]], device=device))


def test_extreme_mixes_keep_their_small_part() -> None:
    """A constant whose share is far below the rounding of 1."""
    x, copy = torch.zeros(1, 1, device=device), torch.zeros(1, device=device)
    mix = torch.tensor([[[40.0, 0.0]]], device=device)
    one = torch.ones(1, 1, device=device)
    got = kernels.affine_experts(x, copy, one, mix, one)
    torch.testing.assert_close(
        got, definition.affine_experts(x, copy, one, mix, one), atol=0, rtol=1e-4
    )


def test_gradients_are_the_same_each_time() -> None:
    torch.manual_seed(0)
    inputs = arguments(150, 40, 2, torch.float32, torch.float32)
    direction = torch.randn(150, 40, device=device)
    first, second = (
        torch.autograd.grad(kernels.affine_experts(*inputs), inputs, direction) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
