"""Tokens to rows sorted by expert and back, against loops over assignments."""

import math

import pytest
import torch
from torch import Tensor

from moebius.kernels.permute import Order, permute, sort_by_expert, unpermute

CASES = [
    # tokens, top_k, experts, alignment
    (6, 2, 3, 1),
    (6, 2, 3, 4),
    (9, 3, 5, 1),
    (9, 3, 5, 8),
    (1, 1, 1, 16),
    (0, 2, 3, 4),
    (5, 2, 0, 4),
]


def ids_of(tokens: int, top_k: int, experts: int) -> Tensor:
    """Ids of dispatched experts, of others beyond them, and of none."""
    generator = torch.Generator().manual_seed(tokens + experts)
    return torch.randint(-2, experts + 2, (tokens, top_k), generator=generator)


def naive_order(ids_TK: Tensor, num_experts: int, alignment: int) -> tuple[list[int], list[int]]:
    """Assignment of each row and the end of each expert, by going through them all."""
    rows: list[int] = []
    ends = []
    for expert in range(num_experts):
        mine = [i for i, e in enumerate(ids_TK.flatten().tolist()) if e == expert]
        rows += mine + [-1] * (-len(mine) % alignment)
        ends.append(len(rows))
    return rows, ends


@pytest.mark.parametrize(("tokens", "top_k", "experts", "alignment"), CASES)
def test_order_equals_a_loop_over_experts(
    tokens: int, top_k: int, experts: int, alignment: int
) -> None:
    ids = ids_of(tokens, top_k, experts)
    order = sort_by_expert(ids, experts, alignment)
    rows, ends = naive_order(ids, experts, alignment)
    assert order.assignment_R.tolist() == rows
    assert order.ends_E.tolist() == ends
    assert order.assignment_R.dtype == torch.int64
    assert order.ends_E.dtype == torch.int32
    assert order.top_k == top_k
    assert order.has_padding == (-1 in rows or (alignment > 1 and bool(rows)))


def test_an_expert_without_tokens_gets_no_padding() -> None:
    order = sort_by_expert(torch.tensor([[0, 3], [3, 9], [-1, 3]]), 5, alignment=4)
    assert order.ends_E.tolist() == [4, 4, 4, 8, 8]
    assert order.assignment_R.tolist() == [0, -1, -1, -1, 1, 2, 5, -1]


@pytest.mark.parametrize(("tokens", "top_k", "experts", "alignment"), CASES)
def test_rows_are_their_tokens_and_padding_is_zero(
    tokens: int, top_k: int, experts: int, alignment: int
) -> None:
    x, weights = torch.randn(tokens, 5), torch.randn(tokens, top_k)
    order = sort_by_expert(ids_of(tokens, top_k, experts), experts, alignment)
    rows, row_weights = permute(x, weights, order)
    assert len(rows) == len(row_weights) == len(order.assignment_R)
    for row, weight, assignment in zip(rows, row_weights, order.assignment_R, strict=True):
        if assignment < 0:
            assert (row == 0).all()
            assert weight == 0
        else:
            assert torch.equal(row, x[assignment // top_k])
            assert weight == weights[assignment // top_k, assignment % top_k]


@pytest.mark.parametrize(("tokens", "top_k", "experts", "alignment"), CASES)
def test_tokens_get_their_rows_and_no_padding(
    tokens: int, top_k: int, experts: int, alignment: int
) -> None:
    order = sort_by_expert(ids_of(tokens, top_k, experts), experts, alignment)
    y, rows = torch.randn(tokens, 5), torch.randn(len(order.assignment_R), 5)
    rows[order.assignment_R < 0] = math.nan
    expected = y.clone()
    for row, assignment in zip(rows, order.assignment_R, strict=True):
        if assignment >= 0:
            expected[assignment // top_k] += row
    torch.testing.assert_close(unpermute(rows, order, y), expected)


@pytest.mark.parametrize(("tokens", "top_k", "experts", "alignment"), CASES)
def test_gradients_are_those_of_finite_differences(
    tokens: int, top_k: int, experts: int, alignment: int
) -> None:
    order = sort_by_expert(ids_of(tokens, top_k, experts), experts, alignment)
    num_rows = len(order.assignment_R)

    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weights, y, rows = (
        double(tokens, 3),
        double(tokens, top_k),
        double(tokens, 3),
        double(num_rows, 3),
    )
    if num_rows:
        assert torch.autograd.gradcheck(lambda a, b: permute(a, b, order), (x, weights))
        assert torch.autograd.gradcheck(lambda a, b: unpermute(a, order, b), (rows, y))


def test_no_gradient_of_padding_reaches_a_token() -> None:
    """Not even one that is not finite."""
    x, weights = (
        torch.randn(4, 3, requires_grad=True),
        torch.randn(4, 2, requires_grad=True),
    )
    order = sort_by_expert(torch.tensor([[0, 1], [1, 2], [1, 0], [2, 2]]), 3, alignment=4)
    padding = order.assignment_R < 0
    assert padding.any()
    assert not padding.all()
    grad_rows, grad_weights = torch.ones(len(padding), 3), torch.ones(len(padding))
    grad_rows[padding], grad_weights[padding] = math.nan, math.nan
    outputs = permute(x, weights, order)
    got = torch.autograd.grad(outputs, (x, weights), (grad_rows, grad_weights))
    assert torch.equal(got[0], torch.full((4, 3), 2.0))
    assert torch.equal(got[1], torch.ones(4, 2))
    rows = torch.randn(len(padding), 3, requires_grad=True)
    (grad,) = torch.autograd.grad(unpermute(rows, order, x).sum(), rows)
    assert torch.equal(grad, (~padding).float().unsqueeze(1).expand(-1, 3))


def test_rows_past_the_last_end_are_padding() -> None:
    """A backend that does not wait for the device leaves some."""
    whole = sort_by_expert(torch.tensor([[0, 1], [1, 0]]), 2)
    more = Order(torch.cat((whole.assignment_R, torch.tensor([-1, -1]))), whole.ends_E, 2)
    x, weights, y = torch.randn(2, 3), torch.randn(2, 2), torch.randn(2, 3)
    rows, row_weights = permute(x, weights, more)
    assert (rows[4:] == 0).all()
    assert (row_weights[4:] == 0).all()
    rows[4:] = math.inf
    assert torch.equal(unpermute(rows, more, y), unpermute(rows[:4], whole, y))


def test_rows_in_lower_precision_are_added_in_that_of_y() -> None:
    order = sort_by_expert(torch.tensor([[0], [0]]), 1)
    rows = torch.randn(2, 3).bfloat16().requires_grad_()
    out = unpermute(rows, order, torch.ones(2, 3))
    assert out.dtype == torch.float32
    assert torch.equal(out, 1 + rows.float())
    out.sum().backward()
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16
