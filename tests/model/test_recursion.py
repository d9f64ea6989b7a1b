"""Routing over depth against a per-token reference, its limits, and what it may see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.model.carry import Carry
from moebius.model.context import DepthContext, Mode, StepContext, TokenContext
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.program import Visit
from moebius.model.recursion.expert_choice import ExpertChoice
from moebius.model.recursion.routing import LoopState, Selection
from tests.model.helpers import batch_of, build, hidden, random_batch, scale_parameters

DENSE = {"kind": "dense", "intermediate_size": 48}


def routed(num_recursions: int = 3, **router: Any) -> dict[str, Any]:
    """A depth config with two shared layers between two unique ones."""
    return {
        "num_layers": 2 + 2 * num_recursions,
        "sharing": "middle_cycle",
        "num_recursions": num_recursions,
        "router": router,
    }


def lively(executor: LocalExecutor) -> LocalExecutor:
    """The same model with larger weights: selections are clear and every path matters."""
    scale_parameters(executor, "attention", 5.0)
    scale_parameters(executor, "ffn", 5.0)
    scale_parameters(executor, "depth_routers", 30.0)
    scale_parameters(executor, "embedding", 20.0)
    return executor


def loop_router(executor: LocalExecutor) -> ExpertChoice:
    """The routing of the model's one loop."""
    (routing,) = executor.decoder.depth_routers
    assert isinstance(routing, ExpertChoice)
    return routing


