"""Numbers from a step's ledger. They leave the device here, so call this only when reporting."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moebius.model.cost import visit_costs
from moebius.model.decoder import Decoder
from moebius.model.extent import Work
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


def fetched(ledger: Ledger) -> Ledger:
    """The ledger with its numbers on the host, moved in one piece: each move waits for a device."""
    entries = [(s, n, value) for s, sums in ledger.statistics.items() for n, value in sums.items()]
    values = [value for _, _, value in entries] + list(ledger.losses.values())
    host = Ledger()
    host.work = ledger.work
    if not values:
        return host
    together = torch.cat([value.detach().flatten().double() for value in values]).cpu()
    pieces = iter(together.split([value.numel() for value in values]))
    for site, name, value in entries:
        sums = host.statistics.setdefault(site, {})
        sums[name] = next(pieces).view(value.shape).to(value.dtype)
    host.losses = {name: next(pieces)[0] for name in ledger.losses}
    return host


def routing_metrics(decoder: Decoder, ledger: Ledger) -> dict[str, float]:
    """Losses and health of both routings, over all sites; the names are explained in
    `docs/metrics.md`."""
    metrics = {f"train/{name}_loss": float(loss) for name, loss in ledger.losses.items()}
    width = width_metrics(decoder, ledger) | layer_metrics(decoder, ledger)
    return metrics | width | depth_metrics(ledger)


def width_metrics(decoder: Decoder, ledger: Ledger) -> dict[str, float]:
    """`width/...`: how experts are used, see `docs/routing.md`."""
    sites = [
        (router, ledger.statistics[site])
        for site, router in routers_of(decoder).items()
        if site in ledger.statistics
    ]
    if not sites:
        return {}
    each = [sums for _, sums in sites]
    assignments = sum(float(sums["expert_tokens"].sum()) for sums in each)
    tokens = sum(float(sums["tokens"]) for sums in each)
    loads = [sums["expert_tokens"][: router.pool.num_computing] for router, sums in sites]
    executed = sum(
        float(sums["executed_tokens"][: router.pool.num_computing].sum()) for router, sums in sites
    )
    squares = sum(float(sums["logsumexp_squares"]) for sums in each)
    spreads = [_bias_spread(sums) for sums in each if "bias_spread" in sums]
    metrics = {
        "computing_share": executed / max(assignments, 1),
        **_target(sites),
        "experts_per_token": assignments / max(tokens, 1),
        "experts_per_token_std": max(_deviation(sums["k_histogram"]) for sums in each),
        **_shares_of_k([sums for router, sums in sites if not router.config.selector.fixed_k]),
        "load_max_over_mean": max(_max_over_mean(load_N) for load_N in loads),
        "dead_share": float(
            torch.cat([sums["expert_tokens"] == 0 for sums in each]).float().mean()
        ),
        "entropy": sum(float(sums["entropy"]) for sums in each) / max(tokens, 1),
        "dropped_share": sum(float(sums["dropped"]) for sums in each) / max(assignments, 1),
        "spilled_share": sum(float(sums["spilled"]) for sums in each) / max(assignments, 1),
        "logsumexp_rms": (squares / max(tokens, 1)) ** 0.5,
        **({"bias_spread": max(spreads)} if spreads else {}),
    }
    return {f"width/{name}": value for name, value in metrics.items()}


def place_of(site: Site) -> str:
    """A site as metrics name it: layer, sublayer, pass and, in a chain, turn."""
    turn = f".{site.iteration}" if site.iteration > 1 else ""
    return f"{site.module.removeprefix('layers.').removeprefix('depth.')}.{site.depth}{turn}"


def layer_metrics(decoder: Decoder, ledger: Ledger) -> dict[str, float]:
    """`layers/...`: what `width_metrics` says of all, for each router call site."""
    metrics: dict[str, float] = {}
    for site, router in routers_of(decoder).items():
        sums = ledger.statistics.get(site)
        if sums is None:
            continue
        number, target = router.pool.num_computing, router.computing_target
        tokens, assignments = float(sums["tokens"]), float(sums["expert_tokens"].sum())
        of_site = {
            "computing_share": float(sums["executed_tokens"][:number].sum()) / max(assignments, 1),
            **({} if target in (None, 1.0) else {"target_computing_share": target}),
            "experts_per_token": assignments / max(tokens, 1),
            "load_max_over_mean": _max_over_mean(sums["expert_tokens"][:number]),
            "dead_share": float((sums["expert_tokens"] == 0).float().mean()),
            "entropy": float(sums["entropy"]) / max(tokens, 1),
            "dropped_share": float(sums["dropped"]) / max(assignments, 1),
            "spilled_share": float(sums["spilled"]) / max(assignments, 1),
            **({"bias_spread": _bias_spread(sums)} if "bias_spread" in sums else {}),
        }
        metrics |= {f"layers/{place_of(site)}/{name}": value for name, value in of_site.items()}
    return metrics


def _target(sites: Sequence[tuple[Router, Mapping[str, Tensor]]]) -> dict[str, float]:
    """What the share of experts that compute would be if every site met its own target, where all
    have one and it is not 1 at all of them."""
    targets = [router.computing_target for router, _ in sites]
    known = [target for target in targets if target is not None]
    if len(known) < len(sites) or min(known) == 1:
        return {}
    weights = [float(sums["expert_tokens"].sum()) for _, sums in sites]
    total = sum(target * weight for target, weight in zip(known, weights, strict=True))
    return {"target_computing_share": total / max(sum(weights), 1)}


def _max_over_mean(load_N: Tensor) -> float:
    return float(load_N.max() / load_N.mean().clamp(min=1e-9))


def _bias_spread(sums: Mapping[str, Tensor]) -> float:
    """What was the same for all tokens of a step was added up over them."""
    return float(sums["bias_spread"]) / max(float(sums["tokens"]), 1)


def _shares_of_k(each: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Of all tokens, the share with each number of experts."""
    most = max((len(sums["k_histogram"]) for sums in each), default=0)
    count_K = torch.zeros(most)
    for sums in each:
        count_K[: len(sums["k_histogram"])] += sums["k_histogram"]
    share_K = count_K / count_K.sum().clamp(min=1)
    return {f"tokens_with_{number}": float(share) for number, share in enumerate(share_K)}


