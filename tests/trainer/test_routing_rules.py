"""Combinations of routing stages that cannot work are refused with the field to blame."""

from typing import cast

import pytest
import torch

from moebius.errors import ConfigError
from moebius.model.block import Block
from moebius.model.decoder import Decoder
from moebius.model.mixture_attention import MixtureAttention
from moebius.model.moe.layer import MoE
from moebius.trainer.config_file import load_config
from tests.trainer.helpers import REPOSITORY

ROUTER = "model.ffn.router"
CASES = [
    ("moepp", ["selector.top_k=13"], "selector", "13 experts per token, but 12 to choose from"),
    ("moepp", ["selector.sampled_tail=3"], "selector.sampled_tail", "3 of top_k = 2"),
    ("moepp", ["selector.top_k=[2, 2]"], "selector.top_k", "2 numbers for 4 MoE layers"),
    ("moepp", ["selector={kind: fixed, ids: [12]}"], "selector.ids", "allowed: 0 to 11"),
    ("moepp", ["selector={kind: fixed, ids: [1, 1]}"], "selector.ids", "named twice"),
    (
        "moepp",
        ["candidates=[{kind: exclude, ids: [0]}]", "selector={kind: balanced}"],
        "candidates",
        "balanced does not look at them",
    ),
    ("moepp", ["candidates=[{kind: exclude, ids: [12]}]"], "candidates.0.ids", "allowed: 0 to 11"),
    (
        "moepp",
        ["candidates=[{kind: exclude, ids: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}]"],
        "selector",
        "2 experts per token, but 1 to choose from",
    ),
    (
        "moepp",
        ["scorer={kind: none}"],
        "scorer.kind",
        "none, but the selector top_k asks it",
    ),
    (
        "moepp",
        ["losses=[{kind: device, num_groups: 3}]"],
        "losses.0.num_groups",
        "3 groups do not divide 8 experts",
    ),
    (
        "moepp",
        ["controllers=[{kind: target_k, target: 2.0}]"],
        "controllers.0.kind",
        "target_k moves a share, which the selector top_k does not have",
    ),
    (
        "moepp",
        ["controllers=[{kind: budget, group: 4, share: 0.5}]"],
        "controllers.0.group",
        "4; allowed: 0 to 3",
    ),
    (
        "moepp",
        ["controllers=[{kind: percentile_ema, applied_as: bias}]"],
        "controllers.0.applied_as",
        "bias needs per_expert",
    ),
    ("switch", ["capacity.overflow=spill"], "capacity.overflow", "spill needs a constant"),
    (
        "dynamic_moe",
        ["capacity={priority: position}"],
        "capacity.priority",
        "causal only for a fixed number of experts",
    ),
    ("dynamic_moe", ["norm.kind=sigmoid"], "norm.kind", "top_p needs scores that add up to 1"),
    (
        "dynamic_moe",
        ["losses.0.published_scale=moepp"],
        "losses.0.published_scale",
        "not for top_p",
    ),
    (
        "dtop_p",
        ["controllers=[{kind: target_k, target: 2.0}, {kind: target_k, target: 3.0}]"],
        "controllers",
        "two controllers move the one threshold",
    ),
    (
        "deepseek_v3",
        ["candidates.0.num_groups=3"],
        "candidates.0.num_groups",
        "3 groups do not divide 16 experts",
    ),
    ("deepseek_v3", ["candidates.0.keep=5"], "candidates.0.keep", "5 of 4 groups"),
    (
        "deepseek_v3",
        ["candidates.0.score_top=5"],
        "candidates.0.score_top",
        "a group has 4 experts",
    ),
    ("rexmoe", ["candidates.0.end_step=10"], "candidates.0.end_step", "not after start_step"),
    (
        "switch",
        ["candidates=[{kind: progressive, start_step: 0, end_step: 5}]"],
        "candidates.0.kind",
        "set reuse to 2",
    ),
    (
        "dtop_p",
        ["controllers.0.target=11.0"],
        "controllers.0.target",
        "11.0, but the selector gives 1 to 10 experts",
    ),
    ("dtop_p", ["controllers.0.start=0.7"], "controllers.0.start", "but the highest is 0.6"),
    ("dtop_p", ["selector.max_threshold=0.3"], "selector.max_threshold", "below threshold = 0.4"),
    (
        "dynamoe_ema",
        ["controllers=[]"],
        "selector.threshold",
        "give a number or a controller",
    ),
    (
        "dynmole",
        ["norm.kind=sigmoid"],
        "norm.kind",
        "entropy_hybrid needs scores that add up to 1",
    ),
    (
        "dynmole",
        ["scorer={kind: linear, granularity: document}"],
        "selector",
        "entropy_hybrid decides by token with these options",
    ),
    (
        "moepp",
        ["scorer={kind: linear, granularity: document}"],
        "capacity",
        "would tear documents apart",
    ),
    ("duo_llm_random", ["selector.shares=[1, 1]"], "selector.shares", "2 numbers for 3 experts"),
    ("duo_llm_random", ["selector.shares=[0, 0, 0]"], "selector.shares", "fewer than top_k"),
]
LAYER_CASES = [
    ("rexmoe", ["model.ffn.reuse=3"], "model.ffn.reuse", "groups of 3 do not divide 4 MoE"),
    (
        "rexmoe",
        ["model.ffn.experts.0.count=[8, 8, 4, 8]"],
        "model.ffn.reuse",
        "need the same number in each",
    ),
    ("deepseek_moe", ["model.ffn.dense.layers=[4]"], "model.ffn.dense.layers", "allowed: 0 to 3"),
    (
        "deepseek_moe",
        ["model.ffn.dense.layers=[0, 1, 2, 3]"],
        "model.ffn.dense.layers",
        "use ffn: {kind: dense}",
    ),
    (
        "moepp",
        [
            "model.ffn.experts.0.count=[4, 6, 8, 4]",
            "model.ffn.chain={iterations: 2, routers: shared}",
        ],
        "model.ffn.router.scorer.gating_residual",
        "a shared layer or router has one W_g",
    ),
    (
        "hecto",
        ["model.ffn.router.selector={kind: balanced, top_k: 1}"],
        "model.ffn.router.selector",
        "balanced decides by token",
    ),
    (
        "deepseek_moe",
        ["model.ffn.router.selector.top_k=[6, 6, 6, 6]"],
        "model.ffn.router.selector.top_k",
        "4 numbers for 3 MoE layers",
    ),
    ("chain_of_experts", ["model.block=parallel"], "model.ffn.chain", "has one turn"),
    ("mola", ["model.ffn.experts.0.count=[2, 4]"], "model.ffn.experts.0.count", "2 numbers for 4"),
    (
        "dynamoe_row",
        ["model.ffn.experts.0.count.snap=5", "model.ffn.experts.0.count.largest=4"],
        "model.ffn.experts.0.count",
        "no multiple of snap = 5 from 4 to 4",
    ),
    (
        "dynamoe_ema",
        ["model.ffn.experts.0.count.budget=33"],
        "model.ffn.experts.0.count.budget",
        "allowed: multiples of 2 from 8 to 48",
    ),
    (
        "moepp",
        [
            "model.ffn.experts.0.count=[8, 4]",
            "model.depth={num_layers: 4, sharing: cycle, num_recursions: 2}",
            "model.ffn.router.capacity=null",
        ],
        "model.ffn.router.scorer.gating_residual",
        "a shared layer or router has one W_g",
    ),
    (
        "hecto",
        ["model.ffn.router.scorer.granularity=token"],
        "model.ffn.router.scorer.granularity",
        "has to see whole documents",
    ),
    (
        "hecto",
        [
            "model.depth={num_layers: 6, sharing: middle_cycle, num_recursions: 2, router: {}}",
        ],
        "model.ffn.experts",
        "cannot stand in a block that tokens leave",
    ),
    ("mola", ["model.ffn.experts.0.intermediate_size=null"], "intermediate_size", "missing"),
    (
        "moepp",
        ["model.ffn.experts.0.scale=2.0"],
        "model.ffn.experts.0.scale",
        "only low_rank experts are scaled",
    ),
    (
        "bam",
        ["model.attention.router.selector={kind: top_k}"],
        "model.attention.kv",
        "per_expert needs router.selector.kind all",
    ),
    (
        "moduleformer",
        ["model.attention.router.selector.top_k=9"],
        "model.attention.router.selector",
        "9 experts per token, but 8 to choose from",
    ),
]


