"""What routing saves of the experts' all-to-all: bytes per token and layer, counted and worked out.

    .venv/bin/python benchmarks/dispatch.py

Trains small models on the bytes of Python's standard library, with their experts over four gloo
processes of this machine, and then counts what steps send, as we send it (a token once to each
process that holds any of its experts) and with a row for every assignment:

- `moepp`: 16 FFN experts and 4 that cost nothing (2 constant, copy, zero), top-2, tau 0.75;
- `moepp_balanced`: the same with a ten times larger coefficient of the balance loss, which keeps
  the share of FFN experts nearer to the one that tau asks for;
- `moepp_one_group`: a token's FFN experts all on one process (group-limited routing);
- `vanilla`: the 16 FFN experts only, top-2.

What is counted must be, to the byte, what the decisions of the routers say (`closed_form`), else
the script fails. Bytes do not depend on the machine but for rounding; times would, and four
processes that share two cores and exchange through memory say nothing about them. Writes
benchmarks/results/dispatch-<machine>.json.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import write_result
from numpy.typing import NDArray
from torch import Tensor, nn

from moebius.data.batch import Batch, make_batch
from moebius.data.config import StdlibSource
from moebius.data.sources import documents
from moebius.kernels.registry import Kernels
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.moe.experts import ExpertPool
from moebius.model.parameters import ParameterSpec, initialize
from moebius.parallel.config import ParallelConfig
from moebius.parallel.expert import AllToAllDispatcher, Visitors
from moebius.parallel.layout import Layout

PROCESSES = 4
STEPS = 80
COUNTED = 4
"""steps after training whose bytes are counted"""
ROWS, LENGTH = 8, 256
"""of a step, over all processes"""
LEARNING_RATE = 1e-3
"""at first; it falls to 0, or the load would go up and down around its designed value"""
HIDDEN, NUM_LAYERS, TOP_K, NUM_FFN = 256, 2, 2, 16
TAU = 0.75
VOCABULARY = 257
"""bytes, and 0 for the end of a document"""
FLOAT, ID, COUNT = 4, 4, 8
"""bytes of an element of rows and weights, of an id, and of a number of rows to come"""
FFN: dict[str, Any] = {"kind": "ffn", "count": NUM_FFN, "intermediate_size": 128}
IN_PLACE: list[dict[str, Any]] = [
    {"kind": "constant", "count": 2},
    {"kind": "copy"},
    {"kind": "zero"},
]
GROUPS: dict[str, Any] = {
    "kind": "groups",
    "num_groups": PROCESSES,
    "keep": 1,
    "score_top": TOP_K,
}


@dataclass(frozen=True)
class Variant:
    """What differs between the models."""

    in_place: bool = True
    """whether there are experts that cost nothing"""
    one_group: bool = False
    coefficient: float = 0.01
    """of the balance loss"""


MODELS = {
    "moepp": Variant(),
    "moepp_balanced": Variant(coefficient=0.1),
    "moepp_one_group": Variant(one_group=True),
    "vanilla": Variant(in_place=False),
}


class RowPerAssignment(AllToAllDispatcher):
    """Sends a token once for every expert of it, as if each assignment were a token."""

    def send(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        sizes: Sequence[int],
        kernels: Kernels,
    ) -> Callable[[], Visitors]:
        """See `Dispatcher`."""
        number = ids_TK.shape[1]
        arrive = super().send(
            x_TD.repeat_interleave(number, dim=0),
            ids_TK.reshape(-1, 1),
            weights_TK.reshape(-1, 1),
            sizes,
            kernels,
        )

        def arrive_at_tokens() -> Visitors:
            here = arrive()
            return replace(here, home_U=here.home_U // number)

        return arrive_at_tokens


def decoder_of(name: str) -> Decoder:
    """One of the models, initialised."""
    variant = MODELS[name]
    balance = {"kind": "switch", "coefficient": variant.coefficient}
    router = {
        "scorer": {"kind": "linear", "gating_residual": "prev_layer"},
        "selector": {"kind": "top_k", "top_k": TOP_K},
        "candidates": [GROUPS] if variant.one_group else [],
        "losses": [balance | {"tau": TAU, "scope": "sequence"}],
    }
    tree = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
        "ffn": {
            "kind": "moe",
            "experts": [FFN, *(IN_PLACE if variant.in_place else [])],
            "router": router,
        },
        "depth": {"num_layers": NUM_LAYERS},
    }
    decoder = Decoder(ModelConfig.model_validate(tree))
    initialize(decoder, 0)
    return decoder


def read_corpus() -> NDArray[np.uint16]:
    """All of it, document by document."""
    texts = [
        np.frombuffer(b"\0" + document.text.encode(), dtype=np.uint8)
        for document in documents(StdlibSource())
    ]
    starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
    corpus = np.concatenate(texts).astype(np.uint16) + 1
    corpus[starts] = 0
    return corpus


def batches(corpus: NDArray[np.uint16]) -> Iterator[Batch]:
    """Windows of the corpus, drawn at random, the same on every process."""
    generator = np.random.default_rng(0)
    while True:
        starts = generator.integers(0, len(corpus) - LENGTH - 1, (ROWS, 1))
        windows = corpus[starts + np.arange(LENGTH + 1)].astype(np.int64)
        yield make_batch([[window] for window in windows], LENGTH, eod_id=0)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Over all parameters alike."""
    pairs: list[tuple[nn.Parameter, ParameterSpec]] = list(parameters)
    return torch.optim.AdamW([parameter for parameter, _ in pairs], LEARNING_RATE, fused=True)


