"""A planned step against the memory that the system gives to a process that trains it.

Tests compare plans with counted tensors, to the byte or nearly so. Counting leaves out scratch
inside of operations and what an allocator cannot use. Freed memory goes back at once here, so that
the peak of the process is that of the step. Linux only.
Writes benchmarks/results/planned_memory-<machine>.json.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from functools import partial
from pathlib import Path
from typing import Any

from machine import parser, write_result

from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.model.parameters import initialize
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.parallel.planner.live import LiveBytes
from moebius.parallel.planner.simulate import Job, simulate, use_of_step
from moebius.trainer.optim import OptimConfig, build_optimizer

M_MMAP_THRESHOLD = -3
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"ffn": {"kind": "dense", "intermediate_size": 1536}},
    "moe": {
        "ffn": {
            "kind": "moe",
            "experts": [{"kind": "ffn", "count": 8, "intermediate_size": 768}],
            "router": {"selector": {"kind": "balanced", "top_k": 2}},
        }
    },
    "mor": {
        "ffn": {"kind": "dense", "intermediate_size": 1536},
        "depth": {
            "num_layers": 5,
            "sharing": "middle_cycle",
            "num_recursions": 3,
            "router": {"kind": "expert_choice"},
        },
    },
}


def job_of(name: str, quick: bool) -> Job:
    """A step of 8 rows, forwards and backwards in two parts."""
    tree = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "attention": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64},
        "depth": {"num_layers": 4},
    }
    return Job(
        model=ModelConfig.model_validate(tree | MODELS[name]),
        parallel=ParallelConfig(),
        world_size=1,
        rows=8,
        micro_batch_size=4,
        row_length=64 if quick else 512,
        make_optimizer=partial(build_optimizer, config=OptimConfig()),
    )


def status(field: str) -> int:
    """Bytes that the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def train(job: Job) -> tuple[int, int]:
    """Bytes of tensors, counted, and by which the process grew, weights and moments with them."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    decoder = Decoder(job.model)
    initialize(decoder, 0)
    layout = Layout(decoder, job.parallel, job.make_optimizer, job.row_length)
    with LiveBytes() as live:
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        usage = use_of_step(job, layout, live)
    held = usage.memory.weights + usage.memory.optimizer
    return usage.memory.total, status("VmHWM") - before + held


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for name in MODELS:
        job = job_of(name, arguments.quick)
        (planned,) = simulate(job)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            counted, resident = pool.apply(train, (job,))
        total = planned.memory.total
        rows.append({"model": name, "planned": total, "counted": counted, "resident": resident})
        print(f"{name}: planned / counted {total / counted:.3f}, / resident {total / resident:.3f}")
    write_result("planned_memory", {"bytes": rows}, arguments.out)


if __name__ == "__main__":
    main()
