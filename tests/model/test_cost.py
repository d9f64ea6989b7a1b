"""The cost model against torch's FLOP counter and the parameters that exist."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebius.model.context import StepContext
from moebius.model.cost import (
    balanced_rows,
    forward_flops,
    planned_work,
    training_flops,
    visit_costs,
)
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.trainer.metrics import executed_rows
from tests.conftest import MOE
from tests.model.helpers import build, loss_sum, random_batch

FFN = {"kind": "ffn", "count": 4, "intermediate_size": 16}
RESIDUAL = {"scorer": {"kind": "linear", "gating_residual": "prev_layer"}}
MIXTURE = {
    "kind": "mixture",
    "num_experts": 4,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
}


def routed(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Three layers of a pool; parts with a `kind` are groups of experts, the others its router."""
    router: dict[str, Any] = {}
    for part in parts:
        router |= {} if "kind" in part else part
    experts = [part for part in parts if "kind" in part]
    ffn = {"kind": "moe", "experts": experts, "router": router} | changes
    return {"ffn": ffn, "depth": {"num_layers": 3}}


CASES: dict[str, dict[str, Any]] = {
    "dense": {"ffn": {"kind": "dense", "intermediate_size": 48}, "depth": {"num_layers": 3}},
    "moe": {"depth": {"num_layers": 3}},
    "ffn experts only": {
        "ffn": MOE | {"experts": [{"kind": "ffn", "count": 4, "intermediate_size": 24}]},
        "depth": {"num_layers": 2},
    },
    "recursion": {
        "ffn": {"kind": "dense", "intermediate_size": 48},
        "depth": {"num_layers": 6, "sharing": "middle_cycle", "num_recursions": 2},
    },
    "moe and routed recursion": {},
    "moe and cycle": {"depth": {"num_layers": 4, "sharing": "cycle", "num_recursions": 2}},
    "moe and sequence": {"depth": {"num_layers": 4, "sharing": "sequence", "num_recursions": 2}},
    "untied": {"depth": {"num_layers": 2}, "tie_embeddings": False},
    "several kinds and widths": routed(
        FFN,
        FFN | {"intermediate_size": 40},
        {"kind": "low_rank", "count": 2, "intermediate_size": 6},
        {"kind": "constant"},
        {"kind": "zero"},
        shared={"count": 2, "intermediate_size": 8},
    ),
    "chain": routed(FFN, RESIDUAL, chain={"iterations": 3}, shared={"intermediate_size": 8}),
    "reuse after a dense layer": routed(
        FFN, RESIDUAL, reuse=2, dense={"layers": [0], "intermediate_size": 20}
    ),
    "schedule": routed(FFN | {"count": {"shape": "wave", "largest": 6, "smallest": 2}}, RESIDUAL),
    "mlp scorer": routed(FFN, {"scorer": {"kind": "mlp", "intermediate_size": 24}}),
    "cosine scorer": routed(FFN, {"scorer": {"kind": "cosine"}}),
    "spilling": routed(FFN, {"kind": "copy"}, {"capacity": {"factor": 0.5, "overflow": "spill"}}),
    "attention experts": {"attention": MIXTURE, "depth": {"num_layers": 3}},
    "attention experts by top-p, routed depth": {
        "attention": MIXTURE | {"router": {"selector": {"kind": "top_p"}}}
    },
    "soft attention beside experts": {
        "attention": MIXTURE
        | {"kv": "per_expert", "core": "stick_breaking", "positions": "none"}
        | {"router": {"selector": {"kind": "all"}}},
        "block": "parallel",
        "depth": {"num_layers": 2},
    },
}
FORWARD_CASES = CASES | {
    "gru expert": routed(
        FFN | {"count": 1},
        {"kind": "gru", "intermediate_size": 8},
        {
            "scorer": {"kind": "linear", "granularity": "document"},
            "selector": {"kind": "top_k", "top_k": 1},
        },
    ),
    "gru scorer": routed(FFN, {"scorer": {"kind": "gru", "state_size": 8}}),
    "centroid scorer": routed(FFN, {"scorer": {"kind": "centroid"}}),
    "no scorer": routed(FFN, {"scorer": {"kind": "none"}, "selector": {"kind": "random"}}),
}
"""those whose backward pass needs fewer products than twice the forward's, too"""
ROWS, LENGTH = 3, 20


