"""Attention in C++ against its definition in fp64: results and every gradient."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from moebius.kernels.attention import Sight, document_mask, masked_attention
from moebius.kernels.cpp.attention import documents
from tests.kernels.rounding import TOLERANCE, agree, drawn, dtypes, results, some

pytestmark = pytest.mark.usefixtures("cpp")


def packed(*sizes_of_rows: list[int]) -> Sight:
    """Rows of documents, cut to the shortest one."""
    rows = [torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in sizes_of_rows]
    segments = torch.stack([row[: min(map(len, rows))] for row in rows])
    return Sight(lambda: document_mask(segments), segments)


def heads_of(sight: Sight, heads: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values."""
    shape = sight.mask_BSJ.shape[:2]
    return [drawn(n, *shape, h, width, dtype=dtype) for n, h in enumerate((heads, groups, groups))]


@some
@given(
    rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=5), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    width=st.sampled_from([1, 8, 40]),
    dtype=dtypes,
)
@example([[200]], (2, 1), 64, torch.float32)
@example([[65, 128, 3]], (2, 2), 33, torch.bfloat16)
def test_attention(
    rows: list[list[int]], heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    sight = packed(*rows)
    agree(
        lambda q, k, v: documents(q, k, v, sight),
        lambda q, k, v: masked_attention(q, k, v, sight.mask_BSJ),
        heads_of(sight, *heads, width, dtype),
        loose=4,
    )


def test_attention_of_large_scores_and_of_what_is_not_contiguous() -> None:
    sight = packed([70, 5])
    q, k, v = heads_of(sight, 4, 2, 16, torch.float32)
    inputs = [30 * q, k.transpose(1, 2).contiguous().transpose(1, 2), v]
    agree(
        lambda q, k, v: documents(q, k, v, sight),
        lambda q, k, v: masked_attention(q, k, v, sight.mask_BSJ),
        inputs,
        loose=30,
    )


def test_attention_of_segments_that_are_not_contiguous() -> None:
    across = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]).t().contiguous().t()
    sight = Sight(lambda: document_mask(across), across)
    q, k, v = heads_of(sight, 2, 2, 8, torch.float32)
    torch.testing.assert_close(documents(q, k, v, sight), masked_attention(q, k, v, sight.mask_BSJ))


def test_attention_reads_nothing_but_its_operands() -> None:
    sight = packed([4, 3])
    q, k, v = heads_of(sight, 4, 2, 8, torch.float32)
    for wrong in (
        (q[..., :3, :], k, v),
        (q, k[:, :5], v[:, :5]),
        (q, k, v[..., :6]),
        (q[..., :4], k, v),
    ):
        with pytest.raises(RuntimeError, match=r"fit together|differ in shape"):
            documents(*wrong, sight)
    with pytest.raises(RuntimeError, match="scalar type"):
        documents(q, k.bfloat16(), v, sight)


def test_attention_follows_autocast_and_leaves_the_rest_to_torch() -> None:
    sight = packed([4, 3])
    inputs = heads_of(sight, 4, 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert documents(*inputs, sight).dtype == torch.bfloat16
    exact = [tensor.double() for tensor in inputs]
    torch.testing.assert_close(
        documents(*exact, sight), masked_attention(*exact, sight.mask_BSJ), rtol=0, atol=1e-12
    )
    masked = Sight(lambda: sight.mask_BSJ)
    assert torch.equal(documents(*inputs, masked), masked_attention(*inputs, sight.mask_BSJ))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_attention_shows_what_is_not_finite(poison: float, dtype: torch.dtype) -> None:
    """To all who see it, and to no other document."""
    sight = packed([70, 5])
    q, k, v = heads_of(sight, 1, 1, 8, dtype)
    v[0, 10, 0, 3] = poison
    finite = documents(q, k, v, sight).isfinite().all(dim=-1).flatten()
    assert not finite[10:70].any()
    assert finite[70:].all()
    q[0, 72, 0, 0] = poison
    grads = results(lambda *inputs: documents(*inputs, sight), [q, k, v.nan_to_num(0, 0, 0)])
    assert not grads[0][0, 72].isfinite().any()
    assert grads[0].isfinite().all(dim=-1).sum() == 74
    assert not grads[2][0, 70:73].isfinite().any()
