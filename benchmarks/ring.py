"""What a ring holds and sends, beside a tied pipeline and FSDP2; and how its plan comes true.

    .venv/bin/python benchmarks/ring.py

- `layouts`: of the same model, batch and number of processes, for each layout the bytes of
  parameters, gradients and moments of each process, and all bytes that processes send in a step:
  messages as the pipeline and the ring count them, collectives as torch dispatches them (for a
  gather, a reduction or a scatter the size of what a process hands in). For the ring also the
  closed form of its messages.
- `seconds`: the median step of two processes on two cores, over that of one process, in turns in
  one run.
- `plans`: bubbles of plans on two processes with the costs of that model, executed by a tiny one
  whose work is padded to as many matrix products as its planned time is long; beside them the
  bubble of what then happened, in which all else, messages for one, counts as waiting. So would
  waiting for a core: more processes need more cores.

Writes benchmarks/results/ring-<machine>.json.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import write_result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.data.batch import Batch
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.parameters import initialize
from moebius.model.program import kept_tokens
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.parallel.ring.executor import RingExecutor
from moebius.parallel.ring.mail import Mail, Message
from moebius.parallel.ring.slices import cut_ring
from moebius.parallel.ring.step import RingStep
from moebius.parallel.ring.timeline import Event

WIDTH, LENGTH, ROWS, PASSES, SHARED = 128, 128, 16, 3, 4
MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32},
    "ffn": {"kind": "dense", "intermediate_size": 512},
    "depth": {
        "num_layers": 2 + PASSES * SHARED,
        "sharing": "middle_cycle",
        "num_recursions": PASSES,
        "router": {"kind": "expert_choice"},
    },
}
FLOAT, INT32 = 4, 4
LAYOUTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ring": lambda n: {"rp": n, "data": "ddp"},
    "ring without recomputation": lambda n: {"rp": n, "data": "ddp", "ring": {"recompute": False}},
    "tied pipeline, 1f1b": lambda n: {"pp": n, "data": "ddp"},
    "fsdp2": lambda n: {"data": "fsdp2"},
    "zero1": lambda n: {"data": "zero1"},
}
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}
PLANS: tuple[dict[str, Any], ...] = ({"live": 1}, {"live": 2}, {"live": 4}, {"live": 6})
PLAN_ROWS, PLAN_SECONDS = 8, 20.0
TINY: dict[str, Any] = MODEL | {
    "hidden_size": 8,
    "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8},
    "ffn": {"kind": "dense", "intermediate_size": 8},
}
TIMED = 7


class Sent(TorchDispatchMode):
    """Counts what is handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d" and name in COLLECTIVES:
            given = args[0] if name == "allreduce_" else args[1]
            tensors = given if isinstance(given, list | tuple) else [given]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.found[COLLECTIVES[name]] += size
        return func(*args, **kwargs or {})


def adam(parameters: Any) -> torch.optim.Optimizer:
    """As trainings have it."""
    return torch.optim.AdamW([parameter for parameter, _ in parameters], lr=1e-4)


def decoder_of(model: dict[str, Any]) -> Decoder:
    """With numbers."""
    decoder = Decoder(ModelConfig.model_validate(model))
    initialize(decoder, 0)
    return decoder


def built(options: dict[str, Any], model: dict[str, Any] = MODEL) -> Layout:
    """A model on a layout."""
    config = ParallelConfig.model_validate(options)
    return Layout(decoder_of(model), config, adam, LENGTH)


