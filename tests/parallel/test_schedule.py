"""Plans of a pipeline: the compute order of torch, channels without tags, no deadlock, bubbles."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from moebius.parallel.schedule import (
    Action,
    Kind,
    Plan,
    ScheduleName,
    most_in_flight,
    plan,
    simulate,
)

TORCH = {
    "gpipe": ScheduleLoopedBFS,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
COMPUTES = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
SENDS = (Kind.SEND_F, Kind.SEND_B)
RECEIVES = (Kind.RECV_F, Kind.RECV_B)


def grid(schedules: tuple[ScheduleName, ...]) -> Iterator[tuple[ScheduleName, int, int, int]]:
    """(schedule, ranks, stages per rank, micro-batches) that can be planned."""
    for schedule in schedules:
        for num_ranks in range(1, 5):
            for stages_per_rank in range(1, 2 if schedule == "1f1b" else 4):
                for num_micro_batches in range(1, 9):
                    num_rounds = max(1, num_micro_batches // num_ranks)
                    even = num_micro_batches % num_rounds == 0
                    if even or schedule in ("gpipe", "1f1b"):
                        yield schedule, num_ranks, stages_per_rank, num_micro_batches


PLANS = [(case, plan(*case)) for case in grid(get_args(ScheduleName))]


def test_the_grid_is_not_empty() -> None:
    assert Counter(case[0] for case, _ in PLANS) == {
        "gpipe": 96,
        "1f1b": 32,
        "interleaved_1f1b": 87,
        "zero_bubble": 87,
    }


def computed(actions: tuple[Action, ...]) -> list[str]:
    return [str(action) for action in actions if action.kind in COMPUTES]


@pytest.mark.parametrize("schedule", TORCH)
def test_compute_order_is_that_of_torch(schedule: ScheduleName) -> None:
    """torch's schedules read four attributes of the stages of rank 0 and plan for all ranks."""
    for case, actions in PLANS:
        name, num_ranks, stages_per_rank, num_micro_batches = case
        if name != schedule:
            continue
        stage = SimpleNamespace(
            num_stages=num_ranks * stages_per_rank, group_size=num_ranks, group_rank=0, submod=None
        )
        expected = TORCH[schedule]([stage] * stages_per_rank, num_micro_batches).pipeline_order
        for rank in range(num_ranks):
            order = [str(action) for action in expected[rank] if action is not None]
            assert computed(actions[rank]) == order, (case, rank)


def order_of_schedule_1f1b(rank: int, num_ranks: int, num_micro_batches: int) -> list[str]:
    """torch's Schedule1F1B keeps no list for its executor, so it runs, on a stage that records."""
    order: list[str] = []
    stage = MagicMock(num_stages=num_ranks, stage_index=rank, is_last=False, device="cpu")
    for name in ("fwd_recv", "fwd_send", "bwd_recv", "bwd_send"):
        getattr(stage, f"get_{name}_ops").return_value = []
    stage._get_init_p2p_neighbors_ops.return_value = []
    stage.forward_one_chunk.side_effect = lambda i, *_, **__: order.append(f"{rank}F{i}")
    stage.backward_one_chunk.side_effect = lambda i, **_: order.append(f"{rank}B{i}")
    schedule = Schedule1F1B(stage, num_micro_batches, loss_fn=lambda output, target: output)
    schedule.step(torch.zeros(num_micro_batches))
    return order


def test_1f1b_is_what_torch_executes() -> None:
    """Where it executes: with fewer micro-batches than ranks it refuses, without need."""
    for case, actions in PLANS:
        name, num_ranks, _, num_micro_batches = case
        if name != "1f1b" or num_micro_batches < num_ranks:
            continue
        for rank in range(num_ranks):
            expected = order_of_schedule_1f1b(rank, num_ranks, num_micro_batches)
            assert computed(actions[rank]) == expected, (case, rank)


def run(actions: Plan) -> None:
    """Run a plan with blocking receives, and check all that an executor relies on.

    A channel is the queue of what one rank sent to another, without tags; a receive takes its head.
    """
    num_ranks = len(actions)
    channels: dict[tuple[int, int], deque[Action]] = defaultdict(deque)
    done: set[Action] = set()
    remaining = [deque(order) for order in actions]
    while any(remaining):
        before = sum(map(len, remaining))
        for rank, queue in enumerate(remaining):
            while queue:
                action = queue[0]
                assert action.stage % num_ranks == rank
                if action.kind in SENDS + RECEIVES:
                    peer = action.other_end.stage % num_ranks
                    assert peer != rank
                    if action.kind in SENDS:
                        channels[rank, peer].append(action)
                    elif channels[peer, rank]:
                        assert channels[peer, rank].popleft().other_end == action
                    else:
                        break
                assert action not in done
                assert needs(action, actions) <= done, action
                done.add(queue.popleft())
        assert sum(map(len, remaining)) < before, f"all wait: {[q[0] for q in remaining if q]}"
    assert not any(channels.values()), "sent and never received"


