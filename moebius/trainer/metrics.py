"""Numbers from a step's ledger. They leave the device here, so call this only when reporting."""

import torch
from torch import Tensor

from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.moe.layer import Executed
from moebius.model.moe.router import Router
from moebius.model.program import Site


def executed_rows(ledger: Ledger) -> Executed:
    """Assignments that each expert computed at each router call site."""
    return {
        site: sums["executed_tokens"].tolist()
        for site, sums in ledger.statistics.items()
        if "executed_tokens" in sums
    }


def routing_metrics(decoder: Decoder, ledger: Ledger) -> dict[str, float]:
    """Losses and health of both routings, over all sites; the names are explained in
    `docs/routing.md`."""
    metrics = {f"train/{name}_loss": float(loss) for name, loss in ledger.losses.items()}
    return metrics | width_metrics(decoder, ledger) | depth_metrics(ledger)


def width_metrics(decoder: Decoder, ledger: Ledger) -> dict[str, float]:
    """`width/...`: how experts are used, see `docs/routing.md`."""
    computing = _computing_experts(decoder)
    sites = {site: ledger.statistics[site] for site in ledger.statistics if site in computing}
    if not sites:
        return {}
    assignments = sum(float(sums["expert_tokens"].sum()) for sums in sites.values())
    tokens = sum(float(sums["tokens"]) for sums in sites.values())
    loads = {site: sums["expert_tokens"][: computing[site]] for site, sums in sites.items()}
    executed = sum(
        float(s["executed_tokens"][: computing[site]].sum()) for site, s in sites.items()
    )
    squares = sum(float(sums["logsumexp_squares"]) for sums in sites.values())
    return {
        "width/computing_share": executed / max(assignments, 1),
        "width/experts_per_token": assignments / max(tokens, 1),
        "width/experts_per_token_std": max(_deviation(s["k_histogram"]) for s in sites.values()),
        "width/load_max_over_mean": max(
            float(load.max() / load.mean().clamp(min=1e-9)) for load in loads.values()
        ),
        "width/dead_share": float(
            torch.cat([sums["expert_tokens"] == 0 for sums in sites.values()]).float().mean()
        ),
        "width/entropy": sum(float(sums["entropy"]) for sums in sites.values()) / max(tokens, 1),
        "width/dropped_share": sum(float(sums["dropped"]) for sums in sites.values())
        / max(assignments, 1),
        "width/logsumexp_rms": (squares / max(tokens, 1)) ** 0.5,
    }


def _deviation(histogram_K: Tensor) -> float:
    """Standard deviation of a whole number from how often 0, 1, 2, ... came."""
    share_K = histogram_K / histogram_K.sum().clamp(min=1)
    value_K = torch.arange(len(share_K), device=share_K.device)
    mean = (share_K * value_K).sum()
    return float((share_K * (value_K - mean).square()).sum().sqrt())


def depth_metrics(ledger: Ledger) -> dict[str, float]:
    """`depth/agreement`: share of candidates for which the causal threshold decides like the
    selection in training."""
    depths = [sums for sums in ledger.statistics.values() if "agreement" in sums]
    if not depths:
        return {}
    candidates = sum(float(sums["candidates"]) for sums in depths)
    return {"depth/agreement": sum(float(sums["agreement"]) for sums in depths) / candidates}


def _computing_experts(decoder: Decoder) -> dict[Site, int]:
    """For each router call site, how many of its experts need matrix products."""
    return {
        router.place.site(router.sublayer, depth, iteration): router.pool.num_computing
        for router in decoder.modules()
        if isinstance(router, Router)
        for depth in range(1, router.place.num_depths + 1)
        for iteration in router.iterations
    }
