"""Small models that layouts are tried with."""

from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import Any

from moebius.model.config import ModelConfig
from tests.model.recursion.systems import depth, expert, token

VOCABULARY, WIDTH = 32, 16
DENSE: dict[str, Any] = {"kind": "dense", "intermediate_size": 24}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
FFN = {"kind": "ffn", "count": 4, "intermediate_size": 8}
SWITCH = {"kind": "switch", "scope": "sequence", "coefficient": 0.1}
Z_LOSS = {"kind": "z", "coefficient": 0.01}


def moe(experts: Iterable[dict[str, Any]], selector: dict[str, Any], **fields: Any) -> Any:
    """A mixture of experts."""
    router = {"selector": selector, "losses": [SWITCH, Z_LOSS]} | fields.pop("router", {})
    return {"kind": "moe", "experts": list(experts), "router": router} | fields


TOP_2 = {"kind": "top_k", "top_k": 2}
MOEPP = moe(
    [FFN, {"kind": "constant", "count": 2}, {"kind": "copy"}, {"kind": "zero"}],
    TOP_2,
    router={"scorer": {"kind": "linear", "gating_residual": "prev_layer"}},
)
V3 = moe(
    [{**FFN, "count": 8}],
    {"kind": "top_k", "top_k": 3},
    shared={"intermediate_size": 8},
    router={
        "norm": {"kind": "sigmoid"},
        "weights": {"kind": "renormalize"},
        "candidates": [{"kind": "groups", "num_groups": 4, "keep": 2, "score_top": 2}],
        "losses": [{**SWITCH, "scope": "global"}],
        "controllers": [{"kind": "bias", "rate": 0.01}],
    },
)
TOP_P = moe(
    [FFN, {"kind": "zero", "count": 2}],
    {"kind": "top_p", "threshold": 0.5},
    router={"controllers": [{"kind": "target_k", "target": 2.0}]},
)
MIXED = moe(
    [
        FFN,
        {"kind": "ffn", "count": 4, "intermediate_size": 16},
        {"kind": "low_rank", "count": 4, "intermediate_size": 4, "scale": 0.5},
        {"kind": "copy"},
    ],
    TOP_2,
    router={"capacity": {"factor": 1.1}, "scorer": {"kind": "gru", "state_size": 8}},
)
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"tie_embeddings": False},
    "moepp": {"ffn": MOEPP},
    "top_p": {"ffn": TOP_P},
    "v3": {"ffn": V3 | {"dense": {"layers": [0], "intermediate_size": 24}}},
    "mixed": {"ffn": MIXED},
    "mor": {"depth": depth(router=expert())},
    "mor_document": {"depth": depth(router=expert(scope="document", causal={"kind": "router"}))},
    "mor_token": {"depth": depth(router=token({"kind": "bias", "rate": 0.01}))},
    "mor_hybrid": {"depth": depth(router=expert(), kv="hybrid")},
    "mor_shared": {"depth": depth(router=expert(), kv="shared_first")},
    "deep": {"attention": ATTENTION | {"depth_attention": {}}},
    "exits": {
        "depth": depth(router=expert()),
        "exits": {"after": [2, 3], "coefficient": 0.5, "self_distillation": 0.5},
    },
    "moepp_mor": {"ffn": MOEPP, "depth": depth(2, 2, router=expert())},
    "v3_token": {"ffn": V3, "depth": depth(2, router=token())},
    "mixture": {
        "attention": {
            "kind": "mixture",
            "num_experts": 3,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 4,
            "router": {"losses": [SWITCH]},
        },
        "ffn": moe([FFN, {"kind": "copy"}], TOP_2, reuse=2, chain={"iterations": 2}),
    },
    "lora": {"depth": depth(2, adapter={"kind": "lora", "rank": 4})},
    "bdh": {
        "attention": {"kind": "bdh", "num_heads": 4, "neurons": 8},
        "ffn": {"kind": "none"},
        "depth": {"num_layers": 4, "sharing": "cycle", "num_recursions": 4},
    },
}


PASSES = (1, 2, 3, 4)
BLOCKS: dict[str, dict[str, Any]] = {"dense": {}, "moepp": {"ffn": MOEPP}}


def ring_name(block: str, passes: int, is_routed: bool) -> str:
    """The name of a model of four shared layers between two of their own."""
    return f"ring-{block}-{passes}" + "-routed" * is_routed


def _shared(passes: int, layers: int, **fields: Any) -> dict[str, Any]:
    return {"depth": depth(passes, layers, **fields)}


PREV_DEPTH = moe(
    [FFN, {"kind": "copy"}, {"kind": "zero"}],
    TOP_2,
    router={"scorer": {"kind": "linear", "gating_residual": "prev_depth"}},
)
RING_MODELS: dict[str, dict[str, Any]] = {
    ring_name(block, passes, is_routed): BLOCKS[block]
    | _shared(passes, 4, **({"router": expert()} if is_routed else {}))
    for block, passes, is_routed in product(BLOCKS, PASSES, (False, True))
} | {
    "ring-prev_depth": {"ffn": PREV_DEPTH} | _shared(3, 3, router=expert()),
    "ring-prev_depth-unrouted": {"ffn": PREV_DEPTH} | _shared(3, 3),
    "ring-token": {"ffn": V3}
    | _shared(3, 3, router=token({"kind": "bias", "rate": 0.01}, multiple_of=4)),
    "ring-document": _shared(
        3, 3, router=expert(scope="document", causal={"kind": "router"}), adapter={"kind": "gain"}
    ),
    "ring-hybrid": _shared(3, 3, router=expert(), kv="hybrid"),
    "ring-shared_first": _shared(3, 3, kv="shared_first"),
    "ring-deep": {"attention": ATTENTION | {"depth_attention": {}}} | _shared(2, 3),
    "ring-mixed": {"ffn": MIXED} | _shared(2, 3, router=expert()),
    "ring-top_p": {"ffn": TOP_P} | _shared(2, 3, router=expert()),
    "ring-reuse": {"ffn": moe([FFN, {"kind": "copy"}], TOP_2, reuse=2)}
    | _shared(2, 4, router=expert(), adapter={"kind": "lora", "rank": 4}),
    "ring-cycle": {
        "depth": {
            "num_layers": 9,
            "sharing": "cycle",
            "num_recursions": 3,
            "router": expert(gating="additive"),
        }
    },
}
"""with a block of three layers or more, which a ring can cut"""


@cache
def model_of(name: str) -> ModelConfig:
    """The configuration of a model."""
    tree = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "attention": ATTENTION,
        "ffn": DENSE,
        "depth": {"num_layers": 4},
        "init_std": 0.2,
    }
    return ModelConfig.model_validate(tree | (MODELS | RING_MODELS)[name])
