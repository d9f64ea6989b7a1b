"""A converted run begins with the converted weights, and what cannot begin says why."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.data.config import DataConfig
from moebius.data.prepare import prepare
from moebius.model.executor import LocalExecutor
from moebius.trainer.config import RunConfig
from moebius.trainer.folder import claim_folder, lock_folder
from moebius.trainer.restore import restore
from tests.conftest import QUIET, model_tree
from tests.model.recursion.conftest import one_thread
from tests.trainer.helpers import logged, train_run, write_config
from tests.trainer.test_depth_commands import DENSE, LOOP, command, loss_of, run_of

__all__ = ["one_thread"]
CAPTURE = pytest.CaptureFixture[str]


@pytest.fixture
def dense(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a trained dense run, with checkpoints of steps 3 and 6."""
    model = model_tree(ffn=DENSE, depth={"num_layers": 6})
    return train_run(run_of(run_tree, tmp_path, "dense", model=model)).folder


def recursive(tree: dict[str, Any], folder: Path, name: str = "r", **model: Any) -> Path:
    """A run file."""
    changes = {"ffn": DENSE, "depth": LOOP} | model
    tree = tree | {"run_dir": str(folder / name), "model": model_tree(**changes)}
    return write_config(tree, folder / f"{name}.yaml")


@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
def test_training_goes_on_from_the_converted_weights(
    run_tree: dict[str, Any], tmp_path: Path, dense: Path, capsys: CAPTURE, init: str
) -> None:
    """The layers that the method names, of the step that was asked for; then training."""
    file = recursive(run_tree, tmp_path)
    code, out, _ = command(capsys, "convert", dense, file, "--init", init, "--step", "3")
    assert code == 0
    assert f"converted '{dense}' at step 3 to '{tmp_path / 'r'}' at step 0" in out
    source = restore(dense, 3, "cpu").executor.decoder.state_dict()
    converted = restore(tmp_path / "r", 0, "cpu")
    # Layers 1 and 2 stand for 1, 3 and 2, 4; of the body, the first and last are 1 and 4.
    tied = {"stepwise": [(1,), (4,)], "average": [(1, 3), (2, 4)], "lower": [(1,), (2,)]}
    origins = [(0,), *tied.get(init, [(3,), (4,)]), (5,)]
    for name, value in converted.executor.decoder.state_dict().items():
        wanted = source.get(name)
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            found = [source[f"layers.{origin}.{rest}"] for origin in origins[int(layer)]]
            wanted = torch.stack(found).mean(dim=0)
        assert wanted is not None
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-7)
    loss = loss_of(converted)
    assert command(capsys, "train", file)[0] == 0
    evaluated = {
        line["step"]: line["eval/loss"] for line in logged(tmp_path / "r") if "eval/loss" in line
    }
    assert evaluated[0] == pytest.approx(loss, rel=1e-6)
    assert evaluated[6] < evaluated[0]


def test_there_and_back_through_the_command_line(
    run_tree: dict[str, Any], tmp_path: Path, capsys: CAPTURE
) -> None:
    """A trained recursive run becomes a dense one of the same losses, and again a recursive one."""
    adapter = {"kind": "dora", "rank": 4}
    model = model_tree(ffn=DENSE, depth=LOOP | {"adapter": adapter})
    folder = train_run(run_of(run_tree, tmp_path, "first", model=model)).folder
    unrolled = recursive(run_tree, tmp_path, "unrolled", depth={"num_layers": 6})
    assert command(capsys, "convert", folder, unrolled)[0] == 0
    full = LOOP | {"adapter": adapter | {"rank": 48}}
    assert (
        command(
            capsys, "convert", tmp_path / "unrolled", recursive(run_tree, tmp_path, depth=full)
        )[0]
        == 0
    )
    loss = loss_of(restore(folder, None, "cpu"))
    assert loss_of(restore(tmp_path / "unrolled", None, "cpu")) == pytest.approx(loss, abs=1e-5)
    assert loss_of(restore(tmp_path / "r", None, "cpu")) == pytest.approx(loss, abs=1e-5)


