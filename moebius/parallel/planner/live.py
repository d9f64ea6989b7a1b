"""How many bytes of tensors are alive, and what they were when there were most of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moebius.parallel.comm import Traffic

COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
}
"""what they are called elsewhere, and which argument is what a process gives"""
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""products of matrices, and which argument is the first factor"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process when it held most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """all else: what waits for its backward pass, messages, buffers of collectives, scratch"""
    exchanged: int
    """of these what was handed to collectives and messages or came from them; on a ring the tokens
    that are on their way around it"""

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.weights + self.gradients + self.optimizer + self.activations


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation returns, until it is freed, and counts what is handed
    to collectives and the FLOPs of dense products.

    What an operation allocates for itself and frees before it returns is not seen, nor what an
    allocator rounds up or keeps.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.at_peak: Callable[[], None] = lambda: None
        """called whenever there has never been as much"""
        self.collectives = Traffic()
        """all of them, whoever called them; for an axis the processes of gathers and scatters"""
        self.flops = 0
        """of products of matrices"""
        self.exchanged = 0
        """bytes alive that collectives or messages have read or written"""
        self._sizes: dict[int, int] = {}
        self._exchanged: set[int] = set()
        self._watched: set[int] = set()

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Follow tensors that were made outside of the mode, too; they count as no buffers."""
        for tensor in tensors:
            self._follow(tensor)
            self._watched.add(id(tensor.untyped_storage()))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._count(func, args)
        out = func(*args, **(kwargs or {}))
        self._follow_all(out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        if func.namespace == "c10d":
            self._note_exchange(args)
        kind = func.name().partition(".")[0]
        if kind in PRODUCTS:
            left, right = args[PRODUCTS[kind] :][:2]
            self.flops += 2 * left.numel() * right.shape[-1]
        operation = COLLECTIVES.get(func.name())
        if operation is not None:
            name, position = operation
            inputs = args[position] if isinstance(args[position], list) else [args[position]]
            size = sum(t.numel() * t.element_size() for t in inputs)
            count = "all"
            if name != "all_reduce":
                whole, part = sorted((args[0].numel(), args[1].numel()), reverse=True)
                count = str(whole // part) if part else "1"
            self.collectives.add(count, name, size)

    def _note_exchange(self, args: tuple[Any, ...]) -> None:
        for leaf in tree_leaves(args):
            key = id(leaf.untyped_storage()) if isinstance(leaf, Tensor) else 0
            if key in self._sizes and key not in self._exchanged | self._watched:
                self._exchanged.add(key)
                self.exchanged += self._sizes[key]

    def _follow_all(self, out: Any) -> None:
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._follow(leaf)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.live += size
        weakref.finalize(storage, self._forget, key)
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak()

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live -= size
        self._watched.discard(key)
        if key in self._exchanged:
            self._exchanged.remove(key)
            self.exchanged -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the storages of some tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in here(tensors)]
    return sum(storage.nbytes() for storage in {id(s): s for s in storages}.values())


def here(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of tensors that several processes hold a part of (DTensors), the own part."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


class Peak:
    """Keeps what a process held when it held most.

    `weights` and `state` never change while it looks; gradients come and go.
    """

    def __init__(self, live: LiveBytes, weights: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        self.live = live
        self.weights = weights
        self.weight_bytes = bytes_of(weights)
        self.state_bytes = bytes_of(state)
        live.watch(here([*weights, *state]))
        live.at_peak = self._look
        self.begin()

    def begin(self) -> None:
        """Forget what was before."""
        self.live.peak = 0
        self._look()

    def gradient_bytes(self) -> int:
        """Of the gradients that there are."""
        return bytes_of(w.grad for w in self.weights if w.grad is not None)

    def _look(self) -> None:
        gradients = self.gradient_bytes()
        known = self.weight_bytes + self.state_bytes + gradients
        rest = self.live.live - known
        exchanged = min(self.live.exchanged, rest)  # a gradient may be one, too
        self.memory = Memory(self.weight_bytes, gradients, self.state_bytes, rest, exchanged)


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer remembers."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
