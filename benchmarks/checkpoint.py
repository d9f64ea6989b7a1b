"""What saving costs a training that goes on meanwhile, and how fast it is beside `cp`.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/checkpoint.py

Writes benchmarks/results/checkpoint-<machine>.json: seconds of optimizer steps beside which a
checkpoint of the same model and optimizer is written, and of as many without; bytes/s from the
beginning of a save to its commit, and of `cp` of as many bytes to the same disk and to sync; the
host memory that a save takes beside its budget. Takes about two minutes and 3 GB of disk.
"""

import json
import multiprocessing
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, write_result

from moebius.data.batch import make_batch
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.parameters import initialize
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.trainer.checkpoint.commit import CommitRecord
from moebius.trainer.checkpoint.saver import Saver
from moebius.trainer.checkpoint.storage import LocalStorage
from moebius.trainer.config import CheckpointConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.optim import OptimConfig, build_optimizer

PAIRS = 16
ROWS, LENGTH = 3, 256


def build() -> tuple[Layout, TokenBatch]:
    """The quickstart model, wider, and a batch on which it trains."""
    tree = load_config(ROOT / "configs" / "quickstart.yaml").model.model_dump()
    tree |= {"hidden_size": 768, "vocab_size": 16384}
    decoder = Decoder(ModelConfig.model_validate(tree))
    initialize(decoder, 0)
    optim = partial(build_optimizer, config=OptimConfig())
    layout = Layout(decoder, ParallelConfig(), optim, LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(16384, (ROWS, LENGTH + 1), generator=generator)
    samples = [[row.numpy()] for row in ids]
    return layout, make_batch(samples, LENGTH, 0, 0, False)


def train_step(layout: Layout, batch: TokenBatch) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    layout.accumulate_gradients([batch], ROWS * LENGTH, StepContext("topk", Ledger()))
    layout.engine.step(1.0)
    return time.perf_counter() - began


def record(step: int) -> CommitRecord:
    """Of a checkpoint that has nothing but tensors."""
    return CommitRecord(
        step=step, position=0, tokens=0, corpus="", config={}, program=[], callbacks={}, files={}
    )


def anonymous_bytes() -> int:
    """Memory of this process that is not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """How far the memory of this process rises while the context lasts."""
    before = highest = anonymous_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.wait(0.005):
            highest = max(highest, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    yield lambda: highest - before
    ended.set()
    thread.join()


def beside_training(layout: Layout, batch: TokenBatch, folder: Path) -> dict[str, Any]:
    """Steps all of which a save is written beside, and as many without before and after."""
    saver = Saver(LocalStorage(folder), CheckpointConfig(keep=1))
    saver.begin(record(0), layout.parts())  # allocates what the others use again
    saver.settle()
    train_step(layout, batch)
    before = train_step(layout, batch)
    stalls, during, without, both = [], [], [], []
    for number in range(1, PAIRS + 1):
        began = time.perf_counter()
        saver.begin(record(number), layout.parts())
        stalls.append(time.perf_counter() - began)
        beside = []
        while saver.writing:
            seconds = train_step(layout, batch)
            if saver.writing or not beside:
                beside.append(seconds)
        saver.settle()
        after = statistics.mean(train_step(layout, batch) for _ in beside)
        during.append(statistics.mean(beside))
        without.append((before + after) / 2)  # the machine's speed drifts
        both.append((stalls[-1] / len(beside) + during[-1]) / without[-1])
        before = after
    return {
        "pairs": PAIRS,
        "seconds_of_a_step": statistics.median(without),
        "stall_seconds": statistics.median(stalls),
        "step_while_writing_over_step": statistics.median(
            a / b for a, b in zip(during, without, strict=True)
        ),
        "stall_and_steps_while_writing_over_steps": statistics.median(both),
        "all_ratios_with_stall": both,
    }


def speed(layout: Layout, folder: Path) -> dict[str, float]:
    """Bytes/s of a save alone and of `cp` and `sync`, in turn."""
    saver = Saver(LocalStorage(folder / "save"), CheckpointConfig(keep=1))
    ratios, ours, theirs, size = [], [], [], 0
    for number in range(5):
        began = time.perf_counter()
        saver.begin(record(number), layout.parts())
        saver.settle()
        seconds = time.perf_counter() - began
        step = folder / "save" / f"step-{number:08}"
        size = sum(path.stat().st_size for path in step.iterdir())
        copy = folder / "copy"
        began = time.perf_counter()
        subprocess.run(["cp", "-r", str(step), str(copy)], check=True)
        subprocess.run(["sync", *map(str, copy.iterdir())], check=True)
        copied = time.perf_counter() - began
        subprocess.run(["rm", "-r", str(copy)], check=True)
        ours.append(size / seconds)
        theirs.append(size / copied)
        ratios.append(copied / seconds)
    return {
        "bytes": size,
        "save_bytes_per_second": statistics.median(ours),
        "cp_bytes_per_second": statistics.median(theirs),
        "save_over_cp": statistics.median(ratios),
    }


def memory(folder: Path, gigabytes: float | None) -> dict[str, Any]:
    """How much memory a first save takes beside its budget, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(save_within, folder, gigabytes).result()


def save_within(folder: Path, gigabytes: float | None) -> dict[str, Any]:
    """See `memory`."""
    layout, _ = build()
    config = CheckpointConfig(keep=1, host_gigabytes=gigabytes)
    saver = Saver(LocalStorage(folder / f"memory-{gigabytes}"), config)
    parts = layout.parts()
    began = time.perf_counter()
    with peak() as rise:
        saver.begin(record(0), parts)
        stall = time.perf_counter() - began
        saver.settle()
        risen = rise()
    return {"host_gigabytes": gigabytes, "risen_gigabytes": risen / 1e9, "stall_seconds": stall}


def main() -> None:
    """Measure and write the result file."""
    layout, batch = build()
    size = sum(c.tensor.nbytes for part in layout.parts().values() for c in part.chunks)
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        folder = Path(name)
        result = {
            "state_bytes": size,
            "memory": [
                memory(folder, part if part is None else round(part * size / 1e9, 3))
                for part in (0.0, 1 / 3, None)
            ],
            "speed": speed(layout, folder),
            "beside_training": beside_training(layout, batch, folder / "train"),
        }
    print(json.dumps(write_result("checkpoint", result), indent=1))


if __name__ == "__main__":
    main()