def _deviation(histogram_K: Tensor) -> float:
    """Standard deviation of a whole number from how often 0, 1, 2, ... came."""
    share_K = histogram_K / histogram_K.sum().clamp(min=1)
    value_K = torch.arange(len(share_K), device=share_K.device)
    mean = (share_K * value_K).sum()
    return float((share_K * (value_K - mean).square()).sum().sqrt())


def depth_metrics(ledger: Ledger) -> dict[str, float]:
    """`depth/...`: who enters the passes of routed loops, see `docs/recursion.md`."""
    metrics = {}
    passes = {s: sums for s, sums in ledger.statistics.items() if "places" in sums}
    for site, sums in passes.items():
        name = place_of(site)
        metrics[f"depth/selected_share_{name}"] = float(sums["selected"]) / max(
            float(sums["candidates"]), 1
        )
        metrics[f"depth/dead_share_{name}"] = float((sums["places"] == 0).float().mean())
        if "gates" in sums:
            selected = max(float(sums["selected"]), 1)
            metrics[f"depth/gate_{name}"] = float(sums["gates"]) / selected
    compared = [sums for sums in passes.values() if "agreement" in sums]
    if compared:
        candidates = sum(float(sums["candidates"]) for sums in compared)
        agreeing = sum(float(sums["agreement"]) for sums in compared)
        metrics["depth/agreement"] = agreeing / candidates
    choices = [s for site, s in ledger.statistics.items() if site.module.endswith(".choice")]
    if choices:
        made = sum(float(sums["selected"]) for sums in passes.values())
        tokens = sum(float(s["selected"]) for site, s in passes.items() if site.depth == 1)
        metrics |= _choice_metrics(choices) | {"depth/mean_passes": made / max(tokens, 1)}
    return metrics


def _choice_metrics(choices: list[dict[str, Tensor]]) -> dict[str, float]:
    """How evenly tokens choose their number of passes, over all routed loops."""
    counts_N = torch.stack([sums["expert_tokens"] for sums in choices]).sum(dim=0)
    share_N = counts_N / counts_N.sum().clamp(min=1)
    return {
        "depth/max_violation": float(counts_N.max() / counts_N.mean().clamp(min=1e-9)) - 1,
        "depth/choice_entropy": float(torch.special.entr(share_N).sum()),
    }


def ffn_flops_per_token(decoder: Decoder, ledger: Ledger, num_tokens: int) -> float:
    """Forward FLOPs of the feed-forwards of all tokens that entered, per token of the batch: what
    the two budgets, experts that cost nothing and passes that tokens skip, leave together.

    Empty slots of passes whose rows keep different numbers of tokens are not counted: how many
    there are depends on the cut of the batch.
    """
    work = Work(dict(ledger.work.visits))
    for segment in decoder.program.segments:
        for visits in segment.passes if segment.router else ():
            for visit in (visit for visit in visits if visit in work.visits):
                entered = int(ledger.statistics[segment.site(visit.depth)]["selected"])
                work.visits[visit] = replace(work.visits[visit], tokens=entered)
    costs = visit_costs(decoder, work, executed_rows(ledger))
    return sum(cost.ffn for cost in costs) / num_tokens


def routers_of(decoder: Decoder) -> dict[Site, Router]:
    """The routers over width by their call sites."""
    return {
        site: router
        for router in decoder.layers.modules()
        if isinstance(router, Router)
        for site in router.sites
    }
