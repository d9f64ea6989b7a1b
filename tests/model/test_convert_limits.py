"""Conversions that cannot keep the function must say so, or keep it after all."""

from typing import Any

import pytest
import torch

from moebius.model.recursion.convert import conversion_problems, convert
from tests.conftest import MOE
from tests.model.helpers import hidden, random_batch
from tests.model.recursion.conftest import one_thread
from tests.model.test_convert import DENSE, depth, logits, trained, untrained

__all__ = ["one_thread"]
DEEP = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "depth_attention": {"scope": "recursions"},
}
FULL = {"kind": "lora", "rank": 48}


def looking_back(kind: str) -> dict[str, Any]:
    scorer = {"kind": "linear", "gating_residual": kind}
    return MOE | {"router": MOE["router"] | {"scorer": scorer}}


@pytest.mark.parametrize("kind", ["prev_layer", "none"])
def test_residuals_of_the_pass_before_cannot_be_unrolled(kind: str) -> None:
    """Unrolled layers have no pass before."""
    source = trained(depth=depth("cycle"), ffn=looking_back("prev_depth"))
    target = untrained(depth={"num_layers": 8}, ffn=looking_back(kind))
    if not list(conversion_problems(source.decoder.config, target.decoder.config)):
        convert(source.decoder, target.decoder, "stepwise")
        torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-9)


def test_depth_attention_over_recursions_cannot_be_tied_in_another_way() -> None:
    source = trained(depth=depth("cycle"), attention=DEEP)
    target = untrained(depth=depth("sequence", adapter=FULL), attention=DEEP)
    if not list(conversion_problems(source.decoder.config, target.decoder.config)):
        convert(source.decoder, target.decoder, "average")
        torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-9)


def test_other_sharing_of_a_recursive_model_is_recovered_at_full_rank() -> None:
    """What makes the case above a matter of its attention alone."""
    source = trained(depth=depth("cycle"))
    target = untrained(depth=depth("sequence", adapter=FULL))
    convert(source.decoder, target.decoder, "average")
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-9)


def test_a_norm_weight_of_zero_is_no_reason_for_infinite_gains() -> None:
    dense = trained(depth={"num_layers": 8})
    with torch.no_grad():
        dense.decoder.get_parameter("layers.0.attention_norm.weight")[3] = 0.0
    target = untrained(depth=depth("cycle", adapter={"kind": "gain"}))
    convert(dense.decoder, target.decoder, "lower")
    assert bool(hidden(target, random_batch(1, 4)).isfinite().all())


@pytest.mark.parametrize(
    ("source", "target", "path"),
    [
        ({}, {"norm_eps": 1e-6}, "norm_eps"),
        ({}, {"block": "parallel"}, "block"),
        ({}, {"attention": DEEP | {"depth_attention": {"scope": "all"}}}, "attention"),
        ({"depth": depth("cycle", kv="hybrid")}, {"depth": depth("sequence")}, "depth.sharing"),
        (
            {"depth": depth("cycle", router={})},
            {"depth": depth("cycle", num_recursions=4, router={})},
            "depth.sharing",
        ),
        ({"ffn": MOE | {"reuse": 2}}, {"ffn": MOE | {"reuse": 2}, "depth": depth("cycle")}, "ffn"),
    ],
)
def test_what_is_refused_too(source: dict[str, Any], target: dict[str, Any], path: str) -> None:
    base = {"depth": {"num_layers": 8}}
    configs = [untrained(**(base | changes)).decoder.config for changes in (source, target)]
    (problem,) = conversion_problems(*configs)
    assert problem.path.startswith(path)


LOW_RANK = [{"kind": "lora", "rank": 3}, {"kind": "dora", "rank": 3}]


@pytest.mark.parametrize("adapter", LOW_RANK, ids=lambda adapter: adapter["kind"])
def test_the_same_sharing_and_adapters_stay_what_they_are(adapter: dict[str, Any]) -> None:
    """Kept is what the target can hold: there nothing has to be approximated."""
    source = trained(depth=depth("cycle", adapter=adapter))
    target = untrained(depth=depth("cycle", adapter=adapter))
    assert not list(conversion_problems(source.decoder.config, target.decoder.config))
    assert convert(source.decoder, target.decoder, "stepwise") == []
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-9)


@pytest.mark.parametrize("adapter", [None, {"kind": "gain"}], ids=["none", "gain"])
@pytest.mark.parametrize("kv", ["shared_first", "hybrid"])
def test_keys_may_be_shared_where_they_were_not(kv: str, adapter: dict[str, Any] | None) -> None:
    """The same sharing of layers: weights stay what they are, also back again."""
    source = trained(depth=depth("cycle", adapter=adapter))
    target = untrained(depth=depth("cycle", adapter=adapter, kv=kv))
    back = untrained(depth=depth("cycle", adapter=adapter))
    for a, b in ((source, target), (target, back)):
        assert not list(conversion_problems(a.decoder.config, b.decoder.config))
        assert convert(a.decoder, b.decoder, "stepwise") == []
    torch.testing.assert_close(logits(back), logits(source), rtol=0, atol=1e-9)


def test_lower_rank_of_dora_keeps_the_norms_of_rows() -> None:
    dense = trained(depth={"num_layers": 8})
    misses = []
    for rank in (1, 8, 32):
        target = untrained(depth=depth("cycle", adapter={"kind": "dora", "rank": rank}))
        convert(dense.decoder, target.decoder, "average")
        misses.append(float((logits(target) - logits(dense)).abs().mean()))
        for number, visit in enumerate(target.program.visits):
            layer = target.decoder.layers[visit.layer]
            weight = layer.get_submodule("ffn.up").plain(visit)  # type: ignore[operator]
            wanted = dense.decoder.get_parameter(f"layers.{number}.ffn.up.weight")
            torch.testing.assert_close(weight.norm(dim=1), wanted.norm(dim=1), rtol=0, atol=1e-9)
    assert misses[0] > misses[1] > misses[2]
    assert misses[2] < 1e-9


def test_a_head_of_its_own_stays_one() -> None:
    source = trained(depth={"num_layers": 8}, tie_embeddings=False)
    target = untrained(depth=depth("cycle", adapter=FULL), tie_embeddings=False, ffn=DENSE)
    assert convert(source.decoder, target.decoder, "upper") == []
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-9)
    assert target.decoder.head_weight.data_ptr() != source.decoder.head_weight.data_ptr()
