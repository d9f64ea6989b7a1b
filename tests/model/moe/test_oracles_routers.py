"""Oracles of single routers: recurrent, frozen, of documents, and repeating a record."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebius.errors import DataError
from moebius.model.carry import Carry
from moebius.model.context import TokenContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import ALL_SAMPLES
from moebius.model.moe.replay import RoutingTable
from moebius.model.moe.router import Router
from moebius.model.parameters import Role, initialize, named_specs
from moebius.model.program import Site
from tests.model.moe.rig import (
    build_model,
    gradients,
    in_parts,
    make_router,
    normal,
    pool_of,
    random_tokens,
    token_context,
    visit,
)

EXPERTS = [{"kind": "ffn", "count": 4, "intermediate_size": 12}, {"kind": "copy"}]


def model_with(depth: dict[str, Any] | None = None, **router: Any) -> Decoder:
    """A small decoder whose router decides clearly."""
    ffn = {"kind": "moe", "experts": EXPERTS, "router": {"losses": []} | router}
    return build_model(ffn=ffn, depth=depth or {"num_layers": 2}, scale=3.0)


def router_of(decoder: Decoder, layer: str) -> Router:
    """The router of a layer."""
    router = decoder.layers[layer].ffn.routers[0]
    assert isinstance(router, Router)
    return router


def recurrent(detach_state: bool) -> Decoder:
    """Two layers with the recurrent router of RMoE, its biases not 0."""
    decoder = model_with(scorer={"kind": "gru", "state_size": 6, "detach_state": detach_state})
    with torch.no_grad():
        unit = decoder.shared["ffn_router_gru"]
        unit.input_bias.copy_(normal(18, seed=5))
        unit.state_bias.copy_(normal(18, seed=6))
    return decoder


def torch_cell(decoder: Decoder) -> Callable[[Tensor, Tensor], Tensor]:
    """The shared unit as torch has it."""
    unit = decoder.shared["ffn_router_gru"]
    cell = nn.GRUCell(6, 6).double()
    with torch.no_grad():
        cell.weight_ih.copy_(unit.input_weight)
        cell.weight_hh.copy_(unit.state_weight)
        cell.bias_ih.copy_(unit.input_bias)
        cell.bias_hh.copy_(unit.state_bias)
    return cell


def test_a_recurrent_router_passes_its_state_on() -> None:
    """Oracle 11: `h_l = GRU(A_l x_l, h_{l-1})`, scores `G_l h_l`, one GRU for both layers, h_0 = 0;
    without a carry it is the same router without a state."""
    decoder = recurrent(detach_state=False)
    cell = torch_cell(decoder)
    first, second = (router_of(decoder, layer).scorer for layer in ("0", "1"))
    x_BSD, next_BSD, zero_TX = normal(2, 5, 16), normal(2, 5, 16, seed=1), torch.zeros(10, 6)
    seen = visit(router_of(decoder, "0"), x_BSD, shared=decoder.shared)
    state_TX = cell(x_BSD[:].flatten(0, 1) @ first.inward.T, zero_TX.double())
    torch.testing.assert_close(seen.routed.routing.logits_TN, state_TX @ first.weight.T)
    carry = seen.routed.carry
    inward_TX = next_BSD.flatten(0, 1) @ second.inward.T
    for given, state in ((carry, state_TX), (Carry(), zero_TX.double())):
        seen = visit(router_of(decoder, "1"), next_BSD, carry=given, shared=decoder.shared)
        expected_TN = cell(inward_TX, state) @ second.weight.T
        torch.testing.assert_close(seen.routed.routing.logits_TN, expected_TN)


@pytest.mark.parametrize("detach_state", [False, True])
def test_the_recurrent_gradient_can_be_cut(detach_state: bool) -> None:
    """Oracle 11: scores of the second layer have a gradient with respect to the first layer's
    router, unless the state is detached, which changes no score."""
    decoder = recurrent(detach_state)
    x_BSD, next_BSD = normal(2, 5, 16), normal(2, 5, 16, seed=1)
    carry = visit(router_of(decoder, "0"), x_BSD, shared=decoder.shared).routed.carry
    seen = visit(router_of(decoder, "1"), next_BSD, carry=carry, shared=decoder.shared)
    scores = seen.routed.routing.logits_TN
    inward = router_of(decoder, "0").scorer.inward
    (gradient,) = torch.autograd.grad(scores.square().sum(), inward, allow_unused=True)
    if detach_state:
        assert gradient is None
        attached = recurrent(detach_state=False)
        carry = visit(router_of(attached, "0"), x_BSD, shared=attached.shared).routed.carry
        seen = visit(router_of(attached, "1"), next_BSD, carry=carry, shared=attached.shared)
        assert torch.equal(seen.routed.routing.logits_TN, scores)
    else:
        assert float(gradient.abs().max()) > 1e-3


def test_detaching_the_state_changes_earlier_gradients_of_a_model() -> None:
    """Oracle 11: same loss and same gradients of the last scores, other gradients of the first
    layer's router."""
    batch = random_tokens(2, 10)
    attached, detached = (gradients(recurrent(detach), [batch]) for detach in (False, True))
    assert torch.equal(attached.result.loss, detached.result.loss)
    name = "layers.{}.ffn.routers.0.scorer.{}"
    last, first = name.format(1, "weight"), name.format(0, "inward")
    torch.testing.assert_close(attached.gradients[last], detached.gradients[last])
    difference = (attached.gradients[first] - detached.gradients[first]).abs().max()
    assert float(difference / attached.gradients[first].abs().max()) > 0.01


