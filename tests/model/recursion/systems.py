"""One small model for each way of using layers several times, and what all of them are fed."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.parameters import initialize, named_specs
from moebius.model.rules import MODEL_RULES

VOCABULARY, WIDTH = 32, 16
SEED = 22
"""with which some tokens pass every threshold and some none"""
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
DENSE = {"kind": "dense", "intermediate_size": 24}
BDH = {"kind": "bdh", "num_heads": 2, "neurons": 16}
LOSSES = {"causal": {"coefficient": 0.2}, "z_coefficient": 0.1}
"""of expert choice, large enough to show in the gradients"""
MIXTURE = {
    "kind": "mixture",
    "num_experts": 3,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "router": {"losses": [{"kind": "switch", "scope": "sequence", "coefficient": 0.1}]},
}
MOE = {
    "kind": "moe",
    "experts": [
        {"kind": "ffn", "count": 3, "intermediate_size": 12},
        {"kind": "constant"},
        {"kind": "zero"},
    ],
    "shared": {"intermediate_size": 8},
    "router": {
        "selector": {"kind": "top_k", "top_k": 2},
        "losses": [{"kind": "switch", "scope": "global", "coefficient": 0.1}],
        "controllers": [{"kind": "bias", "rate": 0.01}],
    },
}


def depth(num_recursions: int = 3, shared: int = 1, **fields: Any) -> dict[str, Any]:
    """Shared layers that are used so many times, between two layers of their own."""
    groups = fields.get("groups", 1)
    return {
        "num_layers": 2 + shared * groups * num_recursions,
        "sharing": "middle_cycle",
        "num_recursions": num_recursions,
    } | fields


def expert(**router: Any) -> dict[str, Any]:
    """A depth router that picks tokens, with losses."""
    return {"kind": "expert_choice"} | LOSSES | router


def token(*controllers: dict[str, Any], scope: str = "sequence", **router: Any) -> dict[str, Any]:
    """A depth router by which tokens pick their depth, with losses."""
    switch = {"kind": "switch", "scope": scope, "coefficient": 0.3}
    losses = [switch, {"kind": "z", "coefficient": 0.05}]
    fields = {"kind": "token_choice", "losses": losses, "controllers": list(controllers)}
    return fields | router


def moe(per_depth: bool, residual: str, **router: Any) -> dict[str, Any]:
    """A heterogeneous pool whose routers know those before them."""
    scorer = {"kind": "linear", "gating_residual": residual}
    return MOE | {"router": MOE["router"] | {"scorer": scorer, "per_depth": per_depth} | router}


def deep(scope: str) -> dict[str, Any]:
    """Attention that mixes values over depth."""
    return ATTENTION | {"depth_attention": {"scope": scope, "window": 3}}


def pool(**router: Any) -> dict[str, Any]:
    """SwiGLU experts without losses."""
    experts = [{"kind": "ffn", "count": 3, "intermediate_size": 6}]
    return {"kind": "moe", "experts": experts, "router": {"losses": []} | router}


def residual(kind: str) -> dict[str, Any]:
    """A scorer that adds those of an earlier router."""
    return {"kind": "linear", "gating_residual": kind}


BIAS = {"kind": "bias", "rate": 0.01}
SCHEDULED = [[[0, 1.0], [40, 0.8]], [[0, 0.9], [40, 0.5]], 0.25]
MLP = {"kind": "mlp", "intermediate_size": 8}
COSINE = {"kind": "cosine", "projection_size": 8}
ADAPTED = {"ffn": MOE, "depth": depth(2, 2, adapter={"kind": "dora", "rank": 2})}
CYCLE: dict[str, Any] = {"num_layers": 3, "sharing": "cycle", "num_recursions": 3}

SYSTEMS: dict[str, dict[str, Any]] = {
    "cycle": {"depth": CYCLE | {"num_layers": 6}},
    "sequence": {"depth": CYCLE | {"num_layers": 6, "sharing": "sequence"}},
    "cycle groups": {"depth": CYCLE | {"num_layers": 12, "groups": 2}},
    "expert row": {"depth": depth(3, 2, router=expert())},
    "expert document": {"depth": depth(router=expert(scope="document"))},
    "expert warm-up": {"depth": depth(router=expert(warmup_steps=41, scorer=MLP, temperature=0.5))},
    "expert schedule": {"depth": depth(router=expert(capacities=SCHEDULED, activation="none"))},
    "expert additive": {
        "depth": depth(
            router=expert(
                gating="additive", activation="tanh", scorer=COSINE, temperature=2.0, multiple_of=4
            )
        )
    },
    "expert constant": {"depth": depth(router=expert(activation="constant", alpha=0.7))},
    "expert predictor": {"depth": depth(router=expert(causal={"kind": "router", "scorer": MLP}))},
    "expert predictor document": {
        "depth": depth(router=expert(causal={"kind": "router"}, scope="document", warmup_steps=41))
    },
    "expert shared_first": {"depth": depth(3, 2, kv="shared_first", router=expert())},
    "expert hybrid": {
        "depth": depth(3, 2, kv="hybrid", router=expert(capacities=[0.7, 0.5, 0.3])),
    },
    "expert groups": {"depth": depth(2, 1, groups=2, kv="hybrid", router=expert())},
    "shared_first": {"depth": depth(2, 2, kv="shared_first")},
    "token sequence": {"depth": depth(router=token())},
    "token global": {"depth": depth(router=token(scope="global", gating="every"))},
    "token bias": {
        "depth": depth(kv="shared_first", router=token(BIAS, norm={"kind": "sigmoid"}, alpha=0.5))
    },
    "token hybrid": {"depth": depth(3, 2, kv="hybrid", router=token(scorer=MLP, multiple_of=5))},
    "token groups": {"depth": depth(2, 1, groups=2, router=token(BIAS, scope="global"))},
    "token full depth": {"depth": depth(router=token(BIAS, full_depth_steps=21))},
    "lora": {"depth": depth(2, 2, adapter={"kind": "lora", "rank": 2, "scale": 0.5})},
    "lora expert": {
        "depth": depth(adapter={"kind": "lora", "rank": 2, "gains": False}, router=expert())
    },
    "dora": ADAPTED,
    "dora token": {"depth": depth(adapter={"kind": "dora", "rank": 2}, router=token())},
    "gain": {"depth": depth(adapter={"kind": "gain"}, router=expert(), kv="hybrid")},
    "exits all": {
        "depth": {"num_layers": 6, "sharing": "cycle", "num_recursions": 3},
        "exits": {"after": [2, 3, 4], "coefficient": 0.4, "self_distillation": 0.7},
    },
    "exits expert": {
        "depth": depth(3, 2, router=expert()),
        "exits": {"after": [1, 3, 5], "coefficient": 1.0, "normalize": True},
        "tie_embeddings": False,
    },
    "exits token": {
        "depth": depth(3, router=token(BIAS, scope="global")),
        "exits": {"after": [1, 4], "coefficient": 0.5},
    },
    "exits drawn": {
        "depth": depth(2, 2),
        "exits": {"after": [1, 3, 4], "draw": "step"},
    },
    "exits drawn expert": {
        "depth": depth(3, 2, router=expert(capacities=[0.8, 0.6, 0.3])),
        "exits": {"after": [1, 3, 5], "draw": "step"},
    },
    "depth attention": {"attention": deep("all"), "depth": depth(3, router=expert())},
    "depth attention window": {"attention": deep("window"), "depth": depth(3, router=token())},
    "depth attention recursions": {
        "attention": deep("recursions"),
        "depth": depth(2, 2, router=expert(scope="document")),
    },
    "depth attention unrouted": {"attention": deep("all"), "depth": depth(2, 2)},
    "moe prev_depth": {"ffn": moe(True, "prev_depth"), "depth": depth(3, router=expert())},
    "moe prev_layer": {"ffn": moe(True, "prev_layer"), "depth": depth(2, 2, router=expert())},
    "moe shared routers": {"ffn": moe(False, "prev_depth"), "depth": depth(2, 2)},
    "moe token": {
        "ffn": moe(True, "prev_depth", losses=[]),
        "depth": depth(2, 2, router=token()),
    },
    "moe token losses": {"ffn": moe(True, "prev_layer"), "depth": depth(2, 2, router=token())},
    "moe document losses": {
        "ffn": moe(False, "prev_depth", losses=[{"kind": "z", "coefficient": 0.1}]),
        "depth": depth(router=expert(scope="document")),
    },
    "mixture expert": {
        "attention": MIXTURE,
        "depth": depth(kv="shared_first", router=expert()),
    },
    "mixture hybrid": {"attention": MIXTURE, "depth": depth(2, 2, kv="hybrid", router=expert())},
    "mixture token": {
        "attention": MIXTURE | {"router": {"losses": []}},
        "depth": depth(2, 2, kv="hybrid", router=token()),
    },
    "mixture token losses": {"attention": MIXTURE, "depth": depth(2, 2, router=token())},
    "stick breaking": {
        "attention": ATTENTION | {"core": "stick_breaking", "positions": "none"},
        "depth": depth(kv="hybrid", router=expert()),
    },
    "norm scaling": {
        "layer_norm_scaling": "unrolled",
        "depth": depth(3, 2, router=expert(), adapter={"kind": "gain"}),
    },
    "norm scaling unique": {"layer_norm_scaling": "unique", "depth": depth(2, 2, router=token())},
    "bdh": {"attention": BDH, "ffn": {"kind": "none"}, "depth": CYCLE},
    "bdh expert": {
        "attention": BDH,
        "ffn": {"kind": "none"},
        "depth": CYCLE | {"router": expert()},
    },
    "bdh token": {
        "attention": BDH,
        "ffn": {"kind": "none"},
        "depth": CYCLE | {"router": token(BIAS)},
    },
}


QUIET_MIXTURE = MIXTURE | {"router": {"losses": []}}
BY_HAND = [name for name in SYSTEMS if not name.startswith(("moe", "mixture")) and name != "dora"]
NAIVE: dict[str, dict[str, Any]] = {name: SYSTEMS[name] for name in BY_HAND} | {
    "token every sigmoid": {
        "depth": depth(
            kv="hybrid", router=token(BIAS, gating="every", norm={"kind": "sigmoid"}, alpha=0.3)
        )
    },
    "document hybrid": {"depth": depth(kv="hybrid", router=expert(scope="document"))},
    "document shared_first": {"depth": depth(kv="shared_first", router=expert(scope="document"))},
    "hybrid one head": {
        "attention": ATTENTION | {"num_kv_heads": 1},
        "depth": depth(kv="hybrid", router=expert(capacities=[0.6, 0.6, 0.2])),
    },
    "dora dense": {
        "depth": depth(2, 2, kv="hybrid", adapter={"kind": "dora", "rank": 2, "scale": 2.0})
    },
    "window document": {
        "attention": deep("window"),
        "depth": depth(3, router=expert(scope="document")),
    },
    "window unrouted": {"attention": deep("window"), "depth": depth(2, 2)},
    "recursions token": {"attention": deep("recursions"), "depth": depth(3, router=token())},
    "mixture expert": {
        "attention": QUIET_MIXTURE,
        "depth": depth(kv="shared_first", router=expert()),
    },
    "mixture token": {
        "attention": QUIET_MIXTURE,
        "depth": depth(2, 2, kv="hybrid", router=token()),
    },
    "mixture document": {
        "attention": QUIET_MIXTURE,
        "depth": depth(router=expert(scope="document")),
    },
    "prev_layer": {
        "ffn": pool(scorer=residual("prev_layer")),
        "depth": depth(2, 2, router=expert()),
    },
    "prev_depth": {
        "ffn": pool(scorer=residual("prev_depth"), per_depth=True),
        "depth": depth(3, 2, router=expert()),
    },
    "prev_depth token": {
        "ffn": pool(scorer=residual("prev_depth")),
        "depth": depth(3, router=token()),
    },
    "prev_layer per depth": {
        "ffn": pool(scorer=residual("prev_layer"), per_depth=True),
        "depth": depth(3, 2, router=token()),
    },
    "width losses": {
        "ffn": pool(losses=[{"kind": "z", "coefficient": 0.2}]),
        "depth": depth(3, router=expert()),
    },
    "width losses document": {
        "ffn": pool(losses=[{"kind": "z", "coefficient": 0.2}]),
        "depth": depth(3, router=expert(scope="document", warmup_steps=50)),
    },
    "width losses token": {
        "ffn": pool(losses=[{"kind": "z", "coefficient": 0.2}]),
        "depth": depth(2, 2, router=token()),
    },
    "prev_layer cycle": {
        "ffn": pool(scorer=residual("prev_layer")),
        "depth": CYCLE | {"num_layers": 6, "router": expert()},
    },
    "prev_layer groups": {
        "ffn": pool(scorer=residual("prev_layer"), per_depth=True),
        "depth": depth(2, 1, groups=2, router=expert(scope="document")),
    },
}
"""the systems that the naive model knows, and more of what it knows"""


def config_of(**changes: Any) -> ModelConfig:
    """A small model; a configuration that a run would refuse is an error."""
    tree = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "attention": ATTENTION,
        "ffn": DENSE,
        "init_std": 0.3,
    } | changes
    config = ModelConfig.model_validate(tree)
    problems = [problem for rule in MODEL_RULES for problem in rule(config)]
    assert not problems, problems
    return config


def lively(decoder: Decoder, seed: int = 1) -> Decoder:
    """The same in float64, with what begins at a constant moved away from it."""
    generator = torch.Generator().manual_seed(seed)
    decoder.to(torch.float64)
    with torch.no_grad():
        for _, parameter, spec in named_specs(decoder):
            if spec.std == 0:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return decoder


def system(seed: int = SEED, **changes: Any) -> LocalExecutor:
    """A model in which every path matters and selections are clear."""
    decoder = Decoder(config_of(**changes))
    initialize(decoder, seed)
    return LocalExecutor(lively(decoder))


def packed(tokens_BS: Tensor, segment_ids_BS: Tensor) -> TokenBatch:
    """Rows of several documents, whose positions begin at 0 each."""
    positions = torch.zeros_like(tokens_BS)
    for b, row in enumerate(segment_ids_BS.tolist()):
        for t in range(1, len(row)):
            if row[t] == row[t - 1]:
                positions[b, t] = positions[b, t - 1] + 1
    return SimpleNamespace(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        segment_ids_BS=segment_ids_BS,
        positions_BS=positions,
        sample_ids_B=torch.arange(len(tokens_BS)) + 7,
    )


def documents(rows: int = 4, length: int = 16, seed: int = 0, share: float = 0.15) -> TokenBatch:
    """Random tokens in rows of several documents; about `share` of them begin one.

    A token is in a row once: two of the same at the beginning of a document would have one score.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=1)[:, :length]
    begins = torch.rand(rows, length, generator=generator) < share
    return packed(tokens, begins.cumsum(dim=1))
