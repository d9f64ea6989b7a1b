"""Oracles of selectors that ask the router, against the definitions as loops."""

import math
from fractions import Fraction

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from moebius.model.moe.entropy import Measure
from moebius.model.moe.registry import AnyWeights
from moebius.model.moe.selectors import EntropyHybrid, PercentileRow, TopK, TopP
from tests.model.moe.rig import (
    logits_of_varying_sharpness,
    make_router,
    normal,
    pool_of,
    route_context,
    scores_of,
    visit,
)


def probabilities(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    """Rows from nearly equal to nearly one-hot, and one of equal probabilities, `[T, N]`."""
    logits_TN = logits_of_varying_sharpness(num_tokens, num_experts, seed)[0]
    logits_TN[0] = 0
    return logits_TN.softmax(dim=1)


def chosen_sets(ids_TK: Tensor) -> list[set[int]]:
    """The experts of each token; fails where a token has one twice."""
    sets = []
    for ids_K in ids_TK.tolist():
        present = [expert for expert in ids_K if expert >= 0]
        assert len(set(present)) == len(present), f"an expert twice: {ids_K}"
        sets.append(set(present))
    return sets


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("raw", [0.5, 0.3]),
        ("renormalize", [0.625, 0.375]),
        ("drop_null_renormalize", [1.0, 0.0]),
        ("ones", [1.0, 1.0]),
    ],
)
def test_weights_of_an_ffn_beside_a_zero_expert(kind: str, expected: list[float]) -> None:
    """Oracle 4: chosen with a zero expert an ffn weighs exactly 1 by the released policy, its
    probability by the paper's."""
    probs_TN = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.3, 0.2]], dtype=torch.float64)
    is_null_N = torch.tensor([False, False, True])
    ids_TK = TopK(top_k=2).select(scores_of(probs_TN), route_context(1, 2))
    assert ids_TK.tolist() == [[0, 2], [0, 1]]
    policy = TypeAdapter(AnyWeights).validate_python({"kind": kind})
    weights_TK = policy.weights(probs_TN, ids_TK, is_null_N)
    assert weights_TK[0].tolist() == pytest.approx(expected, abs=1e-15)
    if kind == "drop_null_renormalize":  # without a zero expert it is plain renormalisation
        assert weights_TK[0, 0] == 1.0
        assert weights_TK[1].tolist() == pytest.approx([0.625, 0.375])


@pytest.mark.parametrize("num_experts", [4, 6, 8, 12, 16, 32])
@pytest.mark.parametrize("percentile", ["0.25", "0.5", "0.7", "0.75", "0.9"])
def test_a_row_percentile_is_top_k(num_experts: int, percentile: str) -> None:
    """Oracle 6: the experts above a percentile of their row are `ceil((1 - tau)(N - 1))`, for every
    row, and those the selector takes."""
    tau = float(percentile)
    probs_TN = probabilities(200, num_experts, seed=num_experts)[1:]
    bar_T1 = torch.quantile(probs_TN, tau, dim=1, keepdim=True)
    above = [set(row.nonzero()[:, 0].tolist()) for row in probs_TN > bar_T1]
    selector = PercentileRow(percentile=tau)
    ids_TK = selector.select(scores_of(probs_TN), route_context(1, len(probs_TN)))
    assert chosen_sets(ids_TK) == above
    expected = math.ceil((1 - Fraction(percentile)) * (num_experts - 1))
    assert {len(experts) for experts in above} == {expected}
    assert selector.max_assignments(num_experts) == ids_TK.shape[1] == expected


@pytest.mark.parametrize(("num_experts", "percentile"), [(5, "0.5"), (11, "0.7"), (11, "0.9")])
def test_a_row_percentile_that_is_a_rank(num_experts: int, percentile: str) -> None:
    """Oracle 6: also where `(1 - tau)(N - 1)` is whole, which floating point may miss."""
    exact = (1 - Fraction(percentile)) * (num_experts - 1)
    assert exact.denominator == 1
    assert PercentileRow(percentile=float(percentile)).max_assignments(num_experts) == exact


