"""Grouped products in Triton, against the loop over groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from moebius.kernels.grouped_linear import grouped_linear_reference
from moebius.kernels.grouped_swiglu import grouped_swiglu_reference
from moebius.kernels.triton.grouped_linear import grouped_linear, tile_table
from moebius.kernels.triton.grouped_swiglu import grouped_swiglu

device = "cuda" if torch.cuda.is_available() else "cpu"
few = settings(max_examples=6, deadline=None, derandomize=True)
groups = st.one_of(
    st.lists(st.sampled_from([0, 1, 5, 31, 32, 33, 40]), min_size=1, max_size=5),
    st.sampled_from([[0, 70, 0], [0], [0, 0]]),
)
widths = st.sampled_from([1, 7, 16, 33, 64, 70])
DTYPES = [torch.float32, torch.bfloat16]


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of variance 1 / last size, so that products stay near 1."""
    return (torch.randn(*shape, device=device) / max(shape[-1], 1) ** 0.5).to(dtype)


def results(
    function: object, inputs: list[Tensor], ends: Tensor, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients of a function of the inputs as numbers of a precision."""
    assert callable(function)
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = function(*leaves, ends)
    return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]


def assert_close(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Each within the rounding of its precision, relative to the largest number."""
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for ours, expected in zip(got, exact, strict=True):
        assert ours.shape == expected.shape
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            ours.double(), expected, rtol=tolerance, atol=tolerance * (scale + 1e-3)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(groups, widths, widths, st.integers(0, 2**16))
def test_linear_equals_the_loop(
    dtype: torch.dtype, counts: list[int], inputs: int, outputs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    leaves = [random(sum(counts), inputs, dtype=dtype)]
    leaves += [random(len(counts), outputs, inputs, dtype=dtype)]
    ends, grad = ends_of(counts), random(sum(counts), outputs, dtype=dtype)
    got = results(grouped_linear, leaves, ends, grad, dtype)
    assert {tensor.dtype for tensor in got} == {dtype}
    exact = results(grouped_linear_reference, leaves, ends, grad, torch.float64)
    assert_close(got, exact, dtype)
    for group, count in enumerate(counts):
        assert count or (got[2][group] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(groups, widths, widths, st.integers(0, 2**16))
def test_swiglu_equals_the_loop(
    dtype: torch.dtype, counts: list[int], hidden: int, width: int, seed: int
) -> None:
    """Router weights stay in fp32, those of padding are 0."""
    torch.manual_seed(seed)
    rows, experts = sum(counts), len(counts)
    weights = torch.rand(rows, device=device) * (torch.rand(rows, device=device) < 0.8)
    leaves = [random(rows, hidden, dtype=dtype), weights]
    leaves += [random(experts, 2 * width, hidden, dtype=dtype)]
    leaves += [random(experts, hidden, width, dtype=dtype)]
    ends, grad = ends_of(counts), random(rows, hidden, dtype=dtype)
    typed = [tensor.detach().requires_grad_() for tensor in leaves]
    out = grouped_swiglu(*typed, ends)
    got = [out, *torch.autograd.grad(out, typed, grad)]
    exact = results(grouped_swiglu_reference, leaves, ends, grad, torch.float64)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32, dtype, dtype]
    assert_close(got, exact, dtype)
    assert (out[weights == 0] == 0).all()
    for group, count in enumerate(counts):
        assert count or ((got[3][group] == 0).all() and (got[4][group] == 0).all())
    with torch.no_grad():
        assert torch.equal(grouped_swiglu(*leaves, ends), out)


def test_tiles_cover_each_group_and_cross_none() -> None:
    counts = [0, 33, 0, 0, 1, 64, 0]
    table = tile_table(ends_of(counts), 120, 32).tolist()
    assert list(zip(*table, strict=True))[:5] == [(1, 0), (1, 32), (4, 33), (5, 34), (5, 66)]
    assert len(table[0]) == 4 + 7
    assert set(table[0][5:]) == {-1}


def test_more_tiles_than_a_program_writes() -> None:
    counts = [3, 0, 100, 50]
    table = tile_table(ends_of(counts), sum(counts), 1)
    expected = [group for group, count in enumerate(counts) for _ in range(count)]
    assert table[0].tolist() == expected + [-1] * 4
    assert table[1, : sum(counts)].tolist() == list(range(sum(counts)))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_past_the_last_end_reach_nothing(poison: float) -> None:
    """Neither a row of a group nor a weight's gradient."""
    counts, more = [3, 0, 30], 9
    rows, weights, gate_up, down = random(33, 16), random(33), random(3, 24, 16), random(3, 16, 12)
    grad, ends = random(33, 16), ends_of(counts)
    exact = results(
        grouped_swiglu_reference, [rows, weights, gate_up, down], ends, grad, torch.float64
    )
    rows, grad = (torch.cat((t, t.new_full((more, 16), poison))) for t in (rows, grad))
    weights = torch.cat((weights, weights.new_full((more,), poison)))
    got = results(grouped_swiglu, [rows, weights, gate_up, down], ends, grad, torch.float32)
    assert_close([t[:33] for t in got[:3]] + got[3:], exact, torch.float32)
    linear = results(grouped_linear, [rows, gate_up[:, :16]], ends, grad, torch.float32)
    exact = results(
        grouped_linear_reference, [rows[:33], gate_up[:, :16]], ends, grad[:33], torch.float64
    )
    assert_close([t[:33] for t in linear[:2]] + linear[2:], exact, torch.float32)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    counts = [3, 5]
    rows, weight, ends = random(8, 6), random(2, 4, 6), ends_of(counts)
    for trained in ([rows], [weight]):
        for tensor in (rows, weight):
            tensor.requires_grad_(any(tensor is other for other in trained))
        out = grouped_linear(rows, weight, ends)
        expected = grouped_linear_reference(rows, weight, ends)
        grad = random(8, 4)
        torch.testing.assert_close(
            torch.autograd.grad(out, trained, grad), torch.autograd.grad(expected, trained, grad)
        )


def test_takes_views() -> None:
    ends = ends_of([2, 3])
    rows, weights = random(8, 5).T, torch.rand(10, device=device)[::2]
    gate_up, down = random(2, 8, 12).mT, random(2, 6, 8).mT
    got = grouped_swiglu(rows, weights, gate_up, down, ends)
    torch.testing.assert_close(got, grouped_swiglu_reference(rows, weights, gate_up, down, ends))
    got = grouped_linear(rows, gate_up, ends)
    torch.testing.assert_close(got, grouped_linear_reference(rows, gate_up, ends))


def test_follows_autocast() -> None:
    """Products in bf16 of the rounded inputs, gradients in the parameters' precision."""
    counts, ends = [20, 0, 14], ends_of([20, 0, 14])
    leaves = [random(34, 16), torch.rand(34, device=device), random(3, 24, 16), random(3, 16, 12)]
    leaves = [tensor.requires_grad_() for tensor in leaves]
    with torch.autocast(device, torch.bfloat16):
        linear = grouped_linear(leaves[0], leaves[2], ends)
        out = grouped_swiglu(*leaves, ends)
    assert linear.dtype == out.dtype == torch.bfloat16
    grad = random(sum(counts), 16)
    got = [out, *torch.autograd.grad(out, leaves, grad.bfloat16())]
    assert {tensor.dtype for tensor in got[1:]} == {torch.float32}
    exact = results(grouped_swiglu_reference, leaves, ends, grad, torch.float64)
    for ours, expected in zip(got, exact, strict=True):
        bound = 0.04 * float(expected.detach().abs().max())
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=bound)


def test_double_precision_takes_the_definition() -> None:
    ends = ends_of([3, 2])
    leaves = [random(5, 4), random(5), random(2, 6, 4), random(2, 4, 3)]
    rows, weights, gate_up, down = (tensor.double() for tensor in leaves)
    assert torch.equal(
        grouped_swiglu(rows, weights, gate_up, down, ends),
        grouped_swiglu_reference(rows, weights, gate_up, down, ends),
    )
    assert torch.equal(
        grouped_linear(rows, gate_up, ends), grouped_linear_reference(rows, gate_up, ends)
    )