def reference(executor: LocalExecutor, batch: TokenBatch, mode: Mode) -> Tensor:
    """Mixture-of-Recursions one row and one token at a time, with Python lists of survivors.

    The block itself is called on exactly the surviving tokens of one row, with no slot empty.
    """
    decoder = executor.decoder
    depth = decoder.config.depth
    assert depth.router is not None
    cos_BSC, sin_BSC = decoder.rope(batch.positions_BS)
    rows = []
    for b in range(batch.tokens_BS.shape[0]):
        x = decoder.embedding(batch.tokens_BS[b : b + 1])
        length = x.shape[1]
        scores: list[Tensor | None] = [None] * length

        def run(
            block_input: Tensor,
            where: list[int],
            names: list[str],
            b: int = b,
            scores: Any = scores,
        ) -> Tensor:
            carry = Carry()
            if scores[where[0]] is not None:
                carry = Carry({"ffn": torch.stack([scores[t] for t in where])[None]})
            tokens = TokenContext(
                batch.segment_ids_BS[b : b + 1, where],
                cos_BSC[b : b + 1, where],
                sin_BSC[b : b + 1, where],
                batch.sample_ids_B[b : b + 1],
                place_BS=torch.tensor([where]),
                row_length=len(scores),
            )
            for name in names:
                context = DepthContext(Visit(name, 1, 0), tokens, StepContext(mode, Ledger()))
                block_input, carry = decoder.layers[name](block_input, carry, context)
            if "ffn" in carry.router_states:
                for slot, t in enumerate(where):
                    scores[t] = carry.router_states["ffn"][0, slot]
            return block_input

        everyone = list(range(length))
        x = run(x, everyone, ["0"])
        survivors = everyone
        for number, scorer in enumerate(loop_router(executor).scorers):
            logits = {t: float(scorer.weight[0] @ x[0, t]) for t in survivors}
            if mode == "topk":
                capacity = (depth.num_recursions - number) / depth.num_recursions
                k = max(1, int(capacity * length + 1e-9))
                best = sorted(survivors, key=lambda t: (-logits[t], t))[:k]
                survivors = sorted(best)
            else:
                survivors = [t for t in survivors if logits[t] >= 0]
            if not survivors:
                break
            inner = x[:, survivors]
            outer = run(inner, survivors, ["1", "2"])
            gates = depth.router.alpha * torch.tensor([logits[t] for t in survivors]).sigmoid()
            x = x.clone()
            for slot, t in enumerate(survivors):
                update = outer[0, slot]
                if depth.router.gating == "additive":
                    update = update - inner[0, slot]
                x[0, t] = x[0, t] + gates[slot] * update
        rows.append(decoder.norm(run(x, everyone, ["3"])))
    return torch.cat(rows)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("gating", ["weighted", "additive"])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_executor_equals_the_per_token_reference(mode: Mode, gating: str, ffn: str) -> None:
    """Selected tokens, positions, carry, gates: all rows, both modes, dense and MoE blocks."""
    changes = {"ffn": DENSE} if ffn == "dense" else {}
    executor = build(torch.float64, depth=routed(gating=gating, alpha=0.5), **changes)
    scale_parameters(lively(executor), "residual", 1.0)
    with torch.no_grad():
        for name, parameter in executor.decoder.named_parameters():
            if name.endswith("residual"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    batch = random_batch(3, 12)
    with torch.no_grad():
        ledger = Ledger()
        got = executor.hidden(batch, StepContext(mode, ledger))
        torch.testing.assert_close(got, reference(executor, batch, mode), rtol=0, atol=1e-6)
    selected = [
        int(sums["selected"])
        for site, sums in sorted(ledger.statistics.items())
        if site.module == "depth.0"
    ]
    assert 3 * 12 >= selected[0] > selected[-1] > 0, "the comparison must drop tokens"


@contextmanager
def admissions(executor: LocalExecutor) -> Iterator[list[tuple[LoopState, Selection]]]:
    """The state that every decision was made on and the decision, caught on its way out."""
    routing, caught = loop_router(executor), []
    admit = routing.admit

    def admit_and_keep(state: LoopState, *args: Any) -> tuple[LoopState, Selection]:
        after, chosen = admit(state, *args)
        caught.append((state, chosen))
        return after, chosen

    with patch.object(routing, "admit", admit_and_keep):
        yield caught


def selections(executor: LocalExecutor, batch: TokenBatch, mode: Mode) -> list[Tensor]:
    """The index of every depth."""
    with torch.no_grad(), admissions(executor) as caught:
        hidden(executor, batch, mode)
    return [chosen.index_BK for _, chosen in caught]


@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_a_token_that_left_does_not_come_back(mode: Mode) -> None:
    """Indices are sorted and each depth's tokens are among those of the depth before."""
    executor = lively(build(depth=routed()))
    indices = selections(executor, random_batch(4, 24), mode)
    assert len(indices) == 3
    previous = [set(range(24))] * 4
    for depth, index in enumerate(indices):
        for b, row in enumerate(index.tolist()):
            kept = [t for t in row if t >= 0]
            assert kept == sorted(kept)
            assert row[len(kept) :] == [-1] * (len(row) - len(kept))
            assert set(kept) <= previous[b]
            previous[b] = set(kept)
            if mode == "topk":
                assert len(kept) == [24, 16, 8][depth]


def unrouted(executor: LocalExecutor, **changes: Any) -> LocalExecutor:
    """A model without depth routers and with the weights of one that has them."""
    depth = executor.decoder.config.depth.model_dump() | {"router": None}
    plain = build(torch.float64, **({"depth": depth} | changes))
    weights = executor.decoder.state_dict()
    plain.decoder.load_state_dict({name: weights[name] for name in plain.decoder.state_dict()})
    return plain


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_full_capacity_and_gate_one_is_plain_recursion(ffn: str) -> None:
    """c = 1, gate = 1, additive: the same hidden states and gradients as a loop without routers."""
    changes = {"ffn": DENSE} if ffn == "dense" else {}
    router = {
        "capacities": [1.0, 1.0, 1.0],
        "activation": "constant",
        "alpha": 1.0,
        "gating": "additive",
        "causal": {"coefficient": 0.0},
    }
    executor = lively(build(torch.float64, depth=routed(**router), **changes))
    plain = unrouted(executor, **changes)
    batch = random_batch(2, 10)
    torch.testing.assert_close(hidden(executor, batch), hidden(plain, batch), rtol=0, atol=1e-10)
    executor.accumulate_gradients([batch])
    plain.accumulate_gradients([batch])
    parameters = dict(executor.decoder.named_parameters())
    for name, parameter in plain.decoder.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_one_recursion_is_a_model_without_sharing(sharing: str) -> None:
    depth = {"num_layers": 4, "sharing": sharing, "num_recursions": 1}
    shared = lively(build(torch.float64, depth=depth, ffn=DENSE))
    dense = unrouted(shared, depth={"num_layers": 4}, ffn=DENSE)
    batch = random_batch(2, 10)
    assert torch.equal(hidden(shared, batch), hidden(dense, batch))


def test_plain_recursion_is_the_unrolled_model_with_copied_weights() -> None:
    """N_r passes of shared layers equal a deep model whose layers are copies of them."""
    depth = {"num_layers": 8, "sharing": "middle_cycle", "num_recursions": 3}
    shared = lively(build(torch.float64, depth=depth, ffn=DENSE))
    unrolled = build(torch.float64, depth={"num_layers": 8}, ffn=DENSE)
    layers = [visit.layer for visit in shared.decoder.program.visits]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            unrolled.decoder.layers[str(index)].load_state_dict(
                shared.decoder.layers[layer].state_dict()
            )
        unrolled.decoder.embedding.load_state_dict(shared.decoder.embedding.state_dict())
    batch = random_batch(2, 10)
    assert torch.equal(hidden(shared, batch), hidden(unrolled, batch))


def change_after(executor: LocalExecutor, mode: Mode, position: int) -> tuple[Tensor, Tensor]:
    """Hidden states up to a position, before and after every later token is replaced."""
    tokens = random_batch(4, 20).tokens_BS
    other = tokens.clone()
    other[:, position + 1 :] = (other[:, position + 1 :] + 101) % 512
    with torch.no_grad():
        before = hidden(executor, batch_of(tokens), mode)[:, : position + 1]
        after = hidden(executor, batch_of(other), mode)[:, : position + 1]
    return before, after


@pytest.mark.parametrize("position", [0, 7, 18])
def test_threshold_selection_is_causal(position: int) -> None:
    executor = lively(build(torch.float64, depth=routed(alpha=0.5)))
    before, after = change_after(executor, "threshold", position)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)


