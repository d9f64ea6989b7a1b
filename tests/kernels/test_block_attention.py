"""Attention in blocks, and over packed documents, is masked attention."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.kernels import attention, block_attention
from moebius.kernels.attention import Sight, blocks, document_mask, masked_attention, sdpa
from moebius.kernels.flash import packed

Attention = Callable[[Tensor, Tensor, Tensor, Sight], Tensor]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def documents(sizes_of_rows: list[list[int]]) -> Tensor:
    """Segment ids `[B, S]`, rows cut to the shortest one."""
    rows = [[n for n, size in enumerate(sizes) for _ in range(size)] for sizes in sizes_of_rows]
    length = min(map(len, rows))
    return torch.tensor([row[:length] for row in rows])


def operands(segments: Tensor, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*segments.shape, n, 8) for n in (heads, groups, groups)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def results(function: Attention, inputs: list[Tensor], sight: Sight) -> list[Tensor]:
    """The output, and the gradient of each input."""
    out = function(*inputs, sight)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, weights)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """What kernels for packed documents do, one document after the other."""
    bounds = ends.tolist()
    assert longest == max(b - a for a, b in pairwise(bounds))
    parts = []
    for start, end in pairwise(bounds):
        rows = (t[start:end].unsqueeze(0) for t in (q, k, v))
        mask = torch.ones(1, end - start, end - start, dtype=torch.bool).tril()
        parts.append(masked_attention(*rows, mask)[0])
    return torch.cat(parts)


def over_packed(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    return packed(one_by_one, q, k, v, sight)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    block=st.sampled_from([2, 5, 128]),
    function=st.sampled_from([blocks, over_packed]),
)
def test_equals_masked_attention(
    rows: list[list[int]],
    heads: tuple[int, int],
    dtype: torch.dtype,
    block: int,
    function: Attention,
) -> None:
    segments = documents(rows)
    inputs = operands(segments, *heads, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", block)
        sight = Sight(lambda: document_mask(segments), segments)
        got = results(function, inputs, sight)
    expected = results(sdpa, inputs, sight)
    for found, wanted in zip(got, expected, strict=True):
        scale = TOLERANCE[dtype] * max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(found, wanted, rtol=0, atol=scale)


def test_other_keys_than_those_of_the_queries_take_the_mask() -> None:
    q, k, v = operands(documents([[4, 3]]), 4, 2, torch.float64)
    mask = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    sight = Sight(lambda: mask)
    for function in (blocks, over_packed):
        for got, expected in zip(
            results(function, [q, k, v], sight), results(sdpa, [q, k, v], sight), strict=True
        ):
            assert torch.equal(got, expected)


def test_long_rows_keep_no_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = documents([[4, 3]])
    inputs = operands(segments, 4, 2, torch.float64)
    sight = Sight(lambda: document_mask(segments), segments)
    monkeypatch.setattr(attention, "KEPT_BYTES", 1000)
    assert torch.equal(blocks(*inputs, sight), sdpa(*inputs, sight))


def test_the_products_follow_autocast() -> None:
    segments = documents([[4, 3]])
    inputs = operands(segments, 4, 2, torch.float32)
    sight = Sight(lambda: document_mask(segments), segments)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = blocks(*inputs, sight), sdpa(*inputs, sight)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)
