"""Oracles of whole steps: recomputation and the cut into micro-batches change nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebius.model.decoder import Decoder
from moebius.model.moe.experts import ExpertPool
from moebius.model.moe.router import Router
from moebius.model.recursion.expert_choice import ExpertChoice
from tests.model.moe.rig import Step, build_model, gradients, in_parts, random_tokens

EXPERTS = [
    {"kind": "ffn", "count": 4, "intermediate_size": 12},
    {"kind": "constant", "count": 2},
    {"kind": "copy"},
    {"kind": "zero"},
]
RANDOM_ROUTER = {
    "scorer": {"kind": "linear", "gating_residual": "prev_layer", "jitter": 0.1},
    "norm": {"noise": 0.2},
    "selector": {"kind": "top_k", "top_k": 3, "sampled_tail": 1},
    "weights": {"kind": "renormalize"},
    "capacity": {"factor": 0.9, "tau": 0.75, "overflow": "spill"},
    "controllers": [{"kind": "bias", "rate": 0.05}],
    "losses": [{"kind": "z"}, {"kind": "entropy"}],
}
ROUTED_DEPTH = {
    "num_layers": 4,
    "sharing": "cycle",
    "num_recursions": 2,
    "router": {"capacities": [1.0, 0.5], "causal": {"coefficient": 0.1}},
}


def routed_model(losses: list[dict[str, Any]]) -> Decoder:
    """A decoder routed over width and depth, with randomness, limits, losses and controllers."""
    router = RANDOM_ROUTER | {"losses": [*RANDOM_ROUTER["losses"], *losses]}
    ffn = {
        "kind": "moe",
        "experts": EXPERTS,
        "shared": {"intermediate_size": 8},
        "router": router,
    }
    return build_model(ffn=ffn, depth=ROUTED_DEPTH, scale=3.0)


def balance(*scopes: str) -> list[dict[str, Any]]:
    """Losses on the load, with coefficients that make them matter."""
    kinds = [{"kind": "switch", "tau": 0.75}, {"kind": "mutual_information"}]
    kinds.append({"kind": "device", "num_groups": 2})
    return [k | {"coefficient": 0.5, "scope": scope} for k in kinds for scope in scopes]


def assert_same(got: Any, expected: Any) -> None:
    """Nested mappings of tensors agree."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-10, msg=str(key))
        else:
            assert_same(got[key], value)


def assert_same_step(got: Step, expected: Step) -> None:
    """Loss, gradients, counters and auxiliary losses of two ways to make a step."""
    torch.testing.assert_close(got.result.loss, expected.result.loss, rtol=1e-12, atol=0)
    assert_same(got.gradients, expected.gradients)
    assert_same(got.result.ledger.statistics, expected.result.ledger.statistics)
    assert_same(got.result.ledger.losses, expected.result.ledger.losses)


def remember(decoder: Decoder) -> None:
    """Run a step of other tokens, so that controllers and remembered loads are not fresh."""
    step = gradients(decoder, [random_tokens(6, 16, seed=9)])
    decoder.update_routers(step.result.ledger, 0)


def calls(decoder: Decoder, kind: type[nn.Module]) -> list[int]:
    """A list that grows by one with each forward call of a kind of module."""
    seen: list[int] = []
    for module in decoder.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("attention", ["standard", "mixture"])
