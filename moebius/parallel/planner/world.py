"""One process of a world that is not there: its groups, whose collectives go nowhere."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.distributed_c10d import GroupName
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from moebius.parallel.comm import Group
from moebius.parallel.config import ParallelConfig
from moebius.parallel.mesh import Mesh
from moebius.parallel.messages import Channel


@dataclass
class Post:
    """Messages between simulated processes that hold different layers, by (sender, receiver)."""

    boxes: dict[tuple[int, int, str], queue.Queue[Any]] = field(default_factory=dict)
    failure: BaseException | None = None
    """of the first process that failed: nothing will come any more"""

    def send(self, sender: int, receiver: int, message: Any, kind: str = "tensors") -> None:
        """Leave a message."""
        self._box(sender, receiver, kind).put(message)

    def receive(self, sender: int, receiver: int, kind: str = "tensors") -> Any:
        """The next message of a kind; waits for it."""
        box = self._box(sender, receiver, kind)
        while self.failure is None:
            with suppress(queue.Empty):
                return box.get(timeout=0.05)
        raise RuntimeError("another simulated process has failed")

    def _box(self, *address: Any) -> queue.Queue[Any]:
        return self.boxes.setdefault(address, queue.Queue())


class SimulatedMesh(Mesh):
    """The mesh as one of so many processes sees it; nobody else is needed.

    A reduction returns the own summand, a gather the own part again and again: shapes are right,
    and so are integers where all processes do alike.
    """

    def __init__(
        self, config: ParallelConfig, rank: int, world_size: int, post: Post | None = None
    ) -> None:
        self.post = post or Post()
        super().__init__(config, "cpu", rank, world_size)

    def _whole_world(self) -> dist.ProcessGroup | None:
        return self._connect([list(range(self.world_size))])

    def _connect(self, lists: list[list[int]]) -> dist.ProcessGroup | None:
        own = next((ranks for ranks in lists if self.rank in ranks), None)
        if own is None:
            return None
        return fake_process_group(own.index(self.rank), len(own))

    def _make(self, name: str, lists: list[list[int]]) -> Group:
        made = super()._make(name, lists)
        group = SimulatedGroup(made.axis, made.ranks, made.process_group, made.traffic, self.rank)
        group.post = self.post if name in ("pp", "rp") else None
        return group

    def channel(self, pairs: Iterable[tuple[int, int]], device: torch.device) -> Channel:
        """See `Mesh`."""
        return SimulatedChannel(self.depth, {}, {}, device, post=self.post)


def fake_process_group(rank: int, size: int) -> dist.ProcessGroup:
    """One whose collectives return at once, outside of torch's world."""
    create: Any = FakeProcessGroup._create_internal
    group = dist.ProcessGroup(FakeStore(), rank, size)
    kind = dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, create(rank, size))
    group._set_group_name(GroupName("simulated"))
    return group


class SimulatedGroup(Group):
    """A group whose other processes do what this one does, or are simulated beside it."""

    post: Post | None = None
    """of the latter"""

    def objects(self, value: Any) -> list[Any]:
        """See `Group`."""
        if self.post is None:
            return [value] * self.size
        for other in self.ranks:
            self.post.send(self.ranks[self.rank], other, value, "objects")
        found = [self.post.receive(r, self.ranks[self.rank], "objects") for r in self.ranks]
        return [tree_map(_own_copy, other) for other in found]


@dataclass
class SimulatedChannel(Channel):
    """Messages through the memory of this process."""

    post: Post = field(default_factory=Post)

    def _begin(self, buffer: Tensor, stage_rank: int) -> dist.Work:
        ranks = self.group.ranks
        self.post.send(ranks[self.group.rank], ranks[stage_rank], buffer)
        assert self.group.process_group is not None
        return self.group.process_group.send([buffer], stage_rank, 0)

    def _receive(self, buffer: Tensor, stage_rank: int) -> Tensor:
        ranks = self.group.ranks
        sent = self.post.receive(ranks[stage_rank], ranks[self.group.rank])
        assert sent.shape == buffer.shape, (sent.shape, buffer.shape)
        if not buffer.dtype.is_floating_point:
            buffer.copy_(sent)
        assert self.group.process_group is not None
        self.group.process_group.recv([buffer], stage_rank, 0)
        return buffer


def _own_copy(value: Any) -> Any:
    """A tensor of this thread: shapes of another belong to the mode that is on there."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype.is_floating_point:
        return torch.empty(value.shape, dtype=value.dtype)
    return value.clone()


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Torch's own world, for what asks it: FSDP2."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