def needs(action: Action, actions: Plan) -> set[Action]:
    """What must have run on the same rank before an action, by the definition of a pipeline."""
    kind, stage, i = action.kind, action.stage, action.micro_batch
    last = max(a.stage for order in actions for a in order)
    split = any(a.kind is Kind.BACKWARD_INPUT for order in actions for a in order)
    backward = Kind.BACKWARD_INPUT if split else Kind.BACKWARD
    local = len(actions) == 1
    match kind:
        case Kind.FORWARD if stage > 0:
            before = Action(Kind.FORWARD, stage - 1, i) if local else Action(Kind.RECV_F, stage, i)
            return {before}
        case Kind.BACKWARD | Kind.BACKWARD_INPUT:
            found = {Action(Kind.FORWARD, stage, i)}
            if stage < last:
                after = Action(backward, stage + 1, i) if local else Action(Kind.RECV_B, stage, i)
                found.add(after)
            return found
        case Kind.BACKWARD_WEIGHT:
            return {Action(Kind.BACKWARD_INPUT, stage, i)}
        case Kind.SEND_F:
            return {Action(Kind.FORWARD, stage, i)}
        case Kind.SEND_B:
            return {Action(backward, stage, i)}
    return set()


@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_plans_run_with_blocking_receives_and_untagged_channels(schedule: ScheduleName) -> None:
    for case, actions in PLANS:
        if case[0] == schedule:
            run(actions)


def test_everything_is_computed_and_sent_once() -> None:
    for case, actions in PLANS:
        schedule, num_ranks, stages_per_rank, num_micro_batches = case
        num_stages = num_ranks * stages_per_rank
        kinds = {Kind.FORWARD: range(num_stages)}
        for kind in COMPUTES[2:] if schedule == "zero_bubble" else COMPUTES[1:2]:
            kinds[kind] = range(num_stages)
        if num_ranks > 1:
            kinds[Kind.SEND_F] = kinds[Kind.RECV_B] = range(num_stages - 1)
            kinds[Kind.RECV_F] = kinds[Kind.SEND_B] = range(1, num_stages)
        expected = [
            Action(kind, stage, i)
            for kind, stages in kinds.items()
            for stage in stages
            for i in range(num_micro_batches)
        ]
        assert Counter(a for order in actions for a in order) == Counter(expected), case


def test_sends_leave_at_once_and_receives_come_late() -> None:
    """A receive is followed by others of its channel, or by what needs it."""
    for case, actions in PLANS:
        for order in actions:
            for action, after in pairwise(order):
                if after.kind in SENDS:
                    assert action.kind in COMPUTES, case
                    assert (action.stage, action.micro_batch) == (after.stage, after.micro_batch)
                if action.kind in RECEIVES and after.kind in COMPUTES:
                    assert (action.stage, action.micro_batch) == (after.stage, after.micro_batch)
                elif action.kind in RECEIVES:
                    assert after.kind in RECEIVES, case


def exchanged(actions: Plan, first: Action, second: Action) -> Plan:
    swap = {first: second, second: first}
    return tuple(tuple(swap.get(action, action) for action in order) for order in actions)


def test_the_check_finds_wrong_plans() -> None:
    actions = plan("1f1b", 2, 1, 2)
    run(actions)
    a, b = Action(Kind.RECV_F, 1, 0), Action(Kind.RECV_F, 1, 1)
    with pytest.raises(AssertionError):
        run(exchanged(actions, a, b))
    a, b = Action(Kind.SEND_F, 0, 0), Action(Kind.RECV_B, 0, 0)
    with pytest.raises(AssertionError, match="all wait"):
        run(exchanged(actions, a, b))
    with pytest.raises(ValueError, match=r"ranks wait for each other: \{0: '0RECV_B0', 1"):
        simulate(exchanged(actions, a, b), [1, 1], [2, 2])