def counted_flops(executor: LocalExecutor, backward: bool) -> tuple[int, Ledger]:
    """FLOPs of the products that really ran, attention decomposed so that they are visible."""
    batch = random_batch(ROWS, LENGTH)
    ledger = Ledger()
    # Where gradients are wanted the head makes its own in the forward pass.
    with (
        torch.set_grad_enabled(backward),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        loss = loss_sum(executor, batch, StepContext("topk", ledger, training=True))
        if backward:
            loss.backward()
    return counter.get_total_flops(), ledger


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_forward_flops_equal_the_counter(name: str) -> None:
    """Exactly, with the assignments that the routers made; the other work is known before."""
    # float64: the experts run as plain products, which the counter knows; grouped ones it does not.
    executor = build(torch.float64, **FORWARD_CASES[name])
    counted, ledger = counted_flops(executor, backward=False)
    assert forward_flops(executor.decoder, ledger.work, executed_rows(ledger)) == counted
    assert planned_work(executor.decoder, ROWS, LENGTH) == ledger.work


@pytest.mark.parametrize("name", CASES)
def test_training_costs_three_forward_passes(name: str) -> None:
    """Each product costs two more backward, exactly: every input on the way needs its gradient."""
    executor = build(torch.float64, **CASES[name])
    counted, ledger = counted_flops(executor, backward=True)
    assert training_flops(executor.decoder, ledger.work, executed_rows(ledger)) == counted


def test_nominal_cost_sends_as_many_assignments_as_possible_to_ffn_experts() -> None:
    """One row of an ffn expert per token if there is one such expert, two if there are more."""
    tokens = float(ROWS * LENGTH)
    one = MOE | {"experts": [MOE["experts"][0] | {"count": 1}, *MOE["experts"][1:]]}
    single = build(ffn=one, depth={"num_layers": 2}).decoder
    several = build(torch.float64, **CASES["moe"]).decoder
    for decoder, rows in (
        (single, [tokens, tokens, 0.0, 0.0, 0.0]),
        (several, [tokens / 2] * 4 + [0.0] * 4),  # which of the equal experts does not matter
    ):
        work = planned_work(decoder, ROWS, LENGTH)
        possible = {cost.visit.site("ffn"): rows for cost in visit_costs(decoder, work)}
        assert forward_flops(decoder, work) == forward_flops(decoder, work, possible)


def test_balanced_cost_has_the_loads_of_the_balance_loss() -> None:
    """Every ffn expert tau times the load of a zero-computation one, at every site."""
    decoder = build(**CASES["moe"]).decoder
    work = planned_work(decoder, ROWS, LENGTH)
    balanced = balanced_rows(decoder, work)
    assert set(balanced) == {cost.visit.site("ffn") for cost in visit_costs(decoder, work)}
    share = 0.75 * 4 / (0.75 * 4 + 4)
    assignments = ROWS * LENGTH * 2
    for rows in balanced.values():
        assert rows[:4] == pytest.approx([assignments * share / 4] * 4)
        assert rows[4:] == pytest.approx([assignments * (1 - share) / 4] * 4)


@pytest.mark.parametrize("name", CASES)
def test_a_meta_model_has_the_parameters_of_a_real_one(name: str) -> None:
    """`describe` counts a model that was never allocated."""
    with torch.device("meta"):
        meta = build(**CASES[name]).decoder
    real = build(**CASES[name]).decoder
    shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: parameter.shape for name, parameter in meta.named_parameters()} == shapes
    assert sum(p.numel() for p in meta.parameters()) == sum(v.numel() for v in shapes.values())
