"""How the slots of rows are spread over processes: the seam of sequence and context parallelism.

Rows are cut into equal runs of slots, one for each shard; a token stays with its shard wherever
selections take it, so a shard's part of a selection varies. Who is present, which documents there
are and what routers decide is known for *whole* rows to every process that works on them; residual
streams, carries and what experts compute are of a process's *own* slots. Between the two lies the
*part*: the own slots of all processes that split a layer's weights among them, which attention and
dense feed-forwards see together. A spread may give the documents of a row another order, with empty
slots; the tokens of a document keep theirs.
"""

from __future__ import annotations

from torch import Tensor


class Spread:
    """One process has whole rows: own, part and whole are the same."""

    num_shards = 1
    order_BS: Tensor | None = None
    """for each slot the place of its token in the row, -1 for an empty one; None: as they come"""

    def of(self, segment_ids_BS: Tensor) -> Spread:
        """The spread of a batch whose rows have these documents."""
        return self

    def read(self, batch_BS: Tensor) -> Tensor:
        """The part's slots of something in the order of the batch; any value for empty ones."""
        return self.part(batch_BS)

    def present(self, part_BS: Tensor) -> Tensor:
        """The part's tokens, `[T, ...]`, of its slots `[B, S, ...]`."""
        return part_BS.flatten(0, 1)

    def own(self, whole_BS: Tensor) -> Tensor:
        """The own slots of something that is known for whole rows."""
        return whole_BS

    def part(self, whole_BS: Tensor) -> Tensor:
        """The part's slots of something that is known for whole rows."""
        return whole_BS

    def own_places(self, index_BK: Tensor, num_slots: int) -> Tensor:
        """Where in the own run of slots the own slots of a selection stand, or -1."""
        return index_BK

    def whole(self, own_BS: Tensor) -> Tensor:
        """All slots from everyone's own. What follows is computed alike by all: the gradient that
        comes back is that of the own slots, not a sum."""
        return own_BS

    def join(self, part_BS: Tensor) -> Tensor:
        """All slots that the part's tokens may look at, from everyone's part. What follows differs:
        gradients are added up."""
        return part_BS

    def joined_slots(self, num_slots: int) -> Tensor | None:
        """Which of so many slots `join` brings, `[B, J]`, -1 for empty ones; None: all of them."""
        return None

    def pairs(self, num_rows: int, num_slots: int) -> int:
        """Pairs of a token and one that `join` brings, of everyone, empty slots included."""
        return num_rows * num_slots**2


ALONE = Spread()
