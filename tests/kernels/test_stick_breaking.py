"""Oracle 12: stick-breaking attention against a loop that goes back from each token."""

import math

import pytest
import torch
from torch import Tensor

from moebius.kernels.attention import document_mask, stick_breaking_attention

SEGMENTS = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [3, 3, 3, 1, 1, 2, 2]])
VALID = torch.tensor(
    [[True, True, False, True, True, False, True], [True, False, True, True, True, False, False]]
)
MASKS = {
    "causal": document_mask(torch.zeros_like(SEGMENTS)),
    "documents": document_mask(SEGMENTS),
    "missing tokens": document_mask(SEGMENTS, VALID),
    "any": torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(3)).tril() > 0.4,
}
"""the last one has holes and rows without any token"""


def going_back(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask_BSS: Tensor) -> Tensor:
    """From token i back, each allowed token takes its share of what is left of a stick."""
    rows, length, heads, channels = q_BSHC.shape
    per_group = heads // k_BSGC.shape[2]
    outputs = []
    for b in range(rows):
        for i in range(length):
            for h in range(heads):
                left, output = torch.ones((), dtype=q_BSHC.dtype), torch.zeros_like(v_BSGC[b, i, 0])
                for j in range(i, -1, -1):
                    if not mask_BSS[b, i, j]:
                        continue
                    logit = q_BSHC[b, i, h] @ k_BSGC[b, j, h // per_group] / math.sqrt(channels)
                    output = output + left * torch.sigmoid(logit) * v_BSGC[b, j, h // per_group]
                    left = left * torch.sigmoid(-logit)
                outputs.append(output)
    return torch.stack(outputs).view(rows, length, heads, -1)


def inputs_of(heads: int, groups: int, scale: float = 1.0) -> list[Tensor]:
    """Queries, keys and values of two rows, in double precision."""
    generator = torch.Generator().manual_seed(0)
    rows, length = SEGMENTS.shape
    return [
        (size * torch.randn(rows, length, n, 3, generator=generator, dtype=torch.float64))
        .detach()
        .requires_grad_()
        for n, size in ((heads, scale), (groups, scale), (groups, 1.0))
    ]


def weights_of(q_BSHC: Tensor, k_BSGC: Tensor, mask_BSS: Tensor) -> Tensor:
    """The weights `[B, S, H, S]`: values that name their tokens."""
    rows, length, groups = k_BSGC.shape[:3]
    names = torch.eye(length, dtype=q_BSHC.dtype).view(1, length, 1, length)
    return stick_breaking_attention(
        q_BSHC, k_BSGC, names.expand(rows, length, groups, length), mask_BSS
    )


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of the output."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((output * direction.to(output)).sum(), inputs))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_equals_going_back_from_each_token(mask: str, heads: int, groups: int) -> None:
    """Oracle 12, forward and gradients: masked tokens are skipped, head h reads h // (H / G)."""
    inputs = inputs_of(heads, groups)
    got = stick_breaking_attention(*inputs, MASKS[mask])
    expected = going_back(*inputs, MASKS[mask])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for ours, naive in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("mask", MASKS)
def test_weights_of_a_row_add_up_to_at_most_1(mask: str, scale: float) -> None:
    """Oracle 12: what is missing is the product of all `1 - b`; masked tokens weigh nothing."""
    q, k, _ = inputs_of(4, 2, scale)
    allowed = MASKS[mask]
    weights = weights_of(q, k, allowed)
    assert (weights >= 0).all()
    assert (weights.sum(dim=-1) <= 1 + 1e-12).all()
    assert (weights.masked_select(~allowed.unsqueeze(2)) == 0).all()
    logits = torch.einsum("bihc,bjhc->bihj", q, k.repeat_interleave(2, dim=2)) / math.sqrt(3)
    left = torch.sigmoid(-logits).masked_fill(~allowed.unsqueeze(2), 1.0).prod(dim=-1)
    torch.testing.assert_close(1 - weights.sum(dim=-1), left, rtol=1e-9, atol=1e-12)


def test_equal_shares_halve_from_token_to_token() -> None:
    """With logits of 0 the weights are 1/2, 1/4, ... from the token itself back."""
    zeros = torch.zeros(1, 5, 1, 4)
    weights = weights_of(zeros, zeros, document_mask(torch.zeros(1, 5)))[0, :, 0]
    for i in range(5):
        expected = [0.5 ** (i - j + 1) if j <= i else 0.0 for j in range(5)]
        assert weights[i].tolist() == pytest.approx(expected, abs=1e-7)


def test_packed_documents_and_missing_tokens_equal_what_is_there_alone() -> None:
    """A row with documents and gaps gives each document what its present tokens give alone."""
    inputs = inputs_of(4, 2)
    got = stick_breaking_attention(*inputs, MASKS["missing tokens"])
    for b, segments in enumerate(SEGMENTS.tolist()):
        for document in set(segments):
            present = torch.tensor(
                [s for s, name in enumerate(segments) if name == document and VALID[b, s]],
                dtype=torch.int64,
            )
            alone = [t[b : b + 1, present] for t in inputs]
            mask = document_mask(torch.zeros(1, len(present)))
            torch.testing.assert_close(
                got[b : b + 1, present], stick_breaking_attention(*alone, mask)
            )


def logits_of(scores_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one head whose scaled products are these scores."""
    length = len(scores_SS)
    q = (scores_SS * math.sqrt(length)).view(1, length, 1, length)
    k = torch.eye(length, dtype=scores_SS.dtype).view(1, length, 1, length)
    return q, k


@pytest.mark.parametrize("size", [20.0, 80.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_stay_finite(dtype: torch.dtype, size: float) -> None:
    """Oracle 12 at shares of 0 and 1, in random order, with documents: forward and gradients."""
    generator = torch.Generator().manual_seed(1)
    length = 24
    signs = torch.randint(0, 2, (length, length), generator=generator) * 2 - 1
    q, k = logits_of(signs.to(dtype) * size)
    v = torch.randn(1, length, 1, 5, generator=generator).to(dtype)
    mask = document_mask((torch.arange(length) >= 10).long().unsqueeze(0))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    got = stick_breaking_attention(*inputs, mask)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = going_back(*exact, mask)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    sums = weights_of(inputs[0], inputs[1], mask).sum(dim=-1)
    assert (sums <= 1 + tolerance).all()
    for ours, naive in zip(gradients(got, inputs), gradients(expected, exact), strict=True):
        assert ours.isfinite().all()
        bound = tolerance * max(float(naive.abs().max()), 1.0)
        torch.testing.assert_close(ours.double(), naive, rtol=tolerance, atol=bound)


@pytest.mark.parametrize("score", [-80.0, 80.0])
def test_all_shares_0_or_all_1(score: float) -> None:
    """All of the stick goes to the token itself, or nothing is ever taken; in fp32."""
    length = 9
    q, k = (t.requires_grad_() for t in logits_of(torch.full((length, length), score)))
    weights = weights_of(q, k, document_mask(torch.zeros(1, length)))
    expected = torch.eye(length) if score > 0 else torch.zeros(length, length)
    torch.testing.assert_close(weights[0, :, 0], expected, rtol=0, atol=1e-6)
    for grad in gradients(weights, [q, k]):
        assert grad.isfinite().all()


def test_half_precision_goes_through_single() -> None:
    """bf16 in and out, but the stick is broken in fp32: as exact as rounding the logits allows."""
    length = 64
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(1, length, 2, 8, generator=generator).bfloat16() for _ in range(3)]
    mask = document_mask(torch.zeros(1, length))
    got = stick_breaking_attention(*inputs, mask)
    assert got.dtype == torch.bfloat16
    exact = stick_breaking_attention(*(t.double() for t in inputs), mask)
    torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.02)
    # Logits of 0 are exact in bf16, and so are the powers of 1/2 down to fp32's smallest.
    zeros = torch.zeros(1, length, 1, 8, dtype=torch.bfloat16)
    weights = weights_of(zeros, zeros, mask)[0, -1, 0].float()
    powers = 0.5 ** torch.arange(length, 0, -1).float()
    torch.testing.assert_close(weights, powers, rtol=1e-2, atol=0)
