"""Every kernel against the dumbest code that could be right."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.kernels.attention import document_mask, masked_attention
from moebius.kernels.depth_select import add_rows, compact, replace_rows, take_rows, top_k_mask
from moebius.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_reference
from moebius.kernels.rope import apply_rope, rope_tables
from moebius.kernels.zero_experts import affine_experts


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of the output."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((output * direction.to(output)).sum(), inputs))


@pytest.mark.parametrize("counts", [[3, 5, 2], [0, 10, 0], [10, 0, 0], [0, 0, 0], [1, 0, 9]])
def test_grouped_swiglu_equals_a_loop_over_experts(counts: list[int]) -> None:
    """Forward and all gradients, with empty and skewed groups."""
    torch.manual_seed(0)
    num_rows, hidden, width = sum(counts), 16, 24
    inputs = [
        torch.randn(num_rows, hidden, requires_grad=True),
        torch.rand(num_rows, requires_grad=True),
        torch.randn(3, 2 * width, hidden, requires_grad=True),
        torch.randn(3, hidden, width, requires_grad=True),
    ]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    fast, slow = grouped_swiglu(*inputs, ends), grouped_swiglu_reference(*inputs, ends)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    if num_rows:
        for got, expected in zip(gradients(fast, inputs), gradients(slow, inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("hidden", "width"), [(30, 24), (16, 10), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_swiglu_takes_any_width(hidden: int, width: int, dtype: torch.dtype) -> None:
    """`grouped_mm` wants rows of 16 bytes; other shapes must work too."""
    torch.manual_seed(0)
    rows, weights = torch.randn(6, hidden, dtype=dtype), torch.rand(6, dtype=dtype)
    gate_up = torch.randn(2, 2 * width, hidden, dtype=dtype, requires_grad=True)
    down = torch.randn(2, hidden, width, dtype=dtype)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    got = grouped_swiglu(rows, weights, gate_up, down, ends)
    got.sum().backward()
    torch.testing.assert_close(got, grouped_swiglu_reference(rows, weights, gate_up, down, ends))


def test_grouped_swiglu_follows_autocast() -> None:
    """`grouped_mm` does not cast by itself: under autocast the result must be bf16, and close."""
    torch.manual_seed(0)
    rows, weights = torch.randn(6, 16), torch.rand(6)
    gate_up, down = torch.randn(2, 32, 16), torch.randn(2, 16, 16)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    exact = grouped_swiglu(rows, weights, gate_up, down, ends)
    with torch.autocast("cpu", torch.bfloat16):
        half = grouped_swiglu(rows, weights, gate_up, down, ends)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_zero_computation_epilogue_equals_a_loop_over_tokens_and_experts() -> None:
    """copy + constant + zero as one affine map, forward and gradients to 1e-6."""
    torch.manual_seed(0)
    num_tokens, hidden, num_constant = 9, 5, 2
    inputs = [
        torch.randn(num_tokens, hidden, dtype=torch.float64, requires_grad=True),
        torch.rand(num_tokens, dtype=torch.float64, requires_grad=True),
        torch.rand(num_tokens, num_constant, dtype=torch.float64, requires_grad=True),
        torch.randn(num_tokens, num_constant, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(num_constant, hidden, dtype=torch.float64, requires_grad=True),
    ]
    x, copy_weight, constant_weight, mix_logits, constants = inputs
    rows = []
    for t in range(num_tokens):
        zero = 0.0 * x[t]
        copied = copy_weight[t] * x[t]
        row = zero + copied
        for c in range(num_constant):
            first, second = mix_logits[t, c].softmax(dim=0)
            row = row + constant_weight[t, c] * (first * x[t] + second * constants[c])
        rows.append(row)
    naive = torch.stack(rows)
    fused = affine_experts(*inputs)
    torch.testing.assert_close(fused, naive, rtol=0, atol=1e-6)
    for got, expected in zip(gradients(fused, inputs), gradients(naive, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_masked_attention_equals_each_document_alone() -> None:
    """Two documents in a row, grouped heads: the same as causal attention document by document."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 10, 4, 8), torch.randn(1, 10, 2, 8), torch.randn(1, 10, 2, 8)
    segments = torch.tensor([[0] * 4 + [1] * 6])
    packed = masked_attention(q, k, v, document_mask(segments))
    for start, end in ((0, 4), (4, 10)):
        alone = F.scaled_dot_product_attention(
            q[:, start:end].transpose(1, 2),
            k[:, start:end].repeat_interleave(2, dim=2).transpose(1, 2),
            v[:, start:end].repeat_interleave(2, dim=2).transpose(1, 2),
            is_causal=True,
        ).transpose(1, 2)
        torch.testing.assert_close(packed[:, start:end], alone)


def test_document_mask_hides_empty_slots_and_never_blinds_a_row() -> None:
    segments = torch.zeros(1, 4, dtype=torch.int64)
    valid = torch.tensor([[True, True, False, False]])
    mask = document_mask(segments, valid)[0]
    assert mask.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_rope_depends_on_distance_only() -> None:
    """The score of a query and a key is the same wherever the pair stands."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_position: int, key_position: int) -> float:
        rotated = [
            apply_rope(x, *rope_tables(torch.tensor([[position]]), 16, 10_000.0))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 0)) > 0.1


def test_top_k_mask_prefers_the_earlier_of_equal_scores() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert top_k_mask(scores, 2).tolist() == [[False, True, True, False, False]]


def test_compact_keeps_order_and_marks_empty_slots() -> None:
    candidates = torch.tensor([[0, 2, 5, 7], [1, 3, 4, 6]])
    keep = torch.tensor([[True, False, True, True], [False, False, True, False]])
    index, slot = compact(candidates, keep, 3)
    assert index.tolist() == [[0, 5, 7], [4, -1, -1]]
    assert slot[0].tolist() == [0, 2, 3]
    assert slot[1, 0] == 2


def test_rows_are_taken_added_and_replaced_at_their_positions() -> None:
    """Against plain indexing; empty slots must neither read into the result nor write anywhere."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3)
    index = torch.tensor([[0, 3, 4], [2, -1, -1]])
    rows = torch.randn(2, 3, 3)
    rows[1, 1:] = float("nan")
    added, replaced = x.clone(), x.clone()
    for b in range(2):
        for slot, position in enumerate(index[b].tolist()):
            if position >= 0:
                assert torch.equal(take_rows(x, index)[b, slot], x[b, position])
                added[b, position] += rows[b, slot]
                replaced[b, position] = rows[b, slot]
    assert torch.equal(add_rows(x, index, rows), added)
    assert torch.equal(replace_rows(x, index, rows), replaced)
