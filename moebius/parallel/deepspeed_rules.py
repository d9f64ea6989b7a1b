"""What `engine: deepspeed` is refused for."""

from collections.abc import Iterator

from moebius.config import Problem
from moebius.model.config import ModelConfig
from moebius.model.program import build_program
from moebius.model.recursion.config import CausalRouter, ExpertChoiceConfig
from moebius.parallel.config import ParallelConfig

CLIPPED_APART = "is clipped apart from the model, and DeepSpeed clips all by one norm"


def deepspeed_problems(config: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    """What cannot be done, or was not seen to be right, with DeepSpeed under our layers."""
    if config.engine != "deepspeed":
        return
    for axis, size in (("pp", config.pp), ("rp", config.rp)):
        if size > 1:
            yield Problem(
                f"parallel.{axis}",
                f"{size} with engine deepspeed: it reduces gradients within a backward pass, of "
                "which there are many per step; use engine native",
            )
    if config.ep * config.etp not in (1, config.tp):
        yield Problem(
            "parallel.ep",
            f"ep * etp = {config.ep * config.etp} with engine deepspeed: it adds up all gradients "
            f"among the same processes; use 1, tp = {config.tp}, or engine native",
        )
    if config.dp_replicate > 1:
        yield Problem(
            "parallel.dp_replicate",
            f"{config.dp_replicate} with engine deepspeed: its ZeRO shares out among all "
            "data-parallel processes; use engine native with data fsdp2",
        )
    routers = [segment.router for segment in build_program(model.depth).segments]
    causal = [router.causal for router in routers if isinstance(router, ExpertChoiceConfig)]
    if any(isinstance(node, CausalRouter) for node in causal):
        yield Problem(
            "parallel.engine", f"deepspeed, but the causal router over depths {CLIPPED_APART}"
        )
    if model.exits is not None and model.exits.draw != "all":
        yield Problem(
            "parallel.engine",
            f"deepspeed, but model.exits.draw={model.exits.draw} leaves weights without gradients "
            "in some steps, and DeepSpeed would update them all the same",
        )
