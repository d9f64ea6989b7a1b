"""What every stage of routing over width has in common."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor

from moebius.config import ConfigNode
from moebius.kernels.route import Activation, RouteRule
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.routing import RouteContext, Scores

Needs = Literal["bias", "share", "bar"]
"""what a controller gives a selector: a bias per expert, the share of probability to gather, or the
score to be above"""


class Stage(ConfigNode):
    """A member of a stage: its options, and one method that does the work."""

    def problems(self, pool: PoolShape) -> Iterator[tuple[str, str]]:
        """(option, what is wrong) where the options do not fit a pool."""
        return iter(())

    def computing_share(self, pool: PoolShape) -> float | None:
        """Share of all assignments that it asks of experts that compute; None: any."""
        return None


class Selector(Stage):
    """From scores to chosen experts."""

    asks_router: ClassVar[bool] = True
    """whether the choice depends on scores"""
    fixed_k: ClassVar[bool] = False
    """whether every token gets the same number of experts"""
    size_option: ClassVar[str] = "kind"
    """the option that decides how many experts a token has, for messages"""
    adds_up_scores: ClassVar[bool] = False
    """whether it needs scores that add up to 1"""

    @property
    def splits_documents(self) -> bool:
        """Whether tokens of a document with equal scores may get different experts."""
        return False

    @property
    def looks_at_row(self) -> bool:
        """Whether a choice depends on those of earlier tokens, which a cache does not keep."""
        return False

    @property
    def accepts(self) -> tuple[Needs, ...]:
        """What controllers may steer."""
        return ()

    @property
    def highest_threshold(self) -> float:
        """The most that a controller can set its threshold to with effect."""
        return 1.0

    @property
    def needs_controller(self) -> bool:
        """Whether only a controller can give it a threshold."""
        return False

    @abstractmethod
    def max_assignments(self, num_experts: int) -> int:
        """K, the most experts a token can have."""

    def min_candidates(self, num_experts: int) -> int:
        """How many experts must be open to every token."""
        return 1

    def rule(self, scores: Activation, num_experts: int, ctx: RouteContext) -> RouteRule | None:
        """What `select` does, where scores and choice can be one operation."""
        return None

    def limit(self, steered: Tensor | None) -> float | Tensor | None:
        """The share or bar in force, where controllers ask for `steered`; None: it has none."""
        return None

    @abstractmethod
    def select(self, scores: Scores, ctx: RouteContext) -> Tensor:
        """Ids `[T, K]`, -1 for an empty assignment."""


class Candidates(Stage):
    """A restriction of the experts a token may choose from."""

    @abstractmethod
    def mask(self, select_TN: Tensor, pool: PoolShape, ctx: RouteContext) -> Tensor:
        """Bool `[N]` or `[T, N]`: who may be chosen."""

    @abstractmethod
    def fewest(self, pool: PoolShape) -> int:
        """How many experts are open to a token at least."""
