"""Which models run whole contexts, and how often layers run for the others."""

from typing import Any

import pytest
import torch

from moebius.model.context import StepContext
from moebius.model.generation import engine as engine_module
from moebius.model.generation.cache import FIRST_CAPACITY, Entries
from moebius.model.generation.engine import generate
from moebius.model.generation.plain import Limits, generate_plain
from moebius.model.ledger import Ledger
from tests.model.generation import (
    STOP,
    Choice,
    assert_same,
    engine,
    lively,
    loop,
    random_prompts,
    reference,
)
from tests.model.generation.test_equality import ROUTERS, WHOLE_ROWS
from tests.model.recursion.conftest import one_thread

__all__ = ["one_thread"]
CAUSAL = StepContext("threshold", Ledger())


def same(got: Choice, wanted: Choice) -> None:
    """The same tokens were chosen from the same logits."""
    assert got.logits.keys() == wanted.logits.keys()
    for key, logits_V in wanted.logits.items():
        torch.testing.assert_close(got.logits[key], logits_V, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_models_that_need_whole_rows_get_them(name: str) -> None:
    """From the second token on a cache would give other logits: it only knows keys and values."""
    executor = lively(ffn=WHOLE_ROWS[name], depth={"num_layers": 3})
    prompts, limits = random_prompts([8, 12, 5, 9]), Limits(4, 64)
    wanted, got, cached = Choice(), Choice(), Choice()
    expected = reference(executor, prompts, wanted, limits)
    assert generate(executor, prompts, got, limits, CAUSAL, 2) == expected
    same(got, wanted)
    engine(executor, limits, 2).run(prompts, cached)
    apart = {
        number: max(
            float((cached.logits[prompt, number] - wanted.logits[prompt, number]).abs().max())
            for prompt in range(4)
        )
        for number in (0, 1)
    }
    assert apart[0] < 1e-9, "a prompt is run as a whole"
    assert apart[1] > 1e-3


def test_other_models_use_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("whole contexts are run again")

    monkeypatch.setattr(engine_module, "generate_plain", never)
    ffn = WHOLE_ROWS["counted tokens"]
    selector = ffn["router"]["selector"] | {"dense_share": 1.0}
    ffn = ffn | {"router": ffn["router"] | {"selector": selector}}
    executor = lively(ffn=ffn, depth=loop(router=ROUTERS["expert"]))
    prompts, limits = random_prompts([3, 9, 2]), Limits(4, 64)
    wanted, got = Choice(), Choice()
    expected = reference(executor, prompts, wanted, limits)
    assert generate(executor, prompts, got, limits, CAUSAL, 2) == expected
    same(got, wanted)


@pytest.mark.parametrize("router", ["unrouted", "expert", "token every"])
def test_plain_generation_is_its_definition(router: str) -> None:
    """Windows and stops included."""
    executor = lively(depth=loop(router=ROUTERS[router]))
    prompts, limits = random_prompts([1, 6, 15]), Limits(8, 6, STOP)
    wanted, got = Choice([(1, 3), (2, 0)]), Choice([(1, 3), (2, 0)])
    expected = reference(executor, prompts, wanted, limits)
    assert [len(new) for new in expected] == [8, 3, 0]
    assert generate_plain(executor, prompts, got, limits, CAUSAL) == expected
    same(got, wanted)


@pytest.mark.parametrize(("slots", "sizes"), [(1, [1] * 48), (2, [2] * 24), (4, [4] * 12)])
def test_every_slot_is_in_every_pass(slots: int, sizes: list[int]) -> None:
    """Four sequences of 5 new tokens, the first of which the prompt gives; three passes each."""
    generator = engine(lively(depth=loop("cycle")), Limits(5, 64), slots)
    generator.run(random_prompts([3, 7, 1, 4]), Choice())
    assert generator.batch_sizes == sizes


def test_the_next_prompt_enters_as_soon_as_one_has_ended() -> None:
    """The first stops at its second token; the third prompt takes its slot in the next pass."""
    executor = lively(depth={"num_layers": 2})
    (generator,) = assert_same(
        executor, random_prompts([3, 3, 3]), Limits(4, 64, STOP), slots=(2,), stops=[(0, 1)]
    )
    assert generator.batch_sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("max_new_tokens", [1, 5])
def test_a_single_token_needs_no_pass_beside_the_prompt(max_new_tokens: int) -> None:
    generator = engine(lively(depth=loop("cycle")), Limits(max_new_tokens, 64), 2)
    new = generator.run(random_prompts([3, 2, 5]), Choice())
    assert [len(ids) for ids in new] == [max_new_tokens] * 3
    assert (generator.batch_sizes == []) == (max_new_tokens == 1)
    assert generate(generator.executor, [], Choice(), Limits(5, 64), CAUSAL, 2) == []


def test_a_token_that_enters_no_pass_skips_the_loop() -> None:
    """All scores far below the threshold: caches of the loop stay empty, softmax sees no key."""
    for kv in ("per_depth", "shared_first", "hybrid"):
        executor = lively(depth=loop(router=ROUTERS["expert"], kv=kv))
        routing = executor.decoder.depth_routers[0]
        score = routing._score
        routing._score = lambda scorer, rows, score=score: score(scorer, rows) - 1e3  # type: ignore[assignment]
        (generator,) = assert_same(executor, random_prompts([1, 4]), Limits(4, 64), slots=(2,))
        stored = generator.cache.stored_tokens()
        assert {key: count for key, count in stored.items() if count} == {
            ("0", 1): 5 + 2 * 3,
            ("3", 1): 5 + 2 * 3,
        }


@pytest.mark.parametrize("recursions", [2, 3])
def test_shared_keys_take_the_part_of_one_pass(recursions: int) -> None:
    entries = {}
    for kv in ("per_depth", "shared_first", "hybrid"):
        generator = engine(lively(depth=loop("cycle", recursions, kv=kv)), Limits(6, 64), 2)
        generator.run(random_prompts([5, 3]), Choice())
        entries[kv] = sum(generator.cache.stored_tokens().values())
    assert entries["shared_first"] == 2 * (5 + 3 + 2 * 5)
    assert entries["per_depth"] == entries["hybrid"] == recursions * entries["shared_first"]


def test_entries_keep_their_order_when_room_is_made() -> None:
    """Two slots of three, at their own speeds, far beyond the room that there is at first."""
    entries = Entries(3)
    lists: dict[int, list[int]] = {0: [], 2: []}
    place = {0: 0, 2: 0}
    for turn in range(3 * FIRST_CAPACITY):
        slots = [0, 2] if turn % 3 else [2]
        new = [place[slot] if slot == 2 or turn % 2 else -1 for slot in slots]
        values = torch.tensor(new, dtype=torch.float64).view(-1, 1, 1, 1)
        entries.append(torch.tensor(slots), torch.tensor(new).view(-1, 1), values, 10 * values)
        for slot, number in zip(slots, new, strict=True):
            if number >= 0:
                lists[slot].append(number)
            place[slot] += 1
    assert len(lists[2]) > 2 * FIRST_CAPACITY > len(lists[0]) > 0
    for slot, wanted in lists.items():
        places_1J, k, v = entries.read(torch.tensor([slot]))
        assert places_1J[0].tolist() == wanted
        assert k.flatten().tolist() == wanted
        assert v.flatten().tolist() == [10 * number for number in wanted]
    assert entries.count_N.tolist() == [len(lists[0]), 0, len(lists[2])]


def test_a_long_text_of_a_tiny_context() -> None:
    """The window moves with every token."""
    (new,) = engine(lively(depth={"num_layers": 1}), Limits(700, 2), 1).run([[1]], Choice())
    assert len(new) == 700
