"""ZeRO stage 1 (Rajbhandari et al. 2019, arXiv 1910.02054): the optimizer's state is shared out.

Gradients pile up where they arise, however often a block is used and whatever the pipeline does;
once per step and group of processes they are reduced and scattered, and what was updated is
gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moebius.model.parameters import Role
from moebius.parallel.comm import Group
from moebius.parallel.engine import (
    Holding,
    MakeOptimizer,
    adopt,
    agree_on_use,
    begin_state,
    clip,
    square,
    step_where,
)
from moebius.parallel.mesh import Mesh
from moebius.parallel.part import Part, Parts
from moebius.parallel.place import Placed


class Bucket(Protocol):
    """Parameters whose gradients the same processes add up."""

    pieces: list[Piece]
    """what this process updates"""

    def reduce(self) -> None:
        """Hand every piece its gradient; the parameters lose theirs."""

    def publish(self) -> None:
        """Give everyone the parameters that were updated here."""


@dataclass(frozen=True)
class Piece:
    """What a process updates of a parameter."""

    of: Placed
    start: int
    """elements of the flattened parameter"""
    end: int
    own: nn.Parameter
    offset: int
    """where the piece begins in the process's part of the buffer"""

    def place_in(self, part: Tensor) -> Tensor:
        """The piece's elements in the process's part."""
        return part[self.offset : self.offset + self.end - self.start]


class FlatBucket:
    """Parameters one after the other in one buffer, of which each process updates a part."""

    def __init__(self, placed: Sequence[Placed]) -> None:
        self.placed = placed
        self.group: Group = placed[0].placement.reduce
        self.tied = placed[0].placement.tied
        total = sum(p.parameter.numel() for p in placed)
        self.size = -(-total // self.group.size)
        """elements of a part"""
        self.first = self.group.rank * self.size
        self.values = placed[0].parameter.new_zeros(self.size * self.group.size)
        self.pieces: list[Piece] = []
        begin = 0
        for p in placed:
            self._take_over(p, begin)
            begin += p.parameter.numel()

    def _take_over(self, p: Placed, begin: int) -> None:
        """Move a parameter into the buffer, and note which piece of it is updated here."""
        place = self.values[begin : begin + p.parameter.numel()]
        place.copy_(p.parameter.data.flatten())
        p.parameter.data = place.view(p.parameter.shape)
        start = max(self.first - begin, 0)
        end = min(self.first + self.size - begin, p.parameter.numel())
        if start < end:
            own = nn.Parameter(place[start:end])
            self.pieces.append(Piece(p, start, end, own, begin + start - self.first))

    @torch.no_grad()
    def reduce(self) -> None:
        """See `Bucket`."""
        parameters = [p.parameter for p in self.placed]
        used = names_in_use(self.placed, self.tied)
        if not used:
            return
        flat = torch.zeros_like(self.values)
        places = flat[: sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])
        for parameter, place in zip(parameters, places, strict=True):
            if parameter.grad is not None:
                place.copy_(parameter.grad.flatten())
                parameter.grad = None
        part = self.group.reduce_scatter(flat)
        if self.tied is not None:
            part = self.tied.all_reduce(part)
        hand_out(part, self.pieces, used)

    @torch.no_grad()
    def publish(self) -> None:
        """See `Bucket`."""
        own = self.values[self.first : self.first + self.size].clone()
        self.values.copy_(self.group.all_gather(own))


