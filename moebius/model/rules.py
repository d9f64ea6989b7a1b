"""Rules that span fields of the model's configuration.

Each yields problems with the dotted path of the field to blame. Rules about routers and pools look
at every unique layer's own configuration.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moebius.config import Problem
from moebius.model.config import (
    AttentionConfig,
    BDHConfig,
    MixtureAttentionConfig,
    ModelConfig,
)
from moebius.model.moe.config import ExpertSpec, LayerSchedule, MoEConfig, RouterConfig
from moebius.model.moe.pool import PoolShape
from moebius.model.moe.scorers import LinearScorerConfig
from moebius.model.moe.selectors import All, TopK
from moebius.model.moe.stage import Stage
from moebius.model.recursion.config import DepthConfig, TokenChoiceConfig
from moebius.model.recursion.rules import DEPTH_RULES, valid_program


def attention_rules(model: ModelConfig) -> Iterator[Problem]:
    """Query heads must be served evenly by key-value heads; experts with keys of their own too."""
    if isinstance(model.attention, BDHConfig):
        return
    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    if heads % kv_heads:
        yield Problem(
            "attention.num_kv_heads",
            f"{kv_heads} does not divide num_heads = {heads}; "
            f"allowed: {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}",
        )
    if isinstance(model.attention, AttentionConfig):
        return
    if model.attention.kv == "per_expert" and not isinstance(model.attention.router.selector, All):
        yield Problem(
            "attention.kv",
            "per_expert needs router.selector.kind all: an expert attends to its own keys of all "
            "tokens",
        )


def expert_rules(model: ModelConfig) -> Iterator[Problem]:
    """The groups of a pool must be buildable in every layer."""
    if not isinstance(model.ffn, MoEConfig):
        return
    program = valid_program(model)
    for number, spec in enumerate(model.ffn.experts):
        path = f"ffn.experts.{number}"
        if spec.kind in ("ffn", "low_rank", "gru"):
            if spec.intermediate_size is None:
                yield Problem(
                    f"{path}.intermediate_size",
                    f"missing; a {spec.kind} expert needs one, for example 1024",
                )
        elif spec.intermediate_size is not None:
            yield Problem(
                f"{path}.intermediate_size",
                f"{spec.intermediate_size}, but a {spec.kind} expert has no width",
            )
        if spec.scale != 1.0 and spec.kind != "low_rank":
            yield Problem(f"{path}.scale", f"{spec.scale}, but only low_rank experts are scaled")
        if program is not None:
            num_layers = len(model.ffn.moe_layers(len(program.layers)))
            yield from _count_problems(f"{path}.count", spec, num_layers)
    if all(spec.kind in ("constant", "copy", "zero") for spec in model.ffn.experts):
        yield Problem("ffn.experts", "nothing is computed; add a group of kind ffn")
    if any(spec.kind == "gru" for spec in model.ffn.experts):
        yield from _order_problems(model.ffn.router, model.depth)


def _count_problems(path: str, spec: ExpertSpec, num_layers: int) -> Iterator[Problem]:
    count = spec.count
    if isinstance(count, tuple) and len(count) != num_layers:
        yield Problem(path, f"{len(count)} numbers for {num_layers} MoE layers")
    if not isinstance(count, LayerSchedule):
        return
    lowest = -(-count.smallest // count.snap) * count.snap
    highest = count.largest // count.snap * count.snap
    if lowest > highest:
        yield Problem(
            path, f"no multiple of snap = {count.snap} from {count.smallest} to {count.largest}"
        )
    elif count.budget is not None and not (
        count.snap * num_layers <= count.budget <= highest * num_layers
        and count.budget % count.snap == 0
    ):
        yield Problem(
            f"{path}.budget",
            f"{count.budget} for {num_layers} layers; allowed: multiples of {count.snap} from "
            f"{count.snap * num_layers} to {highest * num_layers}",
        )


def _order_problems(router: RouterConfig, depth: DepthConfig) -> Iterator[Problem]:
    """A recurrent expert needs its document's tokens in order and all of them."""
    if router.scorer.granularity != "document":
        yield Problem(
            "ffn.router.scorer.granularity",
            f"{router.scorer.granularity}, but a gru expert has to see whole documents: "
            "use document",
        )
    if depth.router is not None:
        yield Problem(
            "ffn.experts", "a gru expert cannot stand in a block that tokens leave (depth.router)"
        )


