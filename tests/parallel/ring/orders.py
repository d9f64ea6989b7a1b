"""Orders of a looped pipeline, for comparison with plans of a ring: without homes, in given turns.

Time and activation of a slice that all tokens pass forward are 1; a backward pass takes 2.
"""

from collections.abc import Sequence

from moebius.parallel.ring.timeline import Stop, Timeline, Way, simulate
from moebius.parallel.schedule import most_in_flight, plan
from moebius.parallel.schedule import simulate as simulate_pipeline

Work = tuple[bool, int, int, int]


def shares(passes: int) -> list[float]:
    """Capacities of a funnel: 1, (N - 1) / N, ... 1 / N."""
    return [(passes - number) / passes for number in range(passes)]


def looped(num_ranks: int, passes: int, num_micro_batches: int, group: int) -> Timeline:
    """Slices in Megatron's interleaved order, `group` micro-batches pass a slice in turn."""
    way = tuple(
        Stop(rank, share, 2 * share, kept=share)
        for share in shares(passes)
        for rank in range(num_ranks)
    )
    groups = [
        range(start, min(start + group, num_micro_batches))
        for start in range(0, num_micro_batches, group)
    ]
    orders = []
    for rank in range(num_ranks):
        stops = range(rank, num_ranks * passes, num_ranks)
        forwards = [(True, m, s, 0) for part in groups for s in stops for m in part]
        backwards = [(False, m, s, 0) for part in groups for s in stops[::-1] for m in part]
        lead = (passes - 1) * group + 2 * (num_ranks - 1 - rank)
        orders.append(in_turn(lead, forwards, backwards))
    return simulate([way] * num_micro_batches, orders)


def merged(num_ranks: int, passes: int, num_micro_batches: int, group: int) -> Timeline:
    """The same with chunks of equally many tokens: `group` micro-batches are cut anew for each
    pass, into fewer chunks of more rows."""
    sizes = [min(group, num_micro_batches - start) for start in range(0, num_micro_batches, group)]
    counts = [[size * (passes - number) // passes for number in range(passes)] for size in sizes]
    ways: list[Way] = [
        tuple(
            Stop(rank, 1.0, 2.0, num_chunks=count, kept=1.0)
            for count in of_group
            for rank in range(num_ranks)
        )
        for of_group in counts
    ]
    orders = []
    for rank in range(num_ranks):
        stops = range(rank, num_ranks * passes, num_ranks)
        forwards = [
            (True, number, stop, chunk)
            for number, way in enumerate(ways)
            for stop in stops
            for chunk in range(way[stop].num_chunks)
        ]
        backwards = [
            (False, number, stop, chunk)
            for number, way in enumerate(ways)
            for stop in stops[::-1]
            for chunk in range(way[stop].num_chunks)
        ]
        lead = sum(counts[0][:-1]) + 2 * (num_ranks - 1 - rank)
        orders.append(in_turn(lead, forwards, backwards))
    return simulate(ways, orders)


def in_turn(lead: int, forwards: Sequence[Work], backwards: Sequence[Work]) -> list[Work]:
    """So many forwards, then one of each in turn."""
    lead = min(lead, len(forwards))
    order = list(forwards[:lead])
    for pair in zip(forwards[lead:], backwards, strict=False):
        order += pair
    return order + list(backwards[len(forwards) - lead :])


def unrolled(num_ranks: int, passes: int, num_micro_batches: int) -> tuple[float, float]:
    """Bubble and peak of 1F1B over stages of the unrolled depth that cost the same."""
    total = sum(shares(passes))
    actions = plan("1f1b", num_ranks, 1, num_micro_batches)
    timing = simulate_pipeline(actions, [total] * num_ranks, [2 * total] * num_ranks)
    return 1 / (1 - timing.idle_share) - 1, max(most_in_flight(actions)) * total


def bound(num_ranks: int, passes: int, num_micro_batches: int) -> float:
    """No order has a smaller bubble: the ring fills and drains with work of the first pass."""
    return (num_ranks - 1) / (num_micro_batches * sum(shares(passes)))


def homes(num_ranks: int, block_layers: float, head: float, head_stops: int) -> list[Way]:
    """Ways of `num_ranks` micro-batches with homes in turn, through three passes; costs in layers.

    In front of the loop and behind it is a layer; a router costs 0.05. The head is so many stops,
    between which other work can come, or with 0 one with that layer.
    """

    def stop(rank: int, cost: float, is_home: bool = True) -> Stop:
        return Stop(rank, cost, 2 * cost, kept=cost, is_home=is_home)

    ways = []
    for home in range(num_ranks):
        way = []
        for depth, share in enumerate(shares(3)):
            way.append(stop(home, 0.05 + (depth == 0)))
            cost = block_layers / num_ranks * share
            way += [stop(rank, cost, False) for rank in range(num_ranks)]
        if head_stops:
            way += [stop(home, 1.0), *[stop(home, head / head_stops)] * head_stops]
        else:
            way.append(stop(home, 1.0 + head))
        ways.append(tuple(way))
    return ways
