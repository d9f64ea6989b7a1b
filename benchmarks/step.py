"""A whole training step against Hugging Face transformers and against a dense model.

    .venv/bin/python benchmarks/step.py

A step is forward, backward, clipping and AdamW. All models have width 256, 4 layers, 8 heads and a
vocabulary of 8192, batches 8 rows of 256 random tokens; MoE models 8 experts of width 512, top-2;
`dense` is ours with one feed-forward of width 1024: equal active parameters. Two comparisons:

- `as_shipped`: each model in a process of its own, processes in turns; ours as `moebius train`
  sets itself up, the others with torch's and transformers' defaults: AdamW, malloc, experts.
- `same_flags`: all in one process, in turns, which is set up as ours is, all with fused AdamW and
  clipping over lists of tensors.

Ours has a balance loss, which the others leave out by default. In bf16 theirs are models in bf16
(their experts do not heed autocast), ours keeps parameters in fp32 and computes products in bf16.
Writes benchmarks/results/step-<machine>.json.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from machine import NO_BF16, has_bf16, parser, precisions, prepare, product_rates, write_result
from models import TOP_K, Trainee, dense, model_config, random_batches, routed
from rounds import Comparison, compare, show_comparison

from moebius.data.batch import Batch

CPU = torch.device("cpu")
LEARNING_RATE = 3e-4
Step = Callable[[Batch], None]


@dataclass(frozen=True)
class Size:
    """What is measured."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    vocabulary: int = 8192
    width: int = 512
    experts: int = 8
    rows: int = 8
    length: int = 256
    rounds: int = 9
    processes: int = 5
    """rounds of processes"""
    steps: int = 8
    """of each process, after `WARMUP`"""

    def shape(self) -> tuple[int, int, int, int]:
        """Arguments that all models have in common."""
        return self.hidden, self.layers, self.heads, self.vocabulary


QUICK = Size(64, 1, 2, 256, 64, 4, 2, 32, rounds=2, processes=0, steps=1)
WARMUP = 2


def build(name: str, size: Size, dtype: torch.dtype, shipped: bool) -> tuple[Step, dict[str, Any]]:
    """A training step, and what it is made of."""
    if name in ("moebius", "dense"):
        moe = name == "moebius"
        ffn = routed(size.width, size.experts) if moe else dense(TOP_K * size.width)
        trainee = Trainee(model_config(*size.shape(), ffn), size.length, dtype)
        return trainee.step, {
            "parameters": trainee.num_parameters,
            "kernels": trainee.kernel_names,
        }
    model = peers.build(name, *size.shape(), size.width, size.experts).to(dtype)
    flags: dict[str, Any] = {} if shipped else {"fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **flags)
    return peers.stepper(model, optimizer, None if shipped else True), {
        "parameters": sum(p.numel() for p in model.parameters()),
        "experts": peers.experts_implementation(model),
    }


def same_flags(size: Size, dtype: torch.dtype) -> tuple[Comparison, dict[str, Any]]:
    """All models in turns in this process."""
    built = {
        name: build(name, size, dtype, shipped=False) for name in ("moebius", "dense", *peers.PEERS)
    }
    draw = random_batches(size.rows, size.length, size.vocabulary, CPU)
    steps = {name: step for name, (step, _) in built.items()}
    taken = compare(steps, "moebius", draw, size.rounds, WARMUP)
    return taken, {name: about for name, (_, about) in built.items()}


def work(name: str, size: Size, precision: str) -> dict[str, Any]:
    """What a process of its own does: some steps, and their median."""
    settings = prepare() if name == "moebius" else "defaults"
    step, _ = build(name, size, precisions()[precision], shipped=True)
    draw = random_batches(size.rows, size.length, size.vocabulary, CPU)
    seconds = []
    for number in range(WARMUP + size.steps):
        batch = draw(number)
        began = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[WARMUP:]), "settings": settings}


def as_shipped(size: Size, precision: str) -> tuple[Comparison, dict[str, str]]:
    """Processes in turns, and the settings of each."""
    names = ("moebius", *peers.PEERS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    settings = {}
    for number in range(size.processes):
        for name in names if number % 2 == 0 else reversed(names):
            task = json.dumps({"name": name, "precision": precision, "size": asdict(size)})
            command = [sys.executable, str(Path(__file__)), "--worker", task]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            seconds[name].append(found["seconds"])
            settings[name] = found["settings"]
    return Comparison(seconds, "moebius"), settings


def report(taken: Comparison, size: Size) -> dict[str, dict[str, float]]:
    """Times with tokens per second."""
    tokens = size.rows * size.length
    return {
        name: times | {"tokens_per_second": round(tokens / taken.median(name), 1)}
        for name, times in taken.report().items()
    }


def measure(size: Size, precision: str, dtype: torch.dtype) -> dict[str, object]:
    """Both comparisons in one precision."""
    found: dict[str, object] = {}
    if size.processes:
        taken, settings = as_shipped(size, precision)
        show_comparison(f"{precision}, as shipped, a process each", taken)
        found["as_shipped"] = {"times": report(taken, size), "settings": settings}
    taken, about = same_flags(size, dtype)
    show_comparison(f"{precision}, same flags, one process", taken)
    found["same_flags"] = {"times": report(taken, size), "models": about}
    found["dense_time_over_moebius"] = round(taken.ratio("dense"), 4)
    return found


def main() -> None:
    """Measure and write the result."""
    options = parser(__doc__)
    options.add_argument("--worker", help="for processes that this script starts")
    arguments = options.parse_args()
    if arguments.worker:
        task = json.loads(arguments.worker)
        print(json.dumps(work(task["name"], Size(**task["size"]), task["precision"])))
        return
    import transformers

    size = QUICK if arguments.quick else Size()
    prepared = prepare()
    found: dict[str, object] = {} if has_bf16() else {"bf16": NO_BF16}
    for precision, dtype in precisions().items():
        found[precision] = measure(size, precision, dtype)
    result = {
        "transformers": transformers.__version__,
        "settings": prepared,
        "product_gflops": product_rates(),
        "size": asdict(size),
        **found,
    }
    write_result("step", result, arguments.out)


if __name__ == "__main__":
    main()
