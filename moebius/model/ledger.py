"""What a forward pass leaves behind besides its output."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moebius.model.extent import Work
from moebius.model.program import Site

NO_SAMPLES, ALL_SAMPLES = range(0), range(sys.maxsize)


class Ledger:
    """What one forward pass produces besides its output: auxiliary losses, statistics by site, and
    how much was computed.

    Values stay on the device. `share` is this pass's part of all tokens of the optimizer step: it
    weights auxiliary losses, so that their sum over the micro-batches is a mean over the step.
    Of the samples with numbers in `keep` it also holds every decision.
    """

    def __init__(self, share: float = 1.0, keep: range = NO_SAMPLES) -> None:
        self.share = share
        self.keep = keep
        self.statistics: dict[Site, dict[str, Tensor]] = {}
        self.losses: dict[str, Tensor] = {}
        self.work = Work()
        self.routings: dict[Site, Tensor] = {}
        """of kept samples: of routers over width the experts of each token, `[rows, S, K]`, -1 for
        none; of passes that tokens are routed to 0 for those that enter, else -1, `[rows, S, 1]`;
        rows in order of execution"""

    def record(self, site: Site, **sums: Tensor) -> None:
        """Add statistics of a site; they must be sums over tokens, so that passes can be added."""
        entry = self.statistics.setdefault(site, {})
        for name, value in sums.items():
            value = value.detach()
            entry[name] = entry[name] + value if name in entry else value

    def record_decision(self, site: Site, ids_BSK: Tensor, sample_ids_B: Tensor) -> None:
        """Keep the decisions of a site for full rows whose samples are to be kept."""
        kept_B = (sample_ids_B >= self.keep.start) & (sample_ids_B < self.keep.stop)
        self.record_routing(site, ids_BSK[kept_B])

    def record_routing(self, site: Site, ids_BSK: Tensor) -> None:
        """Append the decisions of a site for more rows."""
        seen = [self.routings[site]] if site in self.routings else []
        self.routings[site] = torch.cat([*seen, ids_BSK])

    def attach(self, x: Tensor, name: str, loss: Tensor, coefficient: float) -> Tensor:
        """Return `x` unchanged, with `coefficient * share * loss` added to what is differentiated.

        The loss enters through the backward pass of `x`, so no module has to return it and it
        reaches the optimizer from wherever in the model it arises.
        """
        weight = coefficient * self.share
        booked = weight * loss.detach()
        self.losses[name] = self.losses[name] + booked if name in self.losses else booked
        attached: Tensor = _AttachLoss.apply(x, loss, weight)  # type: ignore[no-untyped-call]
        return attached

    @classmethod
    def merge(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """The ledger of several micro-batches together."""
        merged = cls()
        for ledger in ledgers:
            for site, sums in ledger.statistics.items():
                merged.record(site, **sums)
            for name, loss in ledger.losses.items():
                merged.losses[name] = merged.losses[name] + loss if name in merged.losses else loss
            merged.work.add(ledger.work)
            for site, ids_BSK in ledger.routings.items():
                merged.record_routing(site, ids_BSK)
        return merged


class _AttachLoss(torch.autograd.Function):
    """Identity on x whose backward also sends `weight` to the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = torch.full_like(loss, weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.weight, None
