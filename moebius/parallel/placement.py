"""Where the parts of a parameter are: cut along dimensions, held alike by the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moebius.parallel.comm import Group


@dataclass(frozen=True)
class Cut:
    """A dimension of a parameter in equal parts along a group, in the order of its processes.

    With `copies` so many neighbours hold the same part. With `blocks` the dimension is made of so
    many blocks, each of which is cut, as those of a gate and an up projection in one tensor.
    """

    group: Group
    dim: int
    blocks: int = 1
    copies: int = 1

    @property
    def num_parts(self) -> int:
        """Different parts."""
        return self.group.size // self.copies

    @property
    def number(self) -> int:
        """That of the own part."""
        return self.group.rank // self.copies

    def take(self, whole: Tensor) -> Tensor:
        """The own part. Raises ValueError where the dimension cannot be cut."""
        size = whole.shape[self.dim]
        if size % (self.blocks * self.num_parts):
            raise ValueError(
                f"dimension {self.dim} of {list(whole.shape)} in {self.blocks} x {self.num_parts}"
            )
        blocks = whole.unflatten(self.dim, (self.blocks, -1))
        part: Tensor = blocks.chunk(self.num_parts, self.dim + 1)[self.number]
        return part.flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class Placement:
    """What a process holds of a parameter, and whose gradients of it have to be added up."""

    cuts: tuple[Cut, ...]
    reduce: Group
    """processes that hold the same part and have seen other tokens, or another share of the work
    on the same ones"""
    tied: Group | None = None
    """processes with other layers that hold it too"""

    def take(self, whole: Tensor) -> Tensor:
        """The own part."""
        for cut in self.cuts:
            whole = cut.take(whole)
        return whole

    def replicas(self, stage_size: int) -> int:
        """How many processes hold the same elements."""
        holders = stage_size
        for cut in self.cuts:
            holders //= cut.num_parts
        return holders * (1 if self.tied is None else self.tied.size)
