"""What each rule of a layout refuses, and that what is next to it is legal."""

from typing import Any

import pytest

from moebius.model.config import ModelConfig
from moebius.parallel.config import ParallelConfig
from moebius.parallel.rules import LAYOUT_RULES, Asked, layout_problems
from tests.conftest import MOE, model_tree
from tests.trainer.helpers import moebius, write_config

FFN = {"kind": "ffn", "count": 4, "intermediate_size": 24}
MIXTURE = {"kind": "mixture", "num_experts": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
DENSE = {"kind": "dense", "intermediate_size": 24}
LOOP = {"num_layers": 6, "sharing": "middle_cycle", "num_recursions": 2}
NO_SP = {"tp": 2, "sequence_parallel": False}
GROUPS = {"candidates": [{"kind": "groups", "num_groups": 2, "keep": 1}]}


def routed(**fields: Any) -> dict[str, Any]:
    """A mixture of experts with some fields of its own."""
    return {"kind": "moe", "experts": [FFN], **fields}


def problems(model: dict[str, Any], parallel: dict[str, Any], **asked: Any) -> list[str]:
    """Everything that stands against a layout."""
    found = Asked(
        ModelConfig.model_validate(model_tree(**model)),
        ParallelConfig.model_validate(parallel),
        asked.pop("row_length", 32),
        **asked,
    )
    return [f"{path}: {message}" for path, message in layout_problems(found)]


DEPTH = model_tree()["depth"]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "heads": ({}, {"tp": 3}, "parallel.tp: 3 does not divide 4 attention heads"),
    "key-value heads": (
        {"attention": {"num_heads": 12, "num_kv_heads": 4, "head_dim": 8}, "vocab_size": 513},
        {"tp": 3},
        "parallel.tp: 3 and 4 key-value heads do not divide",
    ),
    "mixture": ({"attention": MIXTURE}, {"tp": 2}, "parallel.tp: 2, but a mixture of attention"),
    "vocabulary": (
        {"vocab_size": 511},
        {"tp": 2},
        "model.vocab_size: 511 is not cut into tp = 2; nearest: 512",
    ),
    "width": (
        {"ffn": {"kind": "dense", "intermediate_size": 25}},
        {"tp": 2},
        "model.ffn.intermediate_size: 25 is not cut into tp = 2; nearest: 26",
    ),
    "shared experts": (
        {"ffn": routed(shared={"intermediate_size": 7})},
        {"tp": 2},
        "model.ffn.shared: 7 is not cut into tp = 2; nearest: 8",
    ),
    "dense layers": (
        {"ffn": routed(dense={"layers": [0], "intermediate_size": 9})},
        {"tp": 2},
        "model.ffn.dense.intermediate_size: 9 is not cut into tp = 2",
    ),
    "dora": (
        {"depth": LOOP | {"adapter": {"kind": "dora", "rank": 2}}},
        {"tp": 2},
        "parallel.tp: dora normalises rows of weights that tp cuts",
    ),
    "context alone": (
        {},
        {"context": {"room": 1.5}},
        "parallel.context: cp is 1, so no row is cut; leave it out",
    ),
    "adaptive thirds": (
        {},
        {"cp": 3, "context": {"adaptive": True}},
        "parallel.cp: 3; context.adaptive needs a power of two, 2 or 4",
    ),
    "adaptive order": (
        {"ffn": routed(router={"capacity": {"factor": 1.0, "priority": "position"}})},
        {"cp": 2, "context": {"adaptive": True}},
        "parallel.context.adaptive: it places documents out of order, but capacity.priority",
    ),
    "rows": ({}, {"cp": 3}, "data.sequence_length: 32 is not cut into 3 parts"),
    "recurrent experts": (
        {
            "ffn": routed(experts=[{"kind": "gru", "intermediate_size": 8}, FFN]),
            "depth": {"num_layers": 2},
        },
        {"cp": 2},
        "parallel.cp: gru experts pass through a document token by token",
    ),
    "documents": (
        {"ffn": routed(router={"scorer": {"kind": "linear", "granularity": "document"}})},
        {"tp": 2},
        "parallel.sequence_parallel: a scorer of granularity document reads",
    ),
    "depth attention": (
        {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "depth_attention": {}}},
        {"tp": 2},
        "parallel.sequence_parallel: depth attention keeps values of the tokens",
    ),
    "no experts": ({"ffn": DENSE}, {"ep": 2}, "parallel.ep: the model has no experts that tokens"),
    "number of experts": ({}, {"ep": 3}, "parallel.ep: 3 does not divide 4 ffn experts"),
    "width of experts": (
        {},
        {"etp": 5},
        "parallel.etp: 5 does not divide the experts' intermediate_size = 24",
    ),
    "same tokens": ({}, NO_SP, "parallel.etp: 1; without sequence_parallel all of tp = 2"),
    "groups of experts": (
        {
            "ffn": routed(
                experts=[{**FFN, "count": 12}],
                router={"candidates": [{"kind": "groups", "num_groups": 3, "keep": 2}]},
            )
        },
        {"ep": 2},
        "parallel.ep: 2: the router's 3 groups of experts would lie across processes",
    ),
    "groups of two kinds": (
        {"ffn": routed(experts=[FFN, {**FFN, "intermediate_size": 8}], router=GROUPS)},
        {"ep": 2},
        "parallel.ep: 2: the router's 2 groups of experts would lie across processes",
    ),
    "stages": ({}, {"pp": 8}, "parallel.pp: 8 stages, but the model has 4 units to cut"),
    "costs": (
        {},
        {"pp": 2, "pipeline": {"costs": [1.0, 2.0]}},
        "parallel.pipeline.costs: 2 numbers, but the model has 4 units and a head",
    ),
    "exits": (
        {"exits": {"after": [3]}},
        {"pp": 2},
        "parallel.pp: exits read the stream before the last stage",
    ),
    "pipeline of fsdp2": (
        {},
        {"pp": 2, "data": "fsdp2"},
        "parallel.data: fsdp2 would gather parameters for every micro-batch",
    ),
    "1f1b": (
        {},
        {"pp": 2, "pipeline": {"stages_per_rank": 2}},
        "parallel.pipeline.schedule: 1f1b has one stage per rank; use interleaved_1f1b",
    ),
    "zero-bubble": (
        {},
        {"pp": 2, "pipeline": {"schedule": "zero_bubble"}},
        "parallel.pipeline.schedule: zero_bubble puts off the gradients of weights",
    ),
    "no ring": ({}, {"ring": {"live": 4}}, "parallel.ring: rp is 1, so there is no ring"),
    "ring and pipeline": ({}, {"rp": 2, "pp": 2}, "parallel.rp: a ring takes the place of a pip"),
    "ring of several loops": (
        {"depth": {"num_layers": 8, "sharing": "cycle", "num_recursions": 2, "groups": 2}},
        {"rp": 2},
        "parallel.rp: the loops of sharing cycle with 2 groups follow each other; a ring goes",
    ),
    "slices": ({}, {"rp": 3}, "parallel.rp: 3 slices, but the block that is repeated has 2 layers"),
    "costs of a ring": (
        {},
        {"rp": 2, "ring": {"costs": [1.0]}},
        "parallel.ring.costs: 1 numbers, but the model has 4 layers and a head",
    ),
    "ring with exits": (
        {"exits": {"after": [3]}},
        {"rp": 2},
        "parallel.rp: exits read the stream at more places than the end of a ring",
    ),
    "ring of fsdp2": (
        {},
        {"rp": 2, "data": "fsdp2"},
        "parallel.data: fsdp2 would gather a slice for every visit to it; use zero1",
    ),
    "merge without routing": (
        {"depth": {"num_layers": 4, "sharing": "cycle", "num_recursions": 2}},
        {"rp": 2, "ring": {"merge": True}},
        "parallel.ring.merge: without depth.router all passes have as many tokens",
    ),
    "merge with shared keys": (
        {"depth": DEPTH | {"kv": "hybrid"}},
        {"rp": 2, "ring": {"merge": True}},
        "parallel.ring.merge: layers keep keys for their next pass (depth.kv: hybrid)",
    ),
    "merge with scores of the pass before": (
        {"ffn": routed(router={"scorer": {"kind": "linear", "gating_residual": "prev_depth"}})},
        {"rp": 2, "ring": {"merge": True}},
        "parallel.ring.merge: layers keep scores for their next pass (prev_depth)",
    ),
    "merge with placed documents": (
        {},
        {"rp": 2, "cp": 2, "ring": {"merge": True}, "context": {"adaptive": True}},
        "parallel.ring.merge: context.adaptive places the rows of a chunk anew",
    ),
    "deepspeed on a ring": (
        {},
        {"engine": "deepspeed", "rp": 2},
        "parallel.rp: 2 with engine deepspeed: it reduces gradients within a backward pass",
    ),
    "replicas": (
        {},
        {"dp_replicate": 2},
        "parallel.dp_replicate: 2, but with data: zero1 nothing is replicated apart",
    ),
    "depth attention over heads": (
        {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "depth_attention": {}}},
        {"tp": 4, "sequence_parallel": False, "etp": 4},
        "parallel.tp: 4, but depth attention averages over all query heads of each of 2",
    ),
    "no stages": ({}, {"pipeline": {"stages_per_rank": 2}}, "parallel.pipeline: pp is 1, so"),
    "no deepspeed": ({}, {"deepspeed": {"stage": 2}}, "parallel.deepspeed: engine is native"),
    "deepspeed": (
        {},
        {"engine": "deepspeed", "pp": 2},
        "parallel.pp: 2 with engine deepspeed: it reduces gradients within a backward pass",
    ),
}
LEGAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"tp": 4, "cp": 2, "ep": 2}),
    ({}, NO_SP | {"etp": 2}),
    ({"attention": MIXTURE}, {"cp": 2, "ep": 2}),
    ({"ffn": routed(router=GROUPS)}, {"ep": 4}),
    ({"depth": {"num_layers": 4}}, {"pp": 2, "pipeline": {"schedule": "zero_bubble"}}),
    ({}, {"data": "fsdp2", "dp_replicate": 2}),
    ({}, {"rp": 2, "tp": 2, "cp": 2, "ep": 2, "ring": {"costs": [1, 1, 1, 1, 2], "merge": True}}),
    ({}, {"pp": 2, "pipeline": {"costs": [1, 1, 1, 1, 2]}}),
]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    model, parallel, expected = REFUSED[name]
    found = problems(model, parallel)
    assert [problem for problem in found if problem.startswith(expected)], found