def test_recomputation_changes_nothing(attention: str) -> None:
    """Oracle 17: with activations computed again in the backward pass loss, gradients and counters
    are the same; experts are computed twice, routers decide once."""
    decoder = routed_model(balance("global", "sequence", "micro_batch"))
    if attention == "mixture":
        heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "kind": "mixture"}
        decoder = build_model(
            attention=heads | {"num_experts": 4, "router": RANDOM_ROUTER | {"capacity": None}},
            ffn={"kind": "moe", "experts": EXPERTS, "router": RANDOM_ROUTER},
            scale=3.0,
        )
    remember(decoder)
    batch = random_tokens(4, 16)
    kept = gradients(decoder, in_parts(batch, 2), step=1)
    experts, routers = calls(decoder, ExpertPool), calls(decoder, Router)
    again = gradients(decoder, in_parts(batch, 2), step=1, recompute="full")
    assert_same_step(again, kept)
    num_visits = len(decoder.program.visits)
    assert len(experts) == 2 * 2 * num_visits
    assert len(routers) == 2 * num_visits * (1 + (attention == "mixture"))
    for site, sums in kept.result.ledger.statistics.items():
        if site.module.startswith("layers"):
            assert float(sums["expert_tokens"].sum()) == 3 * float(sums["tokens"])


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_the_cut_into_micro_batches_changes_nothing(scope: str) -> None:
    """Oracle 18: B rows at once, one by one and in halves: the same loss, gradients, counters and
    next state, for losses of scope global and sequence, with random choices and capacities."""
    batch = random_tokens(4, 16)

    def after_step(rows: int) -> tuple[Step, dict[str, Tensor]]:
        decoder = routed_model(balance(scope))
        remember(decoder)
        step = gradients(decoder, in_parts(batch, rows), step=1)
        decoder.update_routers(step.result.ledger, 1)
        return step, dict(decoder.named_buffers())

    whole, state = after_step(4)
    loads = [load for name, load in state.items() if name.endswith("last_counts_UN")]
    assert len(loads) == (2 if scope == "global" else 0)
    assert all(float(load.min()) > 0 for load in loads)
    assert len(whole.result.ledger.losses) == 6
    sites = [site for site in whole.result.ledger.statistics if site.module.startswith("layers")]
    assert {site.depth for site in sites} == {1, 2}
    assert all(float(whole.result.ledger.statistics[site]["spilled"]) > 0 for site in sites)
    for rows in (1, 2):
        parts, other_state = after_step(rows)
        assert_same_step(parts, whole)
        assert_same(other_state, state)


def test_scope_micro_batch_depends_on_the_cut() -> None:
    """Oracle 18: what the other scopes are for: with scope micro_batch gradients do change."""
    decoder, batch = routed_model(balance("micro_batch")), random_tokens(4, 16)
    name = "layers.0.ffn.routers.0.scorer.weight"
    whole, parts = (gradients(decoder, in_parts(batch, rows)).gradients[name] for rows in (4, 1))
    assert not torch.allclose(whole, parts, rtol=1e-3, atol=0)


def test_remembered_load_matters() -> None:
    """Oracle 18: the state of the previous step changes the gradients of scope global, and not
    those of scope sequence, beside the controllers."""
    batch = random_tokens(4, 16)
    for scope, matters in (("global", True), ("sequence", False)):
        decoder = routed_model(balance(scope))
        for module in decoder.modules():
            if isinstance(module, Router):
                module.controllers = nn.ModuleList()
        fresh = gradients(decoder, [batch]).gradients
        remember(decoder)
        later = gradients(decoder, [batch]).gradients
        same = [torch.allclose(fresh[name], later[name], rtol=1e-6, atol=1e-12) for name in fresh]
        assert all(same) is not matters


def test_steps_are_routed_over_depth() -> None:
    """Oracle 18: half of the tokens reach the second depth of the model these tests use."""
    decoder = routed_model([])
    loops = [module for module in decoder.modules() if isinstance(module, ExpertChoice)]
    assert [len(loop.scorers) for loop in loops] == [2]
    statistics = gradients(decoder, [random_tokens(4, 16)]).result.ledger.statistics
    tokens = {
        (s.module, s.depth): float(v["tokens"]) for s, v in statistics.items() if "tokens" in v
    }
    assert tokens == {
        ("layers.0.ffn", 1): 64,
        ("layers.1.ffn", 1): 64,
        ("layers.0.ffn", 2): 32,
        ("layers.1.ffn", 2): 32,
    }
