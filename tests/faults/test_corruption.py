"""Damage to a file of a checkpoint is noticed by all processes, which go on from the one before."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moebius.data.corpus import open_corpora
from moebius.errors import CheckpointError
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.config import RunConfig
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from tests.parity.forks import run_forked
from tests.trainer.helpers import logged, train_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm")]
PARALLEL = {"tp": 2}
STEPS = ("step-00000002", "step-00000004")


def flip(path: Path, other: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path, other: Path, place: float) -> None:
    path.write_bytes(path.read_bytes()[: int(place * (path.stat().st_size - 1))])


def delete(path: Path, other: Path, place: float) -> None:
    path.unlink()


def replace(path: Path, other: Path, place: float) -> None:
    path.write_bytes(other.read_bytes())


def swap(path: Path, other: Path, place: float) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGE: dict[str, tuple[Callable[[Path, Path, float], None], tuple[float, ...]]] = {
    "flip": (flip, (0.0, 0.3, 0.7, 1.0)),
    "truncate": (truncate, (0.0, 0.5, 1.0)),
    "delete": (delete, (0.0,)),
    "replace": (replace, (0.0,)),
    "swap": (swap, (0.0,)),
}


class Events(Callback):
    """Keeps what a run tells."""

    name = "kept"

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def on_event(self, run: Run, kind: str, text: str) -> None:
        self.told.append((kind, text))


def tree_in(run_tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    return run_tree | {
        "run_dir": str(folder),
        "train": run_tree["train"] | {"num_steps": 4},
        "checkpoint": {"interval": 2, "keep": 2, "max_crashes": 1000},
        "parallel": PARALLEL,
    }


def trained(tree: dict[str, Any]) -> None:
    train_run(RunConfig.model_validate(tree))


def damaged(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Copies of a run, one damage to one file each: the file, and the way it is damaged."""
    newest = source / "checkpoints" / STEPS[1]
    for path in sorted(newest.iterdir()):
        for kind, (damage, places) in DAMAGE.items():
            for place in places:
                shutil.copytree(source / "checkpoints", target / "checkpoints")
                own, other = (target / "checkpoints" / step / path.name for step in STEPS[::-1])
                damage(own, other, place)
                if not own.exists() or own.read_bytes() != path.read_bytes():
                    yield path.name, kind
                shutil.rmtree(target / "checkpoints")


def resumed(tree: dict[str, Any]) -> tuple[int, list[tuple[str, str]], list[str]]:
    """Where a process goes on, what it tells, and the checkpoints that count from then on."""
    config = RunConfig.model_validate(tree)
    events = Events()
    run = Run(config, open_corpora(config.data), [events])
    resume(run)
    dist.barrier()  # one process has put the damaged one aside
    return run.step, events.told, sorted(p.name for p in Path(run.storage.location).iterdir())


def all_resumed(tree: dict[str, Any], source: Path) -> list[tuple[str, str, Any]]:
    """Every damage in turn, by processes that stay the same; one of them does the damage."""
    folder = Path(tree["run_dir"])
    found = []
    if dist.get_rank() == 0:
        for name, kind in damaged(source, folder):
            dist.broadcast_object_list([True], src=0)
            found.append((name, kind, outcome(tree)))
            dist.barrier()
        dist.broadcast_object_list([False], src=0)
        return found
    while True:
        more = [True]
        dist.broadcast_object_list(more, src=0)
        if not more[0]:
            return found
        found.append(("", "", outcome(tree)))
        dist.barrier()


def outcome(tree: dict[str, Any]) -> Any:
    try:
        return resumed(tree)
    except CheckpointError as error:
        return str(error)


def test_every_damage_to_every_file(run_tree: dict[str, Any], tmp_path: Path) -> None:
    tree = tree_in(run_tree, tmp_path / "run")
    run_forked(2, trained, tree)
    first, second = run_forked(
        2, all_resumed, tree | {"run_dir": str(tmp_path / "damaged")}, tmp_path / "run", timeout=500
    )
    files = {name for name, _, _ in first}
    assert files == {
        "commit.json",
        "index.json",
        "model-00000.safetensors",
        "model-00001.safetensors",
        "optimizer-00000.safetensors",
        "optimizer-00001.safetensors",
    }
    each = sum(len(places) for _, places in DAMAGE.values())
    assert len(first) == len(second) == len(files) * each - 2
    for (name, kind, own), (_, _, other) in zip(first, second, strict=True):
        case = f"{kind} of {name}"
        if kind == "swap":  # with the older one, which is damaged, too
            assert own == other, case
            assert isinstance(own, str), case
            assert "none of 2 checkpoints in" in own, case
            assert name in own or name == "commit.json", case
            continue
        assert own == other, case
        step, told, there = own
        assert step == 2, case
        ((what, text),) = told
        assert what == "walked back", case
        assert name in text, case
        assert "going on from step 2" in text, case
        assert there == [STEPS[0], f"{STEPS[1]}.damaged"], case


def test_the_run_goes_on_as_if_the_damage_had_not_been(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = tree_in(run_tree, tmp_path / "run")
    run_forked(2, trained, tree)
    folder = tmp_path / "run"
    expected = logged(folder), contents(folder)
    path = folder / "checkpoints" / STEPS[1] / "optimizer-00001.safetensors"
    flip(path, path, 0.5)
    run_forked(2, trained, tree)
    assert (folder / "checkpoints" / f"{STEPS[1]}.damaged").is_dir()
    assert (logged(folder), contents(folder)) == expected


def contents(folder: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint."""
    return {p.name: p.read_bytes() for p in (folder / "checkpoints" / STEPS[1]).iterdir()}
