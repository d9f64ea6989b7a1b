"""Numbers from a step's ledger. They leave the device here, so call this only when reporting."""

from torch import Tensor

from moebius.model.config import ModelConfig, MoEConfig
from moebius.model.context import Ledger
from moebius.model.program import Site


def ffn_counts(model: ModelConfig, ledger: Ledger) -> dict[Site, Tensor]:
    """Assignments per FFN expert at each MoE site, on the device."""
    num_ffn = model.ffn.count("ffn") if isinstance(model.ffn, MoEConfig) else 0
    return {
        site: sums["expert_tokens"][:num_ffn]
        for site, sums in ledger.statistics.items()
        if "expert_tokens" in sums
    }


def ffn_rows(model: ModelConfig, ledger: Ledger) -> dict[Site, float]:
    """FFN assignments at each MoE site: the executed part of the pool."""
    return {site: float(counts.sum()) for site, counts in ffn_counts(model, ledger).items()}


def routing_metrics(model: ModelConfig, ledger: Ledger) -> dict[str, float]:
    """Losses and health of both routings, over all sites.

    `width/ffn_share`: share of assignments that went to FFN experts; `width/load_max_over_mean`:
    load of the busiest FFN expert over the mean of its site, worst site; `depth/agreement`: share
    of candidates for which the causal threshold decides like the selection in training.
    """
    metrics = {f"train/{name}_loss": float(loss) for name, loss in ledger.losses.items()}
    loads = ffn_counts(model, ledger)
    if loads:
        assignments = sum(float(ledger.statistics[site]["expert_tokens"].sum()) for site in loads)
        metrics["width/ffn_share"] = sum(ffn_rows(model, ledger).values()) / max(assignments, 1)
        metrics["width/load_max_over_mean"] = max(
            float(load.max() / load.mean().clamp(min=1e-9)) for load in loads.values()
        )
    depths = [sums for sums in ledger.statistics.values() if "agreement" in sums]
    if depths:
        candidates = sum(float(sums["candidates"]) for sums in depths)
        agreement = sum(float(sums["agreement"]) for sums in depths)
        metrics["depth/agreement"] = agreement / candidates
    return metrics
