"""Whole trainings on several processes: the course of one process, on any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.trainer.config import RunConfig
from tests.conftest import model_tree
from tests.parity.forks import run_forked
from tests.trainer.helpers import logged, train_run
from tests.trainer.test_resume import config_in

DEPTH = {"num_layers": 6, "sharing": "middle_cycle", "num_recursions": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1 ep sp": (4, {"ep": 2, "tp": 2}),
    "fsdp2": (2, {"data": "fsdp2"}),
    "fsdp2 ep cp": (4, {"data": "fsdp2", "ep": 2, "cp": 2}),
    "ddp tp": (2, {"data": "ddp", "tp": 2, "sequence_parallel": False, "etp": 2}),
    "pipeline": (4, {"pp": 2, "ep": 2}),
    "ring": (4, {"rp": 2, "ep": 2}),
    "one": (1, {}),
}
QUICK = ("zero1 ep sp", "fsdp2")
DEEPSPEED = {
    "deepspeed 2 sp": (4, {"engine": "deepspeed", "deepspeed": {"stage": 2}, "tp": 2}),
    "deepspeed 3": (2, {"engine": "deepspeed", "deepspeed": {"stage": 3}}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(tree: dict[str, Any], folder: Path, layout: str) -> RunConfig:
    train = tree["train"] | {"micro_batch_size": 1}
    model = model_tree(depth=DEPTH | {"router": {"causal": {"coefficient": 0.01}}})
    parallel = (LAYOUTS | DEEPSPEED)[layout][1]
    return config_in(tree, folder, train=train, model=model, parallel=parallel)


def go_on(config: RunConfig, stop_after: int | None) -> int:
    return train_run(config, stop_after).step


def train_on(tree: dict[str, Any], folder: Path, layout: str, stop_after: int | None = None) -> int:
    """Start or continue a run with the processes of a layout; the step that all of them reached."""
    config = config_of(tree, folder, layout)
    (step,) = set(run_forked((LAYOUTS | DEEPSPEED)[layout][0], go_on, config, stop_after))
    return int(step)


def assert_same_course(folder: Path, other: Path) -> None:
    """All reports, but for what the clock or the layout decides."""
    for a, b in zip(logged(folder), logged(other), strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4), a["step"]


@pytest.fixture
def one(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The run in one process."""
    assert train_on(run_tree, tmp_path / "one", "one") == 6
    return tmp_path / "one"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in LAYOUTS
        if name != "one"
    ],
)
def test_training_takes_the_same_course(
    run_tree: dict[str, Any], tmp_path: Path, one: Path, layout: str
) -> None:
    """Losses, norms, routing and evaluation of six AdamW steps, reported by one process."""
    folder = tmp_path / "several"
    assert train_on(run_tree, folder, layout) == 6
    assert_same_course(folder, one)
    text = (folder / "metrics.jsonl").read_text()
    assert '"communication/world/all_reduce_bytes": ' in text


@pytest.mark.slow
@pytest.mark.parametrize("layout", DEEPSPEED)
def test_training_under_deepspeed_takes_the_same_course(
    run_tree: dict[str, Any], tmp_path: Path, one: Path, layout: str
) -> None:
    """Stopped in the middle and gone on by our own engine: a checkpoint is a checkpoint."""
    pytest.importorskip("deepspeed")
    folder = tmp_path / "several"
    assert train_on(run_tree, folder, layout, 4) == 4
    assert train_on(run_tree, folder, "zero1 ep sp") == 6
    assert_same_course(folder, one)


@pytest.mark.slow
def test_a_run_continues_on_other_layouts(
    run_tree: dict[str, Any], tmp_path: Path, one: Path
) -> None:
    """Every step on another number of processes, cut in another way."""
    folder = tmp_path / "moving"
    for step, layout in enumerate((name for name in LAYOUTS if name != "fsdp2"), start=1):
        assert train_on(run_tree, folder, layout, step) == step
    assert_same_course(folder, one)
