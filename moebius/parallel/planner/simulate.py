"""One optimizer step of some processes of a large world, in this process and without its numbers.

The code is that of training: the layout is built, micro-batches go forwards and backwards, the
engine steps. Floats are shapes (`shapes`), the other processes are not there (`world`), but for
those that hold other layers: they are simulated beside, for messages have the shapes that their
senders give them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.model.config import ModelConfig
from moebius.model.context import Recompute, StepContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.parameters import Role
from moebius.model.program import FINAL_STEP
from moebius.parallel.comm import Traffic
from moebius.parallel.config import ParallelConfig
from moebius.parallel.engine import MakeOptimizer
from moebius.parallel.layout import Layout
from moebius.parallel.ledger import merge_results
from moebius.parallel.mesh import Axes, Mesh, partition
from moebius.parallel.planner.links import EXPERT_SHARD, groups_of
from moebius.parallel.planner.live import (
    LiveBytes,
    Memory,
    Peak,
    optimizer_state,
    parameters_of,
)
from moebius.parallel.planner.shapes import Shapes
from moebius.parallel.planner.world import Post, SimulatedMesh, fake_world


@dataclass(frozen=True)
class Job:
    """What processes are to do in a step."""

    model: ModelConfig
    parallel: ParallelConfig
    world_size: int
    rows: int
    """of a batch"""
    micro_batch_size: int
    row_length: int
    make_optimizer: MakeOptimizer
    recompute: Recompute = "none"
    autocast: torch.dtype | None = None
    whole: frozenset[Role] = frozenset()
    """see `Layout`"""


@dataclass(frozen=True)
class Usage:
    """What a step took of one process."""

    rank: int
    micro_batches: int
    passes: Memory
    """when forward and backward passes held most"""
    update: Memory
    """when the reduction of gradients and the optimizer held most"""
    gradients: int
    """bytes of all gradients at the end of the backward pass"""
    of_passes: Traffic
    """sent in forward and backward passes, by each micro-batch alike"""
    of_update: Traffic
    """sent once in a step"""
    update_flops: int
    """of products of the optimizer: Muon's"""

    @property
    def traffic(self) -> Traffic:
        """Sent in the step."""
        return self.traffic_of(self.micro_batches)

    def traffic_of(self, micro_batches: int) -> Traffic:
        """Sent in a step of so many micro-batches, a multiple of the period of the layout."""
        total = Traffic()
        for key, calls in self.of_passes.calls.items():
            total.calls[key] = calls * micro_batches // self.micro_batches
            total.sent[key] = self.of_passes.sent[key] * micro_batches // self.micro_batches
        for key, calls in self.of_update.calls.items():
            total.calls[key] = total.calls.get(key, 0) + calls
            total.sent[key] = total.sent.get(key, 0) + self.of_update.sent[key]
        return total

    @property
    def memory(self) -> Memory:
        """When the step held most."""
        return max(self.passes, self.update, key=lambda memory: memory.total)


@dataclass(frozen=True)
class Rows:
    """A micro-batch: rows of one document each."""

    tokens_BS: Tensor
    labels_BS: Tensor
    segment_ids_BS: Tensor
    positions_BS: Tensor
    sample_ids_B: Tensor

    @classmethod
    def of(cls, start: int, end: int, length: int) -> Rows:
        """Samples of a batch."""
        tokens = torch.zeros(end - start, length, dtype=torch.int64)
        positions = torch.arange(length).repeat(end - start, 1)
        return cls(tokens, tokens + 1, tokens.clone(), positions, torch.arange(start, end))

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return self.tokens_BS.numel()

    def rows(self, start: int, end: int) -> Rows:
        """Some of the rows."""
        return Rows(*(tensor[start:end] for tensor in vars(self).values()))


