"""Losses that are far above those before, see `SpikeConfig`."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from moebius.trainer.recovery.config import SpikeConfig

NORMAL = 1.4826
"""standard deviation of a normal distribution over its median absolute deviation"""
LEAST_DEVIATION = 0.01
"""relative to the median: where losses hardly differ, chance alone would make spikes"""


class SpikeDetector:
    """Keeps the last losses that were no spikes."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)

    @property
    def limit(self) -> float:
        """The largest loss that is no spike; infinite while there are too few to compare with."""
        if len(self.losses) < self.config.window:
            return math.inf
        median = statistics.median(self.losses)
        deviation = NORMAL * statistics.median(abs(loss - median) for loss in self.losses)
        deviation = max(deviation, LEAST_DEVIATION * abs(median))
        return median + self.config.threshold * deviation

    def add(self, loss: float) -> bool:
        """Take a finite loss up; whether it is a spike, which then does not count."""
        if loss > self.limit:
            return True
        self.losses.append(loss)
        return False

    def load(self, losses: Iterable[float]) -> None:
        """Go on from saved losses."""
        self.losses.clear()
        self.losses.extend(losses)
