"""Configuration of what a run does about faults."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from moebius.config import ConfigNode


class SpikeConfig(ConfigNode):
    """When a loss is a spike: it is far above the median of those before, by the robust z-score
    (loss - median) / (1.4826 * median absolute deviation)."""

    action: Literal["report", "skip", "rewind"] = "report"
    """skip: the step changes nothing, like one that is not finite; rewind: the run goes back"""
    threshold: float = Field(8.0, gt=0)
    """largest score that is no spike"""
    window: PositiveInt = Field(64, ge=8)
    """losses that it is compared with; before there are so many there are no spikes"""


class RecoveryConfig(ConfigNode):
    """What happens when numbers go wrong."""

    max_skipped: NonNegativeInt = 5
    """steps in a row whose loss or gradient is not finite, or a spike that is to be skipped: they
    change nothing; after more of them the run goes back to its last sound checkpoint"""
    max_rewinds: NonNegativeInt = 2
    """how often a run goes back before it has come past the fault; the samples between the
    checkpoint and the fault are left out"""
    spike: SpikeConfig = SpikeConfig()
    """losses that are finite and yet wrong"""
    repeat_interval: PositiveInt | None = None
    """compute a micro-batch twice every so many steps and compare gradients bit for bit: a device
    that answers differently is broken; null: never"""
    straggler_ratio: float = Field(1.5, gt=1)
    """report a process that takes so many times as long as the median"""
