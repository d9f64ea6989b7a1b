"""Plans of the published presets on 8 to 1,024 devices: what fits, how fast, how long it took.

Experts of the large mixtures are spread over a node; the micro-batch is halved until a plan fits.
Writes benchmarks/results/planning-<machine>.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from machine import parser, write_result

from moebius.parallel.planner.device import device_profile
from moebius.parallel.planner.estimate import Plan, make_plan
from moebius.trainer.commands.plan import options_of
from moebius.trainer.config_file import load_config
from moebius.trainer.planning import job_of

PRESETS = Path(__file__).parents[1] / "configs" / "published"
LAYOUTS = {"moepp_2b": ["parallel.ep=8"], "moepp_7b": ["parallel.ep=8"]}
DEVICE = "h100"


def fitting_plan(name: str, gpus: int) -> tuple[Plan, float]:
    """The first that fits, or the last one, and the seconds of making it."""
    words = LAYOUTS.get(name, [])
    while True:
        config = load_config(PRESETS / f"{name}.yaml", words)
        began = time.perf_counter()
        plan = make_plan(job_of(config, gpus, "cuda"), device_profile(DEVICE))
        seconds = time.perf_counter() - began
        size = plan.job.micro_batch_size
        if plan.fits or size == 1:
            return plan, seconds
        words = [*LAYOUTS.get(name, []), f"train.micro_batch_size={size // 2}"]


def main() -> None:
    """Plan all and write the result."""
    options = parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    for name in presets[:1] if options.quick else presets:
        for gpus in (8,) if options.quick else (8, 64, 512, 1024):
            plan, seconds = fitting_plan(name, gpus)
            rows.append(
                {
                    "preset": name,
                    "parameters": plan.num_parameters,
                    "gpus": gpus,
                    "options": options_of(plan.job),
                    "memory_gb": round(plan.total_bytes / 1e9, 1),
                    "fits": plan.fits,
                    "step_seconds": round(plan.step_seconds, 4),
                    "mfu": round(plan.mfu, 3),
                    "tokens_per_day": f"{plan.tokens_per_day:.3g}",
                    "planning_seconds": round(seconds, 1),
                }
            )
            print(*rows[-1].values(), sep="  ", flush=True)
    write_result("planning", {"planned_for": DEVICE, "plans": rows}, options.out)


if __name__ == "__main__":
    main()
