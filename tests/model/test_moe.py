"""The MoE layer against loops over tokens and experts, and its losses against closed forms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.context import DepthContext, StepContext, TokenContext
from moebius.model.ledger import ALL_SAMPLES, Ledger
from moebius.model.moe.config import MoEConfig
from moebius.model.moe.layer import MoE
from moebius.model.moe.losses import Load, SwitchLoss, switch_loss
from moebius.model.moe.routing import RouteContext, Scores
from moebius.model.moe.selectors import TopK
from moebius.model.moe.weights import DropNullRenormalize, Raw, Renormalize
from moebius.model.program import Visit
from tests.conftest import MOE
from tests.model.helpers import build, random_batch, rows_of, scale_parameters


def moe_layer(**router: Any) -> MoE:
    """The second MoE layer of a model in float64, with routers that decide clearly."""
    losses = MOE["router"]["losses"]
    executor = build(torch.float64, ffn=MOE | {"router": {"losses": losses} | router})
    scale_parameters(executor, "scorer.weight", 50.0)
    scale_parameters(executor, "experts.zero", 50.0)
    scale_parameters(executor, "experts.", 20.0)
    layer = executor.decoder.layers["1"].ffn
    assert isinstance(layer, MoE)
    return layer


def token_context(rows: int, length: int) -> TokenContext:
    """Full rows of one document each, for sublayers that do not look at positions."""
    segments, dummy = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, 8)
    return TokenContext.of_rows(segments, dummy, dummy, torch.arange(rows))


def select_best(probs_TN: Tensor, top_k: int) -> Tensor:
    """Ids `[T, K]` that the selector chooses from these probabilities."""
    scores = Scores(probs_TN, probs_TN, probs_TN)
    route = RouteContext(
        Visit("1", 1, 1).site("ffn"),
        use=0,
        tokens=token_context(1, len(probs_TN)),
        step=StepContext("topk", Ledger()),
    )
    return TopK(top_k=top_k).select(scores, route)


def with_losses(**switch: Any) -> dict[str, Any]:
    """The feed-forward of the tests' model with other options of its balance loss."""
    losses = [{"kind": "switch", "scope": "sequence"} | switch]
    return MOE | {"router": MOE["router"] | {"losses": losses}}


def run_layer(layer: MoE, x_BSD: Tensor, carry: Carry, valid_BS: Tensor | None = None) -> Any:
    """Output, carry and ledger of one visit."""
    tokens, ledger = token_context(*x_BSD.shape[:2]), Ledger()
    if valid_BS is not None:
        place_BS = tokens.place_BS.masked_fill(~valid_BS, -1)
        tokens = replace(tokens, place_BS=place_BS, valid_BS=valid_BS)
    y_BSD, carry = layer(
        x_BSD, carry, DepthContext(Visit("1", 1, 1), tokens, StepContext("topk", ledger))
    )
    return y_BSD, carry, ledger


