"""Plans of a pipeline: what each rank computes, sends and receives, in which order.

Pure functions of a few numbers, without a process group; an executor runs the plan of its rank from
first to last. Stages are placed in a loop: stage s lives on rank s % num_ranks, so a rank with
several stages is visited once per turn.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, TypeAlias

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]


class Kind(StrEnum):
    """What an action does; the values are the letters of the literature and of torch."""

    FORWARD = "F"
    BACKWARD = "B"
    """of inputs and weights at once"""
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_F = "SEND_F"
    """sends activations to the next stage"""
    RECV_F = "RECV_F"
    """receives activations from the previous stage"""
    SEND_B = "SEND_B"
    """sends the gradient of a stage's input to the previous stage"""
    RECV_B = "RECV_B"
    """receives the gradient of a stage's output from the next stage"""


_OTHER_ENDS = {
    Kind.SEND_F: (Kind.RECV_F, 1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, 1),
}
"""by kind of communication: the kind at the other end, and how many stages away that is"""


@dataclass(frozen=True)
class Action:
    """One step of a rank: `kind` for a micro-batch at the stage that computes, sends or receives.

    Stages count from 0 through all ranks. Printed as torch does: `3F0` is the forward pass of
    micro-batch 0 at stage 3.
    """

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @property
    def other_end(self) -> Action:
        """The receive of a send, the send of a receive.

        Its stage tells the peer of a communication. Raises ValueError for an action that computes.
        """
        if self.kind not in _OTHER_ENDS:
            raise ValueError(f"action {self} communicates with nobody")
        kind, offset = _OTHER_ENDS[self.kind]
        return Action(kind, self.stage + offset, self.micro_batch)


Plan: TypeAlias = tuple[tuple[Action, ...], ...]
"""by rank, its actions in order"""


def plan(
    schedule: ScheduleName, num_ranks: int, stages_per_rank: int, num_micro_batches: int
) -> Plan:
    """The actions of every rank for one step of training.

    - `gpipe` (arXiv 1811.06965): all forwards, then all backwards, last first. With several stages
      per rank, all micro-batches pass one stage before the next (breadth first, 2211.05953).
    - `1f1b` (arXiv 2006.09503): a forward and a backward in turn, as early as the first backward
      can arrive. One stage per rank.
    - `interleaved_1f1b` (arXiv 2104.04473): the same for several stages per rank, which take turns
      after a round of micro-batches. A rank leads by two forwards per rank behind it where `1f1b`
      leads by one: that holds more activations, and hides the time of hops.
    - `zero_bubble` (ZB-H1 of arXiv 2401.10241): backwards are split, and parts that wait for
      nothing, those of weights, fill the time in which inputs are awaited.

    The compute order is that of torch.distributed.pipelining. A send follows the action that made
    what it sends. A receive stands before the action that needs it, behind all receives of what the
    same rank sent before; so both ends of a channel (an ordered pair of ranks) have one order, and
    no tags are needed. An executor whose receives block and whose sends do not cannot deadlock: to
    wait for an earlier message of the channel is to wait for less than for the needed one.

    Raises ValueError for numbers below 1, for `1f1b` with several stages per rank and, in the last
    two schedules, for micro-batches that do not fill whole rounds: there are `num_micro_batches //
    num_ranks` rounds, at least one, of equally many micro-batches.
    """
    _check(schedule, num_ranks, stages_per_rank, num_micro_batches)
    orders = [
        _compute_order(schedule, rank, num_ranks, stages_per_rank, num_micro_batches)
        for rank in range(num_ranks)
    ]
    return _with_communication(orders, num_ranks * stages_per_rank)