class Trainee:
    """A model whose experts are over all processes."""

    def __init__(self, name: str) -> None:
        self.decoder = decoder_of(name)
        self.layout = Layout(self.decoder, ParallelConfig(ep=PROCESSES), adamw, LENGTH)
        self.pools = [m for m in self.decoder.modules() if isinstance(m, ExpertPool)]
        self.decisions: list[Tensor] = []
        for pool in self.pools:
            pool.register_forward_pre_hook(lambda _, inputs: self.decisions.append(inputs[1]))

    def gradients(self, batch: Batch, number: int) -> Ledger:
        """Add those of a step; what the whole step booked."""
        ranges = self.layout.row_ranges(ROWS, ROWS)
        context = StepContext("topk", Ledger(), step=number, training=True)
        parts = [batch.rows(start, end) for start, end in ranges]
        return self.layout.accumulate_gradients(parts, batch.num_tokens, context).ledger

    def train(self, steps: Iterator[Batch]) -> None:
        """So that routers are as they are meant to be."""
        for number in range(STEPS):
            for group in self.layout.engine.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - number / STEPS)
            ledger = self.gradients(next(steps), number)
            self.layout.engine.step(1.0)
            self.decoder.update_routers(ledger, number)

    def count(
        self, steps: Sequence[Batch], dispatcher: type[AllToAllDispatcher]
    ) -> dict[str, float]:
        """What all processes together send in some steps; the model stays as it is."""
        mesh = self.layout.mesh
        for pool in self.pools:
            pool.dispatcher = dispatcher(mesh.experts, 1)
        self.decisions.clear()
        mesh.traffic.take()
        for batch in steps:
            self.gradients(batch, STEPS)
        traffic = mesh.traffic.take()
        self.layout.engine.optimizer.zero_grad()
        axis = mesh.experts.axis
        sent = traffic.sent[axis, "all_to_all"] + traffic.sent[axis, "counts"]
        ids = torch.cat(self.decisions)
        once = dispatcher is AllToAllDispatcher
        going = pairs(ids, mesh.experts.rank, once)
        own = torch.tensor([sent, going, int((ids < NUM_FFN).sum()), ids.numel()])
        sent, going, to_ffn, assignments = mesh.world.all_reduce(own).tolist()
        return summary(sent, going, to_ffn, assignments, once)


def pairs(ids_TK: Tensor, rank: int, once: bool) -> int:
    """How many rows leave a process: one for each token and other process that holds an expert of
    it, or (not `once`) for each assignment to one that another holds."""
    owner_TK = ids_TK.div(NUM_FFN // PROCESSES, rounding_mode="floor")
    owner_TK = owner_TK.where(ids_TK < NUM_FFN, -1)  # experts in place are the last ids
    others = [owner for owner in range(PROCESSES) if owner != rank]
    found = torch.stack([owner_TK == owner for owner in others])
    return int((found.any(dim=2) if once else found).sum())


def closed_form(num_rows: int, once: bool) -> int:
    """Bytes that all processes send in the counted steps.

    Every row goes and its result returns, and so do their gradients; weights of a row's assignments
    go and their gradients return; ids only go. Before that, in each layer, every process tells
    every other one how many rows come.
    """
    assignments = TOP_K if once else 1
    per_row = 4 * HIDDEN * FLOAT + assignments * (2 * FLOAT + ID)
    return num_rows * per_row + COUNTED * NUM_LAYERS * PROCESSES * (PROCESSES - 1) * COUNT


def summary(
    sent: int, num_rows: int, to_ffn: int, assignments: int, once: bool
) -> dict[str, float]:
    """Per token and layer."""
    expected = closed_form(num_rows, once)
    if sent != expected:
        raise AssertionError(f"{sent} bytes were sent, the closed form says {expected}")
    tokens = COUNTED * ROWS * LENGTH * NUM_LAYERS
    return {
        "bytes": sent / tokens,
        "closed_form_bytes": expected / tokens,
        "rows_to_other_processes": num_rows / tokens,
        "ffn_assignments": to_ffn / tokens,
        "ffn_share": to_ffn / assignments,
    }


def measure(rank: int, folder: str, corpus: NDArray[np.uint16]) -> None:
    """One process of several; the first writes what all have counted."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in MODELS:
        steps = batches(corpus)
        trainee = Trainee(name)
        trainee.train(steps)
        counted = [next(steps) for _ in range(COUNTED)]
        found[name] = {
            "once_per_process": trainee.count(counted, AllToAllDispatcher),
            "row_per_assignment": trainee.count(counted, RowPerAssignment),
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (folder, read_corpus()), PROCESSES, start_method="fork")
        found = json.loads(Path(folder, "found.json").read_text())
    reference = found["vanilla"]["once_per_process"]["bytes"]
    plain = found["vanilla"]["row_per_assignment"]["bytes"]
    for way in chain.from_iterable(model.values() for model in found.values()):
        way["of_vanilla_once_per_process"] = way["bytes"] / reference
        way["of_vanilla_row_per_assignment"] = way["bytes"] / plain
    result = {
        "processes": PROCESSES,
        "layout": {"ep": PROCESSES},
        "model": f"{NUM_LAYERS} layers of width {HIDDEN}, {NUM_FFN} FFN experts, top-{TOP_K}, fp32",
        "text": f"bytes of the standard library, {STEPS} steps of {ROWS} rows of {LENGTH}",
        "designed_ffn_share": TAU * NUM_FFN / (TAU * NUM_FFN + 4),
        "per_token_and_layer": found,
    }
    print(json.dumps(write_result("dispatch", result), indent=1))


if __name__ == "__main__":
    main()
