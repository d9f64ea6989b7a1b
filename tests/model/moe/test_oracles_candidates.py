"""Oracles of candidate rules and of selectors that do not ask the router."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.config import ModelConfig
from moebius.model.moe.candidates import GroupLimited, Progressive
from moebius.model.moe.forced import Balanced
from moebius.model.rules import router_rules
from tests.model.moe.rig import (
    make_router,
    normal,
    pool_of,
    route_context,
    token_context,
    visit,
)

OWN, REUSE = 8, 4
POOL = pool_of(("ffn", OWN * REUSE), owners=REUSE)
PROGRESSIVE = Progressive(start_step=100, end_step=300)


def open_experts(step: int, seed: int = 0, rows: int = 1) -> set[int]:
    """The candidates of a step."""
    ctx = route_context(rows, 4, step, seed, training=True)
    mask_N = PROGRESSIVE.mask(normal(rows * 4, POOL.num_experts), POOL, ctx)
    return set(mask_N.nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, OWN),
        (100, OWN),
        (150, math.floor((1 + 3 / 4) * OWN)),
        (200, math.floor((1 + 3 / 2) * OWN)),
        (267, math.floor((1 + 3 * 167 / 200) * OWN)),
        (299, math.floor((1 + 3 * 199 / 200) * OWN)),
        (300, REUSE * OWN),
        (9999, REUSE * OWN),
    ],
)
def test_progressive_numbers(step: int, expected: int) -> None:
    """Oracle 9: N at t_s, `floor((1 + (r-1)(t-t_s)/(t_e-t_s)) N)` on the way, r N from t_e."""
    assert PROGRESSIVE.num_open(POOL, step) == len(open_experts(step)) == expected


def test_progressive_mask_is_a_function_of_seed_step_and_site() -> None:
    """Oracle 9: the same for every micro-batch and after a resume at the same step, whatever
    torch's generator did; another at the next step, with another seed and in another layer."""
    mask = open_experts(150)
    torch.manual_seed(99)
    assert open_experts(150) == open_experts(150, rows=3) == mask
    others = [open_experts(151), open_experts(150, seed=1)]
    assert all(len(other) == len(mask) and other != mask for other in others)
    appearances = torch.zeros(POOL.num_experts)
    for step in range(100):
        appearances[list(open_experts(step))] += 1
    assert int(appearances.min()) > 5, "which experts are open is random, not the layer's own"


def test_progressive_routing_does_not_depend_on_the_cut() -> None:
    """Oracle 9: a router chooses among the same open experts for rows together and apart."""
    candidates = [{"kind": "progressive", "start_step": 100, "end_step": 300}]
    router = make_router(POOL, candidates=candidates, losses=[])
    x_BSD = normal(4, 16, POOL.num_experts)
    whole_TK = visit(router, x_BSD, step=150, training=True).ids_TK
    parts = [
        visit(router, x_BSD[i : i + 1], token_context(1, 16, first_sample=i), step=150).ids_TK
        for i in range(4)
    ]
    assert torch.equal(whole_TK, torch.cat(parts))
    assert set(whole_TK.flatten().tolist()) <= open_experts(150)
    everything = visit(router, x_BSD, step=300).ids_TK
    assert torch.equal(everything, x_BSD.flatten(0, 1).topk(2).indices)