def _check(
    schedule: ScheduleName, num_ranks: int, stages_per_rank: int, num_micro_batches: int
) -> None:
    """Raise ValueError for what `plan` cannot plan."""
    for name, number in (
        ("num_ranks", num_ranks),
        ("stages_per_rank", stages_per_rank),
        ("num_micro_batches", num_micro_batches),
    ):
        if number < 1:
            raise ValueError(f"{name} is {number}: it must be at least 1")
    if schedule == "1f1b" and stages_per_rank > 1:
        raise ValueError(
            f"1f1b runs one stage per rank, not {stages_per_rank}: use interleaved_1f1b"
        )
    num_rounds = max(1, num_micro_batches // num_ranks)
    if schedule in ("interleaved_1f1b", "zero_bubble") and num_micro_batches % num_rounds:
        raise ValueError(
            f"{schedule} on {num_ranks} ranks runs {num_rounds} equal rounds of micro-batches: "
            f"{num_micro_batches} micro-batches are not a multiple of {num_rounds}"
        )


def _compute_order(
    schedule: ScheduleName,
    rank: int,
    num_ranks: int,
    stages_per_rank: int,
    num_micro_batches: int,
) -> list[Action]:
    """What a rank computes: some forwards first, then forwards and backwards in turn."""
    stages = range(rank, num_ranks * stages_per_rank, num_ranks)
    ranks_behind = num_ranks - 1 - rank
    if schedule in ("gpipe", "1f1b"):
        forwards = _visits(stages, num_micro_batches, num_micro_batches)
        if schedule == "gpipe":
            return _in_turn(len(forwards), forwards, forwards[::-1])
        return _in_turn(ranks_behind, forwards, forwards)
    round_size = num_micro_batches // max(1, num_micro_batches // num_ranks)
    forwards = _visits(stages, num_micro_batches, round_size)
    backwards = _visits(stages[::-1], num_micro_batches, round_size)
    # The first backward is that of the last stage, which a round reaches after all others.
    lead = (stages_per_rank - 1) * round_size
    if schedule == "interleaved_1f1b":
        return _in_turn(lead + 2 * ranks_behind, forwards, backwards)
    return _split(_in_turn(lead + ranks_behind, forwards, backwards), lag=rank)


def _visits(
    stages: Iterable[int], num_micro_batches: int, round_size: int
) -> list[tuple[int, int]]:
    """(stage, micro-batch) in the order in which rounds of micro-batches pass the stages."""
    return [
        (stage, micro_batch)
        for start in range(0, num_micro_batches, round_size)
        for stage in stages
        for micro_batch in range(start, start + round_size)
    ]


def _in_turn(
    lead: int, forwards: list[tuple[int, int]], backwards: list[tuple[int, int]]
) -> list[Action]:
    """`lead` forwards, then forwards and backwards in turn, then the backwards that are left."""
    lead = min(lead, len(forwards))
    order = [Action(Kind.FORWARD, *visit) for visit in forwards[:lead]]
    for forward, backward in zip(forwards[lead:], backwards, strict=False):
        order += [Action(Kind.FORWARD, *forward), Action(Kind.BACKWARD, *backward)]
    rest = backwards[len(forwards) - lead :]
    return order + [Action(Kind.BACKWARD, *visit) for visit in rest]


def _split(order: list[Action], lag: int) -> list[Action]:
    """Backwards in two parts; the weight part comes `lag` input parts later, or at the end."""
    result: list[Action] = []
    waiting: deque[Action] = deque()
    for action in order:
        if action.kind is not Kind.BACKWARD:
            result.append(action)
            continue
        result.append(replace(action, kind=Kind.BACKWARD_INPUT))
        waiting.append(replace(action, kind=Kind.BACKWARD_WEIGHT))
        if len(waiting) > lag:
            result.append(waiting.popleft())
    return result + list(waiting)


def _with_communication(orders: list[list[Action]], num_stages: int) -> Plan:
    """The compute orders of the ranks with sends and receives, as `plan` describes them."""
    num_ranks = len(orders)
    if num_ranks == 1:
        return tuple(map(tuple, orders))
    arriving: dict[tuple[int, int], deque[Action]] = defaultdict(deque)
    for rank, order in enumerate(orders):
        for send in filter(None, (_send_after(action, num_stages) for action in order)):
            receive = send.other_end
            arriving[rank, receive.stage % num_ranks].append(receive)
    actions: list[list[Action]] = [[] for _ in orders]
    for rank, order in enumerate(orders):
        received: set[Action] = set()
        for action in order:
            needed = _receive_before(action, num_stages)
            while needed is not None and needed not in received:
                receive = arriving[needed.other_end.stage % num_ranks, rank].popleft()
                received.add(receive)
                actions[rank].append(receive)
            actions[rank].append(action)
            send_after = _send_after(action, num_stages)
            if send_after is not None:
                actions[rank].append(send_after)
    return tuple(map(tuple, actions))


def _send_after(action: Action, num_stages: int) -> Action | None:
    """Sends the result of an action, if another stage needs it."""
    if action.kind is Kind.FORWARD and action.stage < num_stages - 1:
        return replace(action, kind=Kind.SEND_F)
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and action.stage > 0:
        return replace(action, kind=Kind.SEND_B)
    return None


def _receive_before(action: Action, num_stages: int) -> Action | None:
    """Receives what an action needs from another stage, if it does."""
    if action.kind is Kind.FORWARD and action.stage > 0:
        return replace(action, kind=Kind.RECV_F)
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and action.stage < num_stages - 1:
        return replace(action, kind=Kind.RECV_B)
    return None


@dataclass(frozen=True)
class Timing:
    """How long a plan takes."""

    makespan: float
    """from the first action of any rank to the last, in the unit of the given times"""
    idle_share: float
    """the part of the ranks' time in which they wait, from 0 to 1: the bubble"""


def simulate(
    actions: Plan, forward_times: Sequence[float], backward_times: Sequence[float]
) -> Timing:
    """Run a plan on a clock: computing takes the given times, communication none.

    The times are those of each stage in any unit. The two parts of a split backward take half of it
    each. Raises ValueError if there is not a time for each stage, or if ranks wait for each other.
    """
    num_stages = 1 + max(action.stage for order in actions for action in order)
    for name, times in (("forward", forward_times), ("backward", backward_times)):
        if len(times) != num_stages:
            raise ValueError(f"{len(times)} {name} times for {num_stages} stages")

    def duration(action: Action) -> float:
        if action.kind is Kind.FORWARD:
            return forward_times[action.stage]
        return backward_times[action.stage] * (1.0 if action.kind is Kind.BACKWARD else 0.5)

    clocks, busy = [0.0] * len(actions), 0.0
    arrivals: dict[Action, float] = {}
    remaining = [deque(order) for order in actions]
    while any(remaining):
        progress = False
        for rank, queue in enumerate(remaining):
            while queue:
                action = queue[0]
                if action.kind in (Kind.RECV_F, Kind.RECV_B):
                    if action not in arrivals:
                        break
                    clocks[rank] = max(clocks[rank], arrivals[action])
                elif action.kind in (Kind.SEND_F, Kind.SEND_B):
                    arrivals[action.other_end] = clocks[rank]
                else:
                    clocks[rank] += duration(action)
                    busy += duration(action)
                queue.popleft()
                progress = True
        if not progress:
            waiting = {rank: str(queue[0]) for rank, queue in enumerate(remaining) if queue}
            raise ValueError(f"ranks wait for each other: {waiting}")
    makespan = max(clocks)
    return Timing(makespan, 1 - busy / (len(actions) * makespan) if makespan else 0.0)


def most_in_flight(actions: Plan) -> tuple[int, ...]:
    """By rank, how many forwards at most wait for their backward: what activation memory holds.

    A forward is that of one micro-batch at one stage. Where backwards are split, its activations
    are kept until the weight part.
    """
    peaks = []
    for order in actions:
        current = peak = 0
        for action in order:
            current += action.kind is Kind.FORWARD
            current -= action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
            peak = max(peak, current)
        peaks.append(peak)
    return tuple(peaks)
