"""Courses of small runs that are not to change unnoticed, compared as a user compares runs.

After a change that is meant to be one: .venv/bin/python -m tests.trainer.test_golden
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from moebius.data.config import DataConfig, FilesSource
from moebius.data.prepare import prepare
from moebius.files import write_whole
from moebius.trainer.cli import main
from moebius.trainer.config import RunConfig
from tests.conftest import MOE, QUIET, model_tree
from tests.trainer.helpers import REPOSITORY, logged, train_run
from tests.trainer.test_compare import WEIGHT, Disturb

FOLDER = Path(__file__).parent / "golden"
DENSE = {"kind": "dense", "intermediate_size": 48}
PLAIN = {"num_layers": 3}
MODELS = {
    "dense": model_tree(ffn=DENSE, depth=PLAIN),
    "moepp": model_tree(ffn=MOE, depth=PLAIN),
    "mor": model_tree(ffn=DENSE),
    "moepp_mor": model_tree(),
}
KEPT = ("train/loss", "train/grad_norm", "train/param_norm", "eval/loss")
RTOL = "0.002"
"""processors and their libraries round differently, and a router may follow"""


def tree_of(name: str, folder: Path) -> dict[str, Any]:
    """Six steps on the text of the license, which is the same everywhere."""
    texts = [text for text in (REPOSITORY / "LICENSE").read_text().split("\n\n") if text.strip()]
    corpus = folder / "license.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(
        dir=str(folder / "data"),
        source=FilesSource(paths=(str(corpus),)),
        sequence_length=32,
        validation_fraction=0.2,
    )
    prepare(data, 512, QUIET)
    return {
        "run_dir": str(folder / name),
        "model": MODELS[name],
        "data": data.model_dump(),
        "train": {"num_steps": 6, "batch_size": 4, "micro_batch_size": 2, "device": "cpu"},
        "optim": {"lr": 3e-3, "schedule": {"kind": "cosine", "warmup_steps": 2}},
        "evaluation": {"interval": 3, "num_batches": 2},
        "log": {"interval": 1},
    }


def compared(name: str, folder: Path) -> int:
    """The exit code of the command: 0 alike, 1 not."""
    golden, log = FOLDER / f"{name}.jsonl", folder / name / "metrics.jsonl"
    return main(["compare", str(golden), str(log), "--rtol", RTOL])


@pytest.mark.parametrize("name", MODELS)
def test_the_course_is_that_of_before(name: str, tmp_path: Path) -> None:
    train_run(RunConfig.model_validate(tree_of(name, tmp_path)))
    assert compared(name, tmp_path) == 0


def test_another_course_is_seen(tmp_path: Path) -> None:
    """A weight of one expert, disturbed at one step."""
    config = RunConfig.model_validate(tree_of("moepp", tmp_path))
    train_run(config, beside=[Disturb(3, WEIGHT, amount=3.0)])
    assert compared("moepp", tmp_path) == 1


def write() -> None:
    """Make the present courses those that are kept."""
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            run = train_run(RunConfig.model_validate(tree_of(name, Path(folder))))
            kept = [
                {"step": line["step"]} | {key: line[key] for key in KEPT if key in line}
                for line in logged(run.folder)
            ]
        lines = [json.dumps(line) for line in kept if len(line) > 1]
        write_whole(FOLDER / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(write())
