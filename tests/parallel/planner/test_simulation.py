"""A simulated process against a real one: what a step takes, measured in forked processes.

Both run the same code; what is tested is that shapes without numbers take the way that numbers
take. Routers over width deal experts out in turn, for then the real loads are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.model.parameters import initialize
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.parallel.planner.live import LiveBytes
from moebius.parallel.planner.simulate import Job, Usage, simulate, use_of_step
from moebius.trainer.optim import OptimConfig, build_optimizer
from tests.model.recursion.systems import depth, expert
from tests.parity.forks import run_forked
from tests.parity.models import moe

LENGTH, VOCABULARY, WIDTH = 64, 128, 64
FFN = {"kind": "ffn", "count": 8, "intermediate_size": 64}
DEALT = {"kind": "balanced", "top_k": 2}
DENSE: dict[str, Any] = {"ffn": {"kind": "dense", "intermediate_size": 128}}
MOE: dict[str, Any] = {"ffn": moe([FFN], DEALT)}
MOEPP: dict[str, Any] = {
    "ffn": moe([FFN, {"kind": "constant", "count": 4}, {"kind": "zero", "count": 4}], DEALT)
}
MOR: dict[str, Any] = DENSE | {"depth": depth(3, 1, router=expert())}
MOEPP_MOR: dict[str, Any] = MOEPP | {"depth": depth(2, 2, router=expert())}


@dataclass(frozen=True)
class Case:
    """A model on a layout."""

    model: dict[str, Any]
    processes: int = 1
    parallel: dict[str, Any] | None = None
    rows: int = 8
    micro_batch: int = 2
    more: dict[str, Any] | None = None

    @property
    def job(self) -> Job:
        """To be done."""
        tree = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
            "depth": {"num_layers": 4},
        }
        return Job(
            ModelConfig.model_validate(tree | self.model),
            ParallelConfig.model_validate(self.parallel or {}),
            self.processes,
            self.rows,
            self.micro_batch,
            LENGTH,
            partial(build_optimizer, config=OptimConfig()),
            **(self.more or {}),
        )


CASES: dict[str, Case] = {
    "dense": Case(DENSE),
    "dense-bf16": Case(DENSE, more={"autocast": torch.bfloat16}),
    "dense-full": Case(DENSE, more={"recompute": "full"}),
    "dense-ddp": Case(DENSE, 2, {"data": "ddp"}),
    "dense-zero1": Case(DENSE, 4, {"data": "zero1"}, micro_batch=1),
    "dense-tp": Case(DENSE, 2, {"tp": 2, "sequence_parallel": False}),
    "dense-sp": Case(DENSE, 2, {"tp": 2}),
    "dense-cp": Case(DENSE, 2, {"cp": 2}),
    "dense-pp": Case(DENSE, 2, {"pp": 2}, micro_batch=1),
    "dense-fsdp2": Case(DENSE, 2, {"data": "fsdp2"}),
    "moe": Case(MOE),
    "moe-selective": Case(MOE, more={"recompute": "selective"}),
    "moe-ep": Case(MOE, 2, {"ep": 2}),
    "moe-etp": Case(MOE, 4, {"ep": 2, "etp": 2}),
    "moepp-ep-sp": Case(MOEPP, 4, {"ep": 2, "tp": 2}),
    "moepp-pp-ep": Case(MOEPP, 4, {"pp": 2, "ep": 2}, micro_batch=1),
    "moepp-hsdp": Case(MOEPP, 4, {"data": "fsdp2", "dp_replicate": 2}),
    "mor": Case(MOR),
    "mor-zero1": Case(MOR, 2),
    "mor-pp": Case(MOR, 2, {"pp": 2}, micro_batch=1),
    "moepp_mor-ring": Case(MOEPP_MOR, 2, {"rp": 2}, rows=6, micro_batch=1),
    "moepp_mor-ring-merged": Case(
        MOEPP_MOR, 2, {"rp": 2, "ring": {"merge": True}}, rows=6, micro_batch=1
    ),
    "moepp_mor-ring-zero1": Case(MOEPP_MOR, 4, {"rp": 2}, rows=6, micro_batch=1),
}


def measure(case: Case) -> Usage:
    """A real step of this process."""
    job = case.job
    decoder = Decoder(job.model)
    initialize(decoder, 3)
    layout = Layout(
        decoder, job.parallel, job.make_optimizer, job.row_length, job.autocast, whole=job.whole
    )
    with LiveBytes() as live:
        return use_of_step(job, layout, live)


@pytest.mark.parametrize("name", CASES)
def test_a_simulated_process_takes_what_a_real_one_takes(name: str) -> None:
    """Weights, gradients and moments to the byte, activations within a tenth, every byte that goes
    to a collective or to another process."""
    case = CASES[name]
    real: list[Usage] = run_forked(case.processes, measure, case)
    by_rank = {usage.rank: usage for usage in real}
    for usage in simulate(case.job):
        found = by_rank[usage.rank]
        assert usage.traffic.sent == found.traffic.sent
        assert usage.traffic.calls == found.traffic.calls
        assert usage.memory.weights == found.memory.weights
        assert usage.memory.optimizer == found.memory.optimizer
        assert usage.gradients == found.gradients
        if case.job.parallel.data != "fsdp2":  # which frees storages where no mode sees it
            assert usage.passes.activations == pytest.approx(found.passes.activations, rel=0.1)
            # A thread of gloo may hold its last buffer a moment longer.
            buffer = 2 * 4 * case.micro_batch * LENGTH * WIDTH
            expected = pytest.approx(found.passes.exchanged, rel=0.1, abs=buffer)
            assert usage.passes.exchanged == expected
            assert usage.memory.total == pytest.approx(found.memory.total, rel=0.1)
