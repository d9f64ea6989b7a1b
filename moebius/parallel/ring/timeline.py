"""The plan of a ring: which process computes what, and when, on a clock on which nothing surprises.

Pure functions of a few numbers, computed alike by every process. A piece of work is a chunk of a
micro-batch at a stop of its way; it waits for what the stops before have made of any of the same
rows. What executes a plan keeps each process's order, whatever time things take.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias


@dataclass(frozen=True)
class Stop:
    """Where a micro-batch stops on its way: all of it, or chunk by chunk."""

    rank: int
    """the process that computes"""
    forward: float
    """time of a chunk, in any unit"""
    backward: float
    num_chunks: int = 1
    kept: float = 0.0
    """what a chunk leaves behind until its backward pass, in any unit"""
    is_home: bool = False


Way: TypeAlias = tuple[Stop, ...]
"""the stops of a micro-batch, in order"""


@dataclass(frozen=True)
class Event:
    """A chunk at a stop, from `start` to `end`."""

    start: float
    end: float
    rank: int
    is_forward: bool
    micro_batch: int
    stop: int
    """number of the stop on the way"""
    chunk: int

    def __str__(self) -> str:
        letter = "F" if self.is_forward else "B"
        return f"{self.stop}{letter}{self.micro_batch}.{self.chunk}"


@dataclass(frozen=True)
class Timeline:
    """What a step does on all processes."""

    ways: tuple[Way, ...]
    """by micro-batch"""
    num_ranks: int
    events: tuple[Event, ...]
    """in an order in which each comes after all that it waits for"""

    def of(self, rank: int) -> tuple[Event, ...]:
        """What a process does, in order."""
        return tuple(event for event in self.events if event.rank == rank)

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return max((event.end for event in self.events), default=0.0)

    @property
    def bubble(self) -> float:
        """Time in which processes wait, over the time in which they work: 0 is perfect."""
        work = sum(event.end - event.start for event in self.events)
        return self.makespan * self.num_ranks / work - 1 if work else 0.0

    @cached_property
    def peaks(self) -> tuple[float, ...]:
        """By process the most that is kept at a time, in the unit of `Stop.kept`."""
        peaks = []
        for rank in range(self.num_ranks):
            kept = peak = 0.0
            for event in self.of(rank):
                size = self.ways[event.micro_batch][event.stop].kept
                kept += size if event.is_forward else -size
                peak = max(peak, kept)
            peaks.append(peak)
        return tuple(peaks)


Priority: TypeAlias = Callable[[Event], tuple[float, ...]]
"""what goes first of the work that can begin earliest; lower goes first"""


def _time(event: Event) -> float:
    return event.end - event.start


PRIORITIES: tuple[Priority, ...] = (
    lambda e: (_time(e), e.is_forward, e.micro_batch),
    lambda e: (not e.is_forward, _time(e), e.micro_batch),
    lambda e: (e.is_forward, _time(e), e.micro_batch),
    lambda e: (_time(e) / (1 if e.is_forward else 2), e.is_forward, e.micro_batch),
)
"""the shortest first; of forward passes, or of backward passes, before the others; and backward
passes counted as half"""


def plan(
    ways: Sequence[Way],
    num_ranks: int,
    live: int,
    latency: float = 0.0,
    trains: bool = True,
    priorities: Sequence[Priority] = PRIORITIES,
) -> Timeline:
    """The shortest timeline that list scheduling finds with one of the priorities.

    Of all work whose input is there, what can begin earliest is begun. At most `live` micro-batches
    are between their first and their last work; `latency` is the time of a message between
    processes. Without `trains` there are forward passes only.

    Raises ValueError for no process or no micro-batch that may be live.
    """
    if num_ranks < 1 or live < 1:
        raise ValueError(f"{num_ranks} processes and {live} live micro-batches: at least 1 of each")
    found = [
        _Planner(ways, num_ranks, live, latency, trains).run(priority) for priority in priorities
    ]
    return min(found, key=lambda timeline: timeline.makespan)


class _Planner:
    """One list scheduling: work becomes ready, begins, and makes other work ready."""

    def __init__(
        self, ways: Sequence[Way], num_ranks: int, live: int, latency: float, trains: bool
    ) -> None:
        self.ways = tuple(ways)
        self.live = live
        self.latency = latency
        self.trains = trains
        times = [stop.forward + stop.backward for way in self.ways for stop in way]
        self.alike = max(times, default=0.0) / 1e6
        """times that differ by less begin together"""
        self.free = [0.0] * num_ranks
        self.ready: list[tuple[float, Event]] = []
        """when its input is there, and work without times"""
        self.arrivals: defaultdict[tuple[int, int, int, bool], list[float]] = defaultdict(list)
        self.left = [0] * len(self.ways)
        """of each micro-batch, work to be done"""
        self.next = 0

    def run(self, priority: Priority) -> Timeline:
        """The timeline."""
        events: list[Event] = []
        for _ in range(min(self.live, len(self.ways))):
            self._admit(0.0)
        while self.ready:
            starts = [max(when, self.free[work.rank]) for when, work in self.ready]
            soon = min(starts) + self.alike
            event, number = min(
                (
                    (self._timed(start, self.ready[number][1]), number)
                    for number, start in enumerate(starts)
                    if start <= soon
                ),
                key=lambda found: (*priority(found[0]), found[0].stop, found[0].chunk),
            )
            del self.ready[number]
            self.free[event.rank] = event.end
            events.append(event)
            self._finish(event)
        return Timeline(self.ways, len(self.free), tuple(events))

    def _admit(self, when: float) -> None:
        """The next micro-batch begins its way."""
        if self.next == len(self.ways):
            return
        number, way = self.next, self.ways[self.next]
        self.next += 1
        self.left[number] = sum(stop.num_chunks for stop in way) * (2 if self.trains else 1)
        for chunk in range(way[0].num_chunks):
            self.ready.append((when, Event(0.0, 0.0, way[0].rank, True, number, 0, chunk)))

    def _timed(self, start: float, work: Event) -> Event:
        stop = self.ways[work.micro_batch][work.stop]
        end = start + (stop.forward if work.is_forward else stop.backward)
        return Event(
            start, end, stop.rank, work.is_forward, work.micro_batch, work.stop, work.chunk
        )

    def _finish(self, event: Event) -> None:
        """What waited for this work alone is ready."""
        number, way = event.micro_batch, self.ways[event.micro_batch]
        self.left[number] -= 1
        if not self.left[number]:
            self._admit(event.end)
        for stop, chunk, is_forward in self._after(event):
            hop = self.latency if way[stop].rank != event.rank else 0.0
            arrived = self.arrivals[number, stop, chunk, is_forward]
            arrived.append(event.end + hop)
            source = stop - 1 if is_forward else min(stop + 1, len(way) - 1)
            if len(arrived) == len(feeds(way, source, stop, chunk)):
                work = Event(0.0, 0.0, way[stop].rank, is_forward, number, stop, chunk)
                self.ready.append((max(arrived), work))

    def _after(self, event: Event) -> Iterator[tuple[int, int, bool]]:
        """(stop, chunk, is_forward) of the work that needs this one's result."""
        way, is_last = self.ways[event.micro_batch], False
        if event.is_forward:
            is_last = event.stop == len(way) - 1
            if is_last and self.trains:
                yield event.stop, event.chunk, False
        target = event.stop + 1 if event.is_forward else event.stop - 1
        if is_last or target < 0:
            return
        for chunk in feeds(way, target, event.stop, event.chunk):
            yield target, chunk, event.is_forward


