"""A stopped and resumed run is the uninterrupted one, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moebius.data.corpus import open_corpora
from moebius.data.prepare import prepare
from moebius.errors import CheckpointError, TrainingError
from moebius.trainer.callbacks.checkpointing import CheckpointCallback
from moebius.trainer.config import RunConfig
from moebius.trainer.folder import check_folder, claim_folder
from moebius.trainer.loop import train
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from tests.conftest import QUIET
from tests.trainer.helpers import logged, saved_state, train_run


def config_in(run_tree: dict[str, Any], folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(run_tree | {"run_dir": str(folder)} | changes)


def same_state(a: Run, b: Run) -> bool:
    """Parameters and optimizer state, bit for bit."""
    x, y = saved_state(a), saved_state(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize(("precision", "stops"), [("fp32", (1, 2, 3, 4, 5)), ("bf16", (2,))])
def test_stopped_at_any_step(
    run_tree: dict[str, Any], tmp_path: Path, precision: str, stops: tuple[int, ...]
) -> None:
    """Stops after each step in turn; losses, metrics and final weights equal the unbroken run's.

    bf16 is emulated, and slow, on many CPUs.
    """
    changes = {"train": run_tree["train"] | {"precision": precision}}
    whole = train_run(config_in(run_tree, tmp_path / "whole", **changes))
    assert whole.step == 6
    expected = logged(whole.folder)
    assert [line["step"] for line in expected if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    for step in stops:
        config = config_in(run_tree, tmp_path / f"stop{step}", **changes)
        stopped = train_run(config, stop_after=step)
        assert stopped.step == step
        assert stopped.storage.steps()[-1] == step
        resumed = train_run(config)
        assert logged(resumed.folder) == expected
        assert same_state(resumed, whole)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_stopped_at_every_step(run_tree: dict[str, Any], tmp_path: Path, scope: str) -> None:
    """One step per process; a loss of scope `global` remembers the load of the step before."""
    router = run_tree["model"]["ffn"]["router"]
    losses = [loss | {"scope": scope} for loss in router["losses"]]
    ffn = run_tree["model"]["ffn"] | {"router": router | {"losses": losses}}
    run_tree = run_tree | {"model": run_tree["model"] | {"ffn": ffn}}
    whole = train_run(config_in(run_tree, tmp_path / "whole"))
    config = config_in(run_tree, tmp_path / "steps")
    for step in range(1, 7):
        last = train_run(config, stop_after=step)
    assert logged(last.folder) == logged(whole.folder)
    assert same_state(last, whole)


def test_work_after_the_last_checkpoint_is_done_again(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """A run that died between checkpoints logs each step once, with the same numbers."""
    whole = train_run(config_in(run_tree, tmp_path / "whole"))
    config = config_in(run_tree, tmp_path / "died")
    died = train_run(config, stop_after=5)
    died.storage.remove(5)  # as if the process had died before this save: step 3 is left
    with (died.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # and in the middle of a line
    resumed = train_run(config)
    assert logged(resumed.folder) == logged(whole.folder)
    assert same_state(resumed, whole)
    events = EventAccumulator(str(resumed.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_holds_what_was_logged_from_the_first_step(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    run = train_run(config_in(run_tree, tmp_path / "run", log={"interval": 3}))
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    names = {name for line in lines for name in line if name != "step"}
    assert set(events.Tags()["scalars"]) == names
    assert {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/switch_loss",
        "train/depth_loss",
        "eval/loss",
        "eval/topk_loss",
        "eval/bits_per_byte",
        "speed/mfu",
        "speed/tokens_per_second",
        "width/computing_share",
        "width/load_max_over_mean",
        "depth/agreement",
    } <= names
    for name in names:
        expected = [(line["step"], line[name]) for line in lines if name in line]
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [value for _, value in got] == pytest.approx([value for _, value in expected])
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 3, 6]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 3, 6]


def test_a_finished_run_stays_as_it_is(run_tree: dict[str, Any], tmp_path: Path) -> None:
    config = config_in(run_tree, tmp_path / "run")
    first = train_run(config)
    again = train_run(config)
    assert again.step == 6
    assert logged(again.folder) == logged(first.folder)
    assert same_state(again, first)


def test_a_folder_of_another_config_is_refused_with_the_difference(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    claim_folder(config_in(run_tree, folder))
    check_folder(config_in(run_tree, folder, log={"interval": 5}))
    with pytest.raises(CheckpointError) as caught:
        check_folder(config_in(run_tree, folder, optim=run_tree["optim"] | {"lr": 0.5}))
    assert "belongs to another config (optim.lr: 0.01 -> 0.5)" in str(caught.value)
    assert "choose another run_dir" in str(caught.value)


def test_accumulation_in_a_run_changes_rounding_only(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """The first step's loss and gradient norm with 1, 2 and 4 rows per micro-batch."""
    values = []
    for rows in (1, 2, 4):
        train = run_tree["train"] | {"micro_batch_size": rows}
        config = config_in(run_tree, tmp_path / str(rows), train=train)
        run = train_run(config, stop_after=1)
        (line,) = [line for line in logged(run.folder) if "train/loss" in line]
        values.append((line["train/loss"], line["train/grad_norm"], line["train/switch_loss"]))
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-5)


def test_a_checkpoint_knows_its_config_and_corpus(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Also where the config.yaml beside it is gone."""
    config = config_in(run_tree, tmp_path / "run")
    run = train_run(config, stop_after=2)
    (run.folder / "config.yaml").unlink()
    other = config_in(run_tree, tmp_path / "run", optim=run_tree["optim"] | {"lr": 0.5})
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 -> 0\.5"):
        train_run(other)
    data = run_tree["data"] | {"dir": str(tmp_path / "other"), "validation_fraction": 0.3}
    moved = config_in(run_tree, tmp_path / "run", data=data)
    prepare(moved.data, moved.model.vocab_size, QUIET)
    with pytest.raises(CheckpointError, match="was not trained on the corpus"):
        train_run(moved)


def test_a_run_continues_from_a_copy_of_its_corpus(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    whole = train_run(config_in(run_tree, tmp_path / "whole"))
    train_run(config_in(run_tree, tmp_path / "run"), stop_after=3)
    shutil.copytree(run_tree["data"]["dir"], tmp_path / "copy")
    data = run_tree["data"] | {"dir": str(tmp_path / "copy")}
    resumed = train_run(config_in(run_tree, tmp_path / "run", data=data))
    assert logged(resumed.folder) == logged(whole.folder)


def test_nothing_is_saved_where_the_weights_are_not_finite(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    """The good checkpoints stay, although no report happened to show the loss."""
    changes = {"checkpoint": {"interval": 2}, "log": {"interval": 1000}}
    config = config_in(run_tree, tmp_path / "run", **changes)
    train_run(config, stop_after=2)
    run = Run(config, open_corpora(config.data), [CheckpointCallback()])
    resume(run)
    with torch.no_grad():
        next(run.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite after step 4"):
        train(run)
    assert run.storage.steps() == [2]