def batch(rows: int) -> Batch:
    """Rows of one document each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (rows, LENGTH + 1), generator=generator)
    places = torch.arange(LENGTH).expand(rows, -1)
    return Batch(
        ids[:, :-1],
        ids[:, 1:],
        torch.zeros(rows, LENGTH, dtype=torch.int64),
        places,
        torch.arange(rows),
    )


def step(layout: Layout, rows: int = ROWS) -> None:
    """Of training, with micro-batches of one row."""
    whole = batch(rows)
    parts = [whole.rows(*part) for part in layout.row_ranges(rows, 1)]
    context = StepContext("topk", Ledger(), training=True)
    layout.accumulate_gradients(parts, whole.labels_BS.numel(), context)
    layout.engine.step(1.0)


def size_of(tensor: Tensor) -> int:
    """Bytes of the part that is here."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def held_and_sent(options: dict[str, Any]) -> dict[str, Any]:
    """Of this process in its second step."""
    layout = built(options)
    step(layout)
    layout.mesh.traffic.take()
    with Sent() as sent:
        step(layout)
    messages = layout.mesh.traffic.take().sent
    states = layout.engine.optimizer.state.values()
    parameters = sum(size_of(p) for p in layout.decoder.parameters())
    moments = sum(size_of(s[key]) for s in states for key in ("exp_avg", "exp_avg_sq"))
    return {
        "parameters": parameters,
        "gradients": parameters,
        "moments": moments,
        "messages": sum(n for (_, kind), n in messages.items() if kind == "send"),
        "headers": sum(n for (_, kind), n in messages.items() if kind == "header"),
        **sent.found,
    }


def closed_form(num_ranks: int) -> int:
    """Bytes of the messages of a ring on all processes: C (P + 1 - 2 / P) T D elements forward and
    back, and an index of each token on all ways but the one home."""
    tokens = sum(kept_tokens((PASSES - r) / PASSES, LENGTH) for r in range(PASSES))
    floats = 2 * (num_ranks + 1 - 2 / num_ranks) * tokens * WIDTH * ROWS
    indices = (num_ranks - 1 / num_ranks) * tokens * ROWS
    return round(floats * FLOAT + indices * INT32)


def seconds(layout: Layout) -> float:
    """Of a step, on all processes at a time."""
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    step(layout)
    return time.perf_counter() - begin


def executed_bubble(ring: dict[str, Any], num_ranks: int, per_second: float) -> dict[str, float]:
    """That of a plan and that of its execution by padded work."""
    layout = built({"rp": num_ranks, "data": "ddp", "ring": ring}, TINY)
    executor = layout.executor
    assert isinstance(executor, RingExecutor)
    executor.ring = cut_ring(decoder_of(MODEL), num_ranks, LENGTH)
    timeline = executor.timeline(PLAN_ROWS)
    scale = per_second * PLAN_SECONDS / timeline.makespan
    seen: list[tuple[float, float, float]] = []
    matrix = torch.eye(64)
    do, take = RingStep.do, Mail._take
    pending = [0]

    def pad() -> float:
        begin = time.monotonic()
        for _ in range(pending[0]):
            torch.mm(matrix, matrix)
        pending[0] = 0
        return time.monotonic() - begin

    def padded_take(mail: Mail, message: Message) -> Any:
        found = take(mail, message)
        padding.append(pad())
        return found

    padding: list[float] = []

    def padded_do(run: RingStep, event: Event) -> None:
        begin = time.monotonic()
        pending[0] = round((event.end - event.start) * scale)
        if event.stop == (0 if event.is_forward else len(timeline.ways[0]) - 1):
            padding.append(pad())
        do(run, event)
        seen.append((begin, time.monotonic(), sum(padding)))
        padding.clear()

    RingStep.do, Mail._take = padded_do, padded_take  # type: ignore[method-assign]
    dist.barrier()
    step(layout, PLAN_ROWS)
    RingStep.do, Mail._take = do, take  # type: ignore[method-assign]
    edges = torch.tensor([-seen[0][0], seen[-1][1]], dtype=torch.float64)
    work = torch.tensor([sum(worked for _, _, worked in seen)], dtype=torch.float64)
    dist.all_reduce(edges, dist.ReduceOp.MAX)
    dist.all_reduce(work)
    makespan = float(edges.sum())
    return {
        "planned": timeline.bubble,
        "executed": makespan * num_ranks / float(work) - 1,
        "seconds": makespan,
    }


