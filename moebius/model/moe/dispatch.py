"""Moving tokens to the experts that own them and back: the seam for expert parallelism."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.model.moe.routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """Tokens copied once per FFN assignment, sorted by expert."""

    rows_RD: Tensor
    weights_R: Tensor
    ends_E: Tensor
    """int32; rows `ends[e-1]:ends[e]` go to expert e"""
    source_R: Tensor
    """token each row came from"""


class LocalDispatcher:
    """All experts live here; an empty or zero-computation assignment makes no row."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_ffn_experts: int) -> Dispatch:
        """Sort the FFN assignments by expert (stable: by token inside an expert) and gather."""
        ids = routing.ids_TK.flatten()
        assignment_R = ((ids >= 0) & (ids < num_ffn_experts)).nonzero().squeeze(1)
        expert_R, order_R = ids[assignment_R].sort(stable=True)
        assignment_R = assignment_R[order_R]
        source_R = assignment_R // routing.ids_TK.shape[1]
        experts = torch.arange(num_ffn_experts, device=ids.device)
        ends_E = torch.searchsorted(expert_R, experts, right=True).to(torch.int32)
        weights_R = routing.weights_TK.flatten()[assignment_R]
        return Dispatch(x_TD[source_R], weights_R, ends_E, source_R)

    def combine(self, rows_RD: Tensor, dispatch: Dispatch, y_TD: Tensor) -> Tensor:
        """`y` plus each row at the token it came from."""
        return y_TD.index_add(0, dispatch.source_R, rows_RD.to(y_TD.dtype))