def simulate(
    ways: Sequence[Way],
    orders: Sequence[Sequence[tuple[bool, int, int, int]]],
    latency: float = 0.0,
) -> Timeline:
    """The timeline of any orders: by process, (is_forward, micro_batch, stop, chunk).

    Raises ValueError where processes would wait for each other.
    """
    clocks, next_ = [0.0] * len(orders), [0] * len(orders)
    ends: dict[tuple[bool, int, int, int], Event] = {}
    events: list[Event] = []
    while len(events) < sum(map(len, orders)):
        before = len(events)
        for rank, order in enumerate(orders):
            while next_[rank] < len(order):
                is_forward, number, stop, chunk = order[next_[rank]]
                way = ways[number]
                needed = [ends.get(key) for key in _before(way, *order[next_[rank]])]
                if None in needed:
                    break
                arrivals = [e.end + latency * (e.rank != rank) for e in needed if e is not None]
                start = max([clocks[rank], *arrivals])
                time = way[stop].forward if is_forward else way[stop].backward
                event = Event(start, start + time, rank, is_forward, number, stop, chunk)
                ends[is_forward, number, stop, chunk] = event
                events.append(event)
                clocks[rank] = event.end
                next_[rank] += 1
        if len(events) == before:
            raise ValueError(f"processes wait for each other after {len(events)} events")
    return Timeline(tuple(ways), len(orders), tuple(events))


def _before(
    way: Way, is_forward: bool, number: int, stop: int, chunk: int
) -> Iterator[tuple[bool, int, int, int]]:
    """The work that some work needs the results of."""
    source = stop - 1 if is_forward else stop + 1
    if not is_forward:
        yield True, number, stop, chunk
    if 0 <= source < len(way):
        for other in feeds(way, source, stop, chunk):
            yield is_forward, number, source, other


def feeds(way: Way, source: int, target: int, chunk: int) -> range:
    """Chunks at one stop that have rows of a chunk at another; a stop feeds its own chunk."""
    if source == target:
        return range(chunk, chunk + 1)
    there, here = way[source].num_chunks, way[target].num_chunks
    return range(chunk * there // here, -(-(chunk + 1) * there // here))
