"""Operations in C++ against their definitions in fp64: results and every gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.kernels import block_attention
from moebius.kernels.attention import Sight, document_mask, masked_attention
from moebius.kernels.cpp import build
from moebius.kernels.cpp.attention import blocks
from moebius.kernels.cpp.cross_entropy import row_losses
from moebius.kernels.cpp.grouped_linear import grouped_linear
from moebius.kernels.cpp.rms_norm import rms_norm
from moebius.kernels.cpp.rope import apply_rope
from moebius.kernels.cpp.swiglu import grouped_swiglu, swiglu
from moebius.kernels.grouped_linear import grouped_linear_reference
from moebius.kernels.grouped_swiglu import grouped_swiglu_reference
from moebius.kernels.rms_norm import rms_norm as plain_norm
from moebius.kernels.rope import apply_rope as plain_rope
from moebius.kernels.rope import rope_tables

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7}
"""relative to the largest number: rounding"""
dtypes = st.sampled_from(list(TOLERANCE))
some = settings(max_examples=40, deadline=None, derandomize=True)
Function = Callable[..., Tensor]


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    """A machine that develops this has a compiler; without one nothing here may pass."""
    assert build.load() is None


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


@some
@given(shape=st.lists(st.integers(0, 9), max_size=2), width=st.integers(1, 130), dtype=dtypes)
@example([300], 1000, torch.float32)
def test_swiglu(shape: list[int], width: int, dtype: torch.dtype) -> None:
    gate, up = (drawn(seed, *shape, width, dtype=dtype, size=3.0) for seed in (0, 1))
    agree(swiglu, lambda gate, up: F.silu(gate) * up, [gate, up])


def test_swiglu_of_what_lies_apart() -> None:
    """Columns of a wider tensor, as of a product that is split."""
    gate, up = drawn(0, 7, 24).split(12, dim=1)
    agree(swiglu, lambda gate, up: F.silu(gate) * up, [gate, up])
    agree(swiglu, lambda gate, up: F.silu(gate) * up, [gate.T, up.T])


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


@some
@given(
    rows=st.integers(0, 6),
    vocabulary=st.integers(1, 300),
    size=st.sampled_from([0.1, 3.0, 80.0]),
    dtype=dtypes,
)
@example(13, 5000, 3.0, torch.bfloat16)
def test_row_losses(rows: int, vocabulary: int, size: float, dtype: torch.dtype) -> None:
    logits = drawn(0, rows, vocabulary, dtype=dtype, size=size)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    original = logits.clone()
    only = row_losses(logits, labels.unsqueeze(1), with_gradients=False)
    assert torch.equal(logits, original)
    losses = row_losses(logits, labels.unsqueeze(1), with_gradients=True)
    assert torch.equal(only, losses)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(logits.double(), gradient, rtol=bound, atol=max(bound**2, 1e-7))


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_outside_of_the_vocabulary(label: int) -> None:
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds .* with size 5"):
        row_losses(torch.zeros(2, 5), torch.tensor([[0], [label]]), with_gradients=False)


@some
@given(
    shape=st.lists(st.integers(0, 9), max_size=2),
    width=st.integers(1, 130),
    dtype=dtypes,
    scale=st.sampled_from(["vector", 1.0, 0.5]),
)
@example([201], 1000, torch.bfloat16, "vector")
def test_rms_norm(shape: list[int], width: int, dtype: torch.dtype, scale: Any) -> None:
    inputs = [drawn(0, *shape, width, dtype=dtype), drawn(1, width)]
    if scale == "vector":
        inputs.append(drawn(2, width))

    def of(norm: Function) -> Function:
        return lambda x, weight, factor=scale: norm(x, weight, 1e-5, factor)

    agree(of(rms_norm), of(plain_norm), inputs, loose=2)


@some
@given(
    rows=st.integers(0, 3),
    tokens=st.integers(0, 9),
    heads=st.integers(1, 5),
    pairs=st.integers(1, 50),
    dtype=dtypes,
)
def test_rope(rows: int, tokens: int, heads: int, pairs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    positions = torch.randint(300, (rows, tokens), generator=generator)
    tables = rope_tables(positions, 2 * pairs, 100.0)
    agree(apply_rope, plain_rope, [drawn(0, rows, tokens, heads, 2 * pairs, dtype=dtype)], *tables)


def test_rope_of_heads_that_are_not_contiguous_by_one_row_of_tables() -> None:
    tables = rope_tables(torch.tensor([[3, 1, 40]]), 6, 100.0)
    agree(apply_rope, plain_rope, [drawn(0, 2, 5, 3, 6).transpose(1, 2)], *tables)


def test_rope_of_one_token_in_several_rows() -> None:
    """As in generation: tables that look contiguous and are not."""
    cos, sin = rope_tables(torch.tensor([[3, 1, 40], [7, 2, 5]]), 6, 100.0)
    x = drawn(0, 2, 1, 3, 6)
    agree(apply_rope, plain_rope, [x], cos[:1, :1], sin[:1, :1])
    agree(apply_rope, plain_rope, [x], cos[:, 1:2], sin[:, 1:2])


@some
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    dtype=dtypes,
    block=st.sampled_from([2, 5, 128]),
)
def test_attention(
    rows: list[list[int]], heads: tuple[int, int], dtype: torch.dtype, block: int
) -> None:
    length = min(map(sum, rows))
    segments = torch.stack(
        [torch.arange(len(r)).repeat_interleave(torch.tensor(r))[:length] for r in rows]
    )
    sight = Sight(lambda: document_mask(segments), segments)
    shapes = [(*segments.shape, n, 8) for n in (heads[0], heads[1], heads[1])]
    inputs = [drawn(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", block)
        agree(
            lambda q, k, v: blocks(q, k, v, sight),
            lambda q, k, v: masked_attention(q, k, v, sight.mask_BSJ),
            inputs,
            loose=4,
        )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_is_not_finite_stays_so_in_its_row(poison: float, dtype: torch.dtype) -> None:
    """A step that is not sound must be seen."""
    x = drawn(0, 4, 40, dtype=dtype)
    x[2, 7] = poison
    labels = torch.zeros(4, 1, dtype=torch.int64)
    found = [
        swiglu(x, torch.ones_like(x)).sum(1),
        swiglu(torch.ones_like(x), x).sum(1),
        rms_norm(x, torch.ones(40), 1e-5).sum(1),
        row_losses(x.clone(), labels, with_gradients=False),
    ]
    for row_sums in found:
        assert row_sums.isfinite().tolist() == [True, True, False, True]


def test_the_numbers_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    inputs = [drawn(0, 3000, 64), drawn(1, 64)]
    try:
        torch.set_num_threads(1)
        one = results(lambda x, weight: rms_norm(x, weight, 1e-5), inputs)
        torch.set_num_threads(3)
        three = results(lambda x, weight: rms_norm(x, weight, 1e-5), inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, three))
