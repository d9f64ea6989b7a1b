"""Rules about the depth: sharing, routing over depth, keys, adapters, exits."""

import itertools
from collections.abc import Iterator

from moebius.config import Problem
from moebius.model.config import AttentionConfig, BDHConfig, ModelConfig
from moebius.model.moe.registry import AnyScorer
from moebius.model.moe.scorers import LinearScorerConfig
from moebius.model.program import Program, build_program
from moebius.model.recursion.config import (
    CausalRouter,
    ExpertChoiceConfig,
)
from moebius.model.schedule import steps_of, value_at


def sharing_rules(model: ModelConfig) -> Iterator[Problem]:
    """Unrolled layers must be a whole number of recursions (plus two for `middle_*`)."""
    depth = model.depth
    if depth.sharing == "none":
        if depth.num_recursions != 1:
            yield Problem(
                "depth.num_recursions",
                f"{depth.num_recursions}, but sharing is none; use 1 or another sharing",
            )
        if depth.groups != 1:
            yield Problem("depth.groups", f"{depth.groups}, but sharing is none; use 1")
        return
    ends = 2 if depth.sharing.startswith("middle") else 0
    looped = depth.num_layers - ends
    if depth.groups > 1 and depth.sharing.endswith("sequence"):
        yield Problem(
            "depth.groups",
            f"{depth.groups}, but with {depth.sharing} every layer is a group: use 1",
        )
        return
    unit = depth.num_recursions * depth.groups
    if looped < unit or looped % unit:
        lower = max(looped // unit, 1) * unit + ends
        of_groups = f" in {depth.groups} groups" if depth.groups > 1 else ""
        yield Problem(
            "depth.num_layers",
            f"{depth.num_layers} layers cannot be {depth.num_recursions} recursions of "
            f"{depth.sharing}{of_groups}; the nearest that can: {lower}, {lower + unit}",
        )


def valid_program(model: ModelConfig) -> Program | None:
    """The program, None where the depth is not valid."""
    return None if any(True for _ in sharing_rules(model)) else build_program(model.depth)


def depth_router_rules(model: ModelConfig) -> Iterator[Problem]:
    """Only a looped block can be left early; a decision must be the token's own."""
    router, depth = model.depth.router, model.depth
    if router is None:
        return
    if depth.sharing not in ("cycle", "middle_cycle"):
        yield Problem(
            "depth.router",
            f"routing over depth needs sharing cycle or middle_cycle, not {depth.sharing}: "
            "tokens can leave only between passes of one block",
        )
    scorers: dict[str, AnyScorer] = {"depth.router.scorer": router.scorer}
    if isinstance(router, ExpertChoiceConfig) and isinstance(router.causal, CausalRouter):
        scorers["depth.router.causal.scorer"] = router.causal.scorer
    for path, scorer in scorers.items():
        yield from _scorer_problems(path, scorer)
        if scorer.jitter and isinstance(router, ExpertChoiceConfig):
            yield Problem(f"{path}.jitter", f"{scorer.jitter}; expert choice takes none: use 0")
    if isinstance(router, ExpertChoiceConfig):
        yield from _capacity_problems(router, depth.num_recursions)
        if router.scope == "document" and router.multiple_of > 1:
            yield Problem(
                "depth.router.multiple_of",
                f"{router.multiple_of}, but documents have any number of tokens: use scope row",
            )


def _scorer_problems(path: str, scorer: AnyScorer) -> Iterator[Problem]:
    """A depth router has no router before it, and what it gives must not depend on others."""
    if isinstance(scorer, LinearScorerConfig) and scorer.gating_residual != "none":
        yield Problem(
            f"{path}.gating_residual",
            f"{scorer.gating_residual}, but a depth router follows no other: use none",
        )
    elif scorer.passes_state:
        yield Problem(
            f"{path}.kind", f"{scorer.kind} cannot score depths; allowed: linear, mlp, cosine"
        )
    if scorer.granularity != "token":
        yield Problem(f"{path}.granularity", f"{scorer.granularity}; depth is chosen by token")


def _capacity_problems(router: ExpertChoiceConfig, num_recursions: int) -> Iterator[Problem]:
    path, capacities = "depth.router.capacities", router.capacities
    if capacities is None:
        return
    if len(capacities) != num_recursions:
        yield Problem(path, f"{len(capacities)} capacities for num_recursions = {num_recursions}")
        return
    for step in sorted({step for capacity in capacities for step in steps_of(capacity)}):
        shares = [value_at(capacity, step) for capacity in capacities]
        at = f" at step {step}" if step else ""
        if any(not 0 < c <= 1 for c in shares):
            yield Problem(path, f"{shares}{at}: each must be in (0, 1]")
            return
        if any(later > earlier for earlier, later in itertools.pairwise(shares)):
            yield Problem(path, f"{shares}{at}: must not increase, a token cannot come back")
            return


def depth_rules(model: ModelConfig) -> Iterator[Problem]:
    """What looks across visits must have visits to look across."""
    depth, is_looped = model.depth, model.depth.num_recursions > 1
    if depth.kv != "per_depth" and not is_looped:
        yield Problem("depth.kv", f"{depth.kv} needs num_recursions > 1: keys are shared by passes")
    if depth.adapter is not None and not is_looped:
        yield Problem(
            "depth.adapter", f"{depth.adapter.kind} needs num_recursions > 1: it tells passes apart"
        )
    attention = model.attention
    if isinstance(attention, BDHConfig):
        yield from _bdh_problems(model)
    elif model.ffn.kind == "none":
        yield Problem("ffn.kind", f"none, but attention of kind {attention.kind} is no whole layer")
    if isinstance(attention, AttentionConfig) and attention.depth_attention is not None:
        if depth.kv != "per_depth":
            yield Problem(
                "attention.depth_attention",
                f"mixes the values of every visit, but depth.kv is {depth.kv}: use per_depth",
            )
        if attention.depth_attention.scope == "recursions" and not is_looped:
            yield Problem("attention.depth_attention.scope", "recursions needs num_recursions > 1")


def _bdh_problems(model: ModelConfig) -> Iterator[Problem]:
    why = "a bdh layer has no such part"
    if model.ffn.kind != "none":
        yield Problem("ffn.kind", f"{model.ffn.kind}, but {why}: use none")
    if model.block != "sequential":
        yield Problem("block", f"{model.block}, but {why}: use sequential")
    if model.depth.kv != "per_depth":
        yield Problem("depth.kv", f"{model.depth.kv}, but {why}: use per_depth")
    if model.depth.adapter is not None:
        yield Problem("depth.adapter", f"{model.depth.adapter.kind}, but {why}: use null")
    if model.layer_norm_scaling != "none":
        yield Problem("layer_norm_scaling", f"{model.layer_norm_scaling}, but {why}: use none")


def exit_rules(model: ModelConfig) -> Iterator[Problem]:
    """Exits stand where the stream of all tokens is whole."""
    exits, program = model.exits, valid_program(model)
    if exits is None or program is None:
        return
    allowed = [number for number in program.exits if number < len(program.visits)]
    if list(exits.after) != sorted(set(exits.after)):
        yield Problem("exits.after", f"{list(exits.after)}: must ascend")
    elif wrong := [number for number in exits.after if number not in allowed]:
        yield Problem(
            "exits.after",
            f"{wrong[0]} is no exit before the last; allowed: {', '.join(map(str, allowed))}",
        )
    if exits.draw != "all" and exits.self_distillation:
        yield Problem(
            "exits.self_distillation",
            f"{exits.self_distillation}, but with draw {exits.draw} the last exit does not run: "
            "use 0 or draw all",
        )


def predecessor_rules(model: ModelConfig) -> Iterator[Problem]:
    """The pass before exists only in a loop."""
    for name, router in model.routers.items():
        scorer = router.scorer
        if (
            isinstance(scorer, LinearScorerConfig)
            and scorer.gating_residual == "prev_depth"
            and model.depth.num_recursions == 1
        ):
            yield Problem(
                f"{name}.router.scorer.gating_residual",
                "prev_depth needs num_recursions > 1; use prev_layer",
            )
        if router.per_depth and model.depth.num_recursions == 1:
            yield Problem(f"{name}.router.per_depth", "true needs num_recursions > 1; use false")


DEPTH_RULES = (sharing_rules, depth_router_rules, depth_rules, exit_rules, predecessor_rules)
