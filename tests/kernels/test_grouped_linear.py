"""A linear map per group against a product per row."""

import itertools

import pytest
import torch
from torch import Tensor

from moebius.kernels import grouped_linear as kernel
from moebius.kernels.grouped_linear import grouped_linear, grouped_linear_reference

COUNTS = [[3, 5, 2], [0, 10, 0], [10, 0, 0], [0, 0, 10], [0, 0, 0], [1, 0, 9], [97, 1, 2]]
WIDTHS = [(16, 24), (16, 8), (30, 24), (16, 10), (7, 5), (1, 1)]
"""(input, output): rows of 16 bytes in all precisions, in some, in none"""


def row_by_row(rows_RI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    """Each row by the matrix of its group."""
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    outputs = [weight_EOI[group] @ row for row, group in zip(rows_RI, groups, strict=True)]
    return torch.stack(outputs) if outputs else rows_RI.new_zeros(0, weight_EOI.shape[1])


def inputs_of(
    counts: list[int], widths: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    num_inputs, num_outputs = widths
    rows = torch.randn(sum(counts), num_inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), num_outputs, num_inputs, dtype=dtype, requires_grad=True)
    return rows, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of the output."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((output * direction.to(output)).sum(), inputs))


@pytest.mark.parametrize("function", [grouped_linear, grouped_linear_reference])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_a_product_per_row(
    function: object,
    widths: tuple[int, int],
    counts: list[int],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Forward and gradients, with empty and skewed groups."""
    assert callable(function)
    rows, weight, ends = inputs_of(counts, widths, dtype)
    got, expected = function(rows, weight, ends), row_by_row(rows, weight, counts)
    assert got.dtype == dtype
    assert got.shape == (sum(counts), widths[1])
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    if not sum(counts):
        return
    for ours, naive in zip(
        gradients(got, [rows, weight]), gradients(expected, [rows, weight]), strict=True
    ):
        torch.testing.assert_close(ours, naive, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("counts", [[3, 5, 2], [0, 10, 0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_double(
    widths: tuple[int, int], counts: list[int], dtype: torch.dtype
) -> None:
    """Same numbers, products and gradients rounded to half precision."""
    rows, weight, ends = inputs_of(counts, widths, dtype)
    exact = [t.detach().double().requires_grad_() for t in (rows, weight)]
    got, expected = grouped_linear(rows, weight, ends), row_by_row(*exact, counts)
    assert got.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.double(), expected, rtol=bound, atol=bound * float(expected.detach().abs().max())
    )
    for ours, naive in zip(gradients(got, [rows, weight]), gradients(expected, exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), naive, rtol=bound, atol=bound * float(naive.abs().max())
        )


@pytest.mark.parametrize("widths", [(16, 24), (7, 5), (4, 4)])
def test_follows_autocast(widths: tuple[int, int]) -> None:
    """Products in bf16 of the rounded inputs, gradients in the parameters' precision.

    (4, 4) is a whole number of 16 bytes in fp32 and not in bf16: the width that counts is that of
    the precision the products run in.
    """
    counts = [2, 0, 4]
    rows, weight, ends = inputs_of(counts, widths, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_linear(rows, weight, ends)
    assert got.dtype == torch.bfloat16
    rounded = [t.detach().bfloat16().double() for t in (rows, weight)]
    expected = row_by_row(rounded[0], rounded[1], counts)
    torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=2**-7)
    assert not torch.equal(got.float(), grouped_linear(rows, weight, ends))
    for ours, naive in zip(
        gradients(got, [rows, weight]),
        gradients(row_by_row(rows, weight, counts), [rows, weight]),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, naive, rtol=0.05, atol=0.02 * float(naive.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_aligned_rows_do_not_take_the_loop(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop over groups synchronises with the device; it is for what `grouped_mm` refuses."""

    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("the loop was taken")

    monkeypatch.setattr(kernel, "grouped_linear_reference", refuse)
    rows, weight, ends = inputs_of([3, 0, 5], (16, 24), dtype)
    assert grouped_linear(rows, weight, ends).shape == (8, 24)
    with pytest.raises(AssertionError, match="loop"):
        grouped_linear(rows[:, :7], weight[:, :, :7], ends)


def test_no_row_reaches_another_groups_matrix() -> None:
    """The weight gradient of an empty group is 0, that of a group comes from its own rows."""
    counts = [2, 0, 3]
    rows, weight, ends = inputs_of(counts, (16, 8), torch.float32)
    output = grouped_linear(rows, weight, ends)
    bounds = [0, *itertools.accumulate(counts)]
    for group, (start, end) in enumerate(itertools.pairwise(bounds)):
        (grad,) = torch.autograd.grad(
            output[start:end].square().sum(), weight, retain_graph=True, materialize_grads=True
        )
        others = torch.arange(len(counts)) != group
        assert (grad[others] == 0).all()
        assert bool((grad[group] != 0).any()) == (counts[group] > 0)


@pytest.mark.parametrize("layout", ["slice", "transposed", "expanded"])
def test_takes_rows_of_any_strides(layout: str) -> None:
    """`grouped_mm` refuses rows whose strides are no multiples of 16 bytes."""
    counts = [2, 0, 4]
    _, weight, ends = inputs_of(counts, (16, 8), torch.float32)
    rows = {
        "slice": torch.randn(6, 33)[:, 1:17],
        "transposed": torch.randn(16, 6).T,
        "expanded": torch.randn(16).expand(6, 16),
    }[layout]
    torch.testing.assert_close(
        grouped_linear(rows, weight, ends), row_by_row(rows, weight, counts), rtol=1e-5, atol=1e-5
    )
