"""Gradients of models whose looped block goes around a ring."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.objective import TeacherModel
from moebius.parallel.config import ParallelConfig, RingConfig
from moebius.parallel.engine import ReplicatedEngine
from moebius.parallel.layout import Layout
from moebius.parallel.part import Part
from moebius.parallel.ring.executor import RingExecutor
from tests.parity.layouts import FIRST_STEP, LENGTH, Rows, decoder_of, documents, sgd
from tests.parity.whole import model_tensors

ROWS = 5
"""micro-batches of one row: not a multiple of 2, 3 or 4"""


def context() -> StepContext:
    """Of a step of training."""
    return StepContext("topk", Ledger(), step=FIRST_STEP, seed=7, training=True)


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """As numpy has them."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def teacher() -> TeacherModel:
    """A model to learn from."""
    return TeacherModel(LocalExecutor(decoder_of("dense", torch.float32)), 0.5, 2.0)


@cache
def local_gradients(
    name: str, rows: int = ROWS, distils: bool = False, autocast: torch.dtype | None = None
) -> dict[str, Any]:
    """Of one process, and the losses. With the same micro-batches: in fp32 products of other shapes
    are rounded otherwise, and a router near a tie would choose another expert."""
    decoder, batch = decoder_of(name, torch.float32), Rows(**vars(documents(rows)))
    result = LocalExecutor(decoder, autocast).accumulate_gradients(
        [batch.rows(number, number + 1) for number in range(rows)],
        context(),
        teacher() if distils else None,
    )
    found = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    return arrays(found | result.losses)


def ring_gradients(
    name: str,
    options: dict[str, Any],
    rings: Sequence[dict[str, Any]],
    rows: int = ROWS,
    distils: bool = False,
    autocast: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """The same on a layout with `rp`, once for each way to go around."""
    config = ParallelConfig.model_validate(options | {"data": "ddp"})
    decoder = decoder_of(name, torch.float32)
    layout = Layout(decoder, config, sgd, LENGTH, autocast)
    found = []
    for ring in rings:
        decoder.zero_grad()
        found.append(_gradients(layout, RingConfig.model_validate(ring), rows, distils))
    return found


def _gradients(layout: Layout, config: RingConfig, rows: int, distils: bool) -> dict[str, Any]:
    given = layout.executor
    assert isinstance(given, RingExecutor)
    assert isinstance(layout.engine, ReplicatedEngine)
    layout.config = layout.config.model_copy(update={"ring": config})
    layout.executor = RingExecutor(given.local, given.ring, given.channel, config)
    batch = Rows(**vars(documents(rows)))
    parts = [batch.rows(*part) for part in layout.row_ranges(rows, 1)]
    result = layout.accumulate_gradients(
        parts, batch.labels_BS.numel(), context(), teacher() if distils else None
    )
    layout.engine.reduce()
    own = {
        f"model/{p.name}": Part.of(p.parameter.grad, p.placement.cuts)
        for p in layout.engine.placed
        if p.parameter.grad is not None
    }
    return arrays(model_tensors(own) | result.losses)
