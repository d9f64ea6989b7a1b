"""Plans: what is worked out from simulated processes, against closed forms and naive ways."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moebius.config import Problem
from moebius.errors import ConfigError, LayoutError
from moebius.model.cost import forward_flops, planned_work
from moebius.model.decoder import Decoder
from moebius.model.moe.experts import DispatchedExperts
from moebius.parallel.comm import Traffic
from moebius.parallel.config import ParallelConfig
from moebius.parallel.planner.device import Link, device_profile, known_profiles
from moebius.parallel.planner.estimate import IMBALANCE, make_plan
from moebius.parallel.planner.flops import flops_of
from moebius.parallel.planner.idle import idle_share
from moebius.parallel.planner.links import Reach, exchanges, groups_of, link_of, seconds
from moebius.parallel.planner.search import search, why_it_loses
from moebius.parallel.planner.simulate import simulate
from moebius.parallel.planner.whole_step import use_of_whole_step
from moebius.parallel.planner.world import SimulatedMesh
from moebius.trainer.muon import MuonConfig
from moebius.trainer.optim import OptimConfig, build_optimizer
from tests.parallel.planner.test_simulation import (
    DEALT,
    DENSE,
    FFN,
    LENGTH,
    MOE,
    MOEPP_MOR,
    MOR,
    Case,
)
from tests.parity.models import moe

CPU = device_profile("cpu")
INTERLEAVED = {"schedule": "interleaved_1f1b", "stages_per_rank": 2}


@pytest.mark.parametrize(
    "case",
    [
        Case(DENSE, 2, rows=32),
        Case(MOE, 2, {"ep": 2}, rows=32),
        Case(MOE, 2, {"data": "fsdp2"}, rows=16),
        Case(MOR, 2, {"pp": 2}, rows=6, micro_batch=1),
        Case(MOR, 2, {"pp": 2, "pipeline": INTERLEAVED}, rows=10, micro_batch=1),
        Case(MOR, 2, {"pp": 2, "pipeline": {"schedule": "gpipe"}}, rows=3, micro_batch=1),
        pytest.param(Case(MOEPP_MOR, 2, {"rp": 2}, rows=12, micro_batch=1), marks=pytest.mark.slow),
        pytest.param(
            Case(MOEPP_MOR, 2, {"rp": 2, "ring": {"merge": True}}, rows=24, micro_batch=1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dense", "ep", "fsdp2", "1f1b", "interleaved", "gpipe", "ring", "merged"],
)
def test_a_long_step_repeats_a_short_one(case: Case) -> None:
    """To the byte in traffic; what more micro-batches hold are the token ids of the batch."""
    for short, whole in zip(use_of_whole_step(case.job), simulate(case.job), strict=True):
        assert short.traffic.sent == whole.traffic.sent
        assert short.traffic.calls == whole.traffic.calls
        assert short.memory.total == pytest.approx(whole.memory.total, rel=0.05)


def test_a_pipeline_holds_no_more_with_more_micro_batches() -> None:
    """What was sent is let go of once the other process is known to have it."""
    few, many = (Case(MOR, 2, {"pp": 2}, rows=n, micro_batch=1).job for n in (4, 12))
    for short, long in zip(simulate(few), simulate(many), strict=True):
        token_ids = 5 * 8 * LENGTH * (12 - 4)
        assert long.memory.total - short.memory.total < 2 * token_ids


def test_tokens_on_a_ring_are_told_apart() -> None:
    """Parcels wait on their way around; one process alone exchanges nothing."""
    on_ring = simulate(Case(MOEPP_MOR, 2, {"rp": 2}, rows=2, micro_batch=1).job)[0].passes
    parcel = LENGTH * 64 * 4
    assert parcel <= on_ring.exchanged < on_ring.activations
    assert simulate(Case(MOEPP_MOR, rows=2, micro_batch=1).job)[0].passes.exchanged == 0


def test_seconds_on_a_link() -> None:
    """The terms of ring algorithms, and a latency for each call."""
    link = Link(bandwidth=1e9, latency=1e-3)
    assert seconds("all_reduce", 4_000_000, 2, 4, link) == pytest.approx(0.006 + 0.002)
    assert seconds("reduce_scatter", 4_000_000, 1, 4, link) == pytest.approx(0.003 + 0.001)
    assert seconds("all_gather", 1_000_000, 1, 4, link) == pytest.approx(0.003 + 0.001)
    assert seconds("all_to_all", 5_000_000, 1, 4, link) == pytest.approx(0.005 + 0.001)


def test_axes_that_leave_a_node_use_the_network() -> None:
    """16 processes of nodes of 8: tp stays inside, data does not, experts do where they fit."""
    traffic = Traffic()
    for axis in ("tp", "data", "experts", "world"):
        traffic.add(axis, "all_reduce", 1000)
    for ep, leaves in ((8, False), (16, True)):
        mesh = SimulatedMesh(ParallelConfig(tp=2, ep=ep), 3, 16)
        found = {e.axis: e for e in exchanges(traffic, mesh, device_profile("h100"))}
        assert not found["tp"].across_nodes
        assert found["data"].across_nodes
        assert found["world"].across_nodes
        assert found["experts"].across_nodes == leaves
        assert (found["tp"].size, found["data"].size, found["experts"].size) == (2, 8, ep)


def test_rings_share_the_network_cards_of_a_node() -> None:
    """A group with four processes on each of two nodes has four rings between them, as long as the
    links inside a node are no slower; what goes to one process has one card."""
    h100 = device_profile("h100")
    mesh = SimulatedMesh(ParallelConfig(tp=2), 0, 16)
    data = groups_of(mesh, h100.devices_per_node)["data"]
    assert data == Reach(8, True, 4)
    assert link_of(data, "all_reduce", h100).bandwidth == 4 * h100.network.bandwidth
    assert link_of(data, "all_to_all", h100).bandwidth == h100.network.bandwidth
    slow = h100.model_copy(update={"node": Link(bandwidth=1e9, latency=1e-5)})
    assert link_of(data, "all_gather", slow).bandwidth == 1e9
    inside = groups_of(mesh, h100.devices_per_node)["tp"]
    assert link_of(inside, "all_reduce", h100) == h100.node


def test_waiting_is_that_of_the_schedule() -> None:
    """1F1B over two stages, of which the head makes the last one longer: the first one waits for it
    in every micro-batch, and it for the first one once. Of many micro-batches the waiting of few is
    continued."""
    layers = DENSE | {"depth": {"num_layers": 8}, "tie_embeddings": False}
    for rows in (8, 300):
        case = Case(layers, 2, {"pp": 2, "pipeline": {"costs": [1] * 8 + [0]}}, rows, 1)
        with torch.device("meta"):
            decoder = Decoder(case.job.model)
        head = decoder.head_flops(LENGTH)
        first = (forward_flops(decoder, planned_work(decoder, 1, LENGTH)) - head) / 2
        last = first + head
        exact = 1 - rows * (first + last) / (2 * (first + rows * last))
        assert idle_share(case.job, decoder) == pytest.approx(exact, rel=1e-6)
    assert idle_share(Case(DENSE, 2).job, decoder) == 0.0


def test_a_plan_adds_up() -> None:
    """Its parts, and what it says of them."""
    plan = make_plan(Case(MOE, 4, {"ep": 2}).job, CPU)
    assert plan.num_parameters * 4 + plan.num_parameters * 8 <= plan.checkpoint_bytes
    assert plan.checkpoint_bytes == pytest.approx(12 * plan.num_parameters, rel=0.01)
    parts = plan.compute_seconds + plan.idle_seconds + plan.exchange_seconds + plan.update_seconds
    assert plan.step_seconds == pytest.approx(parts)
    assert plan.mfu * plan.step_seconds * 4 * CPU.flops_fp32 == pytest.approx(plan.flops.model)
    hours = CPU.mean_hours_between_failures / 4
    assert plan.save_interval == pytest.approx(math.sqrt(2 * plan.save_seconds * 3600 * hours))
    # Of 8 rows in 4 micro-batches of 2: so many tokens, two assignments each, kept in all layers.
    rows = 2 * LENGTH * 2 * 4
    kept = rows * (2 * 64 + 3 * 64) * 4
    assert plan.headroom == pytest.approx((IMBALANCE - 1) * kept)
    assert any("1.25 times the mean" in line for line in plan.assumptions())


def test_recompute_costs_a_forward_pass_and_saves_memory() -> None:
    """As the model computes it."""
    plain, again = (
        make_plan(Case(DENSE, more={"recompute": recompute}).job, CPU)
        for recompute in ("none", "full")
    )
    assert again.flops.model == plain.flops.model
    with torch.device("meta"):
        decoder = Decoder(plain.job.model)
    head = decoder.head_flops(8 * LENGTH)
    assert plain.flops.again == 0
    assert again.flops.again == plain.flops.model / 3 - head
    assert again.compute_seconds > plain.compute_seconds
    assert again.usage.passes.activations < plain.usage.passes.activations


def test_what_is_computed_again_is_counted() -> None:
    """selective: the two products of attention. A ring: all visits of the loop, whatever
    `train.recompute` says, and once more with `full`."""
    case = Case(DENSE, more={"recompute": "selective"})
    with torch.device("meta"):
        dense, ring = Decoder(case.job.model), Decoder(Case(MOEPP_MOR).job.model)
    assert flops_of(case.job, dense).again == 4 * 8 * (4 * LENGTH * LENGTH * 4 * 16)
    kept, plain, full = (
        flops_of(Case(MOEPP_MOR, 2, {"rp": 2, "ring": {"recompute": on}}, more=more).job, ring)
        for on, more in ((False, {}), (True, {}), (True, {"recompute": "full"}))
    )
    alone = flops_of(Case(MOEPP_MOR, more={"recompute": "full"}).job, ring)
    assert kept.again == 0
    assert 0 < plain.again < alone.again
    assert full.again == alone.again + plain.again


def test_the_process_with_most_rows_sets_the_time() -> None:
    """10 rows on 4 processes take as long as 12."""
    uneven, even = (make_plan(Case(DENSE, 4, rows=rows).job, CPU) for rows in (10, 12))
    assert uneven.compute_seconds == pytest.approx(even.compute_seconds)
    assert uneven.tokens_per_day < even.tokens_per_day


def test_products_of_the_optimizer_take_time() -> None:
    """Muon's, of each matrix of m x n: 5 steps of 4 m^2 n + 2 m^3, m the shorter side."""
    muon = MuonConfig(roles=("matrix",))
    job = replace(
        Case(DENSE).job, make_optimizer=partial(build_optimizer, config=OptimConfig(muon=muon))
    )
    plan, plain = make_plan(job, CPU), make_plan(Case(DENSE).job, CPU)
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (64, 128), (64, 128), (64, 128)]
    products = sum(4 * m * m * n + 2 * m**3 for m, n in shapes)
    assert plan.usage.update_flops == 4 * 5 * products
    assert plain.usage.update_flops == 0
    moved = 3.5 * plan.usage.update.optimizer / CPU.memory_bandwidth
    assert plan.update_seconds == pytest.approx(moved + plan.usage.update_flops / plan.rate)


