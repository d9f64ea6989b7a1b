"""Who holds what, in a few lines."""

from collections.abc import Iterator

from torch import Tensor

from moebius.parallel.layout import Layout
from moebius.parallel.ring.executor import RingExecutor
from moebius.parallel.ring.slices import Ring


def explain(
    layout: Layout, processes_per_node: int, batch_size: int, micro_batch_size: int
) -> Iterator[str]:
    """The axes and their links, stages or slices and the plan of a step with such a batch, and what
    one process holds; nothing for a process alone."""
    if layout.mesh.world.size == 1:
        return
    yield from layout.mesh.describe(processes_per_node)
    for stage in layout.stages:
        visits = [f"{visit.layer}@{visit.depth}" for unit in stage.units for visit in unit.visits]
        ends = ["embedding"] * stage.is_first, ["head"] * stage.is_last
        process = stage.number % layout.mesh.depth.size
        yield f"stage {stage.number} on pp {process}: {' '.join([*ends[0], *visits, *ends[1]])}"
    if layout.ring is not None:
        yield from ring_lines(layout.ring)
    if isinstance(layout.executor, RingExecutor):
        number = len(layout.row_ranges(batch_size, micro_batch_size))
        waiting = layout.executor.timeline(number).bubble
        yield f"a step of {number} micro-batches is planned to wait {waiting:.0%} of its work"
    held = sum(elements_here(p) for p in layout.decoder.parameters())
    groups = layout.engine.optimizer.param_groups
    updated = sum(elements_here(p) for group in groups for p in group["params"])
    yield (
        f"rank {layout.mesh.rank} holds {held:,} of {layout.num_parameters:,} parameters "
        f"and updates {updated:,}"
    )


def ring_lines(ring: Ring) -> Iterator[str]:
    """Who has which slice, and where the rest is."""
    for number, layers in enumerate(ring.slices):
        yield f"slice {number} on rp {number}: layers {', '.join(layers)}, {ring.num_passes} passes"
    yield f"rp 0 to {ring.num_ranks - 1} are the home of every micro-batch in turn, with all else"


def elements_here(parameter: Tensor) -> int:
    """Elements of the part of a parameter, maybe a DTensor, that this process holds."""
    to_local = getattr(parameter, "to_local", None)
    return (parameter if to_local is None else to_local()).numel()
