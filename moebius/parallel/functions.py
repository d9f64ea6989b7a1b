"""Collectives with gradients. Named after the pair of what they do forwards and backwards.

Three kinds of regions meet here: tensors that are the same on all processes of a group and used
alike by all (`same`), the same but used differently, so that gradients add up (`shared`), and
different parts or summands.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from moebius.parallel.comm import Group


def share(x: Tensor, group: Group) -> Tensor:
    """The tensor itself; its gradient is the sum of everyone's."""
    return x if group.size == 1 else _call(_Share, x, group)


def add_up(x: Tensor, group: Group) -> Tensor:
    """The sum of everyone's, the same for all; everyone's gradient is that of the sum."""
    return x if group.size == 1 else _call(_AddUp, x, group)


def gather_shared(x: Tensor, group: Group, dim: int) -> Tensor:
    """Everyone's part; gradients of the own part are added up."""
    return x if group.size == 1 else _call(_GatherShared, x, group, dim)


def scatter_sum(x: Tensor, group: Group, dim: int) -> Tensor:
    """The own part of the sum of everyone's; everyone's gradient has all parts."""
    return x if group.size == 1 else _call(_ScatterSum, x, group, dim)


def gather_same(x: Tensor, group: Group, dim: int) -> Tensor:
    """Everyone's part, from which all compute the same: the own part's gradient is there."""
    return x if group.size == 1 else _call(_GatherSame, x, group, dim)


class Exchange:
    """Rows on their way to other processes; `arrived` waits for them.

    The way back, of rows and of gradients, has the same splits in reverse.
    """

    def __init__(self, group: Group, sent: Sequence[int], received: Sequence[int]) -> None:
        self.group = group
        self.sent = tuple(sent)
        self.received = tuple(received)
        self.work: list[dist.Work] = []

    def send(self, x: Tensor) -> Tensor:
        """What comes in; not to be read before `wait`."""
        return _call(_Send, x, self)

    def wait(self) -> None:
        """Until everything sent has arrived."""
        with self.group.traffic.waiting():
            for work in self.work:
                work.wait()
        self.work.clear()

    def back(self) -> "Exchange":
        """The exchange in the other direction."""
        return Exchange(self.group, self.received, self.sent)


def _call(function: type[Function], *inputs: Any) -> Tensor:
    result: Tensor = function.apply(*inputs)
    return result


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grads[0].clone()), None


class _AddUp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherShared(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return group.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.reduce_scatter(grads[0], ctx.dim), None, None


class _ScatterSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return group.reduce_scatter(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.all_gather(grads[0], ctx.dim), None, None


class _GatherSame(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return group.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        first = ctx.group.rank * ctx.length
        return grads[0].narrow(ctx.dim, first, ctx.length), None, None


class _Send(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.back = exchange.back()
        out, work = exchange.group.all_to_all(x, exchange.received, exchange.sent)
        if work is not None:
            exchange.work.append(work)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        back: Exchange = ctx.back
        out, work = back.group.all_to_all(grads[0], back.received, back.sent)
        if work is not None:
            with back.group.traffic.waiting():
                work.wait()
        return out, None