def test_what_has_no_source_is_named(
    run_tree: dict[str, Any], tmp_path: Path, dense: Path, capsys: CAPTURE
) -> None:
    """Depth routers; an override with a space is quoted in what to do next."""
    file = recursive(run_tree, tmp_path, depth=LOOP | {"router": {}})
    override = f"run_dir={tmp_path / 'with space'}"
    code, out, _ = command(capsys, "convert", dense, file, override)
    assert code == 0
    names = [f"depth_routers.0.scorers.{number}.weight" for number in (0, 1)]
    assert f"new, with initial values: {', '.join(names)}" in out
    assert f"moebius train {file} '{override}'" in out
    assert restore(tmp_path / "with space", None, "cpu").step == 0


def failure(capsys: CAPTURE, *arguments: str | Path) -> str:
    """The one line of a conversion that is refused."""
    code, _, errors = command(capsys, "convert", *arguments)
    assert code in (2, 3, 4)
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_what_cannot_be_converted_is_one_line(
    run_tree: dict[str, Any],
    tmp_path: Path,
    dense: Path,
    data_config: DataConfig,
    capsys: CAPTURE,
) -> None:
    file = recursive(run_tree, tmp_path)
    assert "is no run folder" in failure(capsys, tmp_path / "nothing", file)
    assert "there: 3, 6" in failure(capsys, dense, file, "--step", "5")
    line = failure(capsys, dense, file, "model.hidden_size=64")
    assert line == f"error: {file}: model.hidden_size: 64, but the source has 32"
    line = failure(capsys, dense, file, "model.ffn.intermediate_size=64")
    assert f"{file}: model.ffn: " in line
    other = {"dir": str(tmp_path / "small"), "tokenizer": {"vocab_size": 300}}
    prepare(DataConfig.model_validate(data_config.model_dump() | other), 300, QUIET)
    small = (f"data.dir={tmp_path / 'small'}", "data.tokenizer.vocab_size=300")
    line = failure(capsys, dense, file, *small)
    assert "has another tokenizer than" in line
    with lock_folder(tmp_path / "r"):
        assert "is being trained by another process" in failure(capsys, dense, file)
    assert not (tmp_path / "r" / "config.yaml").exists()
    assert command(capsys, "convert", dense, file)[0] == 0, "no refusal is in the way of the next"
    assert "holds a run already" in failure(capsys, dense, file)
    assert "holds a run already" in failure(capsys, dense, dense / "config.yaml")


def test_the_folder_of_another_config_is_refused_as_in_training(
    run_tree: dict[str, Any], tmp_path: Path, dense: Path, capsys: CAPTURE
) -> None:
    """A run that has begun and not yet saved."""
    (tmp_path / "r").mkdir()
    claim_folder(RunConfig.model_validate(run_tree | {"run_dir": str(tmp_path / "r")}))
    file = recursive(run_tree, tmp_path)
    assert command(capsys, "train", file)[0] == 4
    assert command(capsys, "convert", dense, file)[0] == 4


def test_generation_from_each_exit_of_a_converted_model(
    run_tree: dict[str, Any], tmp_path: Path, dense: Path, capsys: CAPTURE
) -> None:
    """The last exit is the model; an earlier one is the program that ends there."""
    file = recursive(run_tree, tmp_path)
    assert command(capsys, "convert", dense, file)[0] == 0
    options = ("--prompt", "def ", "--temperature", "0", "--max-new-tokens", "8")
    texts = [
        command(capsys, "generate", tmp_path / "r", *options, "--exit", str(number))[1]
        for number in range(1, 7)
    ]
    assert texts[5] == command(capsys, "generate", tmp_path / "r", *options)[1]
    assert len(set(texts)) > 1
    model = restore(tmp_path / "r", None, "cpu")
    losses = [
        loss_of(
            model, LocalExecutor(model.executor.decoder, program=model.executor.program.until(n))
        )
        for n in (1, 6)
    ]
    assert losses[1] == pytest.approx(loss_of(model), abs=1e-6)
    assert losses[0] != losses[1]