def test_fsdp2_holds_its_share_and_what_it_has_gathered() -> None:
    """Weights, gradients and moments are shared out, activations are those of other schemes."""
    whole, shared = (
        make_plan(Case(DENSE, 4, {"data": data}, micro_batch=1).job, CPU)
        for data in ("ddp", "fsdp2")
    )
    assert shared.memory.weights == pytest.approx(whole.memory.weights / 4, rel=0.05)
    assert shared.memory.optimizer == pytest.approx(whole.memory.optimizer / 4, rel=0.05)
    assert shared.usage.passes.activations > whole.usage.passes.activations
    assert {e.axis for e in shared.exchanges} >= {"shard"}


def test_fsdp2_gathers_spread_experts_among_those_that_hold_the_same() -> None:
    """8 processes, ep 2: experts come from 4, twice a step at most, all else from 8."""
    plan = make_plan(Case(MOE, 8, {"data": "fsdp2", "ep": 2}, micro_batch=1).job, CPU)
    sizes = {e.axis: e.size for e in plan.exchanges if e.operation == "all_gather"}
    assert sizes == {"shard": 8, "expert_shard": 4}
    with torch.device("meta"):
        decoder = Decoder(plan.job.model)
    pools = [m for m in decoder.modules() if isinstance(m, DispatchedExperts)]
    held = 4 * sum(p.numel() for pool in pools for p in pool.parameters()) // 2
    (gathered,) = (
        e for e in plan.exchanges if (e.axis, e.operation) == ("expert_shard", "reduce_scatter")
    )
    assert gathered.sent == held
    assert plan.usage.passes.activations > held  # they stay from their use to its backward pass


