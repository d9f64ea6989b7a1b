"""What processes of a ring do, hold and send is what the plan says."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.generation.cache import KVCache
from moebius.model.generation.plain import document_logits
from moebius.model.ledger import Ledger
from moebius.model.program import kept_tokens
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.parallel.ring.executor import RingExecutor
from moebius.parallel.ring.step import RingStep
from moebius.parallel.ring.timeline import Event
from tests.parity.forks import run_forked
from tests.parity.layouts import LENGTH, Rows, decoder_of, documents, sgd
from tests.parity.models import VOCABULARY, WIDTH, ring_name
from tests.parity.rings import arrays, context

FLOAT, INT32 = 4, 4


def built(name: str, make: Any = sgd, **options: Any) -> Layout:
    """A model in fp32 on a layout."""
    decoder = decoder_of(name, torch.float32)
    return Layout(decoder, ParallelConfig.model_validate(options), make, LENGTH)


def step(layout: Layout, rows: int) -> None:
    """Gradients of micro-batches of one row."""
    batch = Rows(**vars(documents(rows)))
    parts = [batch.rows(*part) for part in layout.row_ranges(rows, 1)]
    layout.accumulate_gradients(parts, batch.labels_BS.numel(), context())


Executed = list[tuple[Event, float, float]]


def padded(do: Callable[[RingStep, Event], None], unit: float, seen: Executed) -> Any:
    """`RingStep.do`, which besides computes as many products as the plan's time is long."""
    matrix = torch.eye(64)

    def padded_do(run: RingStep, event: Event) -> None:
        begin = time.monotonic()
        for _ in range(round((event.end - event.start) / unit)):
            torch.mm(matrix, matrix)
        do(run, event)
        seen.append((event, begin, time.monotonic()))

    return padded_do


def executed_order(name: str, options: dict[str, Any], rows: int) -> tuple[list[Event], Executed]:
    """The plan, and this process's events with their times."""
    layout = built(name, **options)
    executor = layout.executor
    assert isinstance(executor, RingExecutor)
    timeline = executor.timeline(rows)
    seen: Executed = []
    unit = max(event.end - event.start for event in timeline.events) / 200
    RingStep.do = padded(RingStep.do, unit, seen)  # type: ignore[method-assign]
    step(layout, rows)
    return list(timeline.events), seen


@pytest.mark.parametrize(
    ("num_ranks", "options"), [(2, {}), (2, {"ring": {"live": 3}}), (3, {"ring": {"live": 9}})]
)
def test_events_are_executed_in_the_order_of_the_plan(
    num_ranks: int, options: dict[str, Any]
) -> None:
    """On each process as planned, and nothing ends before what it needs has begun."""
    name = ring_name("dense", 3, is_routed=True)
    results = run_forked(num_ranks, executed_order, name, options | {"rp": num_ranks}, 7)
    plan = results[0][0]
    begins: dict[tuple[bool, int, int], float] = {}
    ends: dict[tuple[bool, int, int], float] = {}
    for rank, (planned, seen) in enumerate(results):
        assert planned == plan, "all processes have the same plan"
        assert [event for event, _, _ in seen] == [e for e in plan if e.rank == rank]
        for event, begin, end in seen:
            begins[event.is_forward, event.micro_batch, event.stop] = begin
            ends[event.is_forward, event.micro_batch, event.stop] = end
    assert len(begins) == len(plan)
    for (is_forward, number, stop), end in ends.items():
        before = begins.get((is_forward, number, stop + (-1 if is_forward else 1)))
        assert before is None or before < end


def sent_bytes(name: str, rp: int, rows: int, recompute: bool) -> dict[tuple[str, str], int]:
    """What one process sends in a step."""
    layout = built(name, rp=rp, ring={"recompute": recompute})
    layout.mesh.traffic.take()
    step(layout, rows)
    return layout.mesh.traffic.take().sent


@pytest.mark.parametrize(
    ("block", "num_ranks", "rows", "recompute"),
    [("dense", 2, 4, True), ("dense", 3, 7, False), ("moepp", 3, 6, True), ("moepp", 4, 4, False)],
)
def test_only_active_tokens_travel(block: str, num_ranks: int, rows: int, recompute: bool) -> None:
    """C (P + 1 - 2 / P) T D elements forward and as many back, where homes are met equally often,
    and an index of four bytes on all ways but the one home."""
    name, passes = ring_name(block, 3, is_routed=True), 3
    states = 8 if block == "moepp" else 0  # scores that the next router looks at
    tokens = sum(kept_tokens((passes - r) / passes, LENGTH) for r in range(passes))
    floats = index = 0
    for number in range(rows):
        home = number % num_ranks
        out, back = int(home != 0), int(home != num_ranks - 1)
        floats += 2 * tokens * (WIDTH + states) * (num_ranks - 1 + out + back)
        index += tokens * (num_ranks - 1 + out)
    if rows % num_ranks == 0:
        hops = num_ranks + 1 - 2 / num_ranks
        assert floats == pytest.approx(2 * rows * tokens * (WIDTH + states) * hops)
    results = run_forked(num_ranks, sent_bytes, name, num_ranks, rows, recompute)
    sent = sum(result[("rp", "send")] for result in results)
    assert sent == floats * FLOAT + index * INT32


