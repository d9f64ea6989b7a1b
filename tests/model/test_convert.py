"""Weights from one sharing of layers to another."""

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.model.parameters import named_specs
from moebius.model.program import build_program
from moebius.model.recursion.config import DepthConfig
from moebius.model.recursion.convert import Method, conversion_problems, convert, sources
from moebius.model.visit import VisitLinear
from tests.conftest import MOE
from tests.model.helpers import build, hidden, random_batch
from tests.model.recursion.conftest import one_thread

__all__ = ["one_thread"]
DENSE = {"kind": "dense", "intermediate_size": 48}
MIXTURE = {"kind": "mixture", "num_experts": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
METHODS = get_args(Method)
SHARINGS = ["cycle", "sequence", "middle_cycle", "middle_sequence"]


def depth(sharing: str, **changes: Any) -> dict[str, Any]:
    """Eight unrolled layers."""
    recursions = 3 if sharing.startswith("middle") else 2
    return {"num_layers": 8, "sharing": sharing, "num_recursions": recursions} | changes


def trained(seed: int = 3, **changes: Any) -> LocalExecutor:
    """A model none of whose numbers is special: noise on every parameter and state."""
    executor = build(torch.float64, **({"ffn": DENSE} | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter, _ in named_specs(executor.decoder):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for buffer in executor.decoder.buffers():
            if buffer.is_floating_point():
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
    return executor


def untrained(**changes: Any) -> LocalExecutor:
    return build(torch.float64, seed=9, **({"ffn": DENSE} | changes))


def logits(executor: LocalExecutor) -> Tensor:
    with torch.no_grad():
        return executor.decoder.logits(hidden(executor, random_batch(2, 10)))


def chosen(layers: int, sharing: str, recursions: int, method: Method) -> list[list[int]]:
    """For each unique layer, the layers of a dense model it is made of."""
    dense = build_program(DepthConfig(num_layers=layers))
    target = build_program(
        DepthConfig.model_validate(
            {"num_layers": layers, "sharing": sharing, "num_recursions": recursions}
        )
    )
    return list(sources(dense, target, method).values())


def test_which_layers_shared_ones_are_made_of() -> None:
    """18 layers in 2 loops, as Gemma in the paper; and with ends of their own."""
    steps = [[0], [2], [4], [6], [8], [11], [13], [15], [17]]
    assert chosen(18, "cycle", 2, "stepwise") == steps
    assert chosen(18, "cycle", 2, "lower") == [[i] for i in range(9)]
    assert chosen(18, "cycle", 2, "upper") == [[i] for i in range(9, 18)]
    assert chosen(18, "cycle", 2, "average") == [[i, i + 9] for i in range(9)]
    assert chosen(6, "sequence", 2, "average") == [[0, 1], [2, 3], [4, 5]]
    assert chosen(8, "middle_cycle", 3, "stepwise") == [[0], [1], [6], [7]]
    assert chosen(8, "middle_cycle", 3, "average") == [[0], [1, 3, 5], [2, 4, 6], [7]]
    assert chosen(8, "middle_sequence", 3, "upper") == [[0], [5], [6], [7]]
    assert chosen(4, "none", 1, "stepwise") == [[0], [1], [2], [3]]


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_adapters_recover_the_dense_model(
    method: Method, kind: str, sharing: str
) -> None:
    dense = trained(depth={"num_layers": 8})
    adapter = {"kind": kind, "rank": 48, "scale": 2.0}
    recursive = untrained(depth=depth(sharing, adapter=adapter))
    assert not list(conversion_problems(dense.decoder.config, recursive.decoder.config))
    assert convert(dense.decoder, recursive.decoder, method) == []
    torch.testing.assert_close(logits(recursive), logits(dense), rtol=0, atol=1e-9)


def test_without_gains_norms_must_be_alike() -> None:
    dense = trained(depth={"num_layers": 8})
    adapter = {"kind": "lora", "rank": 48, "gains": False}
    recursive = untrained(depth=depth("cycle", adapter=adapter))
    convert(dense.decoder, recursive.decoder, "average")
    assert float((logits(recursive) - logits(dense)).abs().max()) > 1e-3
    with torch.no_grad():
        for name, parameter in dense.decoder.named_parameters():
            if "norm" in name:
                parameter.fill_(1.5)
    convert(dense.decoder, recursive.decoder, "average")
    torch.testing.assert_close(logits(recursive), logits(dense), rtol=0, atol=1e-9)


def linears(decoder: Decoder) -> Iterator[tuple[str, VisitLinear]]:
    return (
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, VisitLinear) and module.adapter is not None
    )


def test_adapters_are_the_best_of_their_rank() -> None:
    """What a rank cannot hold is the tail of the singular values; more rank, less of it."""
    dense = trained(depth={"num_layers": 8})
    misses = []
    for rank in (1, 4, 16):
        adapter = {"kind": "lora", "rank": rank, "scale": 0.5}
        recursive = untrained(depth=depth("cycle", adapter=adapter))
        convert(dense.decoder, recursive.decoder, "average")
        for name, module in linears(recursive.decoder):
            layer, rest = name.removeprefix("layers.").split(".", 1)
            for visit in recursive.program.visits:
                if visit.layer != layer:
                    continue
                wanted = dense.decoder.get_parameter(f"layers.{visit.index}.{rest}.weight")
                values = torch.linalg.svdvals(wanted - module.weight)
                missed = (wanted - module.plain(visit)).norm()
                torch.testing.assert_close(missed, values[rank:].norm(), rtol=0, atol=1e-9)
        misses.append(float((logits(recursive) - logits(dense)).abs().mean()))
    assert misses[0] > misses[1] > misses[2]


UNROLLED: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"ffn": MOE},
    "moe with state": {
        "ffn": MOE
        | {
            "router": MOE["router"]
            | {"controllers": [{"kind": "bias"}], "losses": [{"kind": "switch"}]},
            "chain": {"iterations": 2},
            "shared": {"intermediate_size": 8},
        },
    },
    "mixture": {"attention": MIXTURE, "ffn": MOE},
    "norm scaling": {"layer_norm_scaling": "unrolled"},
    "depth attention": {
        "attention": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "depth_attention": {"scope": "all"},
        }
    },
    "bdh": {
        "attention": {"kind": "bdh", "num_heads": 2, "neurons": 16},
        "ffn": {"kind": "none"},
    },
}


