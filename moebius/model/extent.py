"""How much a visit works on."""

from __future__ import annotations

from dataclasses import dataclass, field

from moebius.model.program import Site, Visit


@dataclass(frozen=True)
class Extent:
    """Slots that a visit computes, empty ones included, summed over rows."""

    tokens: int
    """slots"""
    pairs: int
    """pairs of slots of the same row"""
    row_pairs: int
    """pairs of a slot and any place of its full row"""

    @classmethod
    def of(cls, num_rows: int, length: int, row_length: int) -> Extent:
        """Rows of `length` slots each, taken from rows of `row_length`."""
        tokens = num_rows * length
        return cls(tokens, tokens * length, tokens * row_length)

    def __add__(self, other: Extent) -> Extent:
        return Extent(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.row_pairs + other.row_pairs,
        )


NOTHING = Extent(0, 0, 0)


@dataclass
class Work:
    """What forward passes computed: shapes, which the host knows anyway."""

    visits: dict[Visit, Extent] = field(default_factory=dict)
    """by visit, in order of execution"""
    candidates: dict[Site, int] = field(default_factory=dict)
    """by pass of a routed loop, slots that its router looked at"""
    head_tokens: int = 0
    """tokens that the head read, once for each exit"""

    def add_visit(self, visit: Visit, extent: Extent) -> None:
        """Count another use of a layer."""
        self.visits[visit] = self.visits.get(visit, NOTHING) + extent

    def add_candidates(self, site: Site, slots: int) -> None:
        """Count another decision of a depth router."""
        self.candidates[site] = self.candidates.get(site, 0) + slots

    def add(self, other: Work) -> None:
        """Count all of another's."""
        for visit, extent in other.visits.items():
            self.add_visit(visit, extent)
        for site, slots in other.candidates.items():
            self.add_candidates(site, slots)
        self.head_tokens += other.head_tokens
