"""Causal attention in blocks of queries, each with the keys that it may see: for CPUs.

A dense mask computes all pairs and hides most of them. Here rows are cut where documents begin and
every `BLOCK` tokens; a piece multiplies with the keys from its document's beginning to its own end,
and only the square at that end needs a mask.

Shapes: B rows, S tokens, H query heads, G key-value heads, C channels of one head; within a piece
X = rows * G products of M = queries * H / G by J keys.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.kernels.precision import for_products

BLOCK = 128
"""queries of a piece: products of fewer are slower, of more more pairs are hidden"""


class Piece(NamedTuple):
    """Queries `start:end` of some rows, which see keys from `first` on."""

    rows: slice
    first: int
    start: int
    end: int


def block_attention(
    q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, begins: Sequence[Sequence[int]]
) -> Tensor:
    """`softmax(q k / sqrt(C)) v` over the earlier tokens of a document and itself, `[B, S, H, C]`.

    `begins` has for each row the slots where a document begins, ascending, the first 0. Query head
    h reads key-value head `h // (H / G)`. Forward FLOPs: `4 * H * C` for each pair of a query and a
    key of its piece: of a document of many blocks about half of its pairs. The probabilities of
    these pairs are kept for the backward pass; softmax in fp32 or wider. No second derivatives.
    """
    q, k, v = (for_products(t) for t in (q_BSHC, k_BSGC, v_BSGC))
    out: Tensor = _BlockAttention.apply(q, k, v, begins)  # type: ignore[no-untyped-call]
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, begins: Sequence[Sequence[int]]
    ) -> Tensor:
        ctx.pieces = list(_pieces(begins, q_BSHC.shape[1]))
        groups, out_BSHC, kept = k_BSGC.shape[2], torch.empty_like(q_BSHC), []
        for piece in ctx.pieces:
            rows, first, start, end = piece
            q_XMC = _by_key_head(q_BSHC[rows, start:end], groups)
            k_XJC, v_XJC = (_heads_first(t[rows, first:end]) for t in (k_BSGC, v_BSGC))
            probs_XMJ = _probabilities(torch.bmm(q_XMC, k_XJC.transpose(1, 2)), piece, q_BSHC)
            out_XMC = torch.bmm(probs_XMJ.to(v_XJC.dtype), v_XJC)
            _put_queries(out_BSHC[rows, start:end], out_XMC, groups)
            if any(ctx.needs_input_grad):
                kept.append(probs_XMJ)
        ctx.save_for_backward(q_BSHC, k_BSGC, v_BSGC, *kept)
        return out_BSHC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BSHC, k_BSGC, v_BSGC, *kept = ctx.saved_tensors
        groups, scale = k_BSGC.shape[2], q_BSHC.shape[-1] ** -0.5
        dq_BSHC = torch.empty_like(q_BSHC)
        dk_BSGC, dv_BSGC = torch.zeros_like(k_BSGC), torch.zeros_like(v_BSGC)
        for (rows, first, start, end), probs_XMJ in zip(ctx.pieces, kept, strict=True):
            q_XMC, grad_XMC = (
                _by_key_head(t[rows, start:end], groups) for t in (q_BSHC, grad_BSHC)
            )
            k_XJC, v_XJC = (_heads_first(t[rows, first:end]) for t in (k_BSGC, v_BSGC))
            of_probs_XJM = probs_XMJ.to(grad_XMC.dtype).transpose(1, 2)
            _add_keys(dv_BSGC[rows, first:end], torch.bmm(of_probs_XJM, grad_XMC))
            d_probs_XMJ = torch.bmm(grad_XMC, v_XJC.transpose(1, 2)).to(probs_XMJ.dtype)
            d_scores_XMJ = torch._softmax_backward_data(d_probs_XMJ, probs_XMJ, -1, probs_XMJ.dtype)
            d_scores_XMJ = d_scores_XMJ.mul_(scale).to(q_XMC.dtype)
            _put_queries(dq_BSHC[rows, start:end], torch.bmm(d_scores_XMJ, k_XJC), groups)
            _add_keys(dk_BSGC[rows, first:end], torch.bmm(d_scores_XMJ.transpose(1, 2), q_XMC))
        return dq_BSHC, dk_BSGC, dv_BSGC, None


def _probabilities(scores_XMJ: Tensor, piece: Piece, q_BSHC: Tensor) -> Tensor:
    """Softmax of a piece's products, the later keys of the square at its end hidden."""
    scores_XMJ = scores_XMJ.to(torch.promote_types(scores_XMJ.dtype, torch.float32))
    scores_XMJ = scores_XMJ.mul_(q_BSHC.shape[-1] ** -0.5)
    queries = piece.end - piece.start
    later = torch.ones(queries, queries, dtype=torch.bool, device=q_BSHC.device).triu_(1)
    square = scores_XMJ.unflatten(1, (-1, queries))[..., piece.start - piece.first :]
    square.masked_fill_(later, float("-inf"))
    return torch.softmax(scores_XMJ, dim=-1)


def _pieces(begins: Sequence[Sequence[int]], length: int) -> Iterator[Piece]:
    """The pieces of all rows, those of rows that are cut alike together."""
    row = 0
    while row < len(begins):
        after = row + 1
        while after < len(begins) and begins[after] == begins[row]:
            after += 1
        for first, last in zip(begins[row], [*begins[row][1:], length], strict=True):
            for start in range(first, last, BLOCK):
                yield Piece(slice(row, after), first, start, min(start + BLOCK, last))
        row = after


def _by_key_head(t_BQHC: Tensor, groups: int) -> Tensor:
    """`[X, M, C]`: the queries of the heads that read the same keys below each other."""
    t_BGHQC: Tensor = t_BQHC.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    return t_BGHQC.reshape(t_BGHQC.shape[0] * groups, -1, t_BGHQC.shape[-1])


def _put_queries(target_BQHC: Tensor, t_XMC: Tensor, groups: int) -> None:
    """Write what `_by_key_head` has taken apart."""
    queries = target_BQHC.shape[1]
    t_BGHQC = t_XMC.view(len(target_BQHC), groups, -1, queries, t_XMC.shape[-1])
    target_BQHC.unflatten(2, (groups, -1)).copy_(t_BGHQC.permute(0, 3, 1, 2, 4))


def _heads_first(t_BJGC: Tensor) -> Tensor:
    """`[X, J, C]`."""
    return t_BJGC.transpose(1, 2).reshape(-1, t_BJGC.shape[1], t_BJGC.shape[-1])


def _add_keys(target_BJGC: Tensor, t_XJC: Tensor) -> None:
    """Add what has the shape of `_heads_first`."""
    rows, keys, groups, channels = target_BJGC.shape
    target_BJGC.add_(t_XJC.view(rows, groups, keys, channels).transpose(1, 2))
