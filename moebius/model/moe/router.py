"""From a token to its experts: the stages of routing over width, run in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from moebius.model.carry import Carry
from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext, TokenContext, in_full_rows
from moebius.model.ledger import Ledger
from moebius.model.moe.config import RouterConfig
from moebius.model.moe.controllers import Controller, score_histogram
from moebius.model.moe.entropy import entropy
from moebius.model.moe.losses import Load, Observation
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.routing import RouteContext, Routing, Scores, expert_counts
from moebius.model.moe.scorers import LinearScorerConfig, ScorerShape
from moebius.model.parameters import ParameterModule, Role
from moebius.model.program import LayerPlace, Site, Visit


@dataclass(frozen=True)
class Routed:
    """A decision, and what else came of it."""

    routing: Routing
    """after capacities"""
    carry: Carry
    losses: tuple[tuple[str, Tensor, float], ...]
    """name, value, coefficient"""
    affinity_TN: Tensor
    """what the weights were made of"""

    def own(self, tokens: TokenContext) -> tuple[Tensor, Tensor]:
        """Ids and weights of the own slots, `[T, K]`: decisions are of whole rows."""
        shape, spread = tokens.place_BS.shape, tokens.spread
        ids_TK, weights_TK = self.routing.ids_TK, self.routing.weights_TK
        own_ids_BSK = spread.own(ids_TK.unflatten(0, shape))
        own_weights_BSK = spread.own(weights_TK.unflatten(0, shape))
        return own_ids_BSK.flatten(0, 1), own_weights_BSK.flatten(0, 1)

    def attach_losses(self, y: Tensor, ledger: Ledger, prefix: str = "") -> Tensor:
        """`y` unchanged, with the losses on it, see `Ledger.attach`."""
        for name, value, coefficient in self.losses:
            y = ledger.attach(y, prefix + name, value, coefficient)
        return y

    @classmethod
    def join(cls, parts: Sequence[Routed], sizes: Sequence[int]) -> Routed:
        """The decisions of several groups of rows, outside of training: without losses."""
        routings = [part.routing for part in parts]
        routing = Routing(
            torch.cat([r.ids_TK for r in routings]),
            torch.cat([r.weights_TK for r in routings]),
            torch.cat([r.probs_TN for r in routings]),
            torch.cat([r.logits_TN for r in routings]),
        )
        carry = Carry.join([part.carry for part in parts], sizes)
        return cls(routing, carry, (), torch.cat([part.affinity_TN for part in parts]))


class Router(ParameterModule):
    """Scorer, score norm, candidates, selector, weights, capacity; always computed in fp32.

    One router may serve several call sites: each depth of a recursion, each turn of a chain of
    experts. What it remembers of a step is kept by site.
    """

    is_null_N: Tensor
    last_counts_UN: Tensor
    last_probs_UN: Tensor

    def __init__(
        self,
        model: ModelConfig,
        config: RouterConfig,
        pool: PoolShape,
        sublayer: str,
        sites: tuple[Site, ...],
        predecessor: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.pool = pool
        self.sublayer = sublayer
        self.sites = sites
        self.looks_back = "prev_layer"
        if isinstance(config.scorer, LinearScorerConfig):
            self.looks_back = config.scorer.gating_residual
        if self.looks_back == "prev_depth":
            predecessor = pool.num_experts if sites[-1].depth > 1 else None
        elif any(site.iteration > 1 for site in sites):  # a turn follows one of the same pool
            predecessor = pool.num_experts
        self.scorer = config.scorer.build(
            ScorerShape(
                sublayer,
                model.hidden_size,
                pool.num_experts,
                predecessor,
                model.init_std,
                Role.FROZEN if config.frozen else Role.ROUTER,
            )
        )
        num_uses = len(sites)
        self.controllers = nn.ModuleList(
            control.build(pool, config.selector, num_uses) for control in config.controllers
        )
        self.register_buffer("is_null_N", pool.is_kind("zero"), persistent=False)
        self.remembers_load = any(loss.remembers_load for loss in config.losses)
        if self.remembers_load:
            shape = (num_uses, pool.num_experts)
            self.register_buffer("last_counts_UN", torch.zeros(shape))
            self.register_buffer("last_probs_UN", torch.zeros(shape))

    def forward(self, x_BSD: Tensor, carry: Carry, ctx: DepthContext, site: Site) -> Routed:
        """Route each token, book the statistics of the site, and work out its losses.

        `x` and `carry` are of the own slots, what is decided is of whole rows.
        """
        by_document = self.config.scorer.granularity == "document"
        route = RouteContext(site, self.sites.index(site), ctx.tokens, ctx.step, by_document)
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_TN, carry = self._score(x_BSD, carry, route, ctx.shared)
            scores, ids_TK = self._decide(logits_TN, route)
            ids_TK = ids_TK.masked_fill(~route.valid_T.unsqueeze(1), -1)
            weights_TK = self._weights(scores, ids_TK)
            chosen = Routing(ids_TK, weights_TK, scores.probs_TN, logits_TN)
            seen = self._observe(chosen, route)
            # Losses are means over the tokens that are there, or that are expected to be.
            part: Tensor | float = 1.0
            if ctx.tokens.expected is not None:
                part = route.valid_T.sum() / (ctx.tokens.expected or 1.0)
            losses = tuple(
                (
                    loss.kind,
                    loss.value(seen) * part,
                    loss.unit_coefficient(self.pool, ids_TK.shape[1]),
                )
                for loss in self.config.losses
            )
            limited = self._limit(chosen, scores, route)
            self._record(chosen, limited, scores, seen, route)
        return Routed(limited, carry, losses, scores.affinity_TN)

    def _score(
        self, x_BSD: Tensor, carry: Carry, route: RouteContext, shared: nn.ModuleDict
    ) -> tuple[Tensor, Carry]:
        x_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
        scorer = self.config.scorer
        if route.by_document:
            start_BS1 = route.tokens.document_start_BS.unsqueeze(-1)
            x_BSD = x_BSD.gather(1, start_BS1.expand_as(x_BSD))
        x_TD = x_BSD.flatten(0, 1)
        if scorer.jitter and route.step.training:
            noise_TD = route.uniform("jitter", x_TD.shape[1], own=True)
            x_TD = x_TD * (1 + scorer.jitter * (2 * noise_TD - 1))
        name = self.sublayer
        if self.looks_back == "prev_depth":
            name = f"{route.site.module}.{route.site.iteration}"
        previous = carry.router_states.get(name)
        state = None if previous is None else previous.flatten(0, 1)
        logits_TN, state = self.scorer(x_TD, state, shared)
        if state is not None:
            carry = carry.with_state(name, state.unflatten(0, x_BSD.shape[:2]))
        logits_BSN = route.tokens.spread.whole(logits_TN.unflatten(0, x_BSD.shape[:2]))
        return logits_BSN.flatten(0, 1), carry

    def _decide(self, logits_TN: Tensor, route: RouteContext) -> tuple[Scores, Tensor]:
        """Scores and chosen experts; the bias never reaches the weights."""
        norm, selector = self.config.norm, self.config.selector
        scaled_TN, (bias_N, threshold) = norm.scaled(logits_TN, route), self._steering(route)
        rule = selector.rule(norm.kind, self.pool.num_experts, route)
        if rule is not None and not self.config.candidates:
            limit = selector.limit(threshold)
            picked = route.step.kernels.route(scaled_TN, rule, bias_N, limit)
            affinity_TN = picked.affinity_TN
        else:
            picked, affinity_TN = None, norm.activate(scaled_TN)
        select_TN = affinity_TN.detach()
        if bias_N is not None:
            select_TN = select_TN + bias_N
        for candidates in self.config.candidates:
            mask = candidates.mask(select_TN, self.pool, route)
            select_TN = select_TN.masked_fill(~mask, float("-inf"))
        scores = Scores(affinity_TN, norm.probabilities(affinity_TN), select_TN, threshold, bias_N)
        if picked is not None:
            logsumexp_T = picked.logsumexp_T if scaled_TN is logits_TN else None
            scores = replace(scores, entropy_T=picked.entropy_T, logsumexp_T=logsumexp_T)

        def choose() -> Tensor:
            return selector.select(scores, route) if picked is None else picked.ids_TK

        return scores, route.step.decide(route.site, "selected", choose)

    def _steering(self, route: RouteContext) -> tuple[Tensor | None, Tensor | None]:
        """What controllers add to scores, and the share or bar that they ask for."""
        bias_N = threshold = None
        for controller in self._controllers():
            steering = controller.steer(route.use)
            if steering.bias_N is not None:
                bias_N = steering.bias_N if bias_N is None else bias_N + steering.bias_N
            if steering.threshold is not None:
                threshold = steering.threshold
        return bias_N, threshold

    def _weights(self, scores: Scores, ids_TK: Tensor) -> Tensor:
        return self.config.weights.weights(scores.affinity_TN, ids_TK, self.is_null_N)

    def _limit(self, chosen: Routing, scores: Scores, route: RouteContext) -> Routing:
        """Capacities delete or move assignments; the weights of the others stay."""
        capacity = self.config.capacity
        if capacity is None or not route.step.training:
            return chosen
        ids_TK = route.step.decide(
            route.site,
            "admitted",
            lambda: capacity.apply(chosen.ids_TK, scores, self.pool, route),
        )
        return replace(
            chosen, ids_TK=ids_TK, weights_TK=chosen.weights_TK.masked_fill(ids_TK < 0, 0.0)
        )

    def _observe(self, chosen: Routing, route: RouteContext) -> Observation:
        rows, length = route.shape
        valid_T, num_experts = route.valid_T, self.pool.num_experts
        group_T = torch.arange(rows, device=valid_T.device).repeat_interleave(length)
        probs_BSN = (chosen.probs_TN * valid_T.unsqueeze(1)).unflatten(0, (rows, length))
        per_row = Load(
            counts_GN=expert_counts(chosen.ids_TK, group_T, rows, num_experts),
            prob_sums_GN=probs_BSN.sum(dim=1),
            tokens_G=valid_T.view(rows, length).sum(dim=1),
        )
        last_step = None
        if self.remembers_load:
            use = slice(route.use, route.use + 1)
            probs_1N = self.last_probs_UN[use]  # each token's add up to 1
            last_step = Load(self.last_counts_UN[use], probs_1N, probs_1N.sum(dim=1))
        return Observation(chosen, valid_T, per_row, last_step, self.pool)

    def _record(
        self,
        chosen: Routing,
        limited: Routing,
        scores: Scores,
        seen: Observation,
        route: RouteContext,
    ) -> None:
        """Statistics of the call site: sums over present tokens."""
        ledger, valid_T = route.step.ledger, seen.valid_T
        group_T = torch.zeros_like(valid_T, dtype=torch.int64)
        num_experts = self.pool.num_experts
        changed_TK = limited.ids_TK != chosen.ids_TK
        k_T = (chosen.ids_TK >= 0).sum(dim=1)
        k_counts = torch.zeros(chosen.ids_TK.shape[1] + 1, device=valid_T.device)
        entropy_T, logsumexp_T = scores.entropy_T, scores.logsumexp_T
        if entropy_T is None:
            entropy_T = entropy(chosen.probs_TN.detach(), "shannon", 1.0, normalized=True)
        if logsumexp_T is None:
            logsumexp_T = chosen.logits_TN.logsumexp(dim=-1)
        ledger.record(
            route.site,
            tokens=valid_T.sum(),
            expert_tokens=seen.per_row.counts_GN.sum(dim=0),
            executed_tokens=expert_counts(limited.ids_TK, group_T, 1, num_experts)[0],
            dropped=(changed_TK & (limited.ids_TK < 0)).sum(),
            spilled=(changed_TK & (limited.ids_TK >= 0)).sum(),
            prob_sums=seen.per_row.prob_sums_GN.sum(dim=0),
            entropy=(entropy_T * valid_T).sum(),
            logsumexp_squares=(logsumexp_T.square() * valid_T).sum(),
            k_histogram=k_counts.scatter_add(0, k_T, valid_T.to(k_counts.dtype)),
        )
        if scores.bias_N is not None:
            spread = (scores.bias_N.max() - scores.bias_N.min()).double()
            ledger.record(route.site, bias_spread=spread * valid_T.sum())
        if any(controller.needs_histogram for controller in self._controllers()):
            histogram = score_histogram(scores.affinity_TN.detach(), valid_T)
            ledger.record(route.site, score_histogram=histogram)
        if ledger.keep:
            ids_BSK = in_full_rows(chosen.ids_TK.unflatten(0, route.shape), route.tokens)
            ledger.record_decision(route.site, ids_BSK, route.tokens.sample_ids_B)

    @property
    def computing_target(self) -> float | None:
        """Share of all assignments that a budget or a balance loss asks of experts that compute;
        None where nothing does."""
        if self.pool.num_computing == self.pool.num_experts:
            return 1.0
        asked = [node.computing_share(self.pool) for node in self.config.controllers]
        asked += [node.computing_share(self.pool) for node in self.config.losses]
        return next((share for share in asked if share is not None), None)

    def _controllers(self) -> Iterator[Controller]:
        """The controllers, typed."""
        for controller in self.controllers:
            yield cast(Controller, controller)

    @torch.no_grad()
    def update(self, ledger: Ledger, step: int) -> None:
        """Move controllers and remember the load; `ledger` is that of the whole step, `step` its
        number. Call once per optimizer step, after it. A site that was not visited stays as it was.
        """
        for use, site in enumerate(self.sites):
            sums = ledger.statistics.get(site)
            if sums is None:
                continue
            for controller in self._controllers():
                controller.update(use, sums, step)
            if self.remembers_load:
                self.last_counts_UN[use] = sums["expert_tokens"]
                self.last_probs_UN[use] = sums["prob_sums"]

    def flops(self, num_tokens: int, visit: Visit, has_predecessor: bool) -> int:
        """Forward FLOPs of the scorer; the other stages multiply no matrices."""
        if self.looks_back == "prev_depth":
            has_predecessor = visit.depth > 1
        flops: int = self.scorer.flops(num_tokens, has_predecessor)
        return flops


def build_routers(
    model: ModelConfig,
    config: RouterConfig,
    pool: PoolShape,
    place: LayerPlace,
    sublayer: str,
    iterations: int = 1,
    chain_shares: bool = False,
) -> nn.ModuleList:
    """The routers of a sublayer: one, or one for each depth of a recursion and turn of a chain."""
    served: dict[tuple[int, int], list[Site]] = {}
    for site in place.sites(sublayer, range(1, iterations + 1)):
        key = (site.depth * config.per_depth, site.iteration * (not chain_shares))
        served.setdefault(key, []).append(site)
    predecessor = place.predecessors.get(sublayer)
    return nn.ModuleList(
        Router(model, config, pool, sublayer, tuple(sites), predecessor)
        for sites in served.values()
    )


def router_at(routers: Iterable[nn.Module], site: Site) -> Router:
    """The one of a sublayer's routers that serves a call site."""
    return next(r for r in routers if isinstance(r, Router) and site in r.sites)


def route(
    routers: nn.ModuleList, x_BSD: Tensor, carry: Carry, ctx: DepthContext, iteration: int = 1
) -> Routed:
    """The decisions of a sublayer for all rows of a context."""
    sublayer = cast(Router, routers[0]).sublayer

    def decide(part: DepthContext, x_BSD: Tensor, carry: Carry) -> Routed:
        site = part.visit.site(sublayer, iteration)
        routed: Routed = router_at(routers, site)(x_BSD, carry, part, site)
        return routed

    routed: Routed = ctx.by_visit(decide, x_BSD, carry)
    return routed