def products_per_second() -> float:
    """Of the padding, with both cores busy."""
    matrix = torch.eye(64)
    begin = time.monotonic()
    count = 0
    while time.monotonic() - begin < 1.0:
        for _ in range(1000):
            torch.mm(matrix, matrix)
        count += 1000
    return count / (time.monotonic() - begin)


def measure(rank: int, folder: str, num_ranks: int) -> None:
    """One process of several; each writes what it has found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{num_ranks}", rank=rank, world_size=num_ranks
    )
    found: dict[str, Any] = {
        "layouts": {name: held_and_sent(make(num_ranks)) for name, make in LAYOUTS.items()}
    }
    if num_ranks == 2:
        layouts = {name: built(make(num_ranks)) for name, make in LAYOUTS.items()}
        times: defaultdict[str, list[float]] = defaultdict(list)
        for _ in range(TIMED):
            for name, layout in layouts.items():
                times[name].append(seconds(layout))
        found["seconds"] = {name: median(values[1:]) for name, values in times.items()}
        speed = torch.tensor([products_per_second()])
        dist.all_reduce(speed, dist.ReduceOp.MIN)
        found["plans"] = [ring | executed_bubble(ring, num_ranks, float(speed)) for ring in PLANS]
    Path(folder, f"{num_ranks}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(folder: str, num_ranks: int) -> list[dict[str, Any]]:
    """Of every process."""
    mp.start_processes(measure, (folder, num_ranks), num_ranks, start_method="fork")
    paths = [Path(folder, f"{num_ranks}-{rank}.json") for rank in range(num_ranks)]
    return [json.loads(path.read_text()) for path in paths]


def layouts_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """By layout what each process holds, and the sums of what they send."""
    result = {}
    for name in LAYOUTS:
        own = [process["layouts"][name] for process in found]
        kinds = sorted({key for process in own for key in process})
        held = ("parameters", "gradients", "moments")
        result[name] = {
            "bytes of each process": {key: [process[key] for process in own] for key in held},
            "bytes sent by all": {
                key: sum(process.get(key, 0) for process in own)
                for key in kinds
                if key not in held and any(process.get(key) for process in own)
            },
        }
    result["ring"]["closed form of messages"] = closed_form(len(found))
    sent = result["ring"]["bytes sent by all"]["messages"]
    if sent != closed_form(len(found)):
        raise AssertionError(
            f"{sent} bytes were sent, the closed form says {closed_form(len(found))}"
        )
    return result


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(1)
    alone = built({})
    one = median([seconds(alone) for _ in range(4)][1:])
    with tempfile.TemporaryDirectory() as folder:
        two, four = measured(folder, 2), measured(folder, 4)
    again = median([seconds(alone) for _ in range(4)][1:])
    decoder = alone.decoder
    block = sum(
        FLOAT * p.numel()
        for name, p in decoder.named_parameters()
        if name.startswith("layers.") and name.split(".")[1] in map(str, range(1, 1 + SHARED))
    )
    whole = sum(FLOAT * p.numel() for p in decoder.parameters())
    result = {
        "model": f"{SHARED} shared layers, {PASSES} passes, two other layers, width {WIDTH}, fp32",
        "batch": f"{ROWS} micro-batches of {LENGTH} tokens in all",
        "bytes of the block": block,
        "bytes of all else": whole - block,
        "layouts": {"2 processes": layouts_of(two), "4 processes": layouts_of(four)},
        "seconds": {
            "one process before and after": [one, again],
            "over one process": {
                name: value / ((one + again) / 2) for name, value in two[0]["seconds"].items()
            },
        },
        "plans": two[0]["plans"],
    }
    print(json.dumps(write_result("ring", result), indent=1))


if __name__ == "__main__":
    main()
