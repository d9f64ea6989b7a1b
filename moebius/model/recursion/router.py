"""Expert-choice routing over depth (Mixture-of-Recursions, arXiv 2507.10524, section 2.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.kernels.depth_select import compact, take_rows, top_k_mask
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.parameters import Linear, ParameterModule, Role
from moebius.model.program import Site, kept_tokens
from moebius.model.recursion.config import DepthRouterConfig


@dataclass(frozen=True)
class Selection:
    """The tokens that enter a pass and the weight of its result; only the executor moves them."""

    index_BK: Tensor
    """positions in the full row, ascending, int64, -1 for an empty slot"""
    gate_BK: Tensor
    """factor on the pass's result, fp32"""


class DepthRouter(ParameterModule):
    """The router of one depth; every depth of a loop has its own."""

    def __init__(
        self, config: ModelConfig, router: DepthRouterConfig, capacity: float, site: Site
    ) -> None:
        super().__init__()
        self.config = router
        self.capacity = capacity
        self.site = site
        self.score = Linear(config.hidden_size, 1, Role.ROUTER, config.init_std)

    def forward(
        self, x_BSD: Tensor, candidates_BS: Tensor, step: StepContext
    ) -> tuple[Tensor, Selection]:
        """Select among `candidates`, the tokens of the previous depth, and book the auxiliary loss.

        Returns the residual stream with the loss attached, and the selection. A token that was not
        selected once never returns: it is no candidate any more.
        """
        candidate_rows = take_rows(x_BSD, candidates_BS)
        with torch.autocast(x_BSD.device.type, enabled=False):
            dtype = torch.promote_types(x_BSD.dtype, torch.float32)
            logits_BS = F.linear(candidate_rows.to(dtype), self.score.weight.to(dtype)).squeeze(-1)
        present_BS = candidates_BS >= 0
        causal_BS = (logits_BS >= 0) & present_BS
        if step.mode == "topk":
            k = min(kept_tokens(self.capacity, x_BSD.shape[1]), candidates_BS.shape[1])
            keep_BS = top_k_mask(logits_BS, k)
        else:
            keep_BS = causal_BS
            k = max(1, int(keep_BS.sum(dim=1).max()))
        step.ledger.record(
            self.site,
            candidates=present_BS.sum(),
            selected=keep_BS.sum(),
            agreement=((causal_BS == keep_BS) & present_BS).sum(),
        )
        if step.mode == "topk":
            loss = F.binary_cross_entropy_with_logits(logits_BS, keep_BS.to(dtype))
            x_BSD = step.ledger.attach(x_BSD, "depth", loss, self.config.aux_coefficient)
        index_BK, slot_BK = compact(candidates_BS, keep_BS, k)
        return x_BSD, Selection(index_BK, self._gate(logits_BS.gather(1, slot_BK)))

    def _gate(self, logits_BK: Tensor) -> Tensor:
        if self.config.activation == "sigmoid":
            return self.config.alpha * logits_BK.sigmoid()
        if self.config.activation == "tanh":
            return self.config.alpha * logits_BK.tanh()
        return torch.full_like(logits_BK, self.config.alpha)