@pytest.mark.parametrize("num_experts", [4, 8, 16, 32])
@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("crossing", ["include", "exclude"])
def test_top_p_equals_a_loop(num_experts: int, threshold: float, crossing: str) -> None:
    """Oracle 7: the fewest experts above the threshold, or as many as stay within it; never more
    than `floor(p N) + 1`, which equal probabilities need."""
    probs_TN = probabilities(200, num_experts)
    selector = TopP.model_validate({"threshold": threshold, "crossing": crossing, "min_k": 2})
    ids_TK = selector.select(scores_of(probs_TN), route_context(1, len(probs_TN)))
    for probs, experts in zip(probs_TN.tolist(), chosen_sets(ids_TK), strict=True):
        best = sorted(range(num_experts), key=lambda i: (-probs[i], i))
        count, total = 0, 0.0
        while count < num_experts:
            if crossing == "include" and total > threshold:
                break
            if crossing == "exclude" and total + probs[best[count]] > threshold:
                break
            total += probs[best[count]]
            count += 1
        assert experts == set(best[: max(count, 2)])
    most = max(2, math.floor(threshold * num_experts + 1e-9) + (crossing == "include"))
    assert selector.max_assignments(num_experts) == ids_TK.shape[1] == min(most, num_experts)
    if crossing == "include":
        assert len(chosen_sets(ids_TK[:1])[0]) == min(most, num_experts)


def test_top_p_of_equal_probabilities() -> None:
    """Oracle 7: 7 experts for N = 16 and p = .4."""
    probs_TN = torch.full((1, 16), 1 / 16)
    ids_TK = TopP(threshold=0.4).select(scores_of(probs_TN), route_context(1, 1))
    assert ids_TK.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("threshold", [1.0, 1.5])