def naive_moe(layer: MoE, x_TD: Tensor, previous_TN: Tensor, policy: str) -> Tensor:
    """The definition (MoE++ eq. 1-6), one token and one expert at a time."""
    scorer, experts, zero = layer.routers[0].scorer, layer.experts.groups[0], layer.experts.zero
    outputs = []
    for x, previous in zip(x_TD, previous_TN, strict=True):
        scores = scorer.weight @ x
        if scorer.residual is not None:
            scores = scores + scorer.residual @ previous
        probs = scores.softmax(dim=0)
        chosen = sorted(range(len(probs)), key=lambda i: (-probs[i].item(), i))[:2]
        weights = {i: probs[i] for i in chosen}
        if policy == "drop_null_renormalize":
            weights = {i: (0.0 * p if i == 7 else p) for i, p in weights.items()}
        if policy != "raw":
            total = sum(weights.values())
            weights = {i: p / total for i, p in weights.items()} if total.item() > 0 else weights
        y = torch.zeros_like(x)
        for i, weight in weights.items():
            if i < 4:
                gate, up = (experts.gate_up[i] @ x).chunk(2)
                expert_out = experts.down[i] @ (F.silu(gate) * up)
            elif i < 6:
                first, second = (zero.mix[i - 4] @ x).softmax(dim=0)
                expert_out = first * x + second * zero.constants[i - 4]
            elif i == 6:
                expert_out = x
            else:
                expert_out = torch.zeros_like(x)
            y = y + weight * expert_out
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("policy", ["raw", "renormalize", "drop_null_renormalize"])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_equals_a_loop_over_tokens_and_experts(policy: str, residual: bool) -> None:
    """Outputs and every gradient, for each weight policy, with and without the gating residual."""
    scorer_config = {"kind": "linear", "gating_residual": "prev_layer" if residual else "none"}
    layer = moe_layer(scorer=scorer_config, weights={"kind": policy})
    router = layer.routers[0]
    generator = torch.Generator().manual_seed(3)
    assert (router.scorer.residual is not None) == residual
    if residual:
        with torch.no_grad():
            router.scorer.residual.normal_(0, 0.3, generator=generator)
    x = torch.randn(2, 11, 32, dtype=torch.float64, generator=generator, requires_grad=True)
    previous = torch.randn(2, 11, 8, dtype=torch.float64, generator=generator, requires_grad=True)

    y, carry, ledger = run_layer(layer, x, Carry({"ffn": previous}))
    scores = x @ router.scorer.weight.T
    if residual:
        torch.testing.assert_close(
            carry.router_states["ffn"], scores + previous @ router.scorer.residual.T
        )
    naive = naive_moe(layer, x.flatten(0, 1), previous.flatten(0, 1), policy).view_as(y)
    torch.testing.assert_close(y, naive, rtol=0, atol=1e-9)

    (site_statistics,) = ledger.statistics.values()
    used = site_statistics["expert_tokens"]
    assert float(used.sum()) == 2 * 22
    assert int((used > 0).sum()) >= 7, "the comparison must exercise nearly all kinds of experts"

    # Gradients without the attached balance loss, which the naive loop does not have.
    router.config = router.config.model_copy(update={"losses": ()})
    y, _, _ = run_layer(layer, x, Carry({"ffn": previous}))
    inputs = [x, *([previous] if residual else []), *layer.parameters()]
    direction = torch.randn(y.shape, generator=generator)
    got = torch.autograd.grad((y * direction).sum(), inputs)
    expected = torch.autograd.grad((naive * direction).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_released_policy_gives_an_ffn_beside_a_zero_expert_weight_one() -> None:
    probs = torch.tensor([[0.5, 0.2, 0.3]])
    is_null = torch.tensor([False, False, True])
    ids = select_best(probs, top_k=2)
    assert ids.tolist() == [[0, 2]]
    weights = {
        policy.kind: policy.weights(probs, ids, is_null)[0].tolist()
        for policy in (Raw(), Renormalize(), DropNullRenormalize())
    }
    assert weights["raw"] == pytest.approx([0.5, 0.3])
    assert weights["renormalize"] == pytest.approx([0.625, 0.375])
    assert weights["drop_null_renormalize"] == [1.0, 0.0]


def test_only_zero_experts_chosen_gives_weights_zero_and_finite_gradients() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0]], requires_grad=True)
    is_null = torch.tensor([False, True, True])
    ids = torch.tensor([[1, 2]])
    weights = DropNullRenormalize().weights(logits.softmax(dim=1), ids, is_null)
    assert weights.tolist() == [[0.0, 0.0]]
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    assert bool(gradient.isfinite().all())


def test_of_equal_probabilities_the_lower_id_wins() -> None:
    probs = torch.full((1, 6), 1 / 6)
    assert select_best(probs, top_k=3).tolist() == [[0, 1, 2]]


def test_empty_slots_are_neither_computed_nor_counted() -> None:
    """Dropping the last tokens of a row and marking them empty is the same for the others."""
    layer = moe_layer()
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True] * 4 + [False] * 2])
    y, _, ledger = run_layer(layer, x, Carry(), valid)
    y_short, _, ledger_short = run_layer(layer, x[:, :4], Carry())
    torch.testing.assert_close(y[:, :4], y_short)
    assert torch.equal(y[:, 4:], torch.zeros_like(y[:, 4:]))
    (full,), (short,) = ledger.statistics.values(), ledger_short.statistics.values()
    assert torch.equal(full["expert_tokens"], short["expert_tokens"])
    assert int(full["tokens"]) == 4
    assert full.keys() == short.keys()
    for name, sums in full.items():
        torch.testing.assert_close(sums, short[name])
    torch.testing.assert_close(ledger.losses["switch"], ledger_short.losses["switch"])


@pytest.mark.parametrize("tau", [1.0, 0.75, 0.1])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_one_at_balance(tau: float, top_k: int) -> None:
    """For any K, pool and tau: `eta_i f_i` equal everywhere, probabilities following the load."""
    eta = MoEConfig.model_validate(MOE).pool.load_weights(tau)
    assert eta.tolist() == pytest.approx([1.0] * 4 + [tau] * 4)
    load = (1 / eta) / (1 / eta).sum()
    tokens = torch.tensor([1000.0])
    loss = switch_loss(Load(load[None] * top_k * 1000, load[None] * 1000, tokens), eta)
    assert float(loss) == pytest.approx(1.0, rel=1e-5)


def test_paper_scale_is_the_published_value_at_balance() -> None:
    """MoE++ 16+4 experts, K = 2, tau = .75: the loss as published is .09375 where ours is 1."""
    pool = [
        {"kind": "ffn", "count": 16, "intermediate_size": 8},
        {"kind": "constant", "count": 2},
        {"kind": "copy"},
        {"kind": "zero"},
    ]
    moe = MoEConfig.model_validate(MOE | {"experts": pool})
    loss = SwitchLoss(tau=0.75, coefficient=1.0, published_scale="moepp")
    published = 2 * 0.75 / (0.75 * 16 + 4)
    assert published == 0.09375
    assert loss.unit_coefficient(moe.pool, moe.num_assignments) == pytest.approx(published)
    ours = SwitchLoss(tau=0.75, coefficient=1.0)
    assert ours.unit_coefficient(moe.pool, moe.num_assignments) == 1.0


