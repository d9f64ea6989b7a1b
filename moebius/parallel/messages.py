"""What flows between pipeline stages as messages: any nest of dataclasses and maps of tensors.

Shapes change from one micro-batch to the next where routers choose, and integers travel beside
activations, so a header says what follows. Tensors of one dtype travel together.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.parallel.comm import Group

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
)


@dataclass
class Channel:
    """Messages between processes that hold different layers; sends are asynchronous, messages in
    one direction between two processes arrive in order.

    Each direction has a communicator of its own: with NCCL a large message would wait for one that
    crosses it.
    """

    group: Group
    """who is numbered how"""
    outgoing: Mapping[int, Group]
    """by receiver"""
    incoming: Mapping[int, Group]
    """by sender"""
    device: torch.device
    pending: dict[Hashable, list[tuple[dist.Work, Tensor]]] = field(default_factory=dict)
    """by message"""

    def send_nest(self, value: Any, stage_rank: int, key: Hashable) -> list[Tensor]:
        """A nest to another process; returns its tensors that gradients will come back for."""
        skeleton, tensors = taken_apart(value)
        kinds = [(DTYPES.index(t.dtype), tuple(t.shape), t.requires_grad) for t in tensors]
        # Between processes of one run: nothing is ever unpickled that came from a file.
        text = pickle.dumps((skeleton, kinds))
        # On the host, where they are read; the backend for its tensors is another one on devices.
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        self._send([length, content], stage_rank, key, "header")
        self._send(pack(tensors), stage_rank, key)
        return [tensor for tensor in tensors if tensor.requires_grad]

    def send(self, tensors: Sequence[Tensor], stage_rank: int, key: Hashable) -> None:
        """Tensors whose shapes the other process knows."""
        self._send(pack(tensors), stage_rank, key)

    def _send(
        self, buffers: Sequence[Tensor], stage_rank: int, key: Hashable, kind: str = "send"
    ) -> None:
        sent = self.pending.setdefault(key, [])
        for buffer in (buffer for buffer in buffers if len(buffer)):
            size = buffer.numel() * buffer.element_size()
            self.group.traffic.add(self.group.axis, kind, size)
            work = self._begin(buffer, stage_rank)
            if work is not None:
                sent.append((work, buffer))

    def _begin(self, buffer: Tensor, stage_rank: int) -> dist.Work | None:
        process_group = self.outgoing[stage_rank].process_group
        return dist.isend(buffer, self.group.ranks[stage_rank], process_group)

    def receive_nest(self, stage_rank: int) -> tuple[Any, list[Tensor]]:
        """A nest, and its tensors for which gradients must be sent back: leaves."""
        length = self._receive(torch.empty(1, dtype=torch.int64), stage_rank)
        text = torch.empty(int(length), dtype=torch.uint8)
        content = self._receive(text, stage_rank).numpy().tobytes()
        skeleton, kinds = pickle.loads(content)
        like = [torch.empty(shape, dtype=DTYPES[n], device="meta") for n, shape, _ in kinds]
        tensors = self.receive(like, stage_rank)
        leaves = []
        for tensor, (_, _, requires_grad) in zip(tensors, kinds, strict=True):
            if requires_grad:
                leaves.append(tensor.requires_grad_())
        return put_together(skeleton, tensors), leaves

    def receive(self, like: Sequence[Tensor], stage_rank: int) -> list[Tensor]:
        """Tensors of known shapes."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in like:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        buffers = [
            torch.empty(sizes.get(dtype, 0), dtype=dtype, device=self.device) for dtype in DTYPES
        ]
        for buffer in buffers:
            if len(buffer):
                self._receive(buffer, stage_rank)
        return unpack(buffers, like)

    def settle(self, key: Hashable) -> None:
        """Let go of a message that is known to have arrived, as its answer has."""
        with self.group.traffic.waiting():
            for work, _ in self.pending.pop(key, ()):
                work.wait()

    def wait(self) -> None:
        """Until everything sent has left."""
        for key in tuple(self.pending):
            self.settle(key)

    def _receive(self, buffer: Tensor, stage_rank: int) -> Tensor:
        process_group = self.incoming[stage_rank].process_group
        with self.group.traffic.waiting():
            dist.recv(buffer, self.group.ranks[stage_rank], process_group)
        return buffer


def pack(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A buffer for each of `DTYPES`."""
    return [
        torch.cat([tensor.detach().flatten() for tensor in tensors if tensor.dtype == dtype])
        if any(tensor.dtype == dtype for tensor in tensors)
        else torch.empty(0, dtype=dtype)
        for dtype in DTYPES
    ]


def unpack(buffers: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of given shapes and dtypes in buffers."""
    places = dict.fromkeys(DTYPES, 0)
    found = []
    for tensor in like:
        buffer, place = buffers[DTYPES.index(tensor.dtype)], places[tensor.dtype]
        found.append(buffer[place : place + tensor.numel()].view(tensor.shape))
        places[tensor.dtype] += tensor.numel()
    return found


@dataclass(frozen=True)
class Slot:
    """Where a tensor was in a nest."""

    number: int


def tensors_of(nest: Any) -> list[Tensor]:
    """Every tensor of a nest once."""
    found: dict[int, Tensor] = {}
    replaced(nest, Tensor, lambda tensor: found.setdefault(id(tensor), tensor))
    return list(found.values())


def replaced(nest: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """A nest of dataclasses and maps with a function of each part of some kind in its place."""
    if isinstance(nest, kind):
        return function(nest)
    if is_dataclass(nest) and not isinstance(nest, type):
        parts = {f.name: replaced(getattr(nest, f.name), kind, function) for f in fields(nest)}
        return replace(nest, **parts)
    if isinstance(nest, Mapping):
        return {name: replaced(part, kind, function) for name, part in nest.items()}
    return nest


def taken_apart(nest: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """A nest with slots in place of its tensors, and these."""
    tensors = tensors_of(nest)
    number = {id(tensor): index for index, tensor in enumerate(tensors)}
    return replaced(nest, Tensor, lambda t: Slot(number[id(t)])), tuple(tensors)


def put_together(nest: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `taken_apart`."""
    return replaced(nest, Slot, lambda slot: tensors[slot.number])
