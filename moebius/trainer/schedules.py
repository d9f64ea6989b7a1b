"""Learning-rate schedules: pure functions of the optimizer step."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from moebius.config import ConfigNode


class CosineSchedule(ConfigNode):
    """Linear warm-up, then half a cosine that reaches `min_ratio` after the last step."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    """steps over which the rate rises linearly to its peak"""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """rate after the last step, relative to the peak"""


class WSDSchedule(ConfigNode):
    """Linear warm-up, constant, linear decay to `min_ratio` over the last `decay_fraction`."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: NonNegativeInt = 0
    """steps over which the rate rises linearly to its peak"""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """share of all steps, at the end, over which the rate falls"""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """rate after the last step, relative to the peak"""


Schedule = Annotated[CosineSchedule | WSDSchedule, Field(discriminator="kind")]


def lr_ratio(schedule: CosineSchedule | WSDSchedule, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of `num_steps`, relative to the peak."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    floor = schedule.min_ratio
    if isinstance(schedule, WSDSchedule):
        remaining = (num_steps - step) / (schedule.decay_fraction * num_steps)
        return floor + (1 - floor) * min(1.0, remaining)
    progress = (step - schedule.warmup_steps) / max(1, num_steps - schedule.warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
