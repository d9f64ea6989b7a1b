"""Choosing tokens along the sequence, taking them out of their rows and putting them back.

An index `[B, K]` lists positions of a row in ascending order; -1 marks an empty slot (rows may
select different numbers of tokens); all empty slots of a row, or of each of its shards, come last.

Shapes: B rows, S tokens, K selected slots, D any trailing width.
"""

import math

import torch
from torch import Tensor


def top_k_mask(scores_BS: Tensor, k: int) -> Tensor:
    """True for the k highest scores of each row; of equal scores the earlier position wins."""
    order = scores_BS.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(scores_BS, dtype=torch.bool)
    return mask.scatter_(1, order[:, :k], True)


def top_k_positions(scores_BS: Tensor, k: int) -> Tensor:
    """Positions of the k highest scores of each row, ascending, int64 `[B, min(k, S)]`; -1 where a
    row has fewer: a score of -inf is never chosen, a NaN always. Of equal scores the earlier
    position wins.

    Reads `4 * B * S` bytes of fp32 scores; `O(B * S)` comparisons for a selection by bisection.
    """
    # Sorting on a GPU goes by bits, in which NaN has a sign.
    best_BS = top_k_mask(scores_BS.masked_fill(scores_BS.isnan(), math.nan), k)
    keep_BS = best_BS & ~scores_BS.isneginf()
    positions_BS = torch.arange(scores_BS.shape[1], device=scores_BS.device).expand_as(keep_BS)
    return compact(positions_BS, keep_BS, k)[0]


def top_share_mask(
    scores_BS: Tensor, index_BS: Tensor, segment_ids_BL: Tensor, share: float
) -> Tensor:
    """True for the best `max(1, floor(share * n))` tokens of each document of n tokens in a row.

    `scores` belong to the tokens at `index` (-1: empty slot); a document's n counts its tokens in
    the full row, whose documents `segment_ids` (ascending) names. Of equal scores the earlier
    position wins.
    """
    first_BL = torch.zeros_like(segment_ids_BL, dtype=torch.bool)
    first_BL[:, 1:] = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    document_BL = first_BL.cumsum(dim=1)
    sizes_BL = torch.zeros_like(document_BL).scatter_add(
        1, document_BL, torch.ones_like(document_BL)
    )
    empty_BS = index_BS < 0
    own_BS = document_BL.gather(1, index_BS.clamp(min=0))
    own_BS = own_BS.masked_fill(empty_BS, segment_ids_BL.shape[1])  # after all documents
    by_score = scores_BS.argsort(dim=1, descending=True, stable=True)
    by_document = own_BS.gather(1, by_score).argsort(dim=1, stable=True)
    order_BS = by_score.gather(1, by_document)
    sorted_BS = own_BS.gather(1, order_BS)
    rank_BS = torch.arange(sorted_BS.shape[1], device=sorted_BS.device) - torch.searchsorted(
        sorted_BS, sorted_BS
    )
    size_BS = sizes_BL.gather(1, sorted_BS.clamp(max=segment_ids_BL.shape[1] - 1))
    most_BS = (share * size_BS.double() + 1e-9).floor().clamp(min=1)
    keep_BS = (rank_BS < most_BS) & ~empty_BS.gather(1, order_BS)
    return torch.zeros_like(keep_BS).scatter(1, order_BS, keep_BS)


def scatter_counts(index_BK: Tensor, length: int) -> Tensor:
    """How many rows list each position, fp32 `[length]`; empty slots count nowhere."""
    counts = torch.zeros(length + 1, dtype=torch.float32, device=index_BK.device)
    index = index_BK.masked_fill(index_BK < 0, length).flatten()
    return counts.scatter_add(0, index, torch.ones_like(index, dtype=torch.float32))[:length]


def compact(candidates_BS: Tensor, keep_BS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The kept candidates of each row, in order, in k slots.

    Returns `(index_BK, slot_BK)`: `index` has -1 where a row keeps fewer than k; `slot` says at
    which place in `candidates` each stood.
    """
    slot_BK = (~keep_BS).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    index_BK = candidates_BS.gather(1, slot_BK)
    return index_BK.masked_fill(~keep_BS.gather(1, slot_BK), -1), slot_BK


def compact_shards(
    candidates_BS: Tensor, keep_BS: Tensor, k: int, num_shards: int
) -> tuple[Tensor, Tensor]:
    """`compact` in each of so many equal runs of slots, which stay in order.

    With one shard k slots remain; with several each has as many as the fullest one of any row.
    """
    if num_shards == 1:
        return compact(candidates_BS, keep_BS, k)
    rows, length = candidates_BS.shape
    each = length // num_shards
    keep_XS = keep_BS.reshape(rows * num_shards, each)
    most = max(1, int(keep_XS.sum(dim=1).max())) if rows else 1
    index_XK, slot_XK = compact(candidates_BS.reshape(keep_XS.shape), keep_XS, most)
    first_X = torch.arange(num_shards, device=slot_XK.device) * each
    slot_XK = slot_XK + first_X.repeat(rows).unsqueeze(1)
    shape = (rows, num_shards * index_XK.shape[1])
    return index_XK.reshape(shape), slot_XK.reshape(shape)


def take_rows(x_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """`x[b, index[b, k]]`, `[B, K, D]`; empty slots read position 0 and must not be used."""
    index = index_BK.clamp(min=0).unsqueeze(-1).expand(-1, -1, x_BSD.shape[-1])
    return x_BSD.gather(1, index)


def add_rows(x_BSD: Tensor, index_BK: Tensor, rows_BKD: Tensor) -> Tensor:
    """`x` with `rows` added at their positions; rows of empty slots are ignored."""
    rows = rows_BKD.masked_fill((index_BK < 0).unsqueeze(-1), 0).to(x_BSD.dtype)
    index = index_BK.clamp(min=0).unsqueeze(-1).expand_as(rows)
    return x_BSD.scatter_add(1, index, rows)


def add_gated_rows(x_BSD: Tensor, index_BK: Tensor, gate_BK: Tensor, rows_BKD: Tensor) -> Tensor:
    """`x` with `gate * rows` added at their positions; rows of empty slots are ignored.

    Positions of a row differ. In one pass it reads x and rows and writes the result, `b * B * D *
    (2 * S + K)` bytes for elements of b bytes; `2 * B * K * D` FLOPs.
    """
    return add_rows(x_BSD, index_BK, gate_BK.unsqueeze(-1) * rows_BKD)


def replace_rows(x_BSD: Tensor, index_BK: Tensor, rows_BKD: Tensor) -> Tensor:
    """`x` with `rows` instead of what stood at their positions; empty slots write nowhere."""
    length = x_BSD.shape[1]
    index = index_BK.masked_fill(index_BK < 0, length).unsqueeze(-1).expand_as(rows_BKD)
    nowhere = x_BSD.new_zeros(x_BSD.shape[0], 1, x_BSD.shape[2])
    return torch.cat([x_BSD, nowhere], dim=1).scatter(1, index, rows_BKD)[:, :length]
