"""Operations of experts in C++ against their definitions in fp64: results and every gradient."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from moebius.kernels import permute as plain_permute
from moebius.kernels.cpp import permute
from moebius.kernels.cpp.grouped_linear import grouped_linear
from moebius.kernels.cpp.swiglu import grouped_swiglu
from moebius.kernels.cpp.zero_experts import affine_experts
from moebius.kernels.grouped_linear import grouped_linear_reference
from moebius.kernels.grouped_swiglu import grouped_swiglu_reference
from moebius.kernels.permute import Order
from moebius.kernels.zero_experts import affine_experts as plain_experts
from tests.kernels.rounding import TOLERANCE, agree, drawn, dtypes, results, some

pytestmark = pytest.mark.usefixtures("cpp")


@some
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 32, 33]), min_size=1, max_size=5),
    hidden=st.sampled_from([8, 16, 40]),
    width=st.sampled_from([8, 24, 72]),
    dtype=dtypes,
)
@example([0, 70, 0], 16, 64, torch.bfloat16)
@example([0, 0], 8, 8, torch.float32)
def test_grouped_swiglu(counts: list[int], hidden: int, width: int, dtype: torch.dtype) -> None:
    """Empty experts, one that takes all, tokens with weight 0; router weights stay in fp32."""
    rows, experts = sum(counts), len(counts)
    weights = drawn(1, rows).relu()
    inputs = [drawn(0, rows, hidden, dtype=dtype), weights]
    inputs += [drawn(2, experts, 2 * width, hidden, dtype=dtype, size=hidden**-0.5)]
    inputs += [drawn(3, experts, hidden, width, dtype=dtype, size=width**-0.5)]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    agree(grouped_swiglu, grouped_swiglu_reference, inputs, ends, loose=4)


@some
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 33, 600]), min_size=1, max_size=5),
    inputs=st.sampled_from([1, 7, 16, 40]),
    outputs=st.sampled_from([1, 8, 30]),
    behind=st.sampled_from([0, 9]),
    dtype=dtypes,
    threads=st.sampled_from([1, 3]),
)
@example([0, 1500, 0], 16, 8, 0, torch.float32, 2)
def test_grouped_linear(
    counts: list[int], inputs: int, outputs: int, behind: int, dtype: torch.dtype, threads: int
) -> None:
    """Groups that are cut, empty ones, and rows behind the last, which reach nothing."""
    rows, ends = sum(counts), torch.tensor(counts).cumsum(0).to(torch.int32)
    x, more = drawn(0, rows, inputs, dtype=dtype), torch.full((behind, inputs), math.nan)
    weight = drawn(1, len(counts), outputs, inputs, dtype=dtype, size=inputs**-0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agree(
            lambda x, weight: grouped_linear(torch.cat([x, more.to(dtype)]), weight, ends)[:rows],
            lambda x, weight: grouped_linear_reference(x, weight, ends),
            [x, weight],
            loose=4,
        )
    finally:
        torch.set_num_threads(before)


def test_grouped_linear_makes_no_gradient_that_nobody_wants() -> None:
    x, weight, ends = drawn(0, 5, 8), drawn(1, 2, 8, 8), torch.tensor([2, 5], dtype=torch.int32)
    for wanted in ((x,), (weight,)):
        alone = grouped_linear(
            *(t.clone().requires_grad_(any(t is w for w in wanted)) for t in (x, weight)), ends
        )
        assert alone.requires_grad
        alone.sum().backward()
    assert not grouped_linear(x, weight, ends).requires_grad


def test_grouped_swiglu_follows_autocast() -> None:
    inputs = [drawn(0, 9, 16), drawn(1, 9), drawn(2, 2, 16, 16), drawn(3, 2, 16, 8)]
    ends = torch.tensor([4, 9], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(grouped_swiglu, inputs, ends)
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 4
    exact = results(grouped_swiglu_reference, [t.double() for t in inputs], ends)
    for ours, theirs in zip(got, exact, strict=True):
        bound = 4 * TOLERANCE[torch.bfloat16] * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


def carried(way: Any, order: Order, x: Tensor, weights: Tensor, y: Tensor) -> Tensor:
    """To rows of experts that do nothing, and back."""
    rows, row_weights = way.permute(x, weights, order)
    return way.unpermute(rows * row_weights.unsqueeze(1).to(rows.dtype), order, y)


@some
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    experts=st.integers(1, 9),
    alignment=st.sampled_from([1, 2, 16]),
    width=st.integers(1, 70),
    dtype=dtypes,
    with_rows=st.booleans(),
)
@example(3000, 2, 8, 32, 16, torch.float32, True)
def test_permute(
    tokens: int,
    top_k: int,
    experts: int,
    alignment: int,
    width: int,
    dtype: torch.dtype,
    with_rows: bool,
) -> None:
    """Some assignments are to experts that are not here or to none, some experts have none."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 2, (top_k, tokens), generator=generator).t()
    ids[ids == experts - 1] = 0
    expected = plain_permute.sort_by_expert(ids, experts, alignment)
    order = permute.sort_by_expert(ids, experts, alignment)
    assert torch.equal(order.assignment_R, expected.assignment_R)
    assert torch.equal(order.ends_E, expected.ends_E)
    assert (order.ends_E.dtype, order.top_k) == (torch.int32, top_k)
    assert order.has_padding == expected.has_padding
    assert torch.equal(order.rows_of(tokens), expected.rows_of(tokens))
    inputs = [drawn(0, tokens, width, dtype=dtype), drawn(1, tokens, top_k)]
    agree(
        lambda x, weights, y: carried(permute, order if with_rows else expected, x, weights, y),
        lambda x, weights, y: carried(plain_permute, expected, x, weights, y),
        [*inputs, drawn(2, tokens, width, dtype=dtype)],
        loose=4,
    )


def test_permute_reads_no_padding() -> None:
    order = permute.sort_by_expert(torch.tensor([[0, 1], [1, 2], [1, 0]]), 3, alignment=4)
    x, weights = drawn(0, 3, 5).requires_grad_(), drawn(1, 3, 2).requires_grad_()
    moved, padding = permute.permute(x, weights, order), order.assignment_R < 0
    assert not moved[0][padding].any()
    assert not moved[1][padding].any()
    poison = [torch.where(padding, math.nan, torch.ones(len(padding))) for _ in moved]
    grads = torch.autograd.grad(
        moved, (x, weights), [poison[0].unsqueeze(1).expand(-1, 5), poison[1]]
    )
    assert [grad.unique().tolist() for grad in grads] == [[2.0], [1.0]]
    rows = poison[0].unsqueeze(1).expand(-1, 5)
    assert torch.equal(permute.unpermute(rows, order, torch.zeros(3, 5)), torch.full((3, 5), 2.0))


@some
@given(
    tokens=st.integers(0, 70),
    width=st.integers(1, 130),
    constants=st.integers(0, 3),
    dtype=dtypes,
)
@example(200, 1000, 2, torch.bfloat16)
def test_zero_computation_experts(
    tokens: int, width: int, constants: int, dtype: torch.dtype
) -> None:
    """Every second token has picked none of them; weights are in fp32."""
    picked = (torch.arange(tokens) % 2).float()
    inputs = [drawn(0, tokens, width, dtype=dtype), drawn(1, tokens).abs() * picked]
    inputs += [drawn(2, tokens, constants).abs() * picked.unsqueeze(1)]
    inputs += [drawn(3, tokens, constants, 2, size=3), drawn(4, constants, width)]
    agree(affine_experts, plain_experts, inputs, loose=4)
