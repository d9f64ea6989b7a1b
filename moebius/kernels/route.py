"""From a router's logits to scores and chosen experts, in one operation.

Shapes: T tokens, N experts, K the most experts that a token can have.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class RouteRule:
    """What is chosen, by what."""

    activation: Activation
    """scores of all experts together, or of each by itself"""
    select: Literal["top_k", "top_p", "threshold"]
    """the K best, a share of the probability (`nucleus`), or those above a bar (`above`)"""
    max_k: int
    """K, the cap: the most experts a token can have"""
    crossing: Literal["include", "exclude"] = "include"
    """top_p: whether the expert that crosses the threshold is one of them"""
    min_k: int = 1
    """top_p: so many are chosen however little they have"""


@dataclass(frozen=True)
class Picked:
    """Scores, choice and statistics of each token; numbers in fp32, or fp64 for fp64."""

    affinity_TN: Tensor
    """activated logits; the only part that can be differentiated"""
    ids_TK: Tensor
    """int64, best first, -1 for an empty assignment; `min(K, N)` columns"""
    logsumexp_T: Tensor
    """of the logits"""
    entropy_T: Tensor
    """of the scores divided by their sum, divided by `log N`; 0 for one expert"""


def route(
    logits_TN: Tensor,
    rule: RouteRule,
    bias_N: Tensor | None = None,
    threshold: float | Tensor | None = None,
) -> Picked:
    """Scores of the logits, and the experts chosen by `score + bias`, where -inf closes an expert.

    `threshold` is the share that top_p gathers, a number or one element, or the bar of the selector
    threshold, which may also be `[N]`. Of equal scores the lower id wins. Raises ValueError where a
    threshold is missing, or given to top_k.

    Computed at once it reads `b * T * N` bytes of logits in b bytes each and writes `4 * T * N`
    (backward: reads twice and writes once as much), with `O(T * N * K)` comparisons and a few FLOPs
    per logit; in separate steps each of about ten reads and writes `4 * T * N` or more.
    """
    if (threshold is None) != (rule.select == "top_k"):
        needs = "takes no" if rule.select == "top_k" else "needs a"
        raise ValueError(f"selector {rule.select} {needs} threshold, got {threshold}")
    logits_TN = logits_TN.to(torch.promote_types(logits_TN.dtype, torch.float32))
    softmax = rule.activation == "softmax"
    affinity_TN = logits_TN.softmax(dim=-1) if softmax else logits_TN.sigmoid()
    with torch.no_grad():
        select_TN = affinity_TN if bias_N is None else affinity_TN + bias_N
        ids_TK = _pick(select_TN, rule, threshold)
        if softmax:  # the score of the largest logit is its share of the sum of exponentials
            logsumexp_T = logits_TN.amax(dim=-1) - affinity_TN.amax(dim=-1).log()
        else:
            logsumexp_T = logits_TN.logsumexp(dim=-1)
        return Picked(affinity_TN, ids_TK, logsumexp_T, _entropy(affinity_TN, adds_up=softmax))


def ranked(scores_TN: Tensor) -> Tensor:
    """Ids by falling score; of equal scores the lower id comes first, on every backend."""
    return scores_TN.argsort(dim=-1, descending=True, stable=True)


def nucleus(
    select_TN: Tensor,
    threshold: float | Tensor,
    crossing: Literal["include", "exclude"],
    min_k: int,
) -> tuple[Tensor, Tensor]:
    """Ranked ids and which of them gather `threshold` of the candidates' probability, `[T, N]`.

    include: the fewest whose sum is above the threshold; exclude: as many as stay within it. The
    sums are taken in the precision of the scores: in bf16 they would choose other experts.
    """
    order_TN = ranked(select_TN)
    sorted_TN = select_TN.gather(1, order_TN)
    sums_TN = sorted_TN.clamp(min=0).cumsum(dim=1)
    sums_TN = sums_TN / sums_TN[:, -1:]  # of the open experts
    if crossing == "include":
        sums_TN = F.pad(sums_TN, (1, 0))[:, :-1]
    # Rounded sums may exceed 1 before the last expert: a threshold of 1 means all of them.
    bound = torch.as_tensor(threshold, device=sums_TN.device)
    keep_TN = sums_TN <= bound.masked_fill(bound >= 1, torch.inf)
    keep_TN[:, :min_k] = True
    return order_TN, keep_TN & sorted_TN.isfinite()


def above(select_TN: Tensor, bar: float | Tensor, max_k: int) -> Tensor:
    """Ids `[T, K]` of the experts whose score is above a bar, one for all or one for each, best
    first; the best one where there is none."""
    order_TN = ranked(select_TN)
    keep_TN = (select_TN > bar).gather(1, order_TN)
    keep_TN[:, 0] |= ~keep_TN.any(dim=1)
    # With a bar per expert the kept ones need not be the best ranked: move them to the front.
    front_TN = (~keep_TN).to(torch.uint8).argsort(dim=1, stable=True)
    order_TN, keep_TN = order_TN.gather(1, front_TN), keep_TN.gather(1, front_TN)
    return chosen(order_TN, keep_TN, max_k)


def chosen(order_TN: Tensor, keep_TN: Tensor, max_assignments: int) -> Tensor:
    """Ids `[T, K]` of the kept ones among ranked ids, -1 for the others."""
    return order_TN.masked_fill(~keep_TN, -1)[:, :max_assignments]


def _pick(select_TN: Tensor, rule: RouteRule, threshold: float | Tensor | None) -> Tensor:
    if threshold is None:
        return ranked(select_TN)[:, : rule.max_k]
    if rule.select == "top_p":
        order_TN, keep_TN = nucleus(select_TN, threshold, rule.crossing, rule.min_k)
        return chosen(order_TN, keep_TN, rule.max_k)
    return above(select_TN, threshold, rule.max_k)


def _entropy(affinity_TN: Tensor, adds_up: bool) -> Tensor:
    tiny = torch.finfo(affinity_TN.dtype).tiny
    probs_TN = affinity_TN
    if not adds_up:
        probs_TN = affinity_TN / affinity_TN.sum(dim=-1, keepdim=True).clamp(min=tiny)
    clamped_TN = probs_TN.clamp(min=tiny)
    values_T = -(clamped_TN * clamped_TN.log()).sum(dim=-1)
    num_experts = affinity_TN.shape[1]
    return values_T if num_experts == 1 else (values_T / math.log(num_experts)).clamp(max=1.0)