PREV_DEPTH = MOE | {
    "router": MOE["router"] | {"scorer": {"kind": "linear", "gating_residual": "prev_depth"}}
}
RECURSIONS = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "depth_attention": {"scope": "recursions"},
}


def with_routers_per_depth(changes: dict[str, Any]) -> dict[str, Any]:
    ffn = copy.deepcopy(changes.get("ffn", DENSE))
    if ffn["kind"] == "moe":
        ffn["router"]["per_depth"] = True
    return changes | {"ffn": ffn}


@pytest.mark.parametrize("adapter", [None, "lora", "dora", "gain"])
@pytest.mark.parametrize("sharing", ["cycle", "middle_sequence"])
@pytest.mark.parametrize("name", UNROLLED)
def test_an_unrolled_recursive_model_has_the_same_logits(
    name: str, sharing: str, adapter: str | None
) -> None:
    """Routers per depth where there are adapters, shared ones with state by depth elsewhere."""
    changes = UNROLLED[name]
    own = depth(sharing)
    if adapter is not None and name != "bdh":
        own |= {"adapter": {"kind": adapter} | ({} if adapter == "gain" else {"rank": 3})}
        changes = with_routers_per_depth(changes)
    recursive = trained(**(changes | {"depth": own}))
    unrolled = untrained(**(UNROLLED[name] | {"depth": {"num_layers": 8}}))
    assert not list(conversion_problems(recursive.decoder.config, unrolled.decoder.config))
    assert convert(recursive.decoder, unrolled.decoder, "stepwise") == []
    torch.testing.assert_close(logits(unrolled), logits(recursive), rtol=0, atol=1e-9)
    back = untrained(**(UNROLLED[name] | {"depth": depth(sharing)}))
    if adapter is None:
        convert(unrolled.decoder, back.decoder, "average")
        torch.testing.assert_close(logits(back), logits(recursive), rtol=0, atol=1e-9)


