"""What routing over depth saves: step time beside executed FLOPs, against unrouted recursion.

    .venv/bin/python benchmarks/recursion.py

Trains two models in turns, step by step in one process: the decoder of configs/mor.yaml (expert
choice, three passes, shares 1, 2/3, 1/3) and the same one without routers. Tokens are random, which
does not matter here: how many of them enter a pass is fixed. A step is forward, backward, clipping
and AdamW. Writes benchmarks/results/recursion-<machine>.json.
"""

import gc
import json
import os
import statistics
import time
from functools import partial

import numpy as np
from machine import ROOT, machine

from moebius.data.batch import Batch, make_batch
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.cost import training_flops
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.parameters import initialize
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.trainer.config_file import load_config
from moebius.trainer.metrics import executed_rows
from moebius.trainer.optim import OptimConfig, build_optimizer

SIZES = ((16, 256), (4, 1024))
"""rows and tokens per row"""
STEPS = 12
WARMUP = 2


class Trainee:
    """A model with its optimizer, and how long its steps took."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        decoder = Decoder(config)
        initialize(decoder, 0)
        make = partial(build_optimizer, config=OptimConfig())
        self.layout = Layout(decoder, ParallelConfig(), make, length)
        self.seconds: list[float] = []
        self.flops = 0

    def step(self, batch: Batch, number: int) -> None:
        """Train on a batch."""
        context = StepContext("topk", Ledger(), step=number, training=True)
        began = time.perf_counter()
        result = self.layout.accumulate_gradients([batch], batch.num_tokens, context)
        self.layout.engine.step(1.0)
        self.seconds.append(time.perf_counter() - began)
        ledger = result.ledger
        self.flops = training_flops(self.layout.decoder, ledger.work, executed_rows(ledger))


def compare(rows: int, length: int) -> dict[str, object]:
    """Median step times and their ratio beside that of the FLOPs."""
    config = load_config(ROOT / "configs" / "mor.yaml").model
    plain = config.model_copy(update={"depth": config.depth.model_copy(update={"router": None})})
    trainees = {"routed": Trainee(config, length), "unrouted": Trainee(plain, length)}
    generator = np.random.default_rng(0)
    gc.disable()
    for number in range(WARMUP + STEPS):
        windows = generator.integers(1, config.vocab_size, (rows, length + 1))
        for trainee in trainees.values():
            samples = [[window] for window in windows]
            trainee.step(make_batch(samples, length, eod_id=0), number)
    gc.enable()
    medians = {
        name: statistics.median(trainee.seconds[WARMUP:]) for name, trainee in trainees.items()
    }
    flops = {name: trainee.flops for name, trainee in trainees.items()}
    pairs = zip(trainees["routed"].seconds, trainees["unrouted"].seconds, strict=True)
    ratios = sorted(routed / unrouted for routed, unrouted in list(pairs)[WARMUP:])
    return {
        "rows": rows,
        "tokens_per_row": length,
        "median_step_seconds": medians,
        "training_flops": flops,
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [ratios[0], ratios[-1]],
        "flops_ratio": flops["routed"] / flops["unrouted"],
    }


def main() -> None:
    """Measure and write the result."""
    result = {
        **machine(),
        "model": "configs/mor.yaml, fp32",
        "steps": STEPS,
        "sizes": [compare(rows, length) for rows, length in SIZES],
    }
    target = ROOT / "benchmarks" / "results" / f"recursion-{os.cpu_count()}-core-cpu.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