class MatrixBucket:
    """Parameters of which each process updates whole matrices: some runs of them.

    A parameter of three dimensions may be cut between its entries. The processes' shares are filled
    up to the largest one, so that they can be reduced and gathered in one call each.
    """

    def __init__(self, placed: Sequence[Placed]) -> None:
        self.placed = placed
        self.group: Group = placed[0].placement.reduce
        self.tied = placed[0].placement.tied
        self.shares: list[list[Piece]] = [[] for _ in range(self.group.size)]
        """of each process"""
        filled = [0] * self.group.size
        entries = [len(p.parameter) if p.parameter.dim() == 3 else 1 for p in placed]
        sizes = [p.parameter.numel() // number for p, number in zip(placed, entries, strict=True)]
        for p, size, counts in zip(
            placed, sizes, share_out(entries, sizes, self.group.size), strict=True
        ):
            start = 0
            for rank, count in enumerate(counts):
                end = start + count * size
                if count:
                    own = nn.Parameter(entries_of(p.parameter.data, start, end))
                    self.shares[rank].append(Piece(p, start, end, own, filled[rank]))
                    filled[rank] += end - start
                start = end
        self.size = max(filled)
        """elements of a share"""
        self.pieces = self.shares[self.group.rank]

    @torch.no_grad()
    def reduce(self) -> None:
        """See `Bucket`."""
        used = names_in_use(self.placed, self.tied)
        if not used:
            return
        flat = self.placed[0].parameter.new_zeros(self.group.size, self.size)
        for share, pieces in zip(flat, self.shares, strict=True):
            for piece in pieces:
                if piece.of.name in used:
                    gradient = piece.of.parameter.grad
                    assert gradient is not None
                    piece.place_in(share).copy_(gradient.flatten()[piece.start : piece.end])
        for p in self.placed:
            p.parameter.grad = None
        part = self.group.reduce_scatter(flat.flatten())
        if self.tied is not None:
            part = self.tied.all_reduce(part)
        hand_out(part, self.pieces, used)

    @torch.no_grad()
    def publish(self) -> None:
        """See `Bucket`."""
        if self.tied is not None:
            adopt(self.tied, [piece.own for piece in self.pieces])
        share = self.placed[0].parameter.new_zeros(self.size)
        for piece in self.pieces:
            piece.place_in(share).copy_(piece.own.flatten())
        flat = self.group.all_gather(share).view(self.group.size, self.size)
        for share, pieces in zip(flat, self.shares, strict=True):
            for piece in pieces:
                piece.own.copy_(piece.place_in(share).view_as(piece.own))


def share_out(entries: Sequence[int], sizes: Sequence[int], number: int) -> list[list[int]]:
    """How many entries of each parameter, all of one size, each of so many processes gets: the
    largest first, each to whoever has least."""
    load = [0] * number
    counts = [[0] * number for _ in entries]
    for index in sorted(range(len(entries)), key=lambda index: -sizes[index]):
        for _ in range(entries[index]):
            rank = load.index(min(load))
            load[rank] += sizes[index]
            counts[index][rank] += 1
    return counts


def entries_of(tensor: Tensor, start: int, end: int) -> Tensor:
    """A view of neighbouring entries, given by their elements in the flattened tensor."""
    return tensor.view(-1)[start:end].view(-1, *tensor.shape[1:])


def names_in_use(placed: Sequence[Placed], tied: Group | None) -> set[str]:
    """Parameters with a gradient, here or on processes with other layers that hold them too; a
    collective call of these."""
    if tied is not None:
        agree_on_use(tied, [p.parameter for p in placed])
    return {p.name for p in placed if p.parameter.grad is not None}


def hand_out(part: Tensor, pieces: Iterable[Piece], used: set[str]) -> None:
    """Give pieces their gradients out of what was reduced."""
    for piece in pieces:
        gradient = piece.place_in(part).view_as(piece.own)
        piece.own.grad = gradient if piece.of.name in used else None


class ZeroEngine:
    """Every process updates a part of the parameters it holds (`data: zero1`)."""

    skips = True

    def __init__(
        self,
        placed: Sequence[Placed],
        mesh: Mesh,
        make: MakeOptimizer,
        whole: frozenset[Role] = frozenset(),
    ) -> None:
        self.placed = placed
        self.mesh = mesh
        self.squares: dict[str, Tensor] | None = None
        groups: dict[tuple[object, object, bool], list[Placed]] = {}
        for p in placed:
            if p.spec.role is not Role.FROZEN:
                place = p.placement
                key = (place.reduce, place.tied, p.spec.role in whole)
                groups.setdefault(key, []).append(p)
        self.buckets: list[Bucket] = [
            MatrixBucket(members) if matrices else FlatBucket(members)
            for (_, _, matrices), members in groups.items()
        ]
        self.optimizer = make((piece.own, piece.of.spec) for piece in self.pieces)
        begin_state(self.optimizer)

    @property
    def pieces(self) -> list[Piece]:
        """What this process updates."""
        return [piece for bucket in self.buckets for piece in bucket.pieces]

    def step(self, clip_norm: float, sound: Tensor | None = None) -> Tensor:
        """See `Engine`."""
        for bucket in self.buckets:
            bucket.reduce()
        norm = clip(self._holdings(), self.mesh, clip_norm, self.squares)
        step_where(self.optimizer, norm, sound)
        self.optimizer.zero_grad()
        for bucket in self.buckets:
            bucket.publish()
        return norm

    def weight_square(self) -> Tensor:
        """See `Engine`."""
        return square(self._holdings(), self.mesh)

    def _holdings(self) -> Iterable[Holding]:
        stage_size = self.mesh.world.size // self.mesh.depth.size
        for piece in self.pieces:
            of, placement = piece.of, piece.of.placement
            # Of the processes that add up gradients only one updates this.
            replicas = placement.replicas(stage_size) // placement.reduce.size
            yield Holding(of.name, piece.own.detach(), piece.own.grad, of.spec.role, replicas)

    def parts(self) -> dict[str, Part]:
        """See `Engine`."""
        placed = {p.name: p for p in self.placed}
        found = {f"model/{n}": Part.of(p.parameter, p.placement.cuts) for n, p in placed.items()}
        for piece in self.pieces:
            of = piece.of
            for key, value in self.optimizer.state.get(piece.own, {}).items():
                name = f"optimizer/{of.name}/{key}"
                if value.dim() == 0:
                    found[name] = Part.of(value)
                else:
                    found[name] = Part.of(value, of.placement.cuts, of.parameter.shape, piece.start)
        return found

    def take_over(self, parts: Parts) -> None:
        """See `Engine`: the parts are what it works on."""
