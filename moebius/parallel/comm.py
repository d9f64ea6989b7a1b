"""Collectives of one group of processes, and a count of what they move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has new names and warns about the old ones, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """What this process has handed to collectives, by (axis, operation)."""

    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    sent: dict[tuple[str, str], int] = field(default_factory=dict)
    """bytes: of a gather, a reduction or a reduce-scatter the size of its input; of an all-to-all
    or a message what leaves for other processes"""
    waited: float = 0.0
    """seconds in which the host waited for other processes"""

    def add(self, axis: str, operation: str, sent: int) -> None:
        """Count a call."""
        key = (axis, operation)
        self.calls[key] = self.calls.get(key, 0) + 1
        self.sent[key] = self.sent.get(key, 0) + sent

    def take(self) -> Traffic:
        """What was counted since the last time."""
        taken = Traffic(self.calls, self.sent, self.waited)
        self.calls, self.sent, self.waited = {}, {}, 0.0
        return taken

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the context as waiting."""
        began = perf_counter()
        yield
        self.waited += perf_counter() - began


class Group:
    """Processes along one or several axes of a mesh; one alone communicates nothing.

    Tensors must be alike everywhere but where splits say otherwise. Every process of the group
    makes the same calls in the same order. `rank` is that of this process in the world.
    """

    def __init__(
        self,
        axis: str,
        ranks: Sequence[int],
        process_group: dist.ProcessGroup | None,
        traffic: Traffic,
        rank: int,
    ) -> None:
        self.axis = axis
        self.ranks = tuple(ranks)
        self.process_group = process_group
        self.traffic = traffic
        self.size = len(self.ranks)
        self.rank = self.ranks.index(rank)
        """own number in the group"""

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum (or what `op` says) of everyone's, in place."""
        if self.size > 1:
            self._count("all_reduce", x)
            with self.traffic.waiting():
                dist.all_reduce(x, op, group=self.process_group)
        return x

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Everyone's, one after the other along a dimension."""
        if self.size == 1:
            return x
        self._count("all_gather", x)
        front = x.movedim(dim, 0).contiguous()
        gathered = front.new_empty(self.size * front.shape[0], *front.shape[1:])
        with self.traffic.waiting():
            _all_gather(gathered, front, group=self.process_group)
        return gathered.movedim(0, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """The own one of `size` equal parts of the sum along a dimension."""
        if self.size == 1:
            return x
        self._count("reduce_scatter", x)
        front = x.movedim(dim, 0).contiguous()
        part = front.new_empty(front.shape[0] // self.size, *front.shape[1:])
        with self.traffic.waiting():
            _reduce_scatter(part, front, group=self.process_group)
        return part.movedim(0, dim)

    def all_to_all(
        self, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> tuple[Tensor, dist.Work | None]:
        """Rows to each process and from each, so many; wait for the work before reading."""
        out = x.new_empty(sum(received), *x.shape[1:])
        if self.size == 1:
            out.copy_(x)
            return out, None
        row = x[:1].numel() * x.element_size() if len(x) else 0
        leaving = sum(sent) - sent[self.rank]
        self.traffic.add(self.axis, "all_to_all", leaving * row)
        work = dist.all_to_all_single(
            out,
            x.contiguous(),
            list(received),
            list(sent),
            group=self.process_group,
            async_op=True,
        )
        return out, work

    def counts(self, sent: Tensor) -> Tensor:
        """What each process says to this one, given what this one says to each, int64 `[size]`."""
        if self.size == 1:
            return sent
        self.traffic.add(self.axis, "counts", (self.size - 1) * sent.element_size())
        received = torch.empty_like(sent)
        with self.traffic.waiting():
            dist.all_to_all_single(received, sent, group=self.process_group)
        return received

    def objects(self, value: Any) -> list[Any]:
        """Everyone's value, which is pickled, in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.process_group)
        return found

    def _count(self, operation: str, x: Tensor) -> None:
        self.traffic.add(self.axis, operation, x.numel() * x.element_size())