def test_a_teacher_sees_whole_rows() -> None:
    assert problems({}, {"cp": 2}, distils=True) == [
        "parallel.tp: a teacher predicts whole rows; use tp = cp = 1 to distil"
    ]


@pytest.mark.parametrize(("model", "parallel"), LEGAL)
def test_legal(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    assert problems(model, parallel) == []


def test_every_rule_has_a_case() -> None:
    """Each rule refuses something here that no other one does."""
    cases = [(*case[:2], False) for case in REFUSED.values()] + [({}, {"cp": 2}, True)]
    for rule in LAYOUT_RULES:
        found = [
            asked
            for model, parallel, distils in cases
            if list(
                rule(
                    asked := Asked(
                        ModelConfig.model_validate(model_tree(**model)),
                        ParallelConfig.model_validate(parallel),
                        32,
                        distils,
                    )
                )
            )
        ]
        assert found, rule


def test_a_run_file_is_refused_with_its_line(run_tree: dict[str, Any], tmp_path: Any) -> None:
    tree = run_tree | {"model": model_tree(ffn=MOE), "parallel": {"tp": 3}}
    result = moebius("train", write_config(tree, tmp_path / "run.yaml"))
    assert result.returncode == 2
    assert "parallel.tp: 3 does not divide 4 attention heads" in result.stderr
    assert "run.yaml:" in result.stderr
    assert "Traceback" not in result.stderr
