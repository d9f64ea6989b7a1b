"""The pipeline executor: stages of a program on several processes, micro-batches in a plan's order.

Shapes may change with every micro-batch, integers travel, auxiliary losses enter where they arise,
and positions and documents are read from the batch by every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.context import StepContext, TokenContext
from moebius.model.executor import Flow, LocalExecutor, StepResult, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.objective import TeacherModel
from moebius.parallel.comm import Group
from moebius.parallel.ledger import merge_depth
from moebius.parallel.messages import Channel
from moebius.parallel.schedule import Action, Kind, ScheduleName, plan
from moebius.parallel.stage import Stage

Key = tuple[int, int]
"""stage and micro-batch"""


@dataclass
class Passing:
    """What is kept of micro-batches between their forward and their backward pass."""

    arrived: dict[Key, Flow] = field(default_factory=dict)
    leaves: dict[Key, list[Tensor]] = field(default_factory=dict)
    """of what arrived: tensors that gradients are sent back for"""
    flows: dict[Key, Flow] = field(default_factory=dict)
    """what a stage made, to be sent"""
    outputs: dict[Key, list[Tensor]] = field(default_factory=dict)
    """of what a stage made: what gradients come back for, or its loss"""
    gradients: dict[Key, list[Tensor]] = field(default_factory=dict)
    """that have come back"""


class PipelineExecutor:
    """Runs this process's stages; the others are run by the other processes of the pipeline."""

    def __init__(
        self,
        local: LocalExecutor,
        stages: Sequence[Stage],
        channel: Channel,
        schedule: ScheduleName,
    ) -> None:
        self.local = local
        self.stages = {stage.number: stage for stage in stages}
        self.channel = channel
        self.schedule: ScheduleName = schedule

    def accumulate_gradients(
        self,
        micro_batches: Sequence[TokenBatch],
        step: StepContext,
        teacher: TeacherModel | None,
        num_labels: int,
    ) -> StepResult:
        """See `LocalExecutor.accumulate_gradients`."""
        size, rank = self.channel.group.size, self.channel.group.rank
        actions = plan(self.schedule, size, len(self.stages), len(micro_batches))
        run = _Step(self, micro_batches, step, teacher, num_labels)
        for number in self.stages:
            run.known |= known_to_have_arrived(actions[self.rank_of(number - 1)], number)
        for action in actions[rank]:
            run.do(action)
        step.mark("merge")
        self.channel.wait()
        return merge_depth(run.losses, run.ledgers, self.channel.group, self.channel.device)

    @torch.no_grad()
    def token_losses(
        self, batch: TokenBatch, step: StepContext, exits: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """See `LocalExecutor.token_losses`; where the last stage is, nothing elsewhere."""
        last = len(self.local.program.visits)
        losses: dict[int, Tensor] = {}
        tokens = self.local.tokens(batch)
        with self.local.autocast(batch.tokens_BS.device):
            for number, stage in sorted(self.stages.items()):
                arrived = None
                if not stage.is_first:
                    arrived, _ = self.channel.receive_nest(self.rank_of(number - 1))
                flow = run_stage(self.local, stage, batch, tokens, arrived, step)
                if not stage.is_last:
                    self.channel.send_nest(flow, self.rank_of(number + 1), number)
                    continue
                losses[last] = self.local.final_token_losses(batch, tokens, flow.x_BSD)
        self.channel.wait()
        return losses

    def rank_of(self, stage: int) -> int:
        """The process of the pipeline that runs a stage."""
        return stage % self.channel.group.size


class _Step:
    """One optimizer step."""

    def __init__(
        self,
        executor: PipelineExecutor,
        micro_batches: Sequence[TokenBatch],
        step: StepContext,
        teacher: TeacherModel | None,
        num_labels: int,
    ) -> None:
        self.executor = executor
        self.local = executor.local
        self.micro_batches = micro_batches
        self.step = step
        self.teacher = teacher
        self.num_labels = num_labels
        self.passing = Passing()
        self.tokens: dict[int, TokenContext] = {}
        """of micro-batches that further stages of this process are to run"""
        self.known: dict[Key, list[Key]] = {}
        """by what is received from the stage before, the gradients that it has then taken in"""
        self.losses: dict[str, Tensor] = {}
        self.ledgers: dict[int, Ledger] = {}

    def do(self, action: Action) -> None:
        """One action of the plan."""
        key, passing, channel = (action.stage, action.micro_batch), self.passing, self._channel
        if action.kind is Kind.RECV_F:
            passing.arrived[key], passing.leaves[key] = channel.receive_nest(self._before(action))
            for sent in self.known.get(key, ()):
                channel.settle((Kind.SEND_B, sent))
        elif action.kind is Kind.FORWARD:
            self.step.mark("forward")
            self._forward(self.executor.stages[action.stage], action.micro_batch)
        elif action.kind is Kind.SEND_F:
            passing.outputs[key] = channel.send_nest(
                passing.flows.pop(key), self._after(action), (Kind.SEND_F, key)
            )
        elif action.kind is Kind.RECV_B:
            passing.gradients[key] = channel.receive(passing.outputs[key], self._after(action))
            channel.settle((Kind.SEND_F, key))
        elif action.kind is Kind.BACKWARD:
            self.step.mark("backward")
            self._backward(key)
        elif action.kind is Kind.BACKWARD_INPUT:
            self.step.mark("backward")
            self._backward_input(key)
        elif action.kind is Kind.BACKWARD_WEIGHT:
            self.step.mark("backward")
            self._backward_weight(key)
        else:
            gradients = [
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                for leaf in passing.leaves.pop(key)
            ]
            channel.send(gradients, self._before(action), (Kind.SEND_B, key))

    @property
    def _channel(self) -> Channel:
        return self.executor.channel

    def _before(self, action: Action) -> int:
        return self.executor.rank_of(action.stage - 1)

    def _after(self, action: Action) -> int:
        return self.executor.rank_of(action.stage + 1)

    def _forward(self, stage: Stage, number: int) -> None:
        batch, key = self.micro_batches[number], (stage.number, number)
        share = batch.labels_BS.numel() / self.num_labels
        ledger = self.ledgers.setdefault(number, Ledger(share, self.step.ledger.keep))
        step = replace(self.step, ledger=ledger, micro_batch=number)
        with self.local.autocast(batch.tokens_BS.device):
            tokens = self.tokens.pop(number, None) or self.local.tokens(batch)
            arrived = self.passing.arrived.pop(key, None)
            flow = run_stage(self.local, stage, batch, tokens, arrived, step)
            self.passing.flows[key] = flow
            if stage.number < max(self.executor.stages):
                self.tokens[number] = tokens
            if stage.is_last:
                del self.passing.flows[key]
                self.passing.outputs[key] = [self._loss(batch, tokens, flow, step)]

    def _loss(
        self, batch: TokenBatch, tokens: TokenContext, flow: Flow, step: StepContext
    ) -> Tensor:
        total, sums = self.local.final_loss(batch, tokens, flow.x_BSD, step, self.teacher)
        for name, value in sums.items():
            self.losses[name] = self.losses.get(name, torch.zeros_like(value)) + (
                value / self.num_labels
            )
        return total / self.num_labels

    def _backward(self, key: Key) -> None:
        outputs = self.passing.outputs.pop(key)
        torch.autograd.backward(outputs, self.passing.gradients.pop(key, None))

    def _backward_input(self, key: Key) -> None:
        """What the stage before waits for; weights follow later, on the same graph."""
        leaves = self.passing.leaves.get(key)
        if leaves:
            torch.autograd.backward(
                self.passing.outputs[key],
                self.passing.gradients.get(key),
                retain_graph=True,
                inputs=leaves,
            )

    def _backward_weight(self, key: Key) -> None:
        weights = [p for p in self.local.decoder.parameters() if p.requires_grad]
        torch.autograd.backward(
            self.passing.outputs.pop(key), self.passing.gradients.pop(key, None), inputs=weights
        )


def known_to_have_arrived(actions: Sequence[Action], stage: int) -> dict[Key, list[Key]]:
    """Of gradients that a stage sends to the one before, which that one has received when it sends
    a micro-batch; `actions` are those of its process. Kept to the end of the step, what was sent
    would grow with the number of micro-batches."""
    found: dict[Key, list[Key]] = {}
    received: list[Key] = []
    for action in actions:
        if action.stage == stage - 1 and action.kind is Kind.RECV_B:
            received.append((stage, action.micro_batch))
        elif action.stage == stage - 1 and action.kind is Kind.SEND_F:
            found[stage, action.micro_batch] = received
            received = []
    return found


def neighbours(stages: Sequence[Stage], depth: Group) -> set[tuple[int, int]]:
    """(sender, receiver) of all messages between processes."""
    pairs = [
        (before.number % depth.size, after.number % depth.size)
        for before, after in pairwise(stages)
    ]
    return {pair for a, b in pairs for pair in ((a, b), (b, a)) if a != b}


def run_stage(
    executor: LocalExecutor,
    stage: Stage,
    batch: TokenBatch,
    tokens: TokenContext,
    flow: Flow | None,
    step: StepContext,
) -> Flow:
    """What a stage makes of what has arrived, or the first one of token ids."""
    if flow is None:
        x_BSD = executor.decoder.embed(tokens.spread.read(batch.tokens_BS))
        flow = Flow(x_BSD, Carry())
    for unit in stage.units:
        flow = executor.run(unit, flow, tokens, step)
    return flow
