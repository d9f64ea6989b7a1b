"""The quickstart of an early commit against that of now: speed, and whether it learns the same.

    .venv/bin/python benchmarks/quickstart_speed.py

The commit is checked out beside this one and run in the same environment, processes of both in
turns, each on data that it has prepared itself before. Speed is the median of a run's reports
without the first; the ratio is taken inside of each round. Losses at the same steps stand side by
side. Both prepare the same tokens, to the byte (`same_tokens`), and begin with the same weights but
for those of the depth routers: they have other names now, and draws follow names. So the losses
differ by more than rounding. Writes benchmarks/results/quickstart_speed-<machine>.json.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import ROOT, parser, write_result
from rounds import show

OLD = "2af2cee"
"""where the first step of the project ended"""
NEVER = 100_000
TOKENIZER = "tokenizer.json"
SMALL = ("argparse", "ast", "calendar", "difflib", "inspect", "typing")
"""modules whose source is the corpus of a quick run"""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    steps: int = 60
    interval: int = 10
    """steps between reports"""
    rounds: int = 5
    warmup: int = 1
    """rounds that do not count"""
    extra: tuple[str, ...] = ()
    """overrides"""


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of a commit, for as long as it is needed."""
    path = folder / "old"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
    try:
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


def quick(folder: Path) -> Size:
    """A few steps on a small corpus, which is written here."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = folder / "texts"
    texts.mkdir()
    for module in SMALL:
        (texts / f"{module}.txt").write_text((stdlib / f"{module}.py").read_text("utf-8"))
    return Size(
        steps=3,
        interval=1,
        rounds=1,
        warmup=0,
        extra=(
            "train.batch_size=2",
            "optim.schedule.warmup_steps=1",
            "data.source.kind=files",
            f"data.source.paths=[{texts}/*.txt]",
            "data.validation_fraction=0.3",
        ),
    )


def train(code: Path, data: Path, run: Path, size: Size) -> list[dict[str, Any]]:
    """A run of some code; the lines of its log."""
    overrides = [
        f"run_dir={run}",
        f"data.dir={data}",
        f"train.num_steps={size.steps}",
        f"log.interval={size.interval}",
        f"evaluation.interval={NEVER}",
        "evaluation.num_batches=1",
        f"checkpoint.interval={NEVER}",
        *size.extra,
    ]
    command = [sys.executable, "-m", "moebius.trainer", "train", "configs/quickstart.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    done = subprocess.run(
        [*command, *overrides], cwd=code, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"training in {code} failed:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_tokens(then: Path, now: Path) -> bool:
    """Whether two prepared folders hold the same samples and the same tokenizer."""
    names = sorted(path.name for path in then.iterdir() if path.suffix in (".bin", ".idx"))
    return all((then / n).read_bytes() == (now / n).read_bytes() for n in [*names, TOKENIZER])


def speed(lines: Sequence[dict[str, Any]]) -> float:
    """Tokens per second."""
    key = "speed/tokens_per_second"
    return statistics.median([float(line[key]) for line in lines if key in line][1:])


def losses(lines: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def compare_losses(then: dict[int, float], now: dict[int, float]) -> dict[str, object]:
    """Side by side."""
    table = {
        step: {"old": then[step], "new": now[step], "difference": now[step] - then[step]}
        for step in sorted(then.keys() & now.keys())
    }
    largest = max(table, key=lambda step: abs(table[step]["difference"]))
    return {
        "training_loss": table,
        "largest_difference": table[largest]["difference"],
        "at_step": largest,
    }


def measure(folder: Path, size: Size) -> dict[str, object]:
    """Runs in turns; the first round prepares the data and is not timed."""
    logs: dict[str, list[dict[str, Any]]] = {}
    speeds: dict[str, list[float]] = {"old": [], "new": []}
    with checkout(OLD, folder) as old:
        codes = {"old": old, "new": ROOT}
        for number in range(size.warmup + size.rounds):
            for name in codes if number % 2 == 0 else reversed(codes):
                run = folder / f"run-{name}-{number}"
                logs[name] = train(codes[name], folder / f"data-{name}", run, size)
                speeds[name].append(speed(logs[name]))
    pairs = list(zip(speeds["new"], speeds["old"], strict=True))[size.warmup :]
    ratios = [new / old for new, old in pairs]
    return {
        "tokens_per_second": {name: values[size.warmup :] for name, values in speeds.items()},
        "median_tokens_per_second": {
            name: statistics.median(values[size.warmup :]) for name, values in speeds.items()
        },
        "new_over_old": round(statistics.median(ratios), 4),
        "new_over_old_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "same_tokens": same_tokens(folder / "data-old", folder / "data-new"),
        **compare_losses(losses(logs["old"]), losses(logs["new"])),
    }


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = quick(folder) if arguments.quick else Size()
        found = measure(folder, size)
    medians: Any = found["median_tokens_per_second"]
    rows = [[name, float(value)] for name, value in medians.items()]
    ratio, difference = found["new_over_old"], found["largest_difference"]
    show(
        f"quickstart, {size.rounds} rounds: new / old {ratio:.3g}, "
        f"largest difference of losses {difference:.2g} at step {found['at_step']}",
        ("", "tokens / s"),
        rows,
    )
    result = {
        "old_commit": OLD,
        "config": f"configs/quickstart.yaml, {size.steps} steps",
        "rounds": size.rounds,
        **found,
    }
    write_result("quickstart_speed", result, arguments.out)


if __name__ == "__main__":
    main()