def test_a_search_finds_the_layout_that_fits() -> None:
    """On a device that has too little memory for what is fastest, experts are spread."""
    model = {"ffn": moe([FFN | {"count": 16, "intermediate_size": 512}], DEALT)}
    job = Case(model, 4, rows=16).job
    large = search(job, CPU)
    best = large.ranked[0]
    assert best.plan is not None
    assert best.plan.fits
    alone = make_plan(replace(job, parallel=ParallelConfig()), CPU).total_bytes
    small = CPU.model_copy(update={"memory": alone * 0.9})
    found = search(job, small)
    assert found.ranked
    for candidate in found.ranked:
        config = candidate.job.parallel
        assert config.ep * config.tp * config.pp > 1 or config.data == "fsdp2"
    reasons = [why_it_loses(other, found.ranked[0], small) for other in found.others]
    assert any(reason.startswith("does not fit: ") for reason in reasons)
    assert any("fsdp2" in reason for reason in found.refused)
    times = [c.plan.step_seconds for c in found.ranked if c.plan is not None]
    assert times == sorted(times)


def test_a_search_asks_for_what_speaks_against_layouts() -> None:
    """As an optimizer that needs whole matrices does; and keeps to `etp`."""
    job = Case(MOE, 2, {"etp": 2}).job

    def no_fsdp2(config: ParallelConfig) -> Iterator[Problem]:
        if config.data == "fsdp2":
            yield Problem("parallel.data", "no")

    found = search(job, CPU, no_fsdp2)
    assert found.refused["parallel.data: no"]
    configs = [candidate.job.parallel for candidate in (*found.ranked, *found.others)]
    assert configs
    assert all(config.data == "zero1" and config.etp == 2 for config in configs)
    assert all(job.rows % c.job.micro_batch_size == 0 for c in found.ranked)


