"""Plans of rings are possible and good, and the simulator gives figures known from another one."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise, product

import pytest

from moebius.parallel.ring.timeline import Event, Priority, Stop, Timeline, Way, plan, simulate
from tests.parallel.ring.orders import bound, homes, looped, merged, shares, unrolled

POINTS = 0.02
PUBLISHED: tuple[Priority, ...] = (
    lambda e: (e.is_forward, -e.stop if e.is_forward else e.stop, e.micro_batch),
    lambda e: (e.end - e.start, e.is_forward, e.micro_batch),
    lambda e: (e.micro_batch, e.is_forward, -e.stop),
    lambda e: (not e.is_forward, -e.stop, e.micro_batch),
)
"""rules with which the figures in `HOMES` were found"""
ORDERS = [
    # num_ranks, passes, micro-batches, bound, unrolled, looped in groups of P, 2P and 3P, merged
    (4, 2, 24, 8.3, (12.5, 6), (14.8, 9.5), (8.3, 15), (8.3, 19), (8.3, 15)),
    (4, 3, 12, 12.5, (25.0, 8), (20.8, 12.7), (18.1, 19.3), (12.5, 22.3), (12.5, 24)),
    (4, 3, 24, 6.3, (12.5, 8), (17.4, 12.7), (9.0, 20.7), (6.9, 28.7), (6.3, 27)),
    (4, 3, 48, 3.1, (6.2, 8), (15.6, 12.7), (7.6, 20.7), (5.6, 28.7), (3.1, 27)),
    (4, 3, 96, 1.6, (3.1, 8), (14.8, 12.7), (6.9, 20.7), (4.9, 28.7), (1.6, 27)),
    (8, 3, 48, 7.3, (14.6, 16), (24.9, 26), (10.5, 42), (8.1, 58), None),
    (4, 4, 48, 2.5, (6.2, 10), (16.0, 15.5), (8.1, 27.2), (5.6, 38.2), (4.2, 34)),
]
"""bubbles in per cent, and peaks in slices; found by another simulator"""
HOMES = {
    # layers of the block, cost of the head: bubble in per cent by live micro-batches
    (10, 4.8): {4: 32, 6: 30, 8: 13, 12: 6, 16: 4},
    (7.33, 1.5): {4: 36, 6: 26, 8: 14, 12: 8, 16: 4},
    (60, 0.5): {4: 45, 6: 25, 8: 15, 16: 5},
}


@pytest.mark.parametrize("row", ORDERS, ids=lambda row: f"P{row[0]}-N{row[1]}-M{row[2]}")
def test_bubbles_and_peaks_of_given_orders(row: tuple[object, ...]) -> None:
    num_ranks, passes, number, lowest, of_unrolled, *of_looped, of_merged = row
    size = (num_ranks, passes, number)
    assert bound(*size) == pytest.approx(lowest / 100, abs=0.001)
    assert unrolled(*size) == (
        pytest.approx(of_unrolled[0] / 100, abs=0.001),
        pytest.approx(of_unrolled[1], abs=0.1),
    )
    timelines = [(looped(*size, g * num_ranks), of_looped[g - 1]) for g in (1, 2, 3)]
    if of_merged is not None:
        timelines.append((merged(*size, 8 if passes == 2 else 12), of_merged))
    for timeline, (bubble, peak) in timelines:
        assert timeline.bubble == pytest.approx(bubble / 100, abs=0.001)
        assert timeline.bubble >= bound(*size) - 1e-9
        assert max(timeline.peaks) == pytest.approx(peak, abs=0.1)


def test_bubbles_of_our_plans_with_homes() -> None:
    """The last stop of a micro-batch is one piece of work."""
    found = {live: plan(homes(4, 10, 4.8, 0) * 8, 4, live).bubble for live in (4, 8, 12)}
    assert found == pytest.approx({4: 0.28, 8: 0.15, 12: 0.075}, abs=0.005)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_the_unit_of_time_changes_nothing(scale: float) -> None:
    def scaled(stop: Stop) -> Stop:
        return replace(stop, forward=scale * stop.forward, backward=scale * stop.backward)

    ways = routed(4, 3, 12)
    timeline = plan(ways, 4, 8)
    other = plan([tuple(map(scaled, way)) for way in ways], 4, 8)
    assert list(map(str, other.events)) == list(map(str, timeline.events))


@pytest.mark.parametrize("model", HOMES, ids=str)
def test_bubbles_with_homes(model: tuple[float, float]) -> None:
    for live, bubble in HOMES[model].items():
        found = min(
            plan(homes(4, *model, head_stops=stops) * 8, 4, live, priorities=PUBLISHED).bubble
            for stops in (1, 4)
        )
        assert found == pytest.approx(bubble / 100, abs=POINTS), live


def routed(num_ranks: int, passes: int, number: int, chunks: bool = False) -> list[Way]:
    """Ways with small homes; `chunks` of equally many tokens."""
    ways = []
    for micro_batch in range(number):
        home, way = micro_batch % num_ranks, []
        for index, share in enumerate(shares(passes)):
            way.append(Stop(home, 0.1, 0.2, is_home=True))
            count = passes - index if chunks else 1
            cost = 1.0 if chunks else share
            way += [Stop(r, cost, 2 * cost, count, kept=cost) for r in range(num_ranks)]
        ways.append((*way, Stop(home, 0.5, 1.0, is_home=True)))
    return ways


def check_possible(timeline: Timeline, live: int, trains: bool = True) -> None:
    """Everything once, nobody does two things at a time, nothing begins before what it needs."""
    events = timeline.events
    work = [(e.is_forward, e.micro_batch, e.stop, e.chunk) for e in events]
    expected = {
        (is_forward, number, stop, chunk)
        for number, way in enumerate(timeline.ways)
        for stop, at in enumerate(way)
        for chunk in range(at.num_chunks)
        for is_forward in ((True, False) if trains else (True,))
    }
    assert len(work) == len(set(work))
    assert set(work) == expected
    for rank in range(timeline.num_ranks):
        assert all(a.end <= b.start for a, b in pairwise(timeline.of(rank)))
    begins: dict[tuple[int, int, bool], list[Event]] = defaultdict(list)
    for event in events:
        begins[event.micro_batch, event.stop, event.is_forward].append(event)
    for (number, stop, is_forward), here in begins.items():
        before = begins.get((number, stop + (-1 if is_forward else 1), is_forward), [])
        if not is_forward and stop == len(timeline.ways[number]) - 1:
            before = begins[number, stop, True]
        for event in here:  # rows are of the same place: a part of the whole
            low, high = event.chunk / len(here), (event.chunk + 1) / len(here)
            for other in before:
                first, last = other.chunk / len(before), (other.chunk + 1) / len(before)
                if first < high - 1e-9 and low < last - 1e-9:
                    assert other.end <= event.start
    changes = sorted(
        change
        for number in range(len(timeline.ways))
        for own in [[e for e in events if e.micro_batch == number]]
        for change in ((min(e.start for e in own), 1), (max(e.end for e in own), -1))
    )
    count = peak = 0
    for _, change in changes:
        count += change
        peak = max(peak, count)
    assert peak <= live


@pytest.mark.parametrize(
    ("num_ranks", "passes", "number", "live"),
    list(product((2, 3, 4), (1, 2, 3, 4), (5, 8), (1, 2, 7))),
)
def test_a_plan_is_possible(num_ranks: int, passes: int, number: int, live: int) -> None:
    for chunks in (False, True):
        check_possible(plan(routed(num_ranks, passes, number, chunks), num_ranks, live), live)
    forward = plan(routed(num_ranks, passes, number), num_ranks, live, trains=False)
    check_possible(forward, live, trains=False)


def test_three_live_micro_batches_per_process_reach_the_bound() -> None:
    for num_ranks, passes, number in ((4, 2, 24), (4, 3, 24), (4, 3, 48), (4, 4, 48)):
        ways = [
            tuple(
                Stop(rank, share, 2 * share)
                for share in shares(passes)
                for rank in range(num_ranks)
            )
        ] * number
        lowest = bound(num_ranks, passes, number)
        bubble = plan(ways, num_ranks, 3 * num_ranks).bubble
        assert lowest - 1e-9 <= bubble <= lowest + 0.01
        few = plan(ways, num_ranks, num_ranks).bubble
        assert few > lowest + 0.2, "as many as processes are too few"


def test_more_that_is_live_never_takes_more_time() -> None:
    times = [plan(routed(4, 3, 24), 4, live).makespan for live in (1, 2, 4, 8, 12, 24)]
    assert times == sorted(times, reverse=True)


def test_latency_costs_less_where_more_is_live() -> None:
    ways = routed(4, 3, 16)
    increases = [
        plan(ways, 4, live, latency=0.1).makespan / plan(ways, 4, live).makespan - 1
        for live in (1, 12)
    ]
    assert increases[0] > 2 * increases[1] > 0


def test_a_plan_is_the_same_everywhere_and_can_be_followed() -> None:
    ways = routed(3, 3, 7, chunks=True)
    timeline = plan(ways, 3, 4)
    assert timeline == plan(ways, 3, 4)
    orders = [
        [(e.is_forward, e.micro_batch, e.stop, e.chunk) for e in timeline.of(rank)]
        for rank in range(3)
    ]
    followed = simulate(ways, orders)
    assert followed.makespan <= timeline.makespan + 1e-9, "only admission can be earlier"
    assert followed.peaks == timeline.peaks


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 of each"):
        plan(routed(2, 1, 1), 2, 0)
    way = (Stop(0, 1.0, 2.0), Stop(1, 1.0, 2.0))
    with pytest.raises(ValueError, match="wait for each other after 0 events"):
        simulate([way], [[(False, 0, 0, 0)], [(True, 0, 1, 0)]])


def test_nothing_takes_no_time() -> None:
    timeline = plan([], 2, 1)
    assert (timeline.makespan, timeline.bubble, timeline.peaks) == (0.0, 0.0, (0.0, 0.0))
