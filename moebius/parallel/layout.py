"""A model on a mesh: what the training loop uses instead of an executor and an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor, StepResult, TokenBatch
from moebius.model.objective import TeacherModel
from moebius.model.parameters import Role
from moebius.parallel.arrangement import sequence_cost
from moebius.parallel.batch import row_ranges
from moebius.parallel.comm import Group
from moebius.parallel.config import ParallelConfig
from moebius.parallel.deepspeed import DeepSpeedEngine
from moebius.parallel.engine import Engine, MakeOptimizer, ReplicatedEngine
from moebius.parallel.ledger import merge_results
from moebius.parallel.mesh import Mesh
from moebius.parallel.part import Part
from moebius.parallel.pipeline import PipelineExecutor, neighbours
from moebius.parallel.place import place, row_spread
from moebius.parallel.ring.executor import RingExecutor
from moebius.parallel.ring.slices import Ring, cut_ring, ring_parts
from moebius.parallel.stage import Stage, cut_stages, keep_parts, parts_of
from moebius.parallel.zero import ZeroEngine

Executor: TypeAlias = LocalExecutor | PipelineExecutor | RingExecutor


class Layout:
    """A decoder of which this process keeps its parts, its executor and its engine.

    Give it a whole, initialised decoder, the same on every process; the layout must be legal for
    it, see `parallel.rules`. One process alone is a layout, too. `row_length` is that of rows in
    training, at which pipeline stages are to be alike in cost. Parts move to `device`. `whole` are
    the roles whose matrices the optimizer needs in one piece; `mesh` is made where none is given.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: ParallelConfig,
        make_optimizer: MakeOptimizer,
        row_length: int,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        whole: frozenset[Role] = frozenset(),
        mesh: Mesh | None = None,
    ) -> None:
        device = device or decoder.norm.weight.device
        self.config = config
        self.decoder = decoder
        self.program = decoder.program
        self.mesh = mesh or Mesh(config, device.type)
        self.num_parameters = sum(p.numel() for p in decoder.parameters())
        """of the whole model"""
        self.stages = _stages(decoder, config, row_length)
        self.ring: Ring | None = None
        if config.rp > 1:
            self.ring = cut_ring(decoder, config.rp, row_length, config.ring.costs)
        cost = None
        if config.context.adaptive:
            cost = sequence_cost(
                decoder, config.cp, row_length, config.context.flops_per_byte, autocast_dtype
            )
        tied = _keep_parts(decoder, self._parts(), self.mesh)
        placed = place(decoder, config, self.mesh, tied)
        if any(p.device != device for p in decoder.parameters()):
            decoder.to(device)  # only now: a device need not hold the whole model
        spread = row_spread(config, self.mesh, cost)
        local = LocalExecutor(decoder, autocast_dtype, spread=spread)
        self.executor = self._executor(local, device)
        self.engine: Engine
        self.compute: Callable[[Callable[[], Any]], Any] = lambda function: function()
        """how what only reads the weights is run"""
        if config.engine == "deepspeed":
            engine = DeepSpeedEngine(decoder, placed, self.mesh, make_optimizer, config.deepspeed)
            local.differentiate, self.compute = engine.differentiate, engine.compute
            self.engine = engine
        elif config.data == "fsdp2" and self.mesh.data.size > 1:
            # FSDP2 takes a second to import, which every command would wait for.
            from moebius.parallel.fsdp import FSDPEngine, ShardedExecutor

            sharded = ShardedExecutor(local, self.mesh)
            self.executor = sharded
            self.engine = FSDPEngine(sharded, placed, self.mesh, make_optimizer)
        elif config.data == "zero1" and self.mesh.world.size > 1:
            self.engine = ZeroEngine(placed, self.mesh, make_optimizer, whole)
        else:
            self.engine = ReplicatedEngine(placed, self.mesh, make_optimizer, whole)

    def _executor(self, local: LocalExecutor, device: torch.device) -> Executor:
        """What runs the parts of this process; a collective call."""
        depth = self.mesh.depth
        if self.ring is not None:
            channel = self.mesh.channel(self.ring.pairs, device)
            return RingExecutor(local, self.ring, channel, self.config.ring)
        if self.stages:
            own = self.stages[depth.rank :: depth.size]
            channel = self.mesh.channel(neighbours(self.stages, depth), device)
            return PipelineExecutor(local, own, channel, self.config.pipeline.schedule)
        return local

    def _parts(self) -> list[set[str]]:
        """Which parts of the decoder each of the processes with different layers needs."""
        if self.ring is not None:
            return ring_parts(self.decoder, self.ring)
        size = self.mesh.depth.size
        return [parts_of(self.decoder, self.stages[rank::size]) for rank in range(size)]

    def loss_sums(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Cross-entropy summed over a batch, of which each process computes its part, by exit."""
        last = len(self.decoder.program.visits)
        exits = exits or (last,)
        sums = torch.zeros(len(exits), dtype=torch.float64, device=batch.tokens_BS.device)
        ((start, end),) = self.row_ranges(len(batch.tokens_BS), max(len(batch.tokens_BS), 1))
        own = batch.rows(start, end)
        found = self.compute(lambda: self.executor.token_losses(own, step, exits))
        for number, losses_BS in found.items():
            sums[exits.index(number)] = losses_BS.double().sum()
        self.mesh.depth.all_reduce(self.mesh.data.all_reduce(sums))
        return dict(zip(exits, sums, strict=True))

    def parts(self) -> dict[str, Part]:
        """What this process holds of parameters, of what controllers and routers remember, and of
        the optimizer's state, see `Engine.parts`; a collective call."""
        names = {name for name, _ in self.decoder.named_buffers()}
        own = {n: b for n, b in self.decoder.state_dict().items() if n in names}
        return self.engine.parts() | {f"model/{name}": Part.of(b) for name, b in own.items()}

    def row_ranges(self, num_rows: int, micro_batch_size: int) -> list[tuple[int, int]]:
        """(start, end) of this process's micro-batches in a batch."""
        if self.ring is not None and self.config.ring.merge:
            micro_batch_size *= self.ring.num_passes
        return row_ranges(num_rows, micro_batch_size, self.mesh.dp.rank, self.mesh.dp.size)

    def accumulate_gradients(
        self,
        micro_batches: Sequence[TokenBatch],
        num_labels: int,
        step: StepContext,
        teacher: TeacherModel | None = None,
    ) -> StepResult:
        """Gradients of this process's micro-batches, still to be reduced by the engine, and the
        result of the whole step, which has so many labels."""
        result = self.executor.accumulate_gradients(micro_batches, step, teacher, num_labels)
        step.mark("merge")
        return merge_results(result, self.mesh)


def _stages(decoder: Decoder, config: ParallelConfig, row_length: int) -> tuple[Stage, ...]:
    if config.pp == 1:
        return ()
    pipeline = config.pipeline
    return cut_stages(decoder, config.pp * pipeline.stages_per_rank, row_length, pipeline.costs)


def _keep_parts(decoder: Decoder, parts: Sequence[set[str]], mesh: Mesh) -> dict[str, Group]:
    """Keep what this process needs; by part, the processes with other layers that have it too."""
    if len(parts) == 1:
        return {}
    holders = {
        part: tuple(rank for rank, needed in enumerate(parts) if part in needed)
        for part in sorted(set().union(*parts))
    }
    several = sorted({ranks for ranks in holders.values() if ranks[1:]})
    groups = {ranks: mesh.depth_group(ranks) for ranks in several}
    keep_parts(decoder, parts[mesh.depth.rank])
    found = {part: groups.get(ranks) for part, ranks in holders.items()}
    return {part: group for part, group in found.items() if group is not None}