def test_balance_loss_drives_the_ffn_share_to_tau() -> None:
    """A linear router trained on the loss alone ends at `tau E / (tau E + Z)` of the load."""
    torch.manual_seed(0)
    num_ffn, num_zero, top_k, tau = 16, 4, 2, 0.25
    x, weight = torch.randn(2048, 32), torch.randn(20, 32) * 0.02
    eta = torch.tensor([1.0] * num_ffn + [tau] * num_zero)
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    shares = []
    for step in range(300):
        probs = (x @ weight.T).softmax(dim=1)
        counts = torch.bincount(probs.topk(top_k).indices.flatten(), minlength=20).float()
        load = Load(counts[None], probs.sum(0)[None], torch.tensor([2048.0]))
        loss = switch_loss(load, eta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 200:
            shares.append(float(counts[:num_ffn].sum() / counts.sum()))
    expected = tau * num_ffn / (tau * num_ffn + num_zero)
    assert sum(shares) / len(shares) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_accumulation_changes_nothing(routed: bool, scope: str) -> None:
    """1 x 8, 2 x 4 and 8 x 1 rows: the same loss, auxiliary losses, counts and gradients."""
    depth = {
        "num_layers": 6,
        "sharing": "middle_cycle",
        "num_recursions": 2,
        "router": {"causal": {"coefficient": 0.5}} if routed else None,
    }
    ffn = with_losses(coefficient=0.5, tau=0.75, scope=scope)
    whole = random_batch(8, 16)
    results = []
    for rows in (8, 4, 1):
        executor = build(torch.float64, depth=depth, ffn=ffn)
        # A step before: without its load a loss of scope `global` has no gradient.
        before = executor.accumulate_gradients([random_batch(8, 16, seed=1)])
        executor.decoder.update_routers(before.ledger, 0)
        executor.decoder.zero_grad()
        parts = [rows_of(whole, start, start + rows) for start in range(0, 8, rows)]
        result = executor.accumulate_gradients(parts)
        gradients = [p.grad for p in executor.decoder.parameters() if p.grad is not None]
        results.append((result, gradients))
    (first, first_gradients), *others = results
    assert first.ledger.losses.keys() == ({"switch", "depth"} if routed else {"switch"})
    for result, gradients in others:
        torch.testing.assert_close(result.loss, first.loss, rtol=0, atol=1e-12)
        for name, loss in first.ledger.losses.items():
            torch.testing.assert_close(result.ledger.losses[name], loss, rtol=1e-6, atol=0)
        for site, sums in first.ledger.statistics.items():
            assert result.ledger.statistics[site].keys() == sums.keys()
            for key, value in sums.items():
                got = result.ledger.statistics[site][key]
                # Sums of fractions depend on the order of their terms, counts do not.
                real = key in ("prob_sums", "entropy", "logsumexp_squares", "gates")
                tolerance = 1e-9 if real else 0.0
                torch.testing.assert_close(got, value, rtol=tolerance, atol=0)
        assert len(gradients) == len(first_gradients)
        for a, b in zip(gradients, first_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_attached_losses_enter_the_gradient_with_their_coefficient() -> None:
    """Doubling the coefficient doubles the router gradient that the balance loss contributes."""

    def router_gradient(coefficient: float) -> Tensor:
        executor = build(torch.float64, ffn=with_losses(coefficient=coefficient))
        executor.accumulate_gradients([random_batch(2, 16)])
        gradient = executor.decoder.get_parameter("layers.1.ffn.routers.0.scorer.weight").grad
        assert gradient is not None
        return gradient

    without, once, twice = (router_gradient(c) for c in (0.0, 1.0, 2.0))
    assert float((once - without).abs().max()) > 1e-6
    torch.testing.assert_close(twice - without, 2 * (once - without), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("capacity", [None, {"factor": 0.8}])
def test_what_was_decided_is_not_decided_again(capacity: dict[str, Any] | None) -> None:
    """As where a visit is computed again: scores that came out otherwise change no choice."""
    router = MOE["router"] | {"capacity": capacity}
    executor = build(ffn=MOE | {"router": router}, depth={"num_layers": 2})
    batch = random_batch(2, 16)

    def executed(step: StepContext) -> list[list[float]]:
        ledger = Ledger(keep=ALL_SAMPLES)
        executor.hidden(batch, replace(step, ledger=ledger))
        loads = [sums["executed_tokens"].tolist() for sums in ledger.statistics.values()]
        return [*loads, *(ids.flatten().tolist() for ids in ledger.routings.values())]

    fresh = StepContext("topk", Ledger(), training=True)
    again = replace(fresh, decisions={})
    first = executed(again)
    assert executed(fresh) == first
    for name, parameter in executor.decoder.named_parameters():
        if "scorer" in name:
            parameter.data.neg_()
    assert executed(again) == first
    assert executed(fresh) != first
