"""What travels around a ring, in the order of the plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.model.carry import Carry
from moebius.parallel.messages import Channel, put_together, taken_apart, tensors_of
from moebius.parallel.ring.timeline import Event, Timeline, Way


@dataclass(frozen=True)
class Parcel:
    """Tokens on their way: those that are in the pass, no others."""

    x_BKD: Tensor
    carry: Carry
    index_BK: Tensor | None = None
    """slots of whole rows, int32; None: all of them"""
    expected: float | None = None
    """see `Selection`"""


class Message(NamedTuple):
    """What one piece of work hands to the next: tokens or, on the way back, their gradients."""

    is_forward: bool
    micro_batch: int
    stop: int
    """where it goes to"""
    chunk: int

    @property
    def answer(self) -> Message:
        """The gradients of a parcel."""
        return Message(False, self.micro_batch, self.stop - 1, self.chunk)


def sent_after(way: Way, event: Event) -> list[Message]:
    """What an event sends: a home sends every chunk by itself, a slice its own."""
    target = event.stop + (1 if event.is_forward else -1)
    if not 0 <= target < len(way):
        return []
    chunks = range(event.chunk, event.chunk + 1)
    if way[event.stop].is_home:
        chunks = range(way[target].num_chunks)
    return [Message(event.is_forward, event.micro_batch, target, chunk) for chunk in chunks]


@dataclass(frozen=True)
class Route:
    """A plan as one process of the ring sees it."""

    timeline: Timeline
    expected: Mapping[int, tuple[Message, ...]]
    """by sender, what it sends here, in its order"""
    needed: Mapping[Message, int]
    """of what is sent from here, the number of the event that needs it"""

    @classmethod
    def of(cls, timeline: Timeline, rank: int) -> Route:
        """That of one of the processes."""
        expected: dict[int, list[Message]] = {}
        needed: dict[Message, int] = {}
        numbers = {
            (e.is_forward, e.micro_batch, e.stop, e.chunk): number
            for number, e in enumerate(timeline.events)
        }
        for event in timeline.events:
            way = timeline.ways[event.micro_batch]
            for message in sent_after(way, event):
                target = way[message.stop]
                if target.rank == event.rank:
                    continue
                if target.rank == rank:
                    expected.setdefault(event.rank, []).append(message)
                elif event.rank == rank:
                    chunk = 0 if target.is_home else message.chunk
                    needed[message] = numbers[(*message[:3], chunk)]
        return cls(timeline, {sender: tuple(order) for sender, order in expected.items()}, needed)


GRACE = 8
"""events of a process before it waits for what it has sent to be taken in"""


class Mail:
    """Sends and receives of one process in one step.

    Both ends of a direction know its order, that in which the sender works. What arrives before it
    is needed waits in a box. Sends are asynchronous; the sender lets go of a message some events
    after the plan's receiver has needed it, when waiting for that can wait for no one in turn.
    """

    def __init__(self, route: Route, channel: Channel) -> None:
        self.channel = channel
        self.rank = channel.group.rank
        self.ways = route.timeline.ways
        self.box: dict[Message, Any] = {}
        self.likes: dict[Message, list[Tensor]] = {}
        """of gradients to come: shapes"""
        self.expected = {sender: deque(order) for sender, order in route.expected.items()}
        self.needed = route.needed
        self.sent: deque[Message] = deque()
        self.recent: deque[int] = deque(maxlen=GRACE)

    def begin(self, number: int) -> None:
        """An event of this process comes: let go of what must have been taken in long ago."""
        if len(self.recent) == GRACE:
            while self.sent and self.needed[self.sent[0]] < self.recent[0]:
                self.channel.settle(self.sent.popleft())
        self.recent.append(number)

    def send(self, message: Message, parcel: Parcel, has_answer: bool) -> list[Tensor]:
        """Hand on tokens; returns the tensors that gradients come back for."""
        target = self.ways[message.micro_batch][message.stop].rank
        if target == self.rank:
            self.box[message], outputs = severed(parcel)
        else:
            outputs = self.channel.send_nest(parcel, target, message)
            self.sent.append(message)
        if has_answer:
            self.likes[message.answer] = [torch.empty_like(t, device="meta") for t in outputs]
        return outputs

    def take(self, message: Message) -> tuple[Parcel, list[Tensor]]:
        """Tokens, and the leaves for which gradients are to be sent back."""
        parcel: Parcel = self._take(message)
        return parcel, [tensor for tensor in tensors_of(parcel) if tensor.requires_grad]

    def send_back(self, message: Message, leaves: Sequence[Tensor]) -> None:
        """Hand back the gradients of what was taken."""
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        target = self.ways[message.micro_batch][message.stop].rank
        if target == self.rank:
            self.box[message] = gradients
            return
        self.channel.send(gradients, target, message)
        self.sent.append(message)

    def take_back(self, message: Message) -> list[Tensor]:
        """The gradients of what was handed on."""
        gradients: list[Tensor] = self._take(message)
        return gradients

    def close(self) -> None:
        """Until everything sent has left."""
        self.channel.wait()

    def _take(self, message: Message) -> Any:
        source = self._source(message)
        while message not in self.box:
            arriving = self.expected[source].popleft()
            if arriving.is_forward:
                self.box[arriving], _ = self.channel.receive_nest(source)
            else:
                self.box[arriving] = self.channel.receive(self.likes[arriving], source)
        self.likes.pop(message, None)
        return self.box.pop(message)

    def _source(self, message: Message) -> int:
        before = message.stop + (-1 if message.is_forward else 1)
        return self.ways[message.micro_batch][before].rank


def severed(nest: Any) -> tuple[Any, list[Tensor]]:
    """A nest whose tensors are leaves, and those that gradients come back for.

    What is handed on within a process must be as if it had been received: else the backward pass
    would go on into work whose time has not come.
    """
    skeleton, tensors = taken_apart(nest)
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    return put_together(skeleton, leaves), [t for t in tensors if t.requires_grad]