class RoutedSublayer(NamedTuple):
    """A router's configuration in one unique layer."""

    path: str
    router: RouterConfig
    pool: PoolShape


def router_rules(model: ModelConfig) -> Iterator[Problem]:
    """Every stage must fit the pool, and the stages each other; one problem per field."""
    program = valid_program(model)
    if program is None or any(True for _ in expert_rules(model)):
        return
    lists = list(_list_problems(model, len(program.layers)))
    yield from lists
    seen: set[str] = set()
    for sublayer in () if lists else _routed_sublayers(model, len(program.layers)):
        for problem in _stage_problems(*sublayer):
            if problem.path not in seen:
                seen.add(problem.path)
                yield problem


def _list_problems(model: ModelConfig, num_layers: int) -> Iterator[Problem]:
    """A list of experts per token has one number for each layer that routes."""
    for name, router in model.routers.items():
        expected = num_layers
        if name == "ffn" and isinstance(model.ffn, MoEConfig):
            expected = len(model.ffn.moe_layers(num_layers))
        numbers = router.selector.top_k if isinstance(router.selector, TopK) else 0
        if isinstance(numbers, tuple) and len(numbers) != expected:
            yield Problem(
                f"{name}.router.selector.top_k", f"{len(numbers)} numbers for {expected} MoE layers"
            )


def _routed_sublayers(model: ModelConfig, num_layers: int) -> Iterator[RoutedSublayer]:
    for index in range(num_layers):
        if isinstance(model.attention, BDHConfig):
            break
        attention = model.attention_in(index)
        if isinstance(attention, MixtureAttentionConfig):
            yield RoutedSublayer("attention.router", attention.router, attention.pool)
        ffn = model.ffn_in(index, num_layers)
        if isinstance(ffn, MoEConfig):
            yield RoutedSublayer("ffn.router", ffn.router, ffn.pool)
    if isinstance(model.depth.router, TokenChoiceConfig):
        depths = PoolShape((("ffn", model.depth.num_recursions),))
        yield RoutedSublayer("depth.router", model.depth.router.stages, depths)


def _stage_problems(path: str, router: RouterConfig, pool: PoolShape) -> Iterator[Problem]:
    stages: dict[str, Stage] = {
        "norm": router.norm,
        "selector": router.selector,
        "weights": router.weights,
    }
    stages |= {f"candidates.{i}": rule for i, rule in enumerate(router.candidates)}
    stages |= {f"losses.{i}": loss for i, loss in enumerate(router.losses)}
    stages |= {f"controllers.{i}": control for i, control in enumerate(router.controllers)}
    if router.capacity is not None:
        stages["capacity"] = router.capacity
    found = False
    for name, stage in stages.items():
        for option, message in stage.problems(pool):
            found = True
            yield Problem(f"{path}.{name}.{option}", message)
    if found:
        return
    selector = router.selector
    # Rules may close different experts: what is left at least is what no rule can close.
    closed = sum(pool.num_experts - rule.fewest(pool) for rule in router.candidates)
    fewest = max(pool.num_experts - closed, 0)
    if selector.min_candidates(pool.num_experts) > fewest:
        yield Problem(
            f"{path}.selector.{selector.size_option}",
            f"{selector.min_candidates(pool.num_experts)} experts per token, but "
            f"{fewest} to choose from (the pool has {pool.num_experts})",
        )
    if selector.adds_up_scores and not router.norm.adds_up:
        yield Problem(
            f"{path}.norm.kind", f"{selector.kind} needs scores that add up to 1: use softmax"
        )
    if selector.asks_router and selector.kind != "all" and router.scorer.kind == "none":
        yield Problem(f"{path}.scorer.kind", f"none, but the selector {selector.kind} asks it")
    if router.candidates and not selector.asks_router:
        yield Problem(f"{path}.candidates", f"the selector {selector.kind} does not look at them")
    if router.capacity and router.capacity.priority == "position" and not selector.fixed_k:
        yield Problem(
            f"{path}.capacity.priority",
            "position is causal only for a fixed number of experts per token, not for "
            f"{selector.kind}: use score",
        )
    if router.scorer.granularity == "document":
        if router.capacity is not None:
            yield Problem(f"{path}.capacity", "a limit would tear documents apart: use null")
        if selector.splits_documents:
            yield Problem(
                f"{path}.selector",
                f"{selector.kind} decides by token with these options, but granularity is document",
            )
    yield from _controller_problems(path, router, pool)
    for number, loss in enumerate(router.losses):
        if loss.needs_fixed_k and not selector.fixed_k:
            yield Problem(
                f"{path}.losses.{number}.published_scale",
                f"is defined for a fixed number of experts per token, not for {selector.kind}",
            )