def test_topk_selection_sees_the_future() -> None:
    """The published selection compares a token with later ones; this is a fact, not a wish."""
    executor = lively(build(torch.float64, depth=routed(alpha=0.5)))
    before, after = change_after(executor, "topk", 7)
    assert float((before - after).abs().max()) > 1e-3


def test_without_depth_routing_both_modes_are_the_same_and_causal() -> None:
    depth = {"num_layers": 6, "sharing": "middle_cycle", "num_recursions": 2}
    executor = lively(build(torch.float64, depth=depth))
    batch = random_batch(2, 12)
    assert torch.equal(hidden(executor, batch, "topk"), hidden(executor, batch, "threshold"))
    before, after = change_after(executor, "topk", 7)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)


def test_threshold_mode_survives_a_depth_that_nobody_enters() -> None:
    """All logits negative: the loop changes nothing, and nothing is NaN."""
    executor = build(torch.float64, depth=routed())
    with torch.no_grad():
        executor.decoder.embedding.weight.abs_()
        executor.decoder.get_parameter("depth_routers.0.scorers.0.weight").fill_(-1.0)
        for name, parameter in executor.decoder.named_parameters():
            if name.startswith("layers.0"):
                parameter.zero_()
    batch = random_batch(2, 8)
    ledger = Ledger()
    got = executor.hidden(batch, StepContext("threshold", ledger))
    assert bool(got.isfinite().all())
    selected = [int(s["selected"]) for s in ledger.statistics.values() if "selected" in s]
    assert selected == [0, 0, 0]
    skipped = build(torch.float64, depth={"num_layers": 2})
    weights = executor.decoder.state_dict()
    skipped.decoder.load_state_dict(
        {
            name: weights[name.replace("layers.1.", "layers.3.")]
            for name in skipped.decoder.state_dict()
        }
    )
    # The model of the first and last layer alone: neither MoE carry nor stream may have changed.
    torch.testing.assert_close(got, hidden(skipped, batch), rtol=0, atol=1e-12)


def test_auxiliary_loss_teaches_the_threshold_to_select_like_topk() -> None:
    """A few steps on the auxiliary loss alone raise the agreement of the two selections."""
    executor = build(depth=routed(num_recursions=2, causal={"coefficient": 1.0}), ffn=DENSE)
    scale_parameters(executor, "embedding", 20.0)
    routers = list(executor.decoder.depth_routers.parameters())
    optimizer = torch.optim.Adam(routers, lr=0.02)
    batch = random_batch(2, 12)  # fewer tokens than dimensions: a linear router can separate them
    agreements = []
    for _ in range(150):
        result = executor.accumulate_gradients([batch])
        optimizer.step()
        optimizer.zero_grad()
        sums = [s for s in result.ledger.statistics.values() if "agreement" in s]
        agreed = sum(int(s["agreement"]) for s in sums)
        agreements.append(agreed / sum(int(s["candidates"]) for s in sums))
    assert agreements[0] < 0.8
    assert agreements[-1] > 0.95


def test_auxiliary_loss_is_the_cross_entropy_over_the_candidates() -> None:
    """Mean over rows and candidates of each depth, summed over depths, times the coefficient."""
    executor = lively(build(torch.float64, depth=routed(causal={"coefficient": 0.5})))
    ledger = Ledger(share=0.25)
    with admissions(executor) as caught:
        executor.hidden(random_batch(2, 9), StepContext("topk", ledger))
    total = 0.0
    for scorer, (state, chosen) in zip(loop_router(executor).scorers, caught, strict=True):
        terms = []
        for b in range(2):
            for t in state.active_BK[b].tolist():
                logit = scorer.weight[0] @ state.stream_BSD[b, t]
                target = float(t in chosen.index_BK[b].tolist())
                # log p and log (1 - p), exact also where p rounds to 1
                log_p, log_q = F.logsigmoid(logit), F.logsigmoid(-logit)
                terms.append(-(target * log_p + (1 - target) * log_q))
        total += torch.stack(terms).mean().item()
    assert float(ledger.losses["depth"]) == pytest.approx(0.5 * 0.25 * total, rel=1e-9)
