"""Recorded decisions over width, to be made again: for debugging, oracles and reinforcement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebius.errors import DataError
from moebius.model.program import Site

if TYPE_CHECKING:
    from moebius.model.context import TokenContext


@dataclass(frozen=True)
class RoutingTable:
    """For samples of the training stream, the experts of each token at each router call site."""

    sample_ids_R: Tensor
    """int64, ascending"""
    experts: Mapping[str, Tensor]
    """by the site's name, `[R, S, K]`, -1 for no expert"""

    @cached_property
    def highest_ids(self) -> dict[str, int]:
        """The highest id at each site; read from the device once."""
        return {site: int(ids.max()) for site, ids in self.experts.items()}

    def decisions(self, site: Site, tokens: TokenContext, top_k: int, num_experts: int) -> Tensor:
        """The experts of each present token, `[T, K]`, int64.

        Raises DataError where the table lacks the site or a sample, or was made by a router with
        other experts.
        """
        experts_RSK = self.experts.get(str(site))
        if experts_RSK is None:
            raise DataError(
                f"selector replay: the record has no site {site}; there: {', '.join(self.experts)}",
                "record a run with the same layers, recursions and iterations",
            )
        _, length, recorded_k = experts_RSK.shape
        highest = self.highest_ids[str(site)]
        if recorded_k != top_k or length != tokens.row_length or highest >= num_experts:
            raise DataError(
                f"selector replay: the record of site {site} has {recorded_k} experts per token, "
                f"ids up to {highest} and rows of {length} tokens, the model {top_k}, "
                f"{num_experts - 1} and {tokens.row_length}",
                "record a run with the same experts, top_k and sequence length",
            )
        ids_BSK = experts_RSK[self._places(tokens.sample_ids_B)].long()
        index_BS1 = tokens.place_BS.clamp(min=0).unsqueeze(-1)
        return ids_BSK.gather(1, index_BS1.expand(-1, -1, top_k)).flatten(0, 1)

    def _places(self, sample_ids_B: Tensor) -> Tensor:
        place_B = torch.searchsorted(self.sample_ids_R, sample_ids_B)
        found_B = self.sample_ids_R[place_B.clamp(max=len(self.sample_ids_R) - 1)]
        missing = sample_ids_B[found_B != sample_ids_B]
        if len(missing):
            raise DataError(
                f"selector replay: sample {int(missing[0])} of the training stream was not "
                f"recorded; there: {int(self.sample_ids_R[0])} to {int(self.sample_ids_R[-1])}",
                "record more steps (log.record_routing) or train fewer",
            )
        return place_B
