"""From where on something is a finding."""

from typing import Literal, NamedTuple

from pydantic import Field, PositiveFloat

from moebius.config import ConfigNode

Kind = Literal["error", "warning"]


class Limits(ConfigNode):
    """Options of `moebius preflight`."""

    slow_device: float = Field(0.75, gt=0, lt=1)
    """a device that computes less than this share of the median stops the job"""
    slow_link: float = Field(0.5, gt=0, lt=1)
    """a group with less than this share of the median bandwidth of its axis stops the job"""
    skew: PositiveFloat = 1.0
    """seconds that clocks may differ without a warning"""
    save: PositiveFloat = 600.0
    """seconds that a checkpoint may take without a warning"""
    wait: PositiveFloat = 60.0
    """seconds that a part of the check may take, and processes to arrive; no more than
    parallel.timeout"""


class Finding(NamedTuple):
    """Something that is not as it should be."""

    kind: Kind
    """an error stops the job"""
    check: str
    node: str | None
    """that is to blame; None: it is not about a node"""
    rank: int | None
    text: str
    """what was found, what was expected, and what to do"""

    @property
    def line(self) -> str:
        """With node and rank."""
        where = [] if self.rank is None else [f"rank {self.rank}"]
        where += [] if self.node is None else [f"node {self.node}"]
        return f"{' on '.join(where)}: {self.text}" if where else self.text
