"""What a cache holds: the tokens that entered a pass, and no others."""

import pytest
import torch

from moebius.model.context import StepContext
from moebius.model.generation.engine import DepthBatchedGenerator
from moebius.model.generation.plain import Limits
from moebius.model.ledger import Ledger
from tests.model.generation import Choice, engine, lively, loop, random_prompts
from tests.model.helpers import batch_of

EXPERT = {"kind": "expert_choice"}


def run_one(kv: str) -> tuple[DepthBatchedGenerator, dict[int, int]]:
    """A generator after one sequence, and how many of its cached tokens enter each pass."""
    executor = lively(depth=loop(router=EXPERT, kv=kv))
    generator = engine(executor, Limits(9, 64), 1)
    (prompt,) = random_prompts([12])
    (new,) = generator.run([prompt], Choice())
    ids = [*prompt, *new[:-1]]  # the last token is chosen and never run
    ledger = Ledger()
    with torch.no_grad():
        executor.hidden(batch_of(torch.tensor([ids])), StepContext("threshold", ledger))
    entered = {site.depth: int(s["selected"]) for site, s in ledger.statistics.items()}
    return generator, entered


@pytest.mark.parametrize("kv", ["per_depth", "hybrid"])
def test_each_pass_keeps_the_tokens_that_entered_it(kv: str) -> None:
    generator, entered = run_one(kv)
    stored = generator.cache.stored_tokens()
    assert 20 > entered[1] > entered[2] > 0, "tokens must leave"
    for depth, count in entered.items():
        assert stored.get(("1", depth), 0) == stored.get(("2", depth), 0) == count
    assert stored["0", 1] == stored["3", 1] == 12 + 9 - 1


def test_shared_keys_are_those_of_the_first_pass_alone() -> None:
    generator, entered = run_one("shared_first")
    stored = generator.cache.stored_tokens()
    assert {key for key in stored if key[0] in "12"} == {("1", 1), ("2", 1)}
    assert stored["1", 1] == entered[1]


def test_a_slot_is_empty_for_its_next_sequence() -> None:
    executor = lively(depth=loop(router=EXPERT))
    prompts = random_prompts([30, 2])
    again = engine(executor, Limits(4, 64), 1)
    assert again.run(prompts, Choice())[1] != []
    assert again.cache.stored_tokens()["0", 1] == 2 + 4 - 1
    fresh = engine(executor, Limits(4, 64), 1)
    fresh.run(prompts[1:], lambda logits, prompt, number: Choice()(logits, 1, number))
    assert fresh.cache.stored_tokens() == again.cache.stored_tokens()
