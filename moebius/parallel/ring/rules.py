"""Which models and layouts a ring is legal for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moebius.config import Problem
from moebius.model.moe.scorers import LinearScorerConfig
from moebius.model.program import build_program
from moebius.parallel.config import RingConfig
from moebius.parallel.ring.slices import find_loop

if TYPE_CHECKING:
    from moebius.parallel.rules import Asked


def ring_rules(asked: Asked) -> Iterator[Problem]:
    """One loop of enough layers, whose weights stay where they are."""
    parallel, model = asked.parallel, asked.model
    if parallel.rp == 1:
        if parallel.ring != RingConfig():
            yield Problem("parallel.ring", "rp is 1, so there is no ring; leave it out")
        return
    if parallel.pp > 1:
        yield Problem("parallel.rp", "a ring takes the place of a pipeline; set pp to 1")
    program = build_program(model.depth)
    loop = find_loop(program)
    if loop is None:
        yield Problem(
            "parallel.rp",
            f"the loops of sharing {model.depth.sharing} with {model.depth.groups} groups follow "
            "each other; a ring goes around one: use cycle or middle_cycle with groups 1, or pp",
        )
    elif len(loop.passes[0]) < parallel.rp:
        yield Problem(
            "parallel.rp",
            f"{parallel.rp} slices, but the block that is repeated has {len(loop.passes[0])} "
            "layers to cut",
        )
    costs, count = parallel.ring.costs, len(program.layers)
    if costs is not None and len(costs) != count + 1:
        yield Problem(
            "parallel.ring.costs",
            f"{len(costs)} numbers, but the model has {count} layers and a head",
        )
    if model.exits is not None:
        yield Problem("parallel.rp", "exits read the stream at more places than the end of a ring")
    if parallel.engine == "native" and parallel.data == "fsdp2":
        yield Problem(
            "parallel.data", "fsdp2 would gather a slice for every visit to it; use zero1"
        )
    if parallel.ring.merge:
        yield from _merge_problems(asked)


def _merge_problems(asked: Asked) -> Iterator[Problem]:
    """Chunks are cut anew for each pass: nothing may be kept for the next one by chunk."""
    model, path = asked.model, "parallel.ring.merge"
    if model.depth.router is None:
        yield Problem(path, "without depth.router all passes have as many tokens; set it to false")
    if model.depth.kv != "per_depth":
        yield Problem(
            path, f"layers keep keys for their next pass (depth.kv: {model.depth.kv}); use false"
        )
    scorers = [router.scorer for router in model.routers.values()]
    if any(
        isinstance(s, LinearScorerConfig) and s.gating_residual == "prev_depth" for s in scorers
    ):
        yield Problem(path, "layers keep scores for their next pass (prev_depth); use false")
    if asked.parallel.context.adaptive:
        yield Problem(path, "context.adaptive places the rows of a chunk anew; use false")
