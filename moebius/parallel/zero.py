"""ZeRO stage 1 (Rajbhandari et al. 2019, arXiv 1910.02054): the optimizer's state is shared out.

Gradients pile up where they arise, however often a block is used and whatever the pipeline does;
once per step and group of processes they are reduced and scattered, and what was updated is
gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebius.model.parameters import Role
from moebius.parallel.comm import Group
from moebius.parallel.engine import (
    MakeOptimizer,
    agree_on_use,
    begin_state,
    clip,
    step_where,
)
from moebius.parallel.mesh import Mesh
from moebius.parallel.part import Part, Parts
from moebius.parallel.place import Placed


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


class Bucket:
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
        """Hand every piece its gradient; the parameters lose theirs."""
        parameters = [p.parameter for p in self.placed]
        if self.tied is not None:
            agree_on_use(self.tied, parameters)
        used = {p.name for p in self.placed if p.parameter.grad is not None}
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
        for piece in self.pieces:
            gradient = part[piece.offset : piece.offset + piece.end - piece.start]
            piece.own.grad = gradient if piece.of.name in used else None

    @torch.no_grad()
    def publish(self) -> None:
        """Give everyone the parameters that were updated here."""
        own = self.values[self.first : self.first + self.size].clone()
        self.values.copy_(self.group.all_gather(own))


class ZeroEngine:
    """Every process updates a part of the parameters it holds (`data: zero1`)."""

    skips = True

    def __init__(self, placed: Sequence[Placed], mesh: Mesh, make: MakeOptimizer) -> None:
        self.placed = placed
        self.mesh = mesh
        groups: dict[object, list[Placed]] = {}
        for p in placed:
            if p.spec.role is not Role.FROZEN:
                groups.setdefault((p.placement.reduce, p.placement.tied), []).append(p)
        self.buckets = [Bucket(members) for members in groups.values()]
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
        norm = clip(self._gradients(), self.mesh, clip_norm)
        step_where(self.optimizer, norm, sound)
        self.optimizer.zero_grad()
        for bucket in self.buckets:
            bucket.publish()
        return norm

    def _gradients(self) -> Iterable[tuple[Tensor, Role, int]]:
        stage_size = self.mesh.world.size // self.mesh.depth.size
        for piece in self.pieces:
            if piece.own.grad is not None:
                placement = piece.of.placement
                # Of the processes that add up gradients only one has this part of the sum.
                replicas = placement.replicas(stage_size) // placement.reduce.size
                yield piece.own.grad, piece.of.spec.role, replicas

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