SCORERS = [
    {"kind": "linear", "gating_residual": "prev_layer"},
    {"kind": "mlp"},
    {"kind": "cosine"},
    {"kind": "gru", "state_size": 6},
    {"kind": "centroid"},
]


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer["kind"])
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_routers_learn_nothing(scorer: dict[str, Any], frozen: bool) -> None:
    """Oracle of its own: all parameters of a frozen scorer have the role FROZEN and no gradient, in
    spite of losses; those of others have one. Experts learn in both."""
    router = {"scorer": scorer, "frozen": frozen, "losses": [{"kind": "switch"}, {"kind": "z"}]}
    decoder = model_with(**router, weights={"kind": "renormalize"})
    found = gradients(decoder, [random_tokens(2, 10)]).gradients
    specs = {name: spec for name, _, spec in named_specs(decoder)}
    scoring = {name for name in specs if ".scorer." in name or "router_gru" in name}
    assert len(scoring) >= 2
    is_frozen = frozen or scorer["kind"] == "centroid"
    assert {specs[name].role is Role.FROZEN for name in scoring} == {is_frozen}
    assert scoring.isdisjoint(found) if is_frozen else scoring <= found.keys()
    assert {name for name in specs if name not in scoring and "zero." not in name} <= found.keys()
    assert all(not p.requires_grad for n, p in decoder.named_parameters() if n not in found)


SEGMENTS_BS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 6, 6]])


def document_starts(segments: list[int]) -> list[int]:
    """For each token the slot of the first of its document."""
    return [segments.index(segment) for segment in segments]


def document_router(**options: Any) -> Router:
    """A router that routes documents."""
    scorer = {"kind": "linear", "granularity": "document"} | options.pop("scorer", {})
    return make_router(pool_of(("ffn", 6)), scorer=scorer, losses=[], **options)


@pytest.mark.parametrize("index", [None, [[1, 2, 4, 5, 7], [0, 3, 5, 6, 7]]])
def test_a_document_goes_where_its_first_token_goes(index: list[list[int]] | None) -> None:
    """Oracle of its own: all tokens of a document have the decision, weights and scores of its
    first token in the row, or the first that is present."""
    x_BSD, tokens = normal(2, 8, 6), token_context(2, 8, SEGMENTS_BS)
    if index is not None:
        index_BK = torch.tensor(index)
        tokens = tokens.take(index_BK)
        x_BSD = x_BSD.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, 6))
    starts = [document_starts(segments) for segments in tokens.segment_ids_BS.tolist()]
    assert len({start for row in starts for start in row}) > 2
    first_T = torch.tensor([r * len(row) + start for r, row in enumerate(starts) for start in row])
    alone = visit(make_router(pool_of(("ffn", 6)), losses=[]), x_BSD, tokens).routed.routing
    together = visit(document_router(), x_BSD, tokens).routed.routing
    for name in ("ids_TK", "weights_TK", "logits_TN"):
        assert torch.equal(getattr(together, name), getattr(alone, name)[first_T])
    assert not torch.equal(alone.ids_TK, alone.ids_TK[first_T])