def test_two_ranks_with_two_stages_share_a_channel_for_both_directions() -> None:
    """Rank 0 sends activations and gradients to rank 1, which must take them in that order."""
    rank_0, rank_1 = plan("interleaved_1f1b", 2, 2, 4)
    sent = [str(action.other_end) for action in rank_0 if action.kind in SENDS]
    assert sent == [str(action) for action in rank_1 if action.kind in RECEIVES]
    assert {str(action.kind) for action in rank_1 if action.kind in RECEIVES} == set(RECEIVES)
    assert sent != sorted(sent, key=lambda name: "RECV_B" in name), "a case that mixes them"


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(2, 4), (4, 8), (3, 9), (4, 4)])
def test_bubbles_are_those_of_the_papers(num_ranks: int, num_micro_batches: int) -> None:
    """With equal stages, and backwards twice as long as forwards."""
    hops = num_ranks - 1

    def idle(schedule: ScheduleName, stages_per_rank: int) -> float:
        num_stages = num_ranks * stages_per_rank
        actions = plan(schedule, num_ranks, stages_per_rank, num_micro_batches)
        return simulate(actions, [1.0] * num_stages, [2.0] * num_stages).idle_share

    bubble = hops / (num_micro_batches + hops)
    assert idle("gpipe", 1) == pytest.approx(bubble)
    assert idle("1f1b", 1) == pytest.approx(bubble)
    # Rounds of as many micro-batches as ranks: the bubble is that of a stage, not of a rank.
    assert idle("interleaved_1f1b", 2) == pytest.approx(hops / (2 * num_micro_batches + hops))
    # ZB-H1 idles for (p - 1) (T_F + T_B - T_W), here a third of the (p - 1) (T_F + T_B + T_W).
    assert idle("zero_bubble", 1) == pytest.approx(hops / (3 * num_micro_batches + hops))


def test_the_clock_of_a_plan() -> None:
    """Two stages by hand: 0F0 0-1, 1F0 1-6, 1B0 6-13, 0B0 13-16; then with a second micro-batch."""
    assert simulate(plan("1f1b", 2, 1, 1), [1, 5], [3, 7]).makespan == 16
    assert simulate(plan("1f1b", 2, 1, 2), [1, 5], [3, 7]).makespan == 28
    assert simulate(plan("1f1b", 2, 1, 2), [1, 5], [3, 7]).idle_share == 1 - (8 + 24) / 56
    assert simulate(plan("gpipe", 1, 1, 3), [1], [3]).idle_share == 0
    assert simulate(plan("gpipe", 2, 1, 3), [0, 0], [0, 0]).idle_share == 0
    with pytest.raises(ValueError, match="3 backward times for 2 stages"):
        simulate(plan("1f1b", 2, 1, 2), [1, 5], [3, 7, 9])


def test_activations_in_flight() -> None:
    for case, actions in PLANS:
        schedule, num_ranks, stages_per_rank, num_micro_batches = case
        peaks = most_in_flight(actions)
        if schedule == "gpipe":
            assert peaks == (num_micro_batches * stages_per_rank,) * num_ranks, case
        if schedule == "1f1b":
            assert peaks == tuple(
                min(num_micro_batches, num_ranks - rank) for rank in range(num_ranks)
            )
        if schedule == "zero_bubble" and stages_per_rank == 1:
            assert peaks == (min(num_micro_batches, num_ranks),) * num_ranks, case
    assert most_in_flight(plan("interleaved_1f1b", 4, 2, 8)) == (11, 9, 7, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 0, 1, 1), "num_ranks is 0: it must be at least 1"),
        (("gpipe", 2, -1, 1), "stages_per_rank is -1: it must be at least 1"),
        (("zero_bubble", 2, 1, 0), "num_micro_batches is 0: it must be at least 1"),
        (("1f1b", 2, 2, 4), "1f1b runs one stage per rank, not 2: use interleaved_1f1b"),
        (
            ("interleaved_1f1b", 2, 2, 5),
            "interleaved_1f1b on 2 ranks runs 2 equal rounds of micro-batches: "
            "5 micro-batches are not a multiple of 2",
        ),
        (
            ("zero_bubble", 2, 1, 7),
            "zero_bubble on 2 ranks runs 3 equal rounds of micro-batches: "
            "7 micro-batches are not a multiple of 3",
        ),
    ],
)
def test_what_cannot_be_planned(
    arguments: tuple[ScheduleName, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        plan(*arguments)
    assert str(error.value) == message


def test_torch_refuses_the_same_micro_batches() -> None:
    stage = SimpleNamespace(num_stages=4, group_size=2, group_rank=0, submod=None)
    for schedule in ("interleaved_1f1b", "zero_bubble"):
        for num_micro_batches in range(1, 17):
            refusals = []
            for refuses in (
                lambda m, s=schedule: TORCH[s]([stage] * 2, m),
                lambda m, s=schedule: plan(s, 2, 2, m),
            ):
                try:
                    refuses(num_micro_batches)
                    refusals.append(False)
                except ValueError:
                    refusals.append(True)
            assert refusals[0] == refusals[1], (schedule, num_micro_batches)


def test_an_action_that_computes_has_no_other_end() -> None:
    with pytest.raises(ValueError, match="action 3F0 communicates with nobody"):
        _ = Action(Kind.FORWARD, 3, 0).other_end
    assert Action(Kind.SEND_B, 3, 1).other_end == Action(Kind.RECV_B, 2, 1)
    assert all(
        Action(kind, 3, 1).other_end.other_end == Action(kind, 3, 1) for kind in SENDS + RECEIVES
    )
