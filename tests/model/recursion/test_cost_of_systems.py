"""The cost model of every system against torch's FLOP counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebius.model.context import Mode, StepContext
from moebius.model.cost import forward_flops, planned_work, training_flops
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.objective import drawn_exits
from moebius.trainer.metrics import executed_rows
from tests.model.helpers import loss_sum, random_batch
from tests.model.recursion.systems import SYSTEMS, VOCABULARY, documents, system

STEP, SEED = 20, 7


def exits_of(executor: LocalExecutor, step: StepContext) -> tuple[int, ...]:
    """The exits that a step of training reads."""
    return drawn_exits(executor.decoder.config.exits, executor.program, step)


def counted_forward(executor: LocalExecutor, mode: Mode = "topk") -> tuple[int, Ledger]:
    """FLOPs of the products that ran, attention decomposed so that they are visible."""
    ledger = Ledger()
    step = StepContext(mode, ledger, step=STEP, seed=SEED, training=mode == "topk")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        executor.token_losses(documents(), step, exits_of(executor, step))
    return counter.get_total_flops(), ledger


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_forward_flops_equal_the_counter(name: str, mode: Mode) -> None:
    """Exactly, whatever was selected."""
    executor = system(**SYSTEMS[name])
    counted, ledger = counted_forward(executor, mode)
    assert forward_flops(executor.decoder, ledger.work, executed_rows(ledger)) == counted


FEWER_GRADIENTS = {
    "expert predictor": "the predictor's input is detached",
    "expert predictor document": "the predictor's input is detached",
    "exits all": "distillation reads the last exit once more",
}


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in FEWER_GRADIENTS])
def test_training_costs_three_forward_passes(name: str) -> None:
    """Forward, losses of all exits and backward."""
    executor = system(**SYSTEMS[name])
    step = StepContext("topk", Ledger(), step=STEP, seed=SEED, training=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ledger = executor.accumulate_gradients([documents()], step).ledger
    counted = counter.get_total_flops()
    assert training_flops(executor.decoder, ledger.work, executed_rows(ledger)) == counted


def is_planned(name: str) -> bool:
    """Whether shapes are known before: nothing is chosen by tokens or within documents."""
    router = SYSTEMS[name]["depth"].get("router")
    chosen = router is not None and (
        router["kind"] == "token_choice" or router.get("scope") == "document"
    )
    return not chosen and "exits" not in SYSTEMS[name]


@pytest.mark.parametrize("name", [name for name in SYSTEMS if is_planned(name)])
def test_work_is_known_before(name: str) -> None:
    """On rows of any documents, at a step in the middle of schedules."""
    executor = system(**SYSTEMS[name])
    _, ledger = counted_forward(executor)
    assert planned_work(executor.decoder, 4, 16, STEP) == ledger.work


def test_work_of_documents_is_known_for_rows_of_one_document() -> None:
    executor = system(**SYSTEMS["expert document"])
    ledger = Ledger()
    step = StepContext("topk", ledger, step=STEP, training=True)
    with torch.no_grad():
        loss_sum(executor, random_batch(3, 15, vocab_size=VOCABULARY), step)
    assert planned_work(executor.decoder, 3, 15, STEP) == ledger.work


def test_a_shorter_program_has_a_plan_of_its_own() -> None:
    """Passes that a program leaves out cost nothing, and the last of all nothing beside them."""
    executor = system(**SYSTEMS["expert row"])
    program = executor.program.until(5)
    shorter = LocalExecutor(executor.decoder, program=program)
    counted, ledger = counted_forward(shorter)
    assert planned_work(executor.decoder, 4, 16, STEP, program) == ledger.work
    assert forward_flops(executor.decoder, ledger.work) == counted
    assert [visit.index for visit in ledger.work.visits] == [0, 1, 2, 3, 4]


def test_full_depth_steps_are_planned() -> None:
    """While all tokens make all passes, token choice costs what a loop without routing costs, and
    its one decision."""
    executor = system(**SYSTEMS["token full depth"])
    _, ledger = counted_forward(executor)
    assert planned_work(executor.decoder, 4, 16, STEP).visits == ledger.work.visits
    assert {extent.tokens for extent in ledger.work.visits.values()} == {4 * 16}