@pytest.mark.parametrize("crossing", ["include", "exclude"])
def test_top_p_from_one_on_takes_every_expert(threshold: float, crossing: str) -> None:
    """Oracle 7: p >= 1 gives N, also for fp32 rows whose sums are rounded to more than 1."""
    probs_TN = logits_of_varying_sharpness(4000, 16)[0].float().softmax(dim=1)
    assert float(probs_TN.sort(descending=True).values.cumsum(dim=1)[:, -2].max()) > 1
    selector = TopP.model_validate({"threshold": threshold, "crossing": crossing})
    ids_TK = selector.select(scores_of(probs_TN), route_context(1, 4000))
    missing = int((ids_TK < 0).sum())
    assert (ids_TK.shape[1], missing) == (16, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_add_probabilities_up_in_fp32(dtype: torch.dtype) -> None:
    """Oracle 7: sums in bf16 choose other experts, so a router takes fp32 under autocast and of
    bf16 inputs too."""
    router = make_router(
        pool_of(("ffn", 16)), 24, dtype=torch.float32, selector={"kind": "top_p"}, losses=[]
    )
    x_BSD = normal(1, 2000, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routing = visit(router, x_BSD).routed.routing
    logits_TN = x_BSD[0].float() @ router.scorer.weight.detach().T
    expected_TN = logits_TN.softmax(dim=1).sort(dim=1, descending=True).values
    assert routing.probs_TN.dtype == routing.weights_TK.dtype == torch.float32

    def mean_k(sorted_TN: Tensor) -> Tensor:
        return (sorted_TN.cumsum(dim=1) - sorted_TN <= 0.4).sum(dim=1)

    assert torch.equal((routing.ids_TK >= 0).sum(dim=1), mean_k(expected_TN))
    assert not torch.equal(mean_k(expected_TN), mean_k(expected_TN.bfloat16()))


def hybrid_ids(probs_TN: Tensor, rows: int = 1, step: int = 0, **options: object) -> Tensor:
    """Decisions of an entropy-hybrid selector."""
    selector = EntropyHybrid.model_validate(options)
    return selector.select(scores_of(probs_TN), route_context(rows, len(probs_TN) // rows, step))


@pytest.mark.parametrize("measure", ["tsallis", "shannon", "renyi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_hybrid_at_the_ends_of_its_threshold(measure: Measure, dtype: torch.dtype) -> None:
    """Oracle of its own: at threshold 0 all tokens are dense, at 1 none is, not even one with equal
    probabilities, whose entropy is 1 but for rounding."""
    for num_experts in range(3, 65):
        probs_TN = torch.full((2, num_experts), 1 / num_experts, dtype=dtype)
        probs_TN[1] = normal(num_experts).softmax(dim=0)
        dense = hybrid_ids(probs_TN, measure=measure, entropy_threshold=0.0)
        assert chosen_sets(dense) == [set(range(num_experts))] * 2
        sparse = hybrid_ids(probs_TN, measure=measure, entropy_threshold=1.0)
        top_p = TopP(threshold=0.75, crossing="exclude", min_k=2)
        expected = top_p.select(scores_of(probs_TN), route_context(1, 2))
        assert chosen_sets(sparse) == chosen_sets(expected), f"{num_experts} experts"


def test_entropy_hybrid_equals_a_loop() -> None:
    """Oracle of its own: Tsallis entropy of q = 1.1 above the threshold: all; else top-p without
    the crossing expert, and `min_k` where that gives fewer. The threshold may have a schedule."""
    probs_TN = probabilities(300, 8)
    schedule = [[0, 1.0], [10, 0.8]]
    ids_TK = hybrid_ids(probs_TN, step=5, entropy_threshold=schedule, min_k=2, top_p=0.75)
    counts = set()
    for probs, experts in zip(probs_TN.tolist(), chosen_sets(ids_TK), strict=True):
        q = 1.1
        tsallis = (1 - sum(p**q for p in probs)) / (1 - 8 ** (1 - q))
        best = sorted(range(8), key=lambda i: (-probs[i], i))
        within = sum(sum(probs[i] for i in best[: k + 1]) <= 0.75 for k in range(8))
        count = 8 if tsallis > 0.9 else max(within, 2)
        assert experts == set(best[:count])
        counts.add(count)
    assert counts == {2, 3, 4, 8}


def test_dense_share_thins_undecided_tokens_causally() -> None:
    """Oracle of its own: of each row's undecided tokens every fourth is dense, and changing later
    tokens changes no earlier decision."""
    probs_TN = probabilities(3 * 40, 8)[torch.randperm(120, generator=torch.Generator())]
    options = {"dense_share": 0.25, "entropy_threshold": 0.9}
    ids_TK = hybrid_ids(probs_TN, 3, **options)
    undecided = [len(e) == 8 for e in chosen_sets(hybrid_ids(probs_TN, 3, entropy_threshold=0.9))]
    dense = [len(experts) == 8 for experts in chosen_sets(ids_TK)]
    for row in range(3):
        seen = 0
        for token in range(40 * row, 40 * row + 40):
            seen += undecided[token]
            assert dense[token] == (undecided[token] and seen % 4 == 0)
    assert 0 < sum(dense) < sum(undecided) / 3

    for start in (10, 25):
        changed_TN = probs_TN.view(3, 40, 8).clone()
        changed_TN[:, start:] = changed_TN[:, start:].flip(1).flip(2)
        again_TK = hybrid_ids(changed_TN.flatten(0, 1), 3, **options)
        before, after = (ids.view(3, 40, -1)[:, :start] for ids in (ids_TK, again_TK))
        assert torch.equal(before, after)
        assert not torch.equal(ids_TK, again_TK)


def test_sampled_tail_draws_from_what_is_left() -> None:
    """Oracle of its own: in training the last of K is drawn in proportion to the probabilities of
    the experts left; in evaluation it is the next best; other steps draw again."""
    probs_N = torch.tensor([0.4, 0.1, 0.25, 0.05, 0.2], dtype=torch.float64)
    num_tokens = 20_000
    selector, scores = TopK(top_k=2, sampled_tail=1), scores_of(probs_N.expand(num_tokens, -1))
    ids_TK = selector.select(scores, route_context(1, num_tokens, step=3, training=True))
    assert set(ids_TK[:, 0].tolist()) == {0}
    frequency_N = torch.bincount(ids_TK[:, 1], minlength=5) / num_tokens
    expected_N = probs_N.clone()
    expected_N[0] = 0
    expected_N = expected_N / expected_N.sum()
    deviation_N = (expected_N * (1 - expected_N) / num_tokens).sqrt()
    assert bool(((frequency_N - expected_N).abs() <= 4 * deviation_N).all())
    evaluated = selector.select(scores, route_context(1, num_tokens))
    assert evaluated.unique(dim=0).tolist() == [[0, 2]]
    again_TK = selector.select(scores, route_context(1, num_tokens, step=4, training=True))
    assert 0.2 < float((again_TK != ids_TK).any(dim=1).double().mean()) < 0.9


@pytest.mark.parametrize("sampled_tail", [1, 2])
def test_a_sampled_expert_is_never_one_already_chosen(sampled_tail: int) -> None:
    """Oracle of its own: also where the probabilities of the experts left are 0 in fp32, as with
    logits more than 104 apart (a cosine scorer's differ by up to 200)."""
    router = make_router(
        pool_of(("ffn", 4)),
        dtype=torch.float32,
        selector={"kind": "top_k", "top_k": 2, "sampled_tail": sampled_tail},
        losses=[],
    )
    x_BSD = torch.tensor([[[100.0, -100.0, -100.0, -100.0]]]).expand(1, 8, 4)
    chosen_sets(visit(router, x_BSD, training=True).ids_TK)