@pytest.mark.parametrize(
    ("preset", "overrides", "path", "message"),
    [
        *((n, [f"{ROUTER}.{o}" for o in os], f"{ROUTER}.{p}", m) for n, os, p, m in CASES),
        *LAYER_CASES,
    ],
    ids=lambda value: str(value)[:50],
)
def test_refused(preset: str, overrides: list[str], path: str, message: str) -> None:
    """One line for one mistake, with the path of the field and what would be right."""
    file = REPOSITORY / "configs" / "routing" / f"{preset}.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    (line,) = str(caught.value).splitlines()
    assert path in line
    assert message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.ffn.experts.0.count=0", "count: input should be greater than 0, got 0"),
        ("model.ffn.experts.0.count=[]", "count: "),
        ("model.ffn.experts.0.count={shape: down, largest: 4}", "count.shape: 'down' is not"),
        ("model.ffn.experts=[]", "experts: "),
        ("model.ffn.router.norm.noise=[[5, 1.0], [5, 2.0]]", "ascending steps"),
        ("model.ffn.router.norm.noise=-0.1", "noise: must not be negative, -0.1 is"),
        ("model.ffn.router.norm.noise=[[0, 0.1], [9, -1]]", "must not be negative, -1.0 is"),
        ("model.ffn.router.losses=[{coefficient: 1.0}]", "losses.0: missing `kind`"),
        ("model.ffn.router.losses.0.kind=swich", "losses.0.kind: 'swich' is not allowed; did you"),
        ("model.ffn.router.selector.kind=top_q", "'top_q' is not allowed; did you mean top_p?"),
        ("model.ffn.router.selector.topk=3", "selector.topk: unknown option; did you mean top_k?"),
        ("model.ffn.router.weights.straight_through=true", "weights.straight_through: unknown"),
        ("model.ffn.router.norm.kind=softmx", "norm.kind: 'softmx' is not allowed; did you mean"),
        ("model.attention.kind=mixtur", "attention.kind: 'mixtur' is not allowed; did you mean"),
    ],
)
def test_mistyped_options_are_one_line_with_their_place(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(REPOSITORY / "configs" / "routing" / "moepp.yaml", [override])
    (line,) = str(caught.value).splitlines()
    assert message in line
    assert line.startswith("command line: ")


def test_lists_per_layer_reach_every_router() -> None:
    """Also the attention's; dense layers have no number."""
    model = load_config(
        REPOSITORY / "configs" / "routing" / "moduleformer.yaml",
        [
            "model.attention.router.selector.top_k=[1, 2, 3, 4]",
            "model.ffn.dense={layers: [1], intermediate_size: 64}",
            "model.ffn.router.selector.top_k=[1, 2, 3]",
            "model.ffn.experts.0.count={shape: ascending, largest: 8, smallest: 2, budget: 15}",
            "model.ffn.router.selector.sampled_tail=0",
            "model.attention.router.selector.sampled_tail=0",
        ],
    ).model
    with torch.device("meta"):
        decoder = Decoder(model)
    blocks = [cast(Block, decoder.layers[name]) for name in decoder.program.layers]
    attention = [cast(MixtureAttention, block.attention).config for block in blocks]
    assert [config.num_assignments for config in attention] == [1, 2, 3, 4]
    routed = [block.ffn.config for block in blocks if isinstance(block.ffn, MoE)]
    assert [config.num_assignments for config in routed] == [1, 2, 3]
    assert sum(config.num_experts for config in routed) == 15
