"""What a run file asks of machines: the job that the planner simulates."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from moebius.config import Problem
from moebius.errors import LayoutError
from moebius.parallel.config import ParallelConfig
from moebius.parallel.planner.device import known_profiles
from moebius.parallel.planner.estimate import make_plan
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


def planned_bytes(config: RunConfig, processes: int, device_type: str) -> int | None:
    """Memory that a run needs in the process that needs most, headroom included.

    Worked out in a process of its own: the simulation has a world of its own. None where that was
    killed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_planned_bytes, config, processes, device_type).result()
        except BrokenProcessPool:
            return None


def _planned_bytes(config: RunConfig, processes: int, device_type: str) -> int:
    device = next(d for d in known_profiles().values() if d.kind == device_type)
    return make_plan(job_of(config, processes, device_type), device).total_bytes


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
