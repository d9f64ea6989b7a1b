"""Choosing tokens along the sequence, taking them out of their rows and putting them back.

An index `[B, K]` lists positions of a row in ascending order; -1 marks an empty slot (rows may
select different numbers of tokens) and all empty slots of a row come last.

Shapes: B rows, S tokens, K selected slots, D any trailing width.
"""

import torch
from torch import Tensor


def top_k_mask(scores_BS: Tensor, k: int) -> Tensor:
    """True for the k highest scores of each row; of equal scores the earlier position wins."""
    order = scores_BS.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(scores_BS, dtype=torch.bool)
    return mask.scatter_(1, order[:, :k], True)


def compact(candidates_BS: Tensor, keep_BS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The kept candidates of each row, in order, in k slots.

    Returns `(index_BK, slot_BK)`: `index` has -1 where a row keeps fewer than k; `slot` says at
    which place in `candidates` each stood.
    """
    slot_BK = (~keep_BS).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    index_BK = candidates_BS.gather(1, slot_BK)
    return index_BK.masked_fill(~keep_BS.gather(1, slot_BK), -1), slot_BK


def take_rows(x_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """`x[b, index[b, k]]`, `[B, K, D]`; empty slots read position 0 and must not be used."""
    index = index_BK.clamp(min=0).unsqueeze(-1).expand(-1, -1, x_BSD.shape[-1])
    return x_BSD.gather(1, index)


def add_rows(x_BSD: Tensor, index_BK: Tensor, rows_BKD: Tensor) -> Tensor:
    """`x` with `rows` added at their positions; rows of empty slots are ignored."""
    rows = rows_BKD.masked_fill((index_BK < 0).unsqueeze(-1), 0).to(x_BSD.dtype)
    index = index_BK.clamp(min=0).unsqueeze(-1).expand_as(rows)
    return x_BSD.scatter_add(1, index, rows)


def replace_rows(x_BSD: Tensor, index_BK: Tensor, rows_BKD: Tensor) -> Tensor:
    """`x` with `rows` instead of what stood at their positions; empty slots write nowhere."""
    length = x_BSD.shape[1]
    index = index_BK.masked_fill(index_BK < 0, length).unsqueeze(-1).expand_as(rows_BKD)
    nowhere = x_BSD.new_zeros(x_BSD.shape[0], 1, x_BSD.shape[2])
    return torch.cat([x_BSD, nowhere], dim=1).scatter(1, index, rows_BKD)[:, :length]
