"""Adapters by pass against a dense weight for each pass."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.model.context import DepthContext, StepContext
from moebius.model.ledger import Ledger
from moebius.model.parameters import Role, initialize, named_specs
from moebius.model.program import Visit
from moebius.model.recursion.config import DoraConfig, LoraConfig
from moebius.model.visit import VisitLinear
from tests.model.helpers import build, hidden, random_batch
from tests.model.moe.rig import normal, token_context

CONFIGS = [LoraConfig(rank=2, scale=0.5), DoraConfig(rank=2, scale=0.5)]
DEPTH = {"num_layers": 8, "sharing": "middle_cycle", "num_recursions": 3}
DENSE = {"kind": "dense", "intermediate_size": 48}


def at_depth(depth: int) -> DepthContext:
    return DepthContext(
        Visit("1", depth, depth), token_context(1, 4), StepContext("topk", Ledger())
    )


def naive_weight(linear: VisitLinear, number: int) -> Tensor:
    """By outputs and inputs, one number at a time where that is possible."""
    adapter = linear.adapter
    assert adapter is not None
    rows = []
    for out in range(linear.weight.shape[0]):
        row = linear.weight[out]
        for r in range(adapter.rank):
            row = row + adapter.scale * linear.up[number, out, r] * linear.down[number, r]
        if isinstance(adapter, DoraConfig):
            row = linear.magnitude[number, out] * row / row.square().sum().sqrt()
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_visit_is_its_dense_weight(config: LoraConfig | DoraConfig) -> None:
    """Outputs and all gradients, at each depth."""
    linear = VisitLinear(5, 7, Role.MATRIX, 0.5, config, num_depths=3).double()
    for number, (_, parameter, _) in enumerate(named_specs(linear)):
        parameter.data = normal(*parameter.shape, seed=number)
    x = normal(1, 4, 5, seed=9)
    for depth in (1, 2, 3):
        results = []
        for y in (linear.at(x, at_depth(depth)), F.linear(x, naive_weight(linear, depth - 1))):
            linear.zero_grad()
            (y * normal(1, 4, 7, seed=10)).sum().backward()
            grads = {
                name: p.grad.clone() for name, p in linear.named_parameters() if p.grad is not None
            }
            results.append((y, grads))
        (got, got_grads), (wanted, grads) = results
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            linear.plain(Visit("1", depth, 0)), naive_weight(linear, depth - 1)
        )
        assert grads.keys() == got_grads.keys() == dict(linear.named_parameters()).keys()
        for name, grad in grads.items():
            torch.testing.assert_close(got_grads[name], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "adapter", [{"kind": "lora", "rank": 4}, {"kind": "dora", "rank": 4}, {"kind": "gain"}]
)
def test_at_first_all_passes_are_alike(adapter: dict[str, Any]) -> None:
    """A new model with adapters is the one without, and only looped layers have any."""
    plain = build(torch.float64, ffn=DENSE, depth=DEPTH)
    relaxed = build(torch.float64, ffn=DENSE, depth=DEPTH | {"adapter": adapter})
    batch = random_batch(2, 8)
    torch.testing.assert_close(hidden(relaxed, batch), hidden(plain, batch), rtol=0, atol=1e-6)
    own = dict(plain.decoder.named_parameters())
    added = {n: s for n, _, s in named_specs(relaxed.decoder) if n not in own}
    assert {name.split(".")[1] for name in added} == {"1", "2"}
    assert {spec.role for spec in added.values()} <= {Role.ADAPTER, Role.GAIN}
    assert len(added) == 2 * {"lora": 14 + 2, "dora": 21 + 2, "gain": 2}[adapter["kind"]]


def test_without_gains_only_linear_maps_differ() -> None:
    adapter = {"kind": "lora", "rank": 4, "gains": False}
    relaxed = build(ffn=DENSE, depth=DEPTH | {"adapter": adapter})
    assert not [name for name, _ in relaxed.decoder.named_parameters() if name.endswith("gain")]


def test_initial_magnitudes_follow_the_weights_of_any_seed() -> None:
    relaxed = build(ffn=DENSE, depth=DEPTH | {"adapter": {"kind": "dora", "rank": 4}})
    initialize(relaxed.decoder, 5)
    layer = relaxed.decoder.get_submodule("layers.1.attention.q")
    assert isinstance(layer, VisitLinear)
    for number in range(3):
        torch.testing.assert_close(layer.magnitude[number], layer.weight.norm(dim=1))