def _controller_problems(path: str, router: RouterConfig, pool: PoolShape) -> Iterator[Problem]:
    selector = router.selector
    for number, control in enumerate(router.controllers):
        field = f"{path}.controllers.{number}"
        if control.needs not in selector.accepts:
            yield Problem(
                f"{field}.kind",
                f"{control.kind} moves a {control.needs}, which the selector {selector.kind} does "
                "not have",
            )
            continue
        for option, message in control.problems_with(selector, pool):
            yield Problem(f"{field}.{option}", message)
    thresholds = sum(control.needs != "bias" for control in router.controllers)
    if thresholds > 1:
        yield Problem(f"{path}.controllers", "two controllers move the one threshold")
    if selector.needs_controller and not thresholds:
        yield Problem(
            f"{path}.selector.threshold", "missing; give a number or a controller that moves it"
        )


def layer_rules(model: ModelConfig) -> Iterator[Problem]:
    """Dense layers, reuse groups, chains and residuals must fit the layers they join."""
    ffn, program = model.ffn, valid_program(model)
    if not isinstance(ffn, MoEConfig) or program is None or any(True for _ in expert_rules(model)):
        return
    num_layers = len(program.layers)
    dense = set(ffn.dense.layers) if ffn.dense else set()
    if any(layer >= num_layers for layer in dense):
        yield Problem("ffn.dense.layers", f"{max(dense)}; allowed: 0 to {num_layers - 1}")
        return
    num_moe = num_layers - len(dense)
    if num_moe == 0:
        yield Problem("ffn.dense.layers", "all layers; use ffn: {kind: dense} instead")
        return
    if num_moe % ffn.reuse:
        yield Problem("ffn.reuse", f"groups of {ffn.reuse} do not divide {num_moe} MoE layers")
    pools = {tuple(spec.count_in(i, num_moe) for spec in ffn.experts) for i in range(num_moe)}
    uniform = len(pools) == 1
    if ffn.reuse > 1 and not uniform:
        yield Problem("ffn.reuse", "layers that reuse experts need the same number in each")
    if ffn.chain is not None and model.block == "parallel":
        yield Problem("ffn.chain", "a parallel block has one turn; use block: sequential")
    scorer = ffn.router.scorer
    is_residual = isinstance(scorer, LinearScorerConfig) and scorer.gating_residual == "prev_layer"
    is_chained = ffn.chain is not None and ffn.chain.routers == "shared"
    if is_residual and not uniform and (model.depth.sharing != "none" or is_chained):
        yield Problem(
            "ffn.router.scorer.gating_residual",
            "a shared layer or router has one W_g, so all layers need the same number of experts",
        )


MODEL_RULES = (attention_rules, expert_rules, *DEPTH_RULES, router_rules, layer_rules)