def test_a_search_without_a_legal_layout_says_why() -> None:
    """Three processes are no power of two, and the rows of a batch are two."""
    with pytest.raises(LayoutError, match=r"--gpus: 64; no layout of so many is legal: train"):
        search(Case(DENSE | {"depth": {"num_layers": 1}}, 64, rows=2).job, CPU)


def test_device_profiles(tmp_path: Path) -> None:
    """By name or from a file; a wrong one is named with what is wrong with it."""
    for name, profile in known_profiles().items():
        assert device_profile(name) == profile
    path = tmp_path / "mine.json"
    CPU.write(path)
    assert device_profile(str(path)) == CPU
    with pytest.raises(ConfigError, match=r"--device: 'h800'; allowed: a100, h100"):
        device_profile("h800")
    tree = json.loads(path.read_text())
    for broken, reason in (("{", "Invalid JSON"), (json.dumps(tree | {"memory": -1}), "memory")):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=reason) as error:
            device_profile(str(path))
        assert "\n" not in str(error.value)


def test_a_simulated_world_of_a_thousand() -> None:
    """Every rank of it can be looked at."""
    job = Case(MOE, 1024, {"tp": 2, "ep": 8}, rows=1024, micro_batch=1).job
    uses = [simulate(job, rank)[0] for rank in (0, 517, 1023)]
    assert [use.rank for use in uses] == [0, 517, 1023]
    assert uses[0].traffic.sent == uses[1].traffic.sent
