"""What the dispatcher sends, against a closed form of what the routers decided.

A token travels once to every other process that holds a part of one of its experts, with weights
and ids of all its assignments; one row comes back from there. Experts that need no product, empty
assignments and dropped ones cause no traffic, and what stays on its process is not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moebius.model.config import ModelConfig
from moebius.model.context import DepthContext, StepContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.moe.layer import MoE
from moebius.model.moe.router import Routed
from moebius.model.parameters import initialize
from moebius.parallel.layout import Layout
from tests.model.helpers import rows_of
from tests.model.recursion.systems import depth, expert
from tests.parity.forks import run_forked
from tests.parity.layouts import LENGTH, Case, documents, sgd
from tests.parity.models import ATTENTION, FFN, MIXED, TOP_2, TOP_P, VOCABULARY, WIDTH, moe

ID_BYTES = 4
COUNT_BYTES = 8
FFN_8 = FFN | {"count": 8}
IN_PLACE = [{"kind": "constant", "count": 2}, {"kind": "copy"}, {"kind": "zero"}]
MODELS: dict[str, dict[str, Any]] = {
    "top_2": {"ffn": moe([FFN_8], TOP_2)},
    "moepp": {"ffn": moe([FFN_8, *IN_PLACE], TOP_2)},
    "top_p": {"ffn": TOP_P},
    "mixed": {"ffn": MIXED},  # three groups of experts, and a capacity that drops assignments
    "lonely": {
        "ffn": moe([FFN_8], TOP_2, router={"candidates": [{"kind": "exclude", "ids": [6, 7]}]})
    },
    "moepp_mor": {"ffn": moe([FFN_8, *IN_PLACE], TOP_2), "depth": depth(2, 2, router=expert())},
}


@dataclass(frozen=True)
class Layouted:
    """A layout, the axis along which tokens travel in it, and the precision of products."""

    case: Case
    axis: str = "experts"
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    models: tuple[str, ...] = tuple(MODELS)

    @property
    def owners(self) -> int:
        """Processes, or groups of them, with different experts."""
        return self.case.config.ep

    @property
    def row_bytes(self) -> int:
        """Of an element of what travels."""
        return (self.autocast or self.dtype).itemsize

    @property
    def weight_bytes(self) -> int:
        """Of a weight: routers compute in fp32 at least."""
        return self.dtype.itemsize

    def holders(self, rank: int) -> list[list[int]]:
        """For each owner the processes to which this one sends the tokens of its experts."""
        width = self.case.config.etp
        first = rank // (self.owners * width) * self.owners * width
        parts = range(width)
        if self.axis == "ep":  # those beside this one send the same tokens to those beside others
            parts = range(rank % width, rank % width + 1)
        return [[first + owner * width + part for part in parts] for owner in range(self.owners)]


MOEPP_ONLY = ("moepp",)
LAYOUTS: dict[str, Layouted] = {
    "ep 2": Layouted(Case(2, {"ep": 2})),
    "ep 4": Layouted(Case(4, {"ep": 4}, micro_batch=1)),
    "ep 2 etp 2": Layouted(Case(4, {"ep": 2, "etp": 2})),
    "ep 4 recomputed": Layouted(
        Case(4, {"ep": 4}, recompute="full"), models=("moepp", "mixed", "moepp_mor")
    ),
    "ep 4 without a row": Layouted(Case(4, {"ep": 4}, rows=3), models=MOEPP_ONLY),
    "ep 2 twice": Layouted(Case(4, {"ep": 2}, micro_batch=1), models=MOEPP_ONLY),
    "ep 2 in bf16": Layouted(Case(2, {"ep": 2}), autocast=torch.bfloat16, models=MOEPP_ONLY),
    "ep 2 in fp64": Layouted(Case(2, {"ep": 2}), dtype=torch.float64, models=MOEPP_ONLY),
    "ep 2 cp 2": Layouted(Case(2, {"ep": 2, "cp": 2}), models=MOEPP_ONLY),
    "ep 2 etp 2 tp 2": Layouted(
        Case(4, {"ep": 2, "etp": 2, "tp": 2, "sequence_parallel": False}),
        axis="ep",
        models=MOEPP_ONLY,
    ),
}
BOTH = [(name, model) for name, layout in LAYOUTS.items() for model in layout.models]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A process with threads of its own must not be forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Seen:
    """What one process decided about its own tokens, and what it sent."""

    decisions: list[tuple[list[int], NDArray[np.int64]]] = field(default_factory=list)
    """by call of a router: sizes of the groups of dispatched experts, and ids `[T, K]`"""
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    sent: dict[tuple[str, str], int] = field(default_factory=dict)
    """by axis and operation"""


@cache
def measured(layout: str) -> dict[str, list[Seen]]:
    """By model what each process saw, by rank."""
    results = run_forked(LAYOUTS[layout].case.processes, pass_through_all, LAYOUTS[layout])
    return {model: [of_rank[model] for of_rank in results] for model in LAYOUTS[layout].models}


def pass_through_all(layout: Layouted) -> dict[str, Seen]:
    """In one process of several: a forward and a backward pass of each model."""
    return {model: pass_through(model, layout) for model in layout.models}


def pass_through(model: str, layout: Layouted) -> Seen:
    case, seen = layout.case, Seen()
    tree = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "attention": ATTENTION, "init_std": 0.2}
    tree |= {"depth": {"num_layers": 2}} | MODELS[model]
    decoder = Decoder(ModelConfig.model_validate(tree))
    initialize(decoder, 3)
    split = Layout(decoder.to(layout.dtype), case.config, sgd, LENGTH, layout.autocast)
    listen(decoder, seen)
    batch = documents(case.rows)
    ranges = split.row_ranges(case.rows, case.micro_batch)
    parts = [rows_of(batch, start, end) for start, end in ranges]
    step = StepContext("topk", Ledger(), step=1, training=True, recompute=case.recompute)
    split.mesh.traffic.take()
    split.executor.accumulate_gradients(parts, step, None, batch.labels_BS.numel())
    traffic = split.mesh.traffic.take()
    seen.calls, seen.sent = traffic.calls, traffic.sent
    return seen


def listen(decoder: Decoder, seen: Seen) -> None:
    """Keep every decision about experts, after capacities; what is recomputed decides nothing."""

    def keep(layer: MoE, inputs: tuple[Any, ...], routed: Routed) -> None:
        context = next(value for value in inputs if isinstance(value, DepthContext))
        ids_TK: Tensor = routed.own(context.tokens)[0]
        seen.decisions.append((layer.pool(context.shared).sizes, ids_TK.numpy().copy()))

    def hook(layer: MoE) -> Any:
        return lambda router, inputs, routed: keep(layer, inputs, routed)

    for layer in (module for module in decoder.modules() if isinstance(module, MoE)):
        for router in layer.routers:
            assert isinstance(router, nn.Module)
            router.register_forward_hook(hook(layer))


def owner_of(expert_id: int, sizes: list[int], num_owners: int) -> int | None:
    """Who holds an expert: each group is cut into equal runs of ids. None: nobody has to."""
    for size in sizes:
        if 0 <= expert_id < size:
            return expert_id // (size // num_owners)
        expert_id -= size
    return None


def copies(layout: Layouted, world: list[Seen]) -> NDArray[np.int64]:
    """How many tokens of each process have an expert on each, `[from, to]`: no token counts twice,
    however many of its experts are there."""
    count = np.zeros((len(world), len(world)), dtype=np.int64)
    for rank, seen in enumerate(world):
        holders = layout.holders(rank)
        for sizes, ids_TK in seen.decisions:
            for ids in ids_TK.tolist():
                owners = {owner_of(number, sizes, layout.owners) for number in ids} - {None}
                for owner in owners:
                    count[rank, holders[owner]] += 1
    return count


def closed_form(going: int, coming: int, num_assignments: int, layout: Layouted) -> int:
    """Bytes that leave a process in a forward and a backward pass.

    `going` are pairs of an own token and another process that has an expert of it, `coming` the
    same of others' tokens that have one here:

        forward    going rows, their K weights and K ids; coming rows of results
        backward   going gradients of results; coming gradients of rows and of K weights

    Full recomputation repeats the forward.
    """
    row, weights = WIDTH * layout.row_bytes, num_assignments * layout.weight_bytes
    forward = going * (row + weights + num_assignments * ID_BYTES) + coming * row
    backward = going * row + coming * (row + weights)
    return num_forwards(layout) * forward + backward


def num_forwards(layout: Layouted) -> int:
    return 2 if layout.case.recompute == "full" else 1


@pytest.mark.parametrize(("name", "model"), BOTH)
def test_bytes_are_those_of_the_closed_form(name: str, model: str) -> None:
    layout, world = LAYOUTS[name], measured(name)[model]
    pairs = copies(layout, world)
    assert pairs.sum() > pairs.trace() > 0
    for rank, seen in enumerate(world):
        going = int(pairs[rank].sum() - pairs[rank, rank])
        coming = int(pairs[:, rank].sum() - pairs[rank, rank])
        num_assignments = seen.decisions[0][1].shape[1]
        expected = closed_form(going, coming, num_assignments, layout)
        assert seen.sent[layout.axis, "all_to_all"] == expected, f"rank {rank}"


@pytest.mark.parametrize(("name", "model"), BOTH)
def test_calls_are_counts_then_four_and_three(name: str, model: str) -> None:
    """Rows, weights, ids and results forwards; backwards all but the ids. Every process takes part
    in each, with or without tokens, and tells every other one a number first."""
    layout = LAYOUTS[name]
    others = sum(map(len, layout.holders(0))) - 1
    for seen in measured(name)[model]:
        decisions = len(seen.decisions)
        passes = num_forwards(layout) * decisions
        assert seen.calls[layout.axis, "all_to_all"] == 4 * passes + 3 * decisions
        assert seen.calls[layout.axis, "counts"] == passes
        assert seen.sent[layout.axis, "counts"] == passes * others * COUNT_BYTES


@pytest.mark.parametrize("name", ["ep 2", "ep 4"])
def test_fewer_than_assignments_travel(name: str) -> None:
    """The decisions are such that deduplication and experts in place both show."""
    world = measured(name)["moepp"]
    ids = np.concatenate([ids_TK.ravel() for seen in world for _, ids_TK in seen.decisions])
    assert copies(LAYOUTS[name], world).sum() < (ids < FFN_8["count"]).sum() < ids.size


def test_nothing_comes_to_a_process_whose_experts_nobody_chose() -> None:
    pairs = copies(LAYOUTS["ep 4"], measured("ep 4")["lonely"])
    assert pairs[:, 3].sum() == 0
    assert pairs[3].sum() > 0
