"""Generation with a cache, of any number of sequences together, equals running whole contexts."""

from typing import Any

import pytest

from moebius.model.generation.engine import needs_whole_rows
from moebius.model.generation.plain import Limits
from tests.conftest import MOE
from tests.model.generation import STOP, Choice, assert_same, engine, lively, loop, random_prompts

ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MIXTURE = {"kind": "mixture", "num_experts": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
BDH = {"kind": "bdh", "num_heads": 2, "neurons": 16}
ROUTERS: dict[str, Any] = {
    "unrouted": None,
    "expert": {"kind": "expert_choice"},
    "predictor": {"causal": {"kind": "router"}, "gating": "additive", "activation": "tanh"},
    "token": {"kind": "token_choice"},
    "token every": {"kind": "token_choice", "gating": "every", "norm": {"kind": "sigmoid"}},
}
PROMPTS = [1, 34, 5, 3]
"""lengths; one needs more room than a slot has at first"""


def moe(**router: Any) -> dict[str, Any]:
    """The tests' MoE++ layer with some of its router changed."""
    return MOE | {"router": MOE["router"] | router}


def residual(kind: str) -> dict[str, Any]:
    """A router that looks back."""
    return {"scorer": {"kind": "linear", "gating_residual": kind}}


def models(router: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Everything a cache or a batch of several passes could get wrong, in a loop with a router."""
    depth, cycle = loop(router=router), loop("cycle", router=router)
    return {
        "groups": {"depth": loop("middle_cycle", 2, groups=2, router=router)},
        "moe": {"depth": depth, "ffn": moe()},
        "moe in a cycle": {"depth": cycle, "ffn": moe()},
        "prev_depth": {"depth": depth, "ffn": moe(**residual("prev_depth"))},
        "router per depth": {"depth": depth, "ffn": moe(per_depth=True)},
        "recurrent router": {"depth": depth, "ffn": moe(scorer={"kind": "gru", "state_size": 8})},
        "bias": {"depth": depth, "ffn": moe(controllers=[{"kind": "bias"}])},
        "mixture": {"depth": depth, "attention": MIXTURE},
        "mixture, hybrid": {"depth": depth | {"kv": "hybrid"}, "attention": MIXTURE},
        "mixture, shared": {"depth": depth | {"kv": "shared_first"}, "attention": MIXTURE},
        "stick breaking": {
            "depth": depth,
            "attention": ATTENTION | {"core": "stick_breaking", "positions": "none"},
        },
        "depth attention": {
            "depth": depth,
            "attention": ATTENTION | {"depth_attention": {"scope": "all"}},
        },
        "depth attention, window": {
            "depth": cycle,
            "attention": ATTENTION | {"depth_attention": {"scope": "window", "window": 3}},
        },
        "depth attention, recursions": {
            "depth": depth,
            "attention": ATTENTION | {"depth_attention": {"scope": "recursions"}},
        },
        "lora": {"depth": depth | {"adapter": {"kind": "lora", "rank": 3, "scale": 0.7}}},
        "dora": {"depth": depth | {"adapter": {"kind": "dora", "rank": 3}, "kv": "shared_first"}},
        "gain": {"depth": depth | {"adapter": {"kind": "gain"}}},
        "norm scaling": {"depth": depth, "layer_norm_scaling": "unrolled"},
        "chain": {"depth": depth, "ffn": moe() | {"chain": {"iterations": 2}}},
        "parallel": {"depth": depth, "ffn": moe(), "block": "parallel"},
        "shared experts": {"depth": depth, "ffn": moe() | {"shared": {"intermediate_size": 16}}},
        "bdh": {
            "depth": loop("cycle", router=router) | {"num_layers": 3},
            "attention": BDH,
            "ffn": {"kind": "none"},
        },
    }


@pytest.mark.parametrize("kv", ["per_depth", "shared_first", "hybrid"])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_with_every_kind_of_keys(router: str, kv: str) -> None:
    """Ids and logits, with 1, 3 and 8 slots."""
    executor = lively(depth=loop(router=ROUTERS[router], kv=kv))
    assert not needs_whole_rows(executor.decoder)
    assert_same(executor, random_prompts(PROMPTS), Limits(4, 64))


@pytest.mark.parametrize("router", ["expert", "token"])
@pytest.mark.parametrize("name", models(None))
def test_every_kind_of_layer(name: str, router: str) -> None:
    executor = lively(**models(ROUTERS[router])[name])
    assert not needs_whole_rows(executor.decoder)
    assert_same(executor, random_prompts([1, 9, 3]), Limits(4, 64), slots=(3,))


@pytest.mark.parametrize("sharing", ["none", "sequence", "middle_sequence"])
def test_other_sharings(sharing: str) -> None:
    depth = {"num_layers": 3} if sharing == "none" else loop(sharing)
    assert_same(lively(depth=depth), random_prompts([1, 4, 7]), Limits(5, 64), slots=(2,))


@pytest.mark.parametrize("router", ["expert", "token"])
def test_a_context_that_is_full_forgets_its_older_half(router: str) -> None:
    executor = lively(depth=loop(router=ROUTERS[router]))
    for context_length in (2, 7, 8):
        prompts = random_prompts([1, context_length, 20])
        assert_same(executor, prompts, Limits(12, context_length), slots=(2,))


def test_thousands_of_restarts() -> None:
    """The smallest context, which is full at every second token."""
    executor = lively(depth={"num_layers": 1})
    (new,) = engine(executor, Limits(1200, 2), 1).run([[1]], lambda logits, *_: 3)
    assert len(new) == 1200


def test_stopping_at_once_and_a_single_token() -> None:
    executor = lively(depth=loop(router=ROUTERS["expert"]))
    prompts = random_prompts([3, 3, 3, 3, 3])
    assert_same(executor, prompts, Limits(1, 64))
    stops = [(0, 0), (2, 2), (4, 0)]
    engines = assert_same(executor, prompts, Limits(6, 64, STOP), slots=(1, 2), stops=stops)
    assert all(slot is None for slot in engines[-1].slots)


def test_the_program_of_an_early_exit() -> None:
    executor = lively(depth=loop(router=ROUTERS["expert"]))
    for number in executor.program.exits[:-1]:
        executor.program = executor.decoder.program.until(number)
        assert_same(executor, random_prompts([1, 9, 4]), Limits(5, 64), slots=(2,))
    unrouted = lively(depth=loop())
    for number in unrouted.program.exits[:-1]:
        unrouted.program = unrouted.decoder.program.until(number)
        assert_same(unrouted, random_prompts([1, 9, 4]), Limits(5, 64), slots=(2,))


def test_tokens_at_different_passes_share_runs() -> None:
    """Together they need far fewer runs through the layers, of which some hold several tokens."""
    executor = lively(depth=loop(router=ROUTERS["token"]))
    alone, together = assert_same(executor, random_prompts([3] * 8), Limits(12, 64), slots=(1, 8))
    assert set(alone.batch_sizes) == {1}
    assert max(together.batch_sizes) >= 6
    assert sum(together.batch_sizes) == sum(alone.batch_sizes), "no token makes another pass"
    assert len(together.batch_sizes) < len(alone.batch_sizes) / 2


def test_different_passes_really_meet_in_a_layer() -> None:
    executor = lively(depth=loop(router=ROUTERS["token"]))
    seen: list[set[int]] = []
    layer = executor.decoder.layers["1"]
    hook = layer.register_forward_pre_hook(
        lambda _, args: seen.append({part.visit.depth for part in args[2].parts})
    )
    engine(executor, Limits(12, 64), 6).run(random_prompts([3] * 6), Choice())
    hook.remove()
    assert {1, 2} <= set().union(*seen)
    assert any(len(depths) == 3 for depths in seen)


WHOLE_ROWS: dict[str, dict[str, Any]] = {
    "by document": moe(scorer={"kind": "linear", "granularity": "document"}),
    "counted tokens": moe(
        selector={"kind": "entropy_hybrid", "entropy_threshold": 0.5, "dense_share": 0.5}
    ),
    "recurrent expert": {
        "kind": "moe",
        "experts": [
            {"kind": "ffn", "count": 1, "intermediate_size": 16},
            {"kind": "gru", "count": 1, "intermediate_size": 8},
        ],
        "router": {
            "scorer": {"kind": "linear", "granularity": "document"},
            "selector": {"kind": "top_k", "top_k": 1},
        },
    },
}
