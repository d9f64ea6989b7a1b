"""What processes of a ring do, hold and send is what the plan says."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from moebius.errors import LayoutError
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.model.generation.cache import KVCache
from moebius.model.generation.plain import document_logits
from moebius.model.ledger import Ledger
from moebius.model.program import kept_tokens
from moebius.parallel.config import ParallelConfig, RingConfig
from moebius.parallel.layout import Layout
from moebius.parallel.ring.advice import Job, Machine, prices
from moebius.parallel.ring.executor import RingExecutor
from moebius.parallel.ring.mail import Mail, Message, sent_after
from moebius.parallel.ring.step import RingStep
from moebius.parallel.ring.timeline import Event, Timeline
from tests.parity.forks import run_forked
from tests.parity.layouts import LENGTH, Rows, decoder_of, documents, sgd
from tests.parity.models import VOCABULARY, WIDTH, ring_name
from tests.parity.rings import arrays, context

pytestmark = pytest.mark.usefixtures("warm")
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


Times = dict[Message, float]


def executed(name: str, options: dict[str, Any], rows: int) -> tuple[Timeline, Times, Times]:
    """The plan, and of this process's messages when they were about to leave and were there.

    Every piece of work is padded to as many products as its planned time is long.
    """
    layout = built(name, **options)
    executor = layout.executor
    assert isinstance(executor, RingExecutor)
    timeline = executor.timeline(rows)
    unit = max(event.end - event.start for event in timeline.events) / 200
    matrix = torch.eye(64)
    leaving: Times = {}
    arrived: Times = {}
    do, send, send_back, take = RingStep.do, Mail.send, Mail.send_back, Mail._take

    def padded_do(run: RingStep, event: Event) -> None:
        for _ in range(round((event.end - event.start) / unit)):
            torch.mm(matrix, matrix)
        do(run, event)

    def timed_send(mail: Mail, message: Message, *given: Any) -> Any:
        leaving[message] = time.monotonic()
        return send(mail, message, *given)

    def timed_send_back(mail: Mail, message: Message, leaves: Any) -> None:
        leaving[message] = time.monotonic()
        send_back(mail, message, leaves)

    def timed_take(mail: Mail, message: Message) -> Any:
        found = take(mail, message)
        arrived[message] = time.monotonic()
        return found

    RingStep.do, Mail.send, Mail.send_back = padded_do, timed_send, timed_send_back  # type: ignore
    Mail._take = timed_take  # type: ignore
    step(layout, rows)
    return timeline, leaving, arrived


@pytest.mark.parametrize(
    ("num_ranks", "options"), [(2, {}), (2, {"ring": {"live": 3}}), (3, {"ring": {"live": 9}})]
)
def test_processes_do_what_the_plan_says(num_ranks: int, options: dict[str, Any]) -> None:
    """All have one plan; what each hands on and takes is what it says, in its order; nothing is
    taken before it is handed on."""
    name = ring_name("dense", 3, is_routed=True)
    results = run_forked(num_ranks, executed, name, options | {"rp": num_ranks}, 7)
    plan = results[0][0]
    all_leaving: Times = {}
    all_arrived: Times = {}
    for rank, (timeline, leaving, arrived) in enumerate(results):
        assert timeline == plan
        planned = [
            message
            for event in plan.of(rank)
            for message in sent_after(plan.ways[event.micro_batch], event)
        ]
        assert list(leaving) == planned
        taken = [(m.is_forward, m.micro_batch, m.stop) for m in arrived]
        needing = [
            (e.is_forward, e.micro_batch, e.stop)
            for e in plan.of(rank)
            if e.stop != (0 if e.is_forward else len(plan.ways[0]) - 1)
        ]
        assert taken == needing
        all_leaving |= leaving
        all_arrived |= arrived
    assert all_leaving.keys() == all_arrived.keys()
    assert all(all_leaving[message] <= all_arrived[message] for message in all_leaving)


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
        if not states:  # what `moebius describe` says, which leaves out indices and counts the ends
            job = Job(num_ranks, rows, 1, LENGTH)
            decoder = decoder_of(name)
            found = prices(decoder, job, Machine(1.0, 1e9), RingConfig())
            (price,) = [price for price in found if price.name == "ring"]
            ends = 2 * (1 - 1 / num_ranks) * FLOAT * ends_of(decoder)
            assert (price.sent_bytes - ends) * num_ranks == pytest.approx(floats * FLOAT)
    results = run_forked(num_ranks, sent_bytes, name, num_ranks, rows, recompute)
    sent = sum(result[("rp", "send")] for result in results)
    assert sent == floats * FLOAT + index * INT32


def ends_of(decoder: Decoder) -> int:
    """Parameters outside of the block of four layers."""
    whole = {n: p.numel() for n, p in decoder.named_parameters()}
    block = sum(n for key, n in whole.items() if key.split(".")[1] in ("1", "2", "3", "4"))
    return sum(whole.values()) - block


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
        decoder = decoder_of(name)
        ends = ends_of(decoder)
        block = sum(p.numel() for p in decoder.parameters()) - ends
        results = run_forked(num_ranks, held, name, {"rp": num_ranks, "data": "ddp"})
        for parameters, moments, _ in results:
            assert parameters == block // num_ranks + ends
            assert moments == 2 * parameters
    results = run_forked(2 * num_ranks, held, name, {"rp": num_ranks, "data": "zero1"})
    assert sum(moments for _, moments, _ in results) == 2 * (block + num_ranks * ends)


def test_names_do_not_depend_on_the_ring() -> None:
    """So any number of slices and passes finds its weights in any checkpoint."""
    once = {n for n, _ in decoder_of(ring_name("moepp", 1, is_routed=False)).named_parameters()}
    results = run_forked(3, held, ring_name("moepp", 3, is_routed=False), {"rp": 3})
    assert set().union(*(sizes for _, _, sizes in results)) == once


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


def refused_prefill() -> str:
    layout = built(ring_name("dense", 2, is_routed=True), rp=2, tp=2)
    executor = layout.executor
    assert isinstance(executor, RingExecutor)
    try:
        executor.prefill(PROMPTS, StepContext("threshold", Ledger()))
    except LayoutError as error:
        return str(error)
    return ""


def test_prompts_that_are_cut_are_refused() -> None:
    for message in run_forked(4, refused_prefill):
        assert message.startswith("prefill: tp or cp is more than 1")
