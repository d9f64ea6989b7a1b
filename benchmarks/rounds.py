"""Timing of things that are to be compared: in turns, in one process.

Clocks and neighbours change over minutes, so times of different runs say little about each other.
Within a round every candidate has its turn, and what is reported beside medians is the median of
the ratios inside of rounds, from which such drift cancels out.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.table import Table

Input = TypeVar("Input")


@dataclass(frozen=True)
class Comparison:
    """Seconds of each candidate, one number per round."""

    seconds: Mapping[str, Sequence[float]]
    baseline: str

    def ratios(self, name: str) -> list[float]:
        """Times over those of the baseline in the same rounds."""
        pairs = zip(self.seconds[name], self.seconds[self.baseline], strict=True)
        return [own / other for own, other in pairs]

    def ratio(self, name: str) -> float:
        """The median of them."""
        return statistics.median(self.ratios(name))

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def report(self) -> dict[str, dict[str, float]]:
        """For a result file."""
        return {
            name: {
                "median_ms": round(1e3 * self.median(name), 3),
                "min_ms": round(1e3 * min(self.seconds[name]), 3),
                f"time_over_{self.baseline}": round(self.ratio(name), 4),
                "lowest_ratio": round(min(self.ratios(name)), 4),
                "highest_ratio": round(max(self.ratios(name)), 4),
            }
            for name in self.seconds
        }


def compare(
    candidates: Mapping[str, Callable[[Input], object]],
    baseline: str,
    draw: Callable[[int], Input],
    rounds: int,
    warmup: int = 2,
    synchronize: Callable[[], None] = lambda: None,
    repeats: int = 1,
) -> Comparison:
    """Run all candidates in turns on what `draw` makes for a round, which is not timed.

    Every other round goes backwards, so that nobody always follows the same one. With `repeats` a
    turn is so many calls, and its time that of one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    gc.disable()
    gc.freeze()  # what is here stays, and need not be looked through after every round
    try:
        for number in range(warmup + rounds):
            given = draw(number)
            for name in names if number % 2 == 0 else reversed(names):
                synchronize()
                began = time.perf_counter()
                for _ in range(repeats):
                    candidates[name](given)
                synchronize()
                seconds[name].append((time.perf_counter() - began) / repeats)
            gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    return Comparison({name: taken[warmup:] for name, taken in seconds.items()}, baseline)


def nothing(number: int) -> None:
    """The input of candidates that need none."""


def call(function: Callable[[], object]) -> Callable[[object], object]:
    """A candidate that needs no input."""
    return lambda _: function()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers with three significant digits."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console()
    console.print(title, highlight=False)
    console.print(table)


def show_comparison(title: str, comparison: Comparison) -> None:
    """Print a comparison."""
    rows = [
        (name, 1e3 * comparison.median(name), 1e3 * min(seconds), comparison.ratio(name))
        for name, seconds in comparison.seconds.items()
    ]
    show(title, ("", "median ms", "min ms", f"time / {comparison.baseline}"), rows)