def use_of_step(job: Job, layout: Layout, live: LiveBytes) -> Usage:
    """Train a step under a mode that follows storages, which must be on."""
    engine = layout.engine
    peak = Peak(live, parameters_of(layout.decoder), optimizer_state(engine.optimizer))
    layout.mesh.traffic.take()
    live.collectives.take()
    ranges = layout.row_ranges(job.rows, job.micro_batch_size)
    batches = [Rows.of(start, end, job.row_length) for start, end in ranges]
    step = StepContext(
        "topk",
        Ledger(),
        step=FINAL_STEP,
        training=True,
        recompute=job.recompute,
    )
    num_labels = job.rows * job.row_length
    result = layout.executor.accumulate_gradients(batches, step, None, num_labels)
    gradients, passes = peak.gradient_bytes(), peak.memory
    of_passes = _taken(job, layout, live)
    merge_results(result, layout.mesh)
    peak.begin()
    before = live.flops
    engine.step(1.0)
    return Usage(
        rank=layout.mesh.rank,
        micro_batches=len(batches),
        passes=passes,
        update=peak.memory,
        gradients=gradients,
        of_passes=of_passes,
        of_update=_taken(job, layout, live),
        update_flops=live.flops - before,
    )


def _taken(job: Job, layout: Layout, live: LiveBytes) -> Traffic:
    """What has been sent since the last time."""
    traffic, every = layout.mesh.traffic.take(), live.collectives.take()
    if job.parallel.data == "fsdp2":
        _add_those_of_torch(traffic, every, layout.mesh)
    return traffic


def _add_those_of_torch(traffic: Traffic, every: Traffic, mesh: Mesh) -> None:
    """FSDP2 calls collectives itself: all that were called but ours, among so many processes."""
    sizes = {axis: str(reach.size) for axis, reach in groups_of(mesh, mesh.world_size).items()}
    ours = list(traffic.sent)
    for (count, operation), sent in every.sent.items():
        of_kind = [
            (axis, name)
            for axis, name in ours
            if name == operation and count in ("all", sizes[axis])
        ]
        own = sent - sum(traffic.sent[key] for key in of_kind)
        if own:
            axis = "shard" if count == sizes["shard"] else EXPERT_SHARD
            key = ("dp_replicate" if operation == "all_reduce" else axis, operation)
            traffic.sent[key] = own
            calls = every.calls[count, operation]
            traffic.calls[key] = calls - sum(traffic.calls[key] for key in of_kind)


def simulate(job: Job, rank: int = 0) -> list[Usage]:
    """The use of a process, and of those that hold other layers beside it, in order of layers.

    Raises LayoutError where the processes do not fill the axes. The layout must be legal for the
    model and is not run by DeepSpeed.
    """
    axes = Axes.of(job.parallel, job.world_size)
    partners = next(p for p in partition(axes.dense, ("pp", "rp")) if rank in p)
    post = Post()
    tasks = [_Task(job, partner, post) for partner in partners]
    if len(tasks) == 1:
        return [tasks[0].run()]
    return _side_by_side(tasks)


@dataclass
class _Task:
    """A process to simulate."""

    job: Job
    rank: int
    post: Post
    usage: Usage | None = None

    def run(self) -> Usage:
        """Build the layout and train a step."""
        job = self.job
        with ExitStack() as stack:
            mesh: Mesh
            if job.parallel.data == "fsdp2":
                stack.enter_context(fake_world(self.rank, job.world_size))
                mesh = Mesh(job.parallel)
            else:
                mesh = SimulatedMesh(job.parallel, self.rank, job.world_size, self.post)
            live = stack.enter_context(Shapes())
            layout = Layout(
                Decoder(job.model),
                job.parallel,
                job.make_optimizer,
                job.row_length,
                job.autocast,
                torch.device("cpu"),
                job.whole,
                mesh,
            )
            self.usage = use_of_step(job, layout, live)
        return self.usage

    def try_to_run(self) -> None:
        """The same, in a thread."""
        try:
            self.run()
        except BaseException as error:
            self.post.failure = self.post.failure or error


def _side_by_side(tasks: Sequence[_Task]) -> list[Usage]:
    runs: list[Callable[[], None]] = [task.try_to_run for task in tasks]
    threads = [threading.Thread(target=run, daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failure = tasks[0].post.failure
    if failure is not None:
        raise failure
    return [task.usage for task in tasks if task.usage is not None]
