"""Expert parallelism: tokens travel to the processes that hold their experts, and back.

A token goes at most once to each process that holds any of its experts, with the numbers of its
experts there and their weights; the process adds up what they make of it and sends one row back.
Experts that cost nothing and shared experts are computed where the token is, while it travels.

Shapes as in the model, and: P processes, U tokens that travel (copies), K assignments of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebius.kernels.precision import for_products
from moebius.kernels.registry import Kernels
from moebius.model.decoder import Decoder
from moebius.model.moe.dispatch import Dispatch, LocalDispatcher
from moebius.model.moe.experts import ExpertPool, FFNExperts, LowRankExperts
from moebius.parallel.comm import Group
from moebius.parallel.functions import Exchange, add_up, share
from moebius.parallel.placement import Cut


@dataclass(frozen=True)
class Visitors(Dispatch):
    """Tokens that have come here, sorted by expert, and the way back."""

    num_visitors: int
    exchange: Exchange
    home_U: Tensor
    """which of the own tokens each one that was sent is"""


class AllToAllDispatcher:
    """`experts` are processes that hold different experts, or different parts of their width.

    `same` are those that have the same tokens and other parts of the width of the same experts:
    along `tp`, where tokens are not cut.
    """

    def __init__(self, experts: Group, width: int, same: Group | None = None) -> None:
        self.experts = experts
        self.width = width
        """neighbours in `experts` that hold parts of the same experts"""
        self.same = same
        self.local = LocalDispatcher()

    def send(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        sizes: Sequence[int],
        kernels: Kernels,
    ) -> Callable[[], Visitors]:
        """See `Dispatcher`: first how many, then who."""
        if self.same is not None:
            x_TD, weights_TK = share(x_TD, self.same), share(weights_TK, self.same)
        num_owners = self.experts.size // self.width
        owner_TK, number_TK = owners(ids_TK, sizes, num_owners)
        goes_PT = (owner_TK == torch.arange(num_owners, device=ids_TK.device).view(-1, 1, 1)).any(2)
        goes_PT = goes_PT.repeat_interleave(self.width, dim=0)
        counts_P = goes_PT.sum(dim=1)
        come_P = self.experts.counts(counts_P)
        target_U, home_U = goes_PT.nonzero(as_tuple=True)
        # The only numbers that the host must know: they decide shapes.
        sent, received = torch.stack([counts_P, come_P]).tolist()
        exchange = Exchange(self.experts, sent, received)
        is_there_UK = owner_TK.index_select(0, home_U) == (target_U // self.width).unsqueeze(1)
        ids_UK = number_TK.index_select(0, home_U).masked_fill(~is_there_UK, -1).to(torch.int32)
        weights_UK = weights_TK.index_select(0, home_U) * is_there_UK
        rows = exchange.send(for_products(x_TD.index_select(0, home_U)))
        weights = exchange.send(weights_UK)
        ids = exchange.send(ids_UK)

        def arrive() -> Visitors:
            exchange.wait()
            num_local = sum(sizes) // num_owners
            here = self.local.dispatch(rows, ids.long(), weights, num_local, kernels)
            return Visitors(**vars(here), num_visitors=len(rows), exchange=exchange, home_U=home_U)

        return arrive

    def combine(self, rows_RD: Tensor, dispatch: Dispatch, y_TD: Tensor) -> Tensor:
        """See `Dispatcher`."""
        assert isinstance(dispatch, Visitors)
        shape, dtype = (dispatch.num_visitors, rows_RD.shape[1]), rows_RD.dtype
        nothing_VD = rows_RD.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
        back = dispatch.exchange.back()
        rows_UD = back.send(self.local.combine(rows_RD, dispatch, nothing_VD).to(dtype))
        back.wait()
        if self.same is None:
            return y_TD.index_add(0, dispatch.home_U, rows_UD.to(y_TD.dtype))
        routed_TD = torch.zeros_like(y_TD).index_add(0, dispatch.home_U, rows_UD.to(y_TD.dtype))
        return y_TD + add_up(routed_TD, self.same)


def owners(ids_TK: Tensor, sizes: Sequence[int], num_owners: int) -> tuple[Tensor, Tensor]:
    """Who holds each chosen expert, -1 where nobody has to, and its number there, `[T, K]`.

    Every group of experts is cut into equal runs of ids; an owner's experts are numbered in the
    order of groups.
    """
    owner_E, number_E = [], []
    first = 0
    for size in sizes:
        each = size // num_owners
        owner_E += [i // each for i in range(size)]
        number_E += [first + i % each for i in range(size)]
        first += each
    table = torch.tensor([[*owner_E, -1], [*number_E, -1]], device=ids_TK.device)
    # The last entry stands for empty assignments and for experts that no token is sent to.
    index_TK = ids_TK.where((ids_TK >= 0) & (ids_TK < len(owner_E)), len(owner_E))
    return table[0][index_TK], table[1][index_TK]


def split_experts(
    decoder: Decoder, ep: Group, etp: Group, experts: Group, same: Group | None
) -> dict[nn.Parameter, tuple[Cut, ...]]:
    """Tell pools where their experts are, and say how their weights are cut.

    With `same` the processes along `etp` have the same tokens, and only `ep` exchanges any.
    """
    found: dict[nn.Parameter, tuple[Cut, ...]] = {}
    for pool in (module for module in decoder.modules() if isinstance(module, ExpertPool)):
        pool.local_sizes = [size // ep.size for size in pool.sizes]
        if same is not None:
            pool.dispatcher = AllToAllDispatcher(ep, 1, same)
        elif experts.size > 1:
            pool.dispatcher = AllToAllDispatcher(experts, etp.size)
        for group in pool.groups:
            if isinstance(group, FFNExperts):
                found[group.gate_up] = (Cut(ep, 0), Cut(etp, 1, blocks=2))
                found[group.down] = (Cut(ep, 0), Cut(etp, 2))
            elif isinstance(group, LowRankExperts):
                found[group.down] = (Cut(ep, 0), Cut(etp, 1))
                found[group.up] = (Cut(ep, 0), Cut(etp, 2))
    return found
