"""What a student is trained on, and what it keeps of its teacher."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moebius.data.config import DataConfig
from moebius.data.corpus import open_corpora
from moebius.data.prepare import prepare
from moebius.errors import CheckpointError
from moebius.files import file_sha256
from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.trainer.checkpoint.loader import open_checkpoint
from moebius.trainer.config import RunConfig
from moebius.trainer.restore import restore
from moebius.trainer.run import Run
from tests.conftest import QUIET, model_tree
from tests.model.recursion.conftest import one_thread
from tests.trainer.helpers import logged, train_run, write_config
from tests.trainer.test_depth_commands import DENSE, LOOP, command, run_of

__all__ = ["one_thread"]


@pytest.fixture
def teacher(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a run with experts and routed passes, with checkpoints of steps 3 and 6."""
    return train_run(run_of(run_tree, tmp_path, "teacher")).folder


def student(
    tree: dict[str, Any], folder: Path, name: str, teacher: Path, **options: Any
) -> RunConfig:
    model = model_tree(ffn=DENSE, depth=LOOP)
    return run_of(tree, folder, name, model=model, distillation={"teacher": str(teacher)} | options)


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_the_first_step_is_cross_entropy_plus_divergence(
    run_tree: dict[str, Any], tmp_path: Path, teacher: Path
) -> None:
    """Both losses and the norm of their common gradient, from whole logits of both models."""
    config = student(run_tree, tmp_path, "s", teacher, coefficient=0.6, temperature=1.5)
    before = hashes(teacher)
    untrained = Run(config, open_corpora(config.data), [])
    batch = next(untrained.stream)
    labels_T = batch.labels_BS.flatten()
    executors = (untrained.layout.executor, restore(teacher, None, "cpu").executor)
    mine_TV, taught_TV = (
        executor.decoder.logits(executor.hidden(batch, StepContext(mode, Ledger()))).flatten(0, 1)
        for executor, mode in zip(executors, ("topk", "threshold"), strict=True)
    )
    ce = F.cross_entropy(mine_TV, labels_T)
    kl = 1.5**2 * F.kl_div(
        (mine_TV / 1.5).log_softmax(-1), (taught_TV.detach() / 1.5).softmax(-1), reduction="sum"
    )
    (ce + 0.6 * kl / len(labels_T)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in untrained.decoder.parameters()])

    trained = train_run(config, stop_after=1)
    (line,) = [line for line in logged(trained.folder) if "train/loss" in line]
    assert line["train/loss"] == pytest.approx(ce.item(), rel=1e-5)
    assert line["train/distillation_loss"] == pytest.approx(kl.item() / len(labels_T), rel=1e-4)
    assert line["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert hashes(teacher) == before, "a teacher's folder is read only"


def test_a_student_can_do_without_its_teacher_once_it_is_trained(
    run_tree: dict[str, Any],
    tmp_path: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its checkpoint holds the tensors of a run without one, and commands read nothing else."""
    run = train_run(student(run_tree, tmp_path, "s", teacher))
    assert run.teacher is not None
    newest = restore(teacher, None, "cpu").executor.decoder
    for name, value in run.teacher.executor.decoder.state_dict().items():
        assert torch.equal(value, newest.state_dict()[name]), "the teacher was trained"
    alone = train_run(run_of(run_tree, tmp_path, "alone", model=model_tree(ffn=DENSE, depth=LOOP)))
    keys = [set(open_checkpoint(r.storage, 6).index) for r in (run, alone)]
    assert keys[0] == keys[1]
    shutil.rmtree(teacher)
    assert command(capsys, "evaluate", run.folder)[0] == 0
    assert command(capsys, "generate", run.folder, "--max-new-tokens", "2")[0] == 0


def test_the_newest_checkpoint_of_a_teacher_may_become_another_one(
    run_tree: dict[str, Any], tmp_path: Path, teacher: Path
) -> None:
    """A named step goes on being what it was; which step it is may be said in any way."""
    whole = train_run(student(run_tree, tmp_path, "whole", teacher, step=3))
    name = "parted"
    train_run(student(run_tree, tmp_path, name, teacher, step=3), stop_after=2)
    with pytest.raises(CheckpointError, match="distilled from other weights than those of"):
        train_run(student(run_tree, tmp_path, name, teacher))
    shutil.rmtree(teacher / "checkpoints" / "step-00000006")
    resumed = train_run(student(run_tree, tmp_path, name, teacher))
    assert logged(resumed.folder) == logged(whole.folder)


@pytest.mark.parametrize("options", [{"coefficient": 0.5}, {"temperature": 2.0}])
def test_other_options_are_another_run(
    run_tree: dict[str, Any], tmp_path: Path, teacher: Path, options: dict[str, float]
) -> None:
    train_run(student(run_tree, tmp_path, "s", teacher), stop_after=1)
    (name,) = options
    with pytest.raises(CheckpointError, match=rf"distillation\.{name}: 1\.0 -> "):
        train_run(student(run_tree, tmp_path, "s", teacher, **options))
    with pytest.raises(CheckpointError, match=r"distillation"):
        train_run(run_of(run_tree, tmp_path, "s", model=model_tree(ffn=DENSE, depth=LOOP)))


def test_teachers_that_cannot_teach_are_one_line(
    run_tree: dict[str, Any],
    tmp_path: Path,
    teacher: Path,
    data_config: DataConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No such folder, no such step, another tokenizer; nothing is left in the student's folder."""
    options = data_config.model_dump() | {
        "dir": str(tmp_path / "small"),
        "tokenizer": {"vocab_size": 300},
    }
    other = DataConfig.model_validate(options)
    prepare(other, 300, QUIET)
    cases: list[tuple[dict[str, Any], str, int]] = [
        ({"distillation": {"teacher": str(tmp_path / "no")}}, "is no run folder", 4),
        ({"distillation": {"teacher": str(teacher), "step": 5}}, "there: 3, 6", 4),
        ({"data": other.model_dump()}, "has another tokenizer or vocab_size - train", 3),
        ({"distillation": {"teacher": str(teacher), "coefficient": 0}}, "greater than 0, got 0", 2),
        ({"distillation": {"teacher": str(teacher), "temperature": 0}}, "greater than 0, got 0", 2),
        ({"distillation": {}}, "distillation.teacher: missing", 2),
    ]
    config = student(run_tree, tmp_path, "s", teacher).model_dump(mode="json")
    for changes, message, wanted in cases:
        file = write_config(config | changes, tmp_path / "s.yaml")
        code, _, errors = command(capsys, "train", file)
        assert code == wanted, errors
        (line,) = errors.strip().splitlines()
        assert line.startswith("error: ")
        assert "distillation." in line
        assert message in line
    assert not (tmp_path / "s").exists()
