"""What a run file asks of machines: the job that the planner simulates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from moebius.config import Problem
from moebius.errors import LayoutError
from moebius.parallel.config import ParallelConfig
from moebius.parallel.planner.simulate import Job
from moebius.trainer.config import RUN_RULES, RunConfig
from moebius.trainer.machine import AUTOCAST
from moebius.trainer.optim import build_optimizer, muon_roles


def check_plannable(config: RunConfig) -> None:
    """Raise LayoutError where a run does what is not simulated."""
    if config.parallel.engine == "deepspeed":
        raise LayoutError(
            "parallel.engine: deepspeed is not simulated", "plan with parallel.engine=native"
        )
    if config.distillation is not None:
        raise LayoutError(
            "distillation: a teacher, its memory and its work, is not simulated",
            "plan with distillation=null, and leave room for the teacher",
        )


def layout_problems(config: RunConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """What speaks against another layout of a run besides the model: its optimizer and kernels."""
    changed = config.model_copy(update={"parallel": parallel})
    for rule in RUN_RULES:
        yield from rule(changed)


def job_of(config: RunConfig, world_size: int, device_type: str) -> Job:
    """The training step of a run on so many processes.

    Kernels are the plain ones: what others keep for the backward pass is not planned.
    """
    precision = AUTOCAST[config.train.precision]
    return Job(
        model=config.model,
        parallel=config.parallel,
        world_size=world_size,
        rows=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size or config.train.batch_size,
        row_length=config.data.sequence_length,
        make_optimizer=partial(
            build_optimizer,
            config=config.optim,
            muon_dtype=precision if device_type == "cuda" else None,
        ),
        recompute=config.train.recompute,
        autocast=precision,
        whole=muon_roles(config.optim),
    )
