"""Where a process of a run is: for the watchdog, for the account of its time and for tests."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import Field

from moebius.config import ConfigNode
from moebius.trainer.watch.board import NO_STEP, Board

Section = Literal["start", "prepare", "load", "data", "step", "evaluate", "save"]


class WatchdogConfig(ConfigNode):
    """How long a process may stay in one place before the attempt is ended."""

    enabled: bool = True
    """a process beside those of each node ends them all when one of them hangs, and writes down
    where each of them was; false: nobody does"""
    start: float = Field(1800, gt=0)
    """seconds without a sign of life while processes meet and the model is built"""
    load: float = Field(1800, gt=0)
    """seconds without a sign of life while a checkpoint is read"""
    data: float = Field(600, gt=0)
    """seconds without a sign of life while the next batch is awaited"""
    step: float = Field(600, gt=0)
    """seconds without a sign of life in an optimizer step, the first of which may compile"""
    evaluate: float = Field(1800, gt=0)
    """seconds without a sign of life in an evaluation"""
    save: float = Field(1800, gt=0)
    """seconds without a sign of life while a checkpoint is written"""

    def allowed(self, section: Section) -> float:
        """Seconds that may pass between two marks in a section; 0: any number.

        To prepare a corpus may take days, for which the others wait.
        """
        if section == "prepare":
            return 0.0
        seconds: float = getattr(self, section)
        return seconds if self.enabled else 0.0


class Progress:
    """Where this process is, from its creation on.

    It begins in section `start`, to which it returns whenever it is in no other one. `listeners`
    are called with the section and the phase at every mark. For the main thread only.
    """

    def __init__(self, limits: WatchdogConfig, board: Board | None = None) -> None:
        self.limits = limits
        self.board = board
        self.listeners: list[Callable[[str, str], None]] = []
        self.current: Section = "start"
        self.step = NO_STEP
        self.began = time.monotonic()
        self._marks = 0
        self._seconds: dict[str, float] = {}
        self._counted = self.began
        self.mark()

    @contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """Be in a section as long as the context lasts, and then in the one around it again."""
        outer = self.current
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def mark(self, phase: str = "", step: int | None = None) -> None:
        """Still alive: the time allowed in the present section begins anew.

        A step stays the present one until another is given.
        """
        if step is not None and step != self.step:
            self.step, self._marks = step, 0
        self._marks += 1
        if self.board is not None:
            allowed = self.limits.allowed(self.current)
            self.board.write(self.current, self.step, self._marks, allowed)
        for listener in self.listeners:
            listener(self.current, phase)

    def done(self) -> None:
        """The work of this process has ended: from now on the watchdog lets it take its time."""
        if self.board is not None:
            self.board.write(self.current, self.step, self._marks, 0.0, done=True)

    def spent(self) -> dict[str, float]:
        """Seconds in each section so far, without those in sections inside of it.

        They add up to the time since the creation.
        """
        self._account()
        return dict(self._seconds)

    def _enter(self, name: Section) -> None:
        self._account()
        self.current = name
        self.mark()

    def _account(self) -> None:
        now = time.monotonic()
        before = self._seconds.get(self.current, 0.0)
        self._seconds[self.current] = before + now - self._counted
        self._counted = now