@pytest.mark.parametrize(
    "options",
    [
        {"norm": {"noise": 1.0}},
        {"scorer": {"jitter": 0.9}},
        {"selector": {"kind": "top_k", "top_k": 2, "sampled_tail": 1}},
    ],
    ids=["noise", "jitter", "sampled_tail"],
)
def test_a_document_stays_together_in_training(options: dict[str, Any]) -> None:
    """Oracle of its own: random parts of a decision do not tear a document apart."""
    tokens = token_context(2, 8, SEGMENTS_BS)
    ids_TK = visit(document_router(**options), normal(2, 8, 6), tokens, training=True).ids_TK
    ids_BSK = ids_TK.view(2, 8, -1)
    for segments, ids_SK in zip(SEGMENTS_BS.tolist(), ids_BSK, strict=True):
        assert torch.equal(ids_SK, ids_SK[document_starts(segments)])


DEPTH = {
    "num_layers": 4,
    "sharing": "cycle",
    "num_recursions": 2,
    "router": {"capacities": [1.0, 0.5]},
}


def test_replayed_decisions_are_the_recorded_ones() -> None:
    """Oracle of its own: a model with another router makes the recorded decisions again, in other
    micro-batches and in another order of samples, at every depth; in evaluation it decides itself.
    """
    weights = {"kind": "ones"}  # so that the output depends on decisions only
    recorder = model_with(DEPTH, weights=weights)
    replayer = model_with(
        DEPTH, selector={"kind": "replay", "path": "-", "top_k": 2}, weights=weights
    )
    for layer in replayer.layers:
        initialize(router_of(replayer, layer), 7)
    batch = random_tokens(4, 12)
    record = gradients(recorder, in_parts(batch, 2), keep=ALL_SAMPLES).result
    routings = {s: i for s, i in record.ledger.routings.items() if s.module.startswith("layers.")}
    assert len(routings) == 4
    assert float((routings[Site("layers.0.ffn", 2)] < 0).double().mean()) == 0.5
    table = RoutingTable(
        torch.arange(4), {str(site): ids.to(torch.int16) for site, ids in routings.items()}
    )
    order = torch.tensor([2, 0, 3, 1])
    mixed = type(batch)(**{name: values[order] for name, values in vars(batch).items()})
    again = gradients(replayer, in_parts(mixed, 1), keep=ALL_SAMPLES, replay={"-": table}).result
    torch.testing.assert_close(again.loss, record.loss, rtol=1e-12, atol=0)
    for site, ids_BSK in routings.items():
        assert torch.equal(again.ledger.routings[site], ids_BSK[order])
    alone = gradients(replayer, [batch], keep=ALL_SAMPLES).result
    assert not torch.equal(alone.ledger.routings[Site("layers.0.ffn", 1)], routings[min(routings)])
    router = router_of(replayer, "0")
    x_BSD = normal(4, 12, 16)
    own_TK = (x_BSD.flatten(0, 1) @ router.scorer.weight.T).topk(2).indices
    assert torch.equal(visit(router, x_BSD, replay={"-": table}).ids_TK, own_TK)


def decide(table: RoutingTable, **changes: Any) -> Tensor:
    """Ask for the decisions of rows 0 and 1 at the first site, or of something else."""
    site: Site = changes.get("site", Site("layers.0.ffn", 1))
    tokens: TokenContext = changes.get("tokens", token_context(2, 8, first_sample=3))
    return table.decisions(site, tokens, changes.get("top_k", 2), changes.get("num_experts", 6))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"site": Site("layers.1.ffn", 1)}, "no site layers.1.ffn@1"),
        ({"site": Site("layers.0.ffn", 2)}, "no site layers.0.ffn@2"),
        ({"tokens": token_context(2, 8, first_sample=4)}, "sample 5 "),
        ({"tokens": token_context(2, 8, first_sample=1)}, "sample 1 "),
        ({"top_k": 1}, "2 experts per token"),
        ({"num_experts": 5}, "ids up to 5"),
        ({"tokens": token_context(2, 9, first_sample=3)}, "rows of 8 tokens"),
    ],
)
def test_replay_names_what_is_missing(changes: dict[str, Any], named: str) -> None:
    """Oracle of its own: a record without the site or the sample, or of another shape, is an error
    that says which."""
    ids_RSK = torch.arange(3 * 8 * 2).remainder(6).view(3, 8, 2).to(torch.int16)
    table = RoutingTable(torch.arange(2, 5), {"layers.0.ffn@1": ids_RSK})
    assert torch.equal(decide(table), ids_RSK[1:].flatten(0, 1).long())
    with pytest.raises(DataError, match=named):
        decide(table, **changes)
