"""Sequence and context parallelism: the slots of rows over the processes that share them."""

import torch
from torch import Tensor

from moebius.model.spread import Spread
from moebius.parallel.comm import Group
from moebius.parallel.functions import gather_same, gather_shared


class RowSpread(Spread):
    """Rows cut into parts by `context`; `shards` also cut parts into own slots, with sequence
    parallelism, or are the same."""

    def __init__(self, context: Group, shards: Group) -> None:
        self.context = context
        self.shards = shards
        self.num_shards = shards.size

    def own(self, whole_BS: Tensor) -> Tensor:
        """See `Spread`."""
        return _run(whole_BS, self.shards)

    def part(self, whole_BS: Tensor) -> Tensor:
        """See `Spread`."""
        return _run(whole_BS, self.context)

    def own_places(self, index_BK: Tensor, num_slots: int) -> Tensor:
        """See `Spread`."""
        first = self.shards.rank * (num_slots // self.num_shards)
        own_BK = self.own(index_BK)
        return torch.where(own_BK < 0, own_BK, own_BK - first)

    def whole(self, own_BS: Tensor) -> Tensor:
        """See `Spread`."""
        return gather_same(own_BS, self.shards, dim=1)

    def join(self, part_BS: Tensor) -> Tensor:
        """See `Spread`."""
        return gather_shared(part_BS, self.context, dim=1)


def _run(x_BS: Tensor, group: Group) -> Tensor:
    """The own one of equal runs of slots."""
    length = x_BS.shape[1] // group.size
    return x_BS.narrow(1, group.rank * length, length)
