"""How long the quickstart takes on this machine, and what it reaches.

    .venv/bin/python benchmarks/quickstart.py

Trains configs/quickstart.yaml from nothing in a temporary folder and writes
benchmarks/results/quickstart-<machine>.json. The speed is given as the share of the machine's own
matrix-product rate, measured in the same process (MFU of executed FLOPs).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, write_result


def main() -> None:
    """Train, read the log, write the result."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run_dir={folder}/run", f"data.dir={folder}/data"]
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                "-m",
                "moebius.trainer",
                "train",
                "configs/quickstart.yaml",
                *overrides,
            ],
            cwd=ROOT,
            check=True,
        )
        seconds = time.perf_counter() - began
        log = Path(folder, "run", "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in log.splitlines()]
    evaluations = [line for line in lines if "eval/loss" in line]
    reports = [line for line in lines if "speed/mfu" in line][1:]
    result = {
        "seconds_from_nothing": round(seconds, 1),
        "validation_loss": {line["step"]: line["eval/loss"] for line in evaluations},
        "bits_per_byte": {line["step"]: line["eval/bits_per_byte"] for line in evaluations},
        "median_tokens_per_second": statistics.median(
            line["speed/tokens_per_second"] for line in reports
        ),
        "median_mfu_executed": statistics.median(line["speed/mfu"] for line in reports),
    }
    print(json.dumps(write_result("quickstart", result), indent=1))


if __name__ == "__main__":
    main()
