"""The mesh: which process stands where, and the groups along its axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moebius.errors import LayoutError
from moebius.parallel.comm import Group, Traffic
from moebius.parallel.config import ParallelConfig
from moebius.parallel.messages import Channel

DENSE = ("pp", "rp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT = ("pp", "rp", "edp", "ep", "etp")


@dataclass(frozen=True)
class Axes:
    """Sizes of all axes in both views of the same processes: of dense weights and of experts."""

    dense: dict[str, int]
    expert: dict[str, int]

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Axes:
        """Raises LayoutError where the processes do not fill the axes."""
        taken = config.model_size * config.dp_replicate
        if world_size % taken:
            raise LayoutError(
                f"parallel: pp * rp * dp_replicate * cp * tp = {taken} does not divide the "
                f"{world_size} processes that were started",
                f"start a multiple of {taken} or change the axes",
            )
        dp_shard = world_size // taken
        depth = (config.pp, config.rp)
        data = (config.dp_replicate, dp_shard, config.cp, config.tp)
        dense = dict(zip(DENSE, (*depth, *data), strict=True))
        stage = world_size // math.prod(depth)
        if stage % (config.ep * config.etp):
            raise LayoutError(
                f"parallel: ep * etp = {config.ep * config.etp} does not divide the {stage} "
                "processes that hold the same layers",
                "change ep or etp, or start other processes",
            )
        edp = stage // (config.ep * config.etp)
        expert = dict(zip(EXPERT, (*depth, edp, config.ep, config.etp), strict=True))
        return cls(dense, expert)


class Mesh:
    """Groups of processes by axis. Making it is a collective call where there are several.

    The groups that come in more than one size are all made here, in the same order everywhere.
    `rank` and `world_size` are those of this process where they are given, else of torch's world.
    """

    def __init__(
        self,
        config: ParallelConfig,
        device_type: str = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        started = dist.is_initialized()
        self.world_size = world_size or (dist.get_world_size() if started else 1)
        self.rank = (dist.get_rank() if started else 0) if rank is None else rank
        self.axes = Axes.of(config, self.world_size)
        self.traffic = Traffic()
        self.device_type = device_type
        sizes = self.axes.dense
        self.timeout = timedelta(seconds=config.timeout)
        self.depth = self._group("rp" if config.rp > 1 else "pp", "pp", "rp")
        """processes that hold different layers: the stages of a pipeline or the slices of a ring"""
        self.dp = self._group("dp", "dp_replicate", "dp_shard")
        self.dp_replicate = self._group("dp_replicate", "dp_replicate")
        self.cp = self._group("cp", "cp")
        self.tp = self._group("tp", "tp")
        self.rows = self._group("rows", "cp", "tp")
        """with sequence parallelism, all that work on the same rows"""
        self.data = self._group("data", "dp_replicate", "dp_shard", "cp")
        self.data_tp = self._group("data_tp", "dp_replicate", "dp_shard", "cp", "tp")
        self.shard = self._group("shard", "dp_shard", "cp")
        """among which FSDP2 shares parameters out"""
        self.edp = self._group("edp", "edp")
        self.experts = self._group("experts", "ep", "etp")
        self.ep = self._group("ep", "ep")
        self.etp = self._group("etp", "etp")
        self.world = self._group("world", *DENSE)
        numbers = [n for n in range(2, sizes["tp"] + 1) if sizes["tp"] % n == 0]
        self.neighbours = {n: self._copies(n) for n in numbers}
        """by number, so many neighbours along tp"""
        self.copies = {n: self._copies(n, "dp_replicate", "dp_shard", "cp") for n in numbers}
        """the same with those of the data axes: all that hold the same keys"""

    def _group(self, name: str, *axes: str) -> Group:
        view = (
            self.axes.dense if all(axis in self.axes.dense for axis in axes) else self.axes.expert
        )
        return self._make(name, partition(view, axes))

    def depth_group(self, members: Sequence[int]) -> Group | None:
        """Some of the processes that hold different layers, by number, None where this one is not
        among them; a collective call of all processes."""
        partners = partition(self.axes.dense, ("pp", "rp"))
        lists = [[ranks[member] for member in members] for ranks in partners]
        process_group = self._connect(lists)
        own = next((ranks for ranks in lists if self.rank in ranks), None)
        if own is None:
            return None
        return Group("depth", own, process_group, self.traffic, self.rank)

    def channel(self, pairs: Iterable[tuple[int, int]], device: torch.device) -> Channel:
        """Messages between processes that hold different layers, a communicator for each (sender,
        receiver); a collective call of all processes.

        Each is used once here, one after the other: NCCL connects two processes in their first
        message, and two that send to each other first would wait for ever.
        """
        outgoing, incoming, own = {}, {}, self.depth.rank
        for sender, receiver in sorted(pairs):
            group = self.depth_group((sender, receiver))
            greeting = torch.zeros(1, device=self.device_type)
            if group is not None and sender == own:
                outgoing[receiver] = group
                dist.send(greeting, self.depth.ranks[receiver], group.process_group)
            elif group is not None:
                incoming[sender] = group
                dist.recv(greeting, self.depth.ranks[sender], group.process_group)
        return Channel(self.depth, outgoing, incoming, device)

    def _copies(self, number: int, *axes: str) -> Group:
        """So many neighbours along tp, and the processes of some other axes."""
        sizes = dict(self.axes.dense)
        sizes["tp"] //= number
        sizes["copies"] = number
        return self._make("copies", partition(sizes, (*axes, "copies")))

    def _make(self, name: str, lists: list[list[int]]) -> Group:
        own = next(ranks for ranks in lists if self.rank in ranks)
        if len(own) == 1:
            process_group = None
        elif len(own) == self.world_size:
            process_group = self._whole_world()
        else:
            process_group = self._connect(lists)
        return Group(name, own, process_group, self.traffic, self.rank)

    def _whole_world(self) -> dist.ProcessGroup | None:
        world: dist.ProcessGroup | None = dist.group.WORLD
        return world

    def _connect(self, lists: list[list[int]]) -> dist.ProcessGroup | None:
        """A new communicator of the list that this process is in; a collective call."""
        group: dist.ProcessGroup | None
        group, _ = dist.new_subgroups_by_enumeration(lists, timeout=self.timeout)
        return group

    def describe(self, processes_per_node: int) -> Iterator[str]:
        """Lines that say how long each axis is and whether it leaves a node."""
        for view in (self.axes.dense, self.axes.expert):
            for axis, size in view.items():
                if size == 1 or (axis in ("pp", "rp") and view is self.axes.expert):
                    continue
                lists = partition(view, (axis,))
                nodes = max(len({rank // processes_per_node for rank in ranks}) for ranks in lists)
                where = "within a node" if nodes == 1 else f"across {nodes} nodes"
                yield f"{axis} = {size}: ranks {_brief(lists[0])} and so on, {where}"


def partition(sizes: dict[str, int], axes: Sequence[str]) -> list[list[int]]:
    """All processes in groups of those that differ along some axes only."""
    grid = torch.arange(math.prod(sizes.values())).view(*sizes.values())
    dims = [list(sizes).index(axis) for axis in axes]
    grid = grid.movedim(dims, list(range(-len(dims), 0)))
    lists: list[list[int]] = grid.reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist()
    return lists


def _brief(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
