"""Depths that cannot work are refused with the field to blame, and their neighbours are not."""

import pytest

from moebius.errors import ConfigError
from moebius.trainer.config_file import load_config
from tests.trainer.helpers import REPOSITORY

CASES = [
    ("small", ["depth.num_layers=9"], "depth.num_layers", "the nearest that can: 8, 11"),
    ("grouped", ["depth.num_layers=8"], "depth.num_layers", "in 2 groups; the nearest that can: 6"),
    ("small", ["depth.sharing=none"], "depth.num_recursions", "3, but sharing is none"),
    (
        "small",
        ["depth={num_layers: 8, groups: 2, sharing: none, num_recursions: 1}"],
        "depth.groups",
        "2, but sharing is none; use 1",
    ),
    ("small", ["depth.sharing=middle_sequence", "depth.groups=2"], "depth.groups", "use 1"),
    ("mor_expert_3", ["depth.sharing=middle_sequence"], "depth.router", "cycle or middle_cycle"),
    ("mor_expert_3", ["depth.router.capacities=[1, 0.5]"], "depth.router.capacities", "2 capacit"),
    ("mor_expert_3", ["depth.router.capacities=[1, 0.5, 0]"], "depth.router.capacities", "(0, 1]"),
    (
        "mor_expert_3",
        ["depth.router.capacities=[1, 0.5, [[0, 0.4], [9, 0.6]]]"],
        "depth.router.capacities",
        "at step 9: must not increase",
    ),
    (
        "mor_expert_3",
        ["depth.router.scope=document", "depth.router.multiple_of=8"],
        "depth.router.multiple_of",
        "use scope row",
    ),
    (
        "mor_expert_3",
        ["depth.router.scorer={kind: linear, gating_residual: prev_layer}"],
        "depth.router.scorer.gating_residual",
        "follows no other: use none",
    ),
    ("mor_token_3", ["depth.router.scorer={kind: gru}"], "depth.router.scorer.kind", "gru cannot"),
    (
        "mor_token_3",
        ["depth.router.scorer={kind: none}"],
        "depth.router.scorer.kind",
        "none, but",
    ),
    (
        "mor_token_3",
        ["depth.router.scorer={kind: mlp, granularity: document}"],
        "depth.router.scorer.granularity",
        "chosen by token",
    ),
    (
        "mor_expert_3",
        ["depth.router.scorer={kind: linear, jitter: 0.1}"],
        "depth.router.scorer.jitter",
        "use 0",
    ),
    (
        "mor_expert_3_predictor",
        ["depth.router.causal.scorer={kind: linear, jitter: 0.1}"],
        "depth.router.causal.scorer.jitter",
        "use 0",
    ),
    (
        "mor_token_3",
        ["depth.router.controllers=[{kind: target_k, target: 1.0}]"],
        "depth.router.controllers.0.kind",
        "target_k moves a share",
    ),
    ("sorted_exits", ["depth.kv=hybrid"], "depth.kv", "hybrid needs num_recursions > 1"),
    (
        "sorted_exits",
        ["depth.adapter={kind: lora, rank: 4}"],
        "depth.adapter",
        "lora needs num_recursions > 1",
    ),
    ("small", ["ffn={kind: none}"], "ffn.kind", "standard is no whole layer"),
    ("depth_attention_mor", ["depth.kv=hybrid"], "attention.depth_attention", "use per_depth"),
    (
        "depth_attention",
        ["attention.depth_attention.scope=recursions"],
        "attention.depth_attention.scope",
        "needs num_recursions > 1",
    ),
    ("bdh", ["ffn={kind: dense, intermediate_size: 64}"], "ffn.kind", "use none"),
    ("bdh", ["block=parallel"], "block", "use sequential"),
    ("bdh", ["depth.kv=hybrid"], "depth.kv", "use per_depth"),
    ("bdh", ["depth.adapter={kind: gain}"], "depth.adapter", "use null"),
    ("bdh", ["layer_norm_scaling=unrolled"], "layer_norm_scaling", "use none"),
    ("sorted_exits", ["exits.after=[4, 3]"], "exits.after", "must ascend"),
    ("sorted_exits", ["exits.after=[6]"], "exits.after", "allowed: 1, 2, 3, 4, 5"),
    ("mor_expert_3", ["exits={after: [2]}"], "exits.after", "allowed: 1, 3, 5, 7"),
    ("mor_token_3", ["exits={after: [3]}"], "exits.after", "allowed: 1, 7"),
    (
        "sorted_draws",
        ["exits.self_distillation=0.5"],
        "exits.self_distillation",
        "use 0 or draw all",
    ),
    (
        "moepp_mor",
        ["depth={num_layers: 8, sharing: none, num_recursions: 1, router: null}"],
        "ffn.router.scorer.gating_residual",
        "use prev_layer",
    ),
    (
        "moepp_mor_routers",
        ["depth={num_layers: 8, sharing: none, num_recursions: 1, router: null}"],
        "ffn.router.per_depth",
        "use false",
    ),
]
NEIGHBOURS = [
    ("small", ["depth.num_layers=11"]),
    ("grouped", ["depth.num_layers=14", "depth.groups=3"]),
    ("mor_expert_3", ["depth.sharing=cycle", "depth.num_layers=6"]),
    ("mor_expert_3", ["depth.router.capacities=[1, [[0, 1], [9, 0.6]], 0.5]"]),
    ("mor_expert_3", ["depth.router.multiple_of=8", "depth.router.scorer={kind: cosine}"]),
    ("mor_expert_3", ["exits={after: [1, 3, 5, 7]}"]),
    ("mor_token_3", ["exits={after: [1, 7], self_distillation: 1.0}"]),
    ("mor_token_3", ["depth.router.scorer={kind: linear, jitter: 0.1}"]),
    ("bdh", ["depth.router={kind: token_choice}"]),
    ("depth_attention", ["attention.depth_attention={scope: window, window: 3}"]),
]


def overrides(changes: list[str]) -> list[str]:
    return [f"model.{change}" for change in changes]


@pytest.mark.parametrize(("preset", "changes", "path", "message"), CASES)
def test_the_field_to_blame_is_named(
    preset: str, changes: list[str], path: str, message: str
) -> None:
    file = REPOSITORY / "configs" / "recursion" / f"{preset}.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides(changes))
    lines = [line for line in str(caught.value).splitlines() if f" model.{path}: " in line]
    assert len(lines) == 1, caught.value
    assert message in lines[0]


@pytest.mark.parametrize(("preset", "changes"), NEIGHBOURS)
def test_neighbours_are_fine(preset: str, changes: list[str]) -> None:
    load_config(REPOSITORY / "configs" / "recursion" / f"{preset}.yaml", overrides(changes))
