"""Operations on rows in C++ against their definitions in fp64: results and every gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from moebius.kernels.cpp.attention import documents
from moebius.kernels.cpp.cross_entropy import row_losses
from moebius.kernels.cpp.rms_norm import rms_norm
from moebius.kernels.cpp.rope import apply_rope
from moebius.kernels.cpp.swiglu import swiglu
from moebius.kernels.cpp.zero_experts import affine_experts
from moebius.kernels.rms_norm import rms_norm as plain_norm
from moebius.kernels.rope import apply_rope as plain_rope
from moebius.kernels.rope import rope_tables
from tests.kernels.rounding import TOLERANCE, Function, agree, drawn, dtypes, results, some
from tests.kernels.test_cpp_attention import packed

pytestmark = pytest.mark.usefixtures("cpp")


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


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, weight: rms_norm(x, weight, 1e-5), [(3000, 64), (64,)]),
        (affine_experts, [(3000, 64), (3000,), (3000, 2), (3000, 2, 2), (2, 64)]),
        (
            lambda q, k, v: documents(q, k, v, packed([900, 100, 500])),
            [(1, 1500, 4, 8), (1, 1500, 2, 8), (1, 1500, 2, 8)],
        ),
    ],
)
def test_the_numbers_do_not_depend_on_threads(
    function: Function, shapes: list[tuple[int, ...]]
) -> None:
    threads = torch.get_num_threads()
    inputs = [drawn(seed, *shape) for seed, shape in enumerate(shapes)]
    try:
        torch.set_num_threads(1)
        one = results(function, inputs)
        torch.set_num_threads(3)
        three = results(function, inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, three))