def test_routers_over_depth_are_new_and_the_rest_is_kept() -> None:
    plain = trained(depth=depth("middle_cycle"))
    routed = untrained(depth=depth("middle_cycle", router={}), tie_embeddings=False)
    kept = convert(plain.decoder, routed.decoder, "upper")
    assert kept == [f"depth_routers.0.scorers.{number}.weight" for number in range(3)]
    for name, parameter in plain.decoder.named_parameters():
        assert torch.equal(routed.decoder.get_parameter(name), parameter)
    assert torch.equal(routed.decoder.head_weight, plain.decoder.embedding.weight)


def test_the_result_is_a_model_of_its_own() -> None:
    dense = trained(depth={"num_layers": 8})
    before = copy.deepcopy(dense.decoder.state_dict())
    recursive = untrained(depth=depth("cycle"))
    convert(dense.decoder, recursive.decoder, "lower")
    with torch.no_grad():
        for parameter in recursive.decoder.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in dense.decoder.state_dict().items())


@pytest.mark.parametrize(
    ("source", "target", "path"),
    [
        ({}, {"hidden_size": 64}, "hidden_size"),
        ({}, {"vocab_size": 256}, "vocab_size"),
        ({}, {"depth": {"num_layers": 6}}, "depth.num_layers"),
        ({"tie_embeddings": False}, {}, "tie_embeddings"),
        ({}, {"layer_norm_scaling": "unrolled"}, "layer_norm_scaling"),
        ({"depth": depth("cycle", router={})}, {}, "depth.router"),
        ({"depth": depth("cycle", router={})}, {"depth": depth("cycle")}, "depth.router"),
        (
            {"depth": depth("cycle", router={})},
            {"depth": depth("sequence", router={}, num_recursions=4)},
            "depth.sharing",
        ),
        ({}, {"ffn": MOE}, "ffn"),
        ({"ffn": MOE}, {"ffn": MOE | {"chain": {"iterations": 1}}}, "ffn"),
        (
            {"ffn": PREV_DEPTH, "depth": depth("cycle")},
            {"ffn": PREV_DEPTH, "depth": depth("middle_cycle")},
            "ffn.router.scorer.gating_residual",
        ),
        (
            {"attention": RECURSIONS, "depth": depth("cycle")},
            {"attention": RECURSIONS, "depth": depth("middle_cycle")},
            "attention.depth_attention.scope",
        ),
        ({"depth": depth("cycle", kv="shared_first")}, {}, "depth.sharing"),
        (
            {"depth": depth("cycle"), "layer_norm_scaling": "unique"},
            {"layer_norm_scaling": "unique"},
            "layer_norm_scaling",
        ),
    ],
)
def test_what_is_refused(source: dict[str, Any], target: dict[str, Any], path: str) -> None:
    base = {"depth": {"num_layers": 8}}
    problems = list(
        conversion_problems(
            untrained(**(base | source)).decoder.config, untrained(**(base | target)).decoder.config
        )
    )
    assert [problem.path for problem in problems] == [path]


def test_gains_of_a_norm_that_was_zero() -> None:
    """0 times a gain is 0, whatever the other layers have there."""
    dense = trained(depth={"num_layers": 8})
    with torch.no_grad():
        dense.decoder.get_parameter("layers.0.attention_norm.weight")[0] = 0.0
    adapter = {"kind": "lora", "rank": 48}
    recursive = untrained(depth=depth("cycle", adapter=adapter))
    convert(dense.decoder, recursive.decoder, "lower")
    torch.testing.assert_close(logits(recursive), logits(dense), rtol=0, atol=1e-9)


def test_another_feed_forward_is_named() -> None:
    dense = trained(depth={"num_layers": 8})
    wider = untrained(depth=depth("cycle"), ffn=DENSE | {"intermediate_size": 64})
    with pytest.raises(ValueError, match=r"ffn\.gate\.weight is \[48, 32\] in the source"):
        convert(dense.decoder, wider.decoder, "lower")
    with pytest.raises(ValueError, match="the source has no"):
        convert(dense.decoder, untrained(depth=depth("cycle"), ffn=MOE).decoder, "lower")
