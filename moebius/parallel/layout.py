"""A model on a mesh: what the training loop uses instead of one process's executor and optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor, StepResult, TokenBatch
from moebius.model.objective import TeacherModel
from moebius.parallel.batch import row_ranges
from moebius.parallel.config import ParallelConfig
from moebius.parallel.engine import Engine, MakeOptimizer, ReplicatedEngine
from moebius.parallel.ledger import merge_results
from moebius.parallel.mesh import Mesh
from moebius.parallel.place import place, row_spread
from moebius.parallel.zero import ZeroEngine


class Layout:
    """A decoder whose weights were cut to this process's parts, its executor and its engine.

    Give it a whole, initialised decoder, the same on every process; the layout must be legal for
    it, see `parallel.rules`. One process alone is a layout, too.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: ParallelConfig,
        make_optimizer: MakeOptimizer,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.mesh = Mesh(config)
        placed = place(decoder, config, self.mesh)
        spread = row_spread(config, self.mesh)
        self.executor = LocalExecutor(decoder, autocast_dtype, spread=spread)
        self.engine: Engine
        if config.data == "zero1" and self.mesh.world.size > 1:
            self.engine = ZeroEngine(placed, self.mesh, make_optimizer)
        else:
            self.engine = ReplicatedEngine(placed, self.mesh, make_optimizer)

    def row_ranges(self, num_rows: int, micro_batch_size: int) -> list[tuple[int, int]]:
        """(start, end) of this process's micro-batches in a batch."""
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
        return merge_results(result, self.mesh)
