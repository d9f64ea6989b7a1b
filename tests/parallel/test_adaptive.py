"""Plans for groups of different degrees, against brute force and by hand."""

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest

from moebius.parallel.adaptive import SequenceCost, SequencePlan, plan, routed_lengths

COST = SequenceCost(
    a2=0.01,
    a1=1.0,
    token_bytes=6.0,
    latency=5.0,
    bandwidth={2: 3.0, 8: 0.5},
    max_tokens_per_rank=1000,
)


def degree_multisets(num_ranks: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number of ranks as a sum of powers of two, largest first."""
    if num_ranks == 0:
        yield ()
        return
    while largest:
        if largest <= num_ranks:
            for rest in degree_multisets(num_ranks - largest, largest):
                yield (largest, *rest)
        largest //= 2


def fastest(lengths: Sequence[int], degrees: Sequence[int], cost: SequenceCost) -> float:
    """The smallest makespan of groups of given degrees, over all assignments."""
    best = math.inf
    for chosen in product(range(len(degrees)), repeat=len(lengths)):
        makespan = 0.0
        for group, degree in enumerate(degrees):
            own = [length for length, at in zip(lengths, chosen, strict=True) if at == group]
            if sum(own) > degree * cost.max_tokens_per_rank:
                break
            makespan = max(makespan, cost.time(own, degree))
        else:
            best = min(best, makespan)
    return best


def random_case(key: str, num_ranks: int, number: int) -> tuple[list[int], SequenceCost]:
    """Lengths with a tail, and a cost in which communication is neither free nor all there is."""
    draw = random.Random(key)
    spread = draw.choice([0.3, 1.0, 1.5])
    lengths = [max(1, int(draw.lognormvariate(5, spread))) for _ in range(number)]
    mean = sum(lengths) / number
    a2 = draw.choice([0.0, 0.001, 0.01])
    per_token = a2 * mean + 1
    memory = draw.choice([1.0, 1.05, 1.2, 1.5, 2, 100]) * sum(lengths) / num_ranks
    return lengths, SequenceCost(
        a2=a2,
        a1=1.0,
        token_bytes=draw.choice([0.02, 0.1, 0.3, 0.6, 1.0, 3.0]) * per_token,
        latency=draw.choice([0.0, 0.1]) * mean * per_token,
        bandwidth={1: 1.0, 4: draw.choice([1.0, 0.3])},
        max_tokens_per_rank=math.ceil(memory),
        shares=draw.choice([(1.0,), (1.0, 0.5), (1.0, 2 / 3, 1 / 3)]),
    )


def check_plan(
    made: SequencePlan, lengths: Sequence[int], num_ranks: int, cost: SequenceCost
) -> None:
    """Every sequence once, every rank once in each micro-batch, aligned groups, memory."""
    groups = [group for groups in made.micro_batches for group in groups]
    assert sorted(i for group in groups for i in group.sequences) == list(range(len(lengths)))
    for micro_batch in made.micro_batches:
        ranks = [g.first_rank + i for g in micro_batch for i in range(g.degree)]
        assert ranks == list(range(num_ranks))
    for group in groups:
        assert group.degree.bit_count() == 1
        assert group.first_rank % group.degree == 0
        tokens = sum(lengths[index] for index in group.sequences)
        assert tokens <= group.degree * cost.max_tokens_per_rank


def degrees_of(made: SequencePlan) -> list[tuple[int, ...]]:
    return [tuple(group.degree for group in groups) for groups in made.micro_batches]


def test_time_of_a_group() -> None:
    compute = (0.01 * 100**2 + 100) + (0.01 * 50**2 + 50)
    assert COST.time([100, 50], 1) == pytest.approx(compute)
    assert COST.time([100, 50], 2) == pytest.approx(compute / 2 + 5 + 6 * 150 / (2 * 3.0))
    assert COST.time([100, 50], 4) == pytest.approx(compute / 4 + 5 + 6 * 150 / (4 * 3.0))
    assert COST.time([100, 50], 16) == pytest.approx(compute / 16 + 5 + 6 * 150 / (16 * 0.5))
    assert COST.time([], 4) == 0
    below = replace(COST, bandwidth={8: 0.5, 4: 2.0})
    assert below.time([100], 2) == pytest.approx(200 / 2 + 5 + 6 * 100 / (2 * 2.0))


def test_routing_over_depth_lowers_each_pass() -> None:
    assert routed_lengths(90, (1.0, 2 / 3, 1 / 3)) == pytest.approx((90, 60, 30))
    routed = replace(COST, shares=(1.0, 0.5))
    compute = 0.01 * (100**2 + 50**2) + 150
    assert routed.time([100], 1) == pytest.approx(compute)
    assert routed.time([100], 2) == pytest.approx(compute / 2 + 5 + 6 * 150 / (2 * 3.0))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_small_plans_are_within_a_tenth_of_the_optimum(num_ranks: int, number: int) -> None:
    """All of these are optimal. Of 4000 seeds with 4 ranks and 5 sequences 17 are not, and the
    worst takes 1.081 times the optimum."""
    for seed in range(25):
        lengths, cost = random_case(f"{num_ranks} {number} {seed}", num_ranks, number)
        made = plan(lengths, num_ranks, cost, 1)
        check_plan(made, lengths, num_ranks, cost)
        optimum = min(
            fastest(lengths, degrees, cost) for degrees in degree_multisets(num_ranks, num_ranks)
        )
        time = made.time(lengths, cost)
        assert optimum * (1 - 1e-9) <= time <= optimum * 1.1, (seed, lengths, cost)


def test_cases_need_different_degrees() -> None:
    """The comparison above would show little if one degree for all were always the best."""
    mixed = Counter[int]()
    for seed in range(25):
        lengths, cost = random_case(f"4 5 {seed}", 4, 5)
        mixed[len(set(degrees_of(plan(lengths, 4, cost, 1))[0]))] += 1
    assert mixed[2] >= 4


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
def test_large_plans_keep_the_rules(num_ranks: int) -> None:
    for seed in range(3 if num_ranks < 64 else 1):
        draw = random.Random(seed)
        lengths = [max(1, int(draw.lognormvariate(5, 1.3))) for _ in range(2 * num_ranks + 20)]
        tokens = max(max(lengths), sum(lengths) // 2)
        cost = replace(COST, max_tokens_per_rank=tokens // num_ranks + 1)
        made = plan(lengths, num_ranks, cost)
        check_plan(made, lengths, num_ranks, cost)
        assert len(made.micro_batches) >= 2
        check_plan(plan(lengths, num_ranks, cost, 5), lengths, num_ranks, cost)


def test_skewed_lengths_beat_any_uniform_degree() -> None:
    """One sequence needs four of eight ranks, and the short ones would not like to wait for it."""
    lengths = [250] * 8 + [2500] + [250] * 8
    cost = replace(COST, a2=0.0)
    made = plan(lengths, 8, cost, 1)
    assert degrees_of(made) == [(4, 1, 1, 1, 1)]
    assert made.micro_batches[0][0].sequences == (8,)
    uniform = []
    for degree in (4, 8):  # less does not hold the long one
        # the short ones are alike: what counts is how many are with the long one
        for beside in range(17):
            times = [cost.time([2500] + [250] * beside, degree)]
            if degree == 4:
                times.append(cost.time([250] * (16 - beside), degree))
            elif beside < 16:
                continue
            uniform.append(max(times))
    assert len(uniform) == 18
    assert made.time(lengths, cost) < 0.8 * min(uniform)


@pytest.mark.parametrize("num_ranks", [4, 64, 128])
@pytest.mark.parametrize("free", [False, True])
def test_equal_short_sequences_do_not_communicate(num_ranks: int, free: bool) -> None:
    cost = replace(COST, token_bytes=0.0, latency=0.0) if free else COST
    made = plan([100] * (3 * num_ranks), num_ranks, cost, 1)
    assert degrees_of(made) == [(1,) * num_ranks]
    assert {len(group.sequences) for group in made.micro_batches[0]} == {3}


def test_few_sequences_use_all_ranks_where_communication_is_cheap() -> None:
    cost = replace(COST, token_bytes=0.01, latency=0.0)
    assert degrees_of(plan([800], 128, cost)) == [(128,)]
    assert degrees_of(plan([800, 800], 128, cost, 1)) == [(64, 64)]


def test_exchanges_make_room_where_filling_found_none() -> None:
    """Longest first puts 3 + 2 and 3 + 2 on ranks of 6 tokens, and the last 2 fits neither."""
    cost = replace(COST, token_bytes=1000.0, max_tokens_per_rank=6)
    made = plan([2, 3, 2, 3, 2], 2, cost, 1)
    assert {group.sequences for group in made.micro_batches[0]} == {(0, 2, 4), (1, 3)}


def test_plans_are_the_same_each_time() -> None:
    lengths, cost = random_case("again", 16, 40)
    made = plan(lengths, 16, cost)
    assert plan(tuple(lengths), 16, replace(cost)) == made
    code = (
        "import random; from moebius.parallel.adaptive import *\n"
        f"print(plan({lengths}, 16, {cost})); import sys; assert 'torch' not in sys.modules"
    )
    for seed in ("1", "2"):  # the order of sets must not matter
        run = [sys.executable, "-c", code]
        out = subprocess.run(run, capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        assert out.stdout.strip() == str(made), out.stderr


def test_order_of_the_input_does_not_matter() -> None:
    draw = random.Random(0)
    lengths = draw.sample(range(1, 3000), 20)
    cost = replace(COST, token_bytes=1.0, max_tokens_per_rank=3000)

    def by_length(ordered: list[int]) -> list[list[tuple[int, ...]]]:
        return [
            [(group.degree, *sorted(ordered[i] for i in group.sequences)) for group in groups]
            for groups in plan(ordered, 8, cost, 2).micro_batches
        ]

    assert by_length(sorted(lengths)) == by_length(lengths)


def test_micro_batches_are_cut_evenly() -> None:
    """Consecutive in descending order, with the smallest largest number of tokens."""
    for seed in range(20):
        draw = random.Random(seed)
        lengths = [draw.randint(1, 30) for _ in range(8)]
        cost = replace(COST, max_tokens_per_rank=1000)
        for count in (1, 2, 3, 8):
            made = plan(lengths, 1, cost, count)
            row = sorted(lengths, reverse=True)
            runs = [[lengths[i] for i in groups[0].sequences] for groups in made.micro_batches]
            assert all(runs)
            assert [length for run in runs for length in sorted(run, reverse=True)] == row
            smallest = min(
                max(sum(row[start:stop]) for start, stop in pairwise((0, *cuts, 8)))
                for cuts in combinations(range(1, 8), count - 1)
            )
            assert max(map(sum, runs)) == smallest


def _holds(lengths: Sequence[int], count: int, room: int) -> bool:
    """Whether `count` consecutive runs of descending lengths can each fit into `room`."""
    row = sorted(lengths, reverse=True)
    return any(
        all(sum(row[start:stop]) <= room for start, stop in pairwise((0, *cuts, len(row))))
        for cuts in combinations(range(1, len(row)), count - 1)
    )


@pytest.mark.parametrize(("seed", "fewest", "best"), [(0, 2, 3), (7, 2, 4), (8, 3, 3)])
def test_best_number_of_micro_batches_is_taken(seed: int, fewest: int, best: int) -> None:
    draw = random.Random(seed)
    lengths = [int(draw.lognormvariate(6, 1.2)) % 3900 + 1 for _ in range(14)]
    cost = replace(COST, a2=0.0)
    assert [_holds(lengths, count, 4000) for count in (fewest - 1, fewest)] == [False, True]
    with pytest.raises(ValueError, match=f"to {fewest} or more"):
        plan(lengths, 4, cost, fewest - 1)
    plans = {count: plan(lengths, 4, cost, count) for count in range(fewest, fewest + 5)}
    assert all(len(made.micro_batches) == count for count, made in plans.items())
    assert min(plans, key=lambda count: plans[count].time(lengths, cost)) == best
    assert plan(lengths, 4, cost) == plans[best]


def test_no_more_micro_batches_than_help() -> None:
    # four sequences of one rank each: nothing is gained by a second micro-batch
    assert len(plan([100] * 4, 4, COST).micro_batches) == 1
    # two sequences of all ranks each
    assert len(plan([4000] * 2, 4, COST).micro_batches) == 2


def test_empty_micro_batches() -> None:
    assert plan([], 4, COST).micro_batches == ()
    made = plan([10], 4, COST, 3)
    check_plan(made, [10], 4, COST)
    assert [sum(len(g.sequences) for g in groups) for groups in made.micro_batches] == [1, 0, 0]
    assert made.time([10], COST) == COST.time([10], 1)


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "count", "message"),
    [
        ([10, 4001], 4, None, "4001 tokens fits no group, as 4 ranks of 1000 tokens hold 4000"),
        ([10], 6, None, "num_ranks is 6: give a power of two"),
        ([10], 0, None, "num_ranks is 0: give a power of two"),
        ([10, 0], 4, None, "a sequence of 0 tokens"),
        ([10], 4, 0, "num_micro_batches is 0"),
        ([4000, 10], 4, 1, "for 4010 tokens, as each holds 4000 at most: .* to 2 or more"),
    ],
)
def test_impossible_plans_say_why(
    lengths: list[int], num_ranks: int, count: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        plan(lengths, num_ranks, COST, count)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"a2": -1.0},
        {"latency": math.nan},
        {"shares": (1.0, -0.5)},
        {"shares": ()},
        {"bandwidth": {}},
        {"bandwidth": {2: 0.0}},
        {"bandwidth": {0: 1.0}},
        {"max_tokens_per_rank": 0},
    ],
)
def test_costs_of_no_machine_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(COST, **wrong)  # type: ignore[arg-type]
