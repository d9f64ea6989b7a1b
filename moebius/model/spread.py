"""How the slots of rows are spread over processes: the seam of sequence and context parallelism.

Rows are cut into equal runs of places, one for each shard; a token stays with its shard wherever
selections take it, so a shard's part of a selection varies. Who is present, which documents there
are and what routers decide is known for *whole* rows to every process that works on them; residual
streams, carries and what experts compute are of a process's *own* slots. Between the two lies the
*part*: the own slots of all processes that split a layer's weights among them, which attention and
dense feed-forwards see together.
"""

from torch import Tensor


class Spread:
    """One process has whole rows: own, part and whole are the same."""

    num_shards = 1

    def own(self, whole_BS: Tensor) -> Tensor:
        """The own slots of something that is known for whole rows."""
        return whole_BS

    def part(self, whole_BS: Tensor) -> Tensor:
        """The part's slots of something that is known for whole rows."""
        return whole_BS

    def own_places(self, index_BK: Tensor, row_length: int) -> Tensor:
        """Where in the own run of places the own slots of a selection stand, or -1."""
        return index_BK

    def whole(self, own_BS: Tensor) -> Tensor:
        """All slots from everyone's own. What follows is computed alike by all: the gradient that
        comes back is that of the own slots, not a sum."""
        return own_BS

    def join(self, part_BS: Tensor) -> Tensor:
        """All slots from everyone's part. What follows differs: gradients are added up."""
        return part_BS


ALONE = Spread()
