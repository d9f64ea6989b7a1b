"""Tokens to rows and back in Triton, against the definition in torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from moebius.kernels import permute as definition
from moebius.kernels.permute import Order
from moebius.kernels.triton.permute import permute, sort_by_expert, unpermute

device = "cuda" if torch.cuda.is_available() else "cpu"
few = settings(max_examples=8, deadline=None, derandomize=True)
sizes = st.tuples(
    st.integers(0, 40),  # tokens
    st.integers(1, 4),  # assignments of each
    st.integers(0, 9),  # experts
    st.sampled_from([1, 2, 8, 16]),  # alignment
    st.sampled_from([0.0, 0.3, 1.0]),  # share of assignments without a row
    st.integers(0, 2**16),  # seed
)
DTYPES = [torch.float32, torch.bfloat16]


def ids_of(tokens: int, top_k: int, experts: int, dropped: float) -> Tensor:
    """Experts of which some are empty; ids of none are below 0 and above the last."""
    ids = torch.randint(0, max(experts, 1), (tokens, top_k)) ** 2 % max(experts, 1)
    none = torch.where(torch.rand(tokens, top_k) < 0.5, -1, experts + 3)
    return torch.where(torch.rand(tokens, top_k) < dropped, none, ids).to(device)


def row_of_each(order: Order, shape: torch.Size) -> Tensor:
    """Inverse of `assignment_R`, one row at a time."""
    row = torch.full((shape.numel(),), -1)
    for i, assignment in enumerate(order.assignment_R.tolist()):
        if assignment >= 0:
            row[assignment] = i
    return row.view(shape)


@few
@given(sizes)
def test_order_is_that_of_the_definition(case: tuple[int, int, int, int, float, int]) -> None:
    tokens, top_k, experts, alignment, dropped, seed = case
    torch.manual_seed(seed)
    ids = ids_of(tokens, top_k, experts, dropped)
    got = sort_by_expert(ids, experts, alignment)
    expected = definition.sort_by_expert(ids, experts, alignment)
    num_rows = len(expected.assignment_R)
    assert torch.equal(got.assignment_R[:num_rows], expected.assignment_R)
    assert (got.assignment_R[num_rows:] == -1).all()
    assert len(got.assignment_R) % alignment == 0
    assert torch.equal(got.ends_E, expected.ends_E)
    assert got.ends_E.dtype == torch.int32
    assert got.assignment_R.dtype == torch.int64
    assert got.row_TK is not None
    assert torch.equal(got.row_TK.cpu(), row_of_each(got, ids.shape))
    assert got.top_k == top_k


def test_one_expert_takes_all_or_many_take_none() -> None:
    for ids in (torch.full((30, 2), 4, device=device), torch.full((30, 2), 99, device=device)):
        got, expected = (f(ids, 40, 8) for f in (sort_by_expert, definition.sort_by_expert))
        assert torch.equal(got.ends_E, expected.ends_E)
        num_rows = len(expected.assignment_R)
        assert torch.equal(got.assignment_R[:num_rows], expected.assignment_R)


def run(
    functions: object, order: Order, leaves: list[Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows, weights and sums of a module's functions, and the gradients of all inputs."""
    x, weights, rows, y = (leaf.clone().requires_grad_() for leaf in leaves)
    outputs = [*functions.permute(x, weights, order), functions.unpermute(rows, order, y)]  # type: ignore[attr-defined]
    return outputs, list(torch.autograd.grad(outputs, (x, weights, rows, y), grads))


class Ours:
    """The functions that are tested, by the names of the definition."""

    permute = staticmethod(permute)
    unpermute = staticmethod(unpermute)


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(sizes, st.integers(1, 90))
def test_rows_sums_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype,
    with_rows: bool,
    case: tuple[int, int, int, int, float, int],
    channels: int,
) -> None:
    """With rows that are not finite in padding; the definition need not know where rows are."""
    tokens, top_k, experts, alignment, dropped, seed = case
    torch.manual_seed(seed)
    sort = sort_by_expert if with_rows else definition.sort_by_expert
    order = sort(ids_of(tokens, top_k, experts, dropped), experts, alignment)
    num_rows = len(order.assignment_R)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    leaves = [random(tokens, channels), torch.randn(tokens, top_k, device=device)]
    leaves += [random(num_rows, channels), random(tokens, channels)]
    grads = [random(num_rows, channels), torch.randn(num_rows, device=device)]
    grads += [random(tokens, channels)]
    for poisoned in (leaves[2], grads[0], grads[1]):
        poisoned[order.assignment_R < 0] = math.nan
    outputs, gradients = run(Ours, order, leaves, grads)
    outputs_expected, gradients_expected = run(definition, order, leaves, grads)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    for got, expected in zip(
        outputs + gradients, outputs_expected + gradients_expected, strict=True
    ):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=2 * tolerance)


def test_takes_views_and_rows_in_lower_precision() -> None:
    ids = torch.tensor([[0, 2], [2, 1], [1, 0]], device=device).T.contiguous().T
    order = sort_by_expert(ids, 3, 4)
    x, weights = (torch.randn(5, 3, device=device).T, torch.randn(2, 3, device=device).T)
    for got, expected in zip(
        permute(x, weights, order), definition.permute(x, weights, order), strict=True
    ):
        assert torch.equal(got, expected)
    rows = torch.randn(5, len(order.assignment_R), device=device).bfloat16().T
    rows.requires_grad_()
    out = unpermute(rows, order, x)
    torch.testing.assert_close(out, definition.unpermute(rows, order, x))
    (grad,) = torch.autograd.grad(out.sum(), rows)
    assert grad.dtype == torch.bfloat16


def test_double_precision_takes_the_definition() -> None:
    order = sort_by_expert(torch.tensor([[0], [1]], device=device), 2, 4)
    x = torch.full((2, 3), 1 + 2**-40, dtype=torch.float64, device=device)
    rows, _ = permute(x, torch.ones(2, 1, dtype=torch.float64, device=device), order)
    assert torch.equal(unpermute(rows, order, x), 2 * x)
