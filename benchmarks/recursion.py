"""What routing over depth saves: step time beside executed FLOPs, against unrouted recursion.

    .venv/bin/python benchmarks/recursion.py

Trains two models in turns, step by step in one process: the decoder of configs/mor.yaml (expert
choice, three passes, shares 1, 2/3, 1/3) and the same one without routers, with settings and
kernels that a run would choose. Tokens are random, which does not matter here: how many of them
enter a pass is fixed. A step is forward, backward, clipping and AdamW. `time_over_flops` is the
ratio of times over that of FLOPs: 1 where routing costs nothing by itself. Writes
benchmarks/results/recursion-<machine>.json.
"""

from machine import ROOT, parser, prepare, product_rates, write_result
from models import Trainee, random_batches
from rounds import compare, show_comparison
from torch import device

from moebius.model.config import ModelConfig
from moebius.trainer.config_file import load_config

SIZES = ((16, 256), (4, 1024))
"""rows and tokens per row"""
STEPS = 12


def measure(config: ModelConfig, rows: int, length: int, steps: int) -> dict[str, object]:
    """Median step times and their ratio beside that of the FLOPs."""
    plain = config.model_copy(update={"depth": config.depth.model_copy(update={"router": None})})
    trainees = {"routed": Trainee(config, length), "unrouted": Trainee(plain, length)}
    draw = random_batches(rows, length, config.vocab_size, device("cpu"))
    turns = {name: trainee.step for name, trainee in trainees.items()}
    taken = compare(turns, "unrouted", draw, steps)
    flops = {name: trainee.flops for name, trainee in trainees.items()}
    time_ratio, flops_ratio = taken.ratio("routed"), flops["routed"] / flops["unrouted"]
    ratios = taken.ratios("routed")
    title = f"{rows} rows of {length}: {flops_ratio:.3f} of the FLOPs"
    show_comparison(f"{title}, time over FLOPs {time_ratio / flops_ratio:.3f}", taken)
    return {
        "rows": rows,
        "tokens_per_row": length,
        "median_step_seconds": {name: taken.median(name) for name in trainees},
        "training_flops": flops,
        "time_ratio": time_ratio,
        "time_ratio_range": [min(ratios), max(ratios)],
        "flops_ratio": flops_ratio,
        "time_over_flops": time_ratio / flops_ratio,
    }


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__).parse_args()
    quick = ["model.hidden_size=32", "model.vocab_size=512"] if arguments.quick else []
    steps, sizes = (2, ((1, 32),)) if arguments.quick else (STEPS, SIZES)
    prepared = prepare()
    config = load_config(ROOT / "configs" / "mor.yaml", quick).model
    result = {
        "settings": prepared,
        "product_gflops": product_rates(),
        "model": "configs/mor.yaml, fp32",
        "steps": steps,
        "sizes": [measure(config, rows, length, steps) for rows, length in sizes],
    }
    write_result("recursion", result, arguments.out)


if __name__ == "__main__":
    main()