@pytest.mark.parametrize(("keep", "score_top"), [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("bias", [0.0, -5.0])
def test_group_limited_equals_a_loop(keep: int, score_top: int, bias: float) -> None:
    """Oracle 15: experts from at most M groups, those with the best sums of scores, then the K best
    of them; others are out even where all biases are negative; zero-computation experts are in no
    group and stay."""
    pool = pool_of(("ffn", 12), ("constant", 2), ("zero", 1))
    rule = {"kind": "groups", "num_groups": 4, "keep": keep, "score_top": score_top}
    router = make_router(
        pool,
        candidates=[rule],
        controllers=[{"kind": "bias"}],
        selector={"kind": "top_k", "top_k": 3},
        losses=[],
    )
    bias_N = bias + 0.1 * normal(15, seed=4)
    router.controllers[0].bias_UN[0] = bias_N
    x_BSD = 2 * normal(1, 300, 15)
    ids_TK = visit(router, x_BSD).ids_TK
    select_TN = x_BSD[0].softmax(dim=1) + router.controllers[0].bias_UN[0]
    used_zero_computation = 0
    for select, ids in zip(select_TN.tolist(), ids_TK.tolist(), strict=True):
        group_score = [
            sum(sorted(select[3 * g : 3 * g + 3], reverse=True)[:score_top]) for g in range(4)
        ]
        groups = sorted(range(4), key=lambda g: -group_score[g])[:keep]
        allowed = [i for i in range(15) if i >= 12 or i // 3 in groups]
        assert ids == sorted(allowed, key=lambda i: -select[i])[:3]
        assert len({i // 3 for i in ids if i < 12}) <= keep
        used_zero_computation += sum(i >= 12 for i in ids)
    assert used_zero_computation > 50


def test_group_masks_are_minus_infinity() -> None:
    """Oracle 15: no expert of a group that was left out is chosen, however few others there are."""
    pool, rule = pool_of(("ffn", 8)), GroupLimited(num_groups=4, keep=1)
    select_TN = normal(50, 8) - 10
    mask_TN = rule.mask(select_TN, pool, route_context(1, 50))
    assert mask_TN.sum(dim=1).tolist() == [2] * 50
    assert rule.fewest(pool) == 2
    best_T = select_TN.argmax(dim=1)
    assert bool(mask_TN.gather(1, best_T.unsqueeze(1)).all())


def test_candidate_rules_apply_together() -> None:
    """Oracle 15: with excluded experts in the kept group a token still gets only candidates, or the
    configuration is refused."""
    candidates = [
        {"kind": "exclude", "ids": [0, 1, 2]},
        {"kind": "groups", "num_groups": 2, "keep": 1},
    ]
    tree = {
        "vocab_size": 8,
        "hidden_size": 8,
        "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8},
        "ffn": {
            "kind": "moe",
            "experts": [{"kind": "ffn", "count": 8, "intermediate_size": 8}],
            "router": {"candidates": candidates},
        },
        "depth": {"num_layers": 1},
    }
    if list(router_rules(ModelConfig.model_validate(tree))):
        return
    router = make_router(pool_of(("ffn", 8)), candidates=candidates, losses=[])
    ids_TK = visit(router, normal(1, 50, 8)).ids_TK
    assert not {0, 1, 2} & set(ids_TK.flatten().tolist())


def forced(tree: dict[str, Any], x_BSD: Tensor, first_sample: int = 0, **step: Any) -> Tensor:
    """Decisions of a router whose selector does not ask it, `[B, S, K]`."""
    router = make_router(pool_of(("ffn", x_BSD.shape[2])), selector=tree, losses=[])
    tokens = token_context(*x_BSD.shape[:2], first_sample=first_sample)
    return visit(router, x_BSD, tokens, **step).ids_TK.unflatten(0, x_BSD.shape[:2])


def test_random_choices_have_the_given_shares() -> None:
    """Oracle of its own: the frequency of an expert is its share; one with share 0 never comes."""
    shares, num_tokens = [4.0, 3.0, 2.0, 1.0, 0.0], 20_000
    tree = {"kind": "random", "shares": shares}
    ids_BSK = forced(tree, normal(4, num_tokens // 4, 5))
    frequency_N = torch.bincount(ids_BSK.flatten(), minlength=5) / num_tokens
    expected_N = torch.tensor(shares) / 10
    deviation_N = (expected_N * (1 - expected_N) / num_tokens).sqrt()
    assert bool(((frequency_N - expected_N).abs() <= 4 * deviation_N).all())


def test_random_choices_are_of_the_token() -> None:
    """Oracle of its own: distinct experts, the same wherever a row is computed and whatever the
    router thinks; other tokens, steps and seeds draw again."""
    tree = {"kind": "random", "top_k": 3}
    whole = forced(tree, normal(4, 50, 6))
    assert bool((whole.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert torch.equal(forced(tree, normal(1, 50, 6, seed=9), first_sample=2)[0], whole[2])
    others = (
        whole[1],
        forced(tree, normal(4, 50, 6), step=1)[0],
        forced(tree, normal(4, 50, 6), seed=1)[0],
    )
    for other in others:
        assert float((other != whole[0]).double().mean()) > 0.5
    uniform = torch.bincount(forced(tree, normal(4, 2000, 6)).flatten()) / 24_000
    assert uniform.tolist() == pytest.approx([1 / 6] * 6, abs=0.01)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (6, 4), (5, 1), (4, 4)])
def test_balanced_choices_have_equal_load(num_experts: int, top_k: int) -> None:
    """Oracle of its own: exactly the same number of tokens for each expert in every row whose
    assignments N divides, each token's experts distinct."""
    x_BSD = normal(3, 60, num_experts)
    ids_BSK = forced({"kind": "balanced", "top_k": top_k}, x_BSD)
    for row in ids_BSK:
        counts = [int((row == expert).sum()) for expert in range(num_experts)]
        assert counts == [60 * top_k // num_experts] * num_experts
    if top_k > 1:
        assert bool((ids_BSK.sort(dim=-1).values.diff(dim=-1) > 0).all())
    assert Balanced(top_k=top_k).max_assignments(num_experts) == top_k