def held(name: str, options: dict[str, Any]) -> tuple[int, int, dict[str, int]]:
    """Elements of a process's parameters and of their moments, and the former by name."""

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for parameter, _ in parameters])

    layout = built(name, adam, **options)
    step(layout, 4)
    layout.engine.step(1e9)
    states = layout.engine.optimizer.state.values()
    moments = sum(s[key].numel() for s in states for key in ("exp_avg", "exp_avg_sq"))
    sizes = {n: p.numel() for n, p in layout.decoder.named_parameters()}
    return sum(sizes.values()), moments, sizes


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_process_holds_its_part_of_one_block_and_the_ends(num_ranks: int) -> None:
    """Parameters and both moments, however often the block is used."""
    for passes in (2, 3):
        name = ring_name("moepp", passes, is_routed=True)
        whole = {n: p.numel() for n, p in decoder_of(name).named_parameters()}
        block = sum(n for key, n in whole.items() if key.split(".")[1] in ("1", "2", "3", "4"))
        ends = sum(whole.values()) - block
        results = run_forked(num_ranks, held, name, {"rp": num_ranks, "data": "ddp"})
        for parameters, moments, _ in results:
            assert parameters == block // num_ranks + ends
            assert moments == 2 * parameters
    results = run_forked(2 * num_ranks, held, name, {"rp": num_ranks, "data": "zero1"})
    assert sum(moments for _, moments, _ in results) == 2 * (block + num_ranks * ends)


def test_names_do_not_depend_on_the_ring() -> None:
    """So any number of slices and passes finds its weights in any checkpoint."""
    names = [
        {n for n, _ in decoder_of(ring_name("moepp", p, is_routed=False)).named_parameters()}
        for p in (1, 3)
    ]
    assert names[0] == names[1]
    results = run_forked(3, held, ring_name("moepp", 3, is_routed=False), {"rp": 3})
    assert set().union(*(sizes for _, _, sizes in results)) == names[0]


PROMPTS = [torch.arange(1, length + 1) * 3 % VOCABULARY for length in (9, 4, 12, 7, 5)]


def prefilled(name: str, num_ranks: int) -> tuple[dict[int, Any], dict[Any, Any], list[str]]:
    """Logits of prompts at home here, keys in the cache, and the layers of this process."""
    layout = built(name, rp=num_ranks)
    executor = layout.executor
    assert isinstance(executor, RingExecutor)
    cache = KVCache(len(PROMPTS))
    step = StepContext("threshold", Ledger(), seed=7, cache=cache)
    logits = executor.prefill(PROMPTS, step)
    return arrays(logits), keys_of(cache), list(layout.decoder.layers)


def keys_of(cache: KVCache) -> dict[Any, Any]:
    """By layer, pass and slot."""
    return {
        (*key, slot): entries.k[slot, : entries.count_N[slot]].numpy()
        for key, entries in cache.entries.items()
        if entries.k is not None
        for slot in range(len(PROMPTS))
    }


@pytest.mark.parametrize("name", [ring_name("moepp", 3, is_routed=True), "ring-hybrid"])
def test_prompts_go_around_the_ring(name: str) -> None:
    """Logits, and the keys and values that each layer keeps for tokens to come."""
    cache = KVCache(len(PROMPTS))
    step = StepContext("threshold", Ledger(), seed=7, cache=cache)
    local = LocalExecutor(decoder_of(name, torch.float32))
    expected = {}
    with torch.no_grad():
        for number, ids_S in enumerate(PROMPTS):
            slot_B = torch.tensor([number])
            expected[number] = document_logits(local, ids_S[None], step, slot_B)[0, 0].numpy()
    keys, found = keys_of(cache), {}
    for logits, own, layers in run_forked(3, prefilled, name, 3):
        found |= logits
        for key, values in keys.items():
            if key[0] in layers[1:-1]:  # the first and the last are at home
                np.testing.assert_allclose(own[key], values, atol=1e-5)
    assert found.keys() == expected.keys()
    for number, values in expected.items():
        np.testing.assert_allclose(found[number], values, atol=1e-5)
