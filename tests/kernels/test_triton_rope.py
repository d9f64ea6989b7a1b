"""The rotary embedding in Triton against its definition, forward and backward."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from moebius.kernels.rope import apply_rope, rope_tables
from moebius.kernels.triton import rope as triton_source

device = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""relative; the interpreter cuts bf16 off where a GPU rounds, and tables are fp32 for fp64 too"""


def agree(x: Tensor, positions: Tensor) -> None:
    """The result and the gradient, as those of the definition in fp64."""
    tables = rope_tables(positions, x.shape[-1], 100.0)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(x.shape, generator=generator).to(device, x.dtype)
    exact = x.detach().double().requires_grad_()
    y, expected = triton_source.apply_rope(x, *tables), apply_rope(exact, *tables)
    (dx,) = torch.autograd.grad(y, x, dy)
    (expected_dx,) = torch.autograd.grad(expected, exact, dy.double())
    for got, wanted in ((y, expected), (dx, expected_dx)):
        assert got.dtype == x.dtype
        bound = TOLERANCE[x.dtype]
        torch.testing.assert_close(got.double(), wanted, rtol=bound, atol=bound)


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def places(rows: int, tokens: int) -> Tensor:
    """Positions that are neither in order nor the same in every row, as after a selection."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(300, (rows, tokens), generator=generator).to(device)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 3),
    tokens=st.integers(0, 9),
    num_heads=st.integers(1, 5),
    pairs=st.integers(1, 50),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@example(2, 33, 3, 48, torch.bfloat16)
@example(0, 5, 2, 8, torch.float32)
def test_equals_the_definition(
    rows: int, tokens: int, num_heads: int, pairs: int, dtype: torch.dtype
) -> None:
    agree(heads(rows, tokens, num_heads, 2 * pairs, dtype=dtype), places(rows, tokens))


def test_heads_wider_than_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pairs are cut, the last part is incomplete."""
    monkeypatch.setattr(triton_source, "TILE", 16)
    agree(heads(2, 3, 2, 2 * 41), places(2, 3))


def test_heads_that_are_not_contiguous() -> None:
    agree(heads(2, 3, 5, 8).transpose(1, 2), places(2, 5))


def test_one_row_of_tables_for_all_rows() -> None:
    x, tables = heads(3, 4, 2, 6), rope_tables(places(1, 4), 6, 100.0)
    torch.testing.assert_close(triton_source.apply_rope(x, *tables), apply_rope(x, *tables))
