"""`moebius checkpoints`: what is there, whether it is sound, what goes, and means of weights."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moebius.data.config import DataConfig
from moebius.data.corpus import open_corpora
from moebius.data.manifest import Manifest
from moebius.errors import CheckpointError
from moebius.parallel.part import Box
from moebius.trainer.callbacks.checkpointing import CheckpointCallback
from moebius.trainer.checkpoint.average import average
from moebius.trainer.checkpoint.commit import INDEX_NAME, RECORD_NAME, CommitRecord, FileEntry
from moebius.trainer.checkpoint.files import DTYPES, Item, write_tensors
from moebius.trainer.checkpoint.loader import Checkpoint, open_checkpoint
from moebius.trainer.checkpoint.plan import Entry, Stored, key, write_index
from moebius.trainer.checkpoint.storage import LocalStorage, folder_name
from moebius.trainer.commands.checkpoints import duration
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.folder import lock_folder
from moebius.trainer.loop import train
from moebius.trainer.recovery.goodput import FILE_NAME, Account, write_account
from moebius.trainer.restore import restore
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from tests.conftest import model_tree
from tests.model.recursion.conftest import one_thread
from tests.trainer.helpers import saved_state, train_run
from tests.trainer.test_depth_commands import command

__all__ = ["one_thread"]
CAPTURE = pytest.CaptureFixture[str]
MODEL = "model-00000.safetensors"
OPTIMIZER = "optimizer-00000.safetensors"


def tree_in(folder: Path, data: DataConfig, **checkpoint: Any) -> dict[str, Any]:
    """A run of eight steps with a checkpoint of every other, and an evaluation of every fourth."""
    return {
        "run_dir": str(folder),
        "model": model_tree(),
        "data": data.model_dump(),
        "train": {"num_steps": 8, "batch_size": 4, "micro_batch_size": 2, "device": "cpu"},
        "optim": {"lr": 1e-2, "schedule": {"kind": "cosine", "warmup_steps": 2}},
        "evaluation": {"interval": 4, "num_batches": 2},
        "checkpoint": {"interval": 2, "keep": 3, **checkpoint},
        "log": {"interval": 1},
    }


@pytest.fixture(scope="module")
def trained(
    data_config: DataConfig, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Stopped after step 6, with checkpoints of 2, 4 and 6."""
    tree = tree_in(tmp_path_factory.mktemp("trained") / "run", data_config)
    return train_run(RunConfig.model_validate(tree), stop_after=6).folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of its folder."""
    return shutil.copytree(trained, tmp_path / "run")


def at(run: Path, step: int, file: str = "") -> Path:
    return run / "checkpoints" / folder_name(step) / file


def flip(path: Path, where: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def steps(run: Path) -> list[int]:
    return LocalStorage(run / "checkpoints").steps()


def checkpoints(capsys: CAPTURE, *arguments: str | Path | int) -> tuple[int, list[str], str]:
    """Exit code, lines and errors."""
    code, out, err = command(capsys, "checkpoints", *map(str, arguments))
    assert len(err.splitlines()) == (code != 0)
    return code, out.splitlines(), err


def size(folder: Path) -> int:
    """Of all files beside the record."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != RECORD_NAME)


def crash(run: Path, step: int, count: int) -> None:
    """So many starts from a checkpoint that all crashed two steps after it."""
    for _ in range(count):
        write_account(run / FILE_NAME, Account(0, step, {}), begins=True)
        write_account(run / FILE_NAME, Account(0, step + 2, {}))


class TestList:
    def test_a_table_of_what_there_is(self, run: Path, capsys: CAPTURE) -> None:
        code, lines, _ = checkpoints(capsys, "list", run)
        assert code == 0
        logged = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        (loss,) = [n["eval/loss"] for n in logged if n["step"] == 4 and "eval/loss" in n]
        assert lines[0] == str(run / "checkpoints")
        assert lines[1].split() == [
            "step",
            "tokens",
            "loss",
            "processes",
            "size",
            "files",
            "age",
            "state",
        ]
        sizes = [f"{size(at(run, step)) / 1e3:.1f} kB" for step in (2, 4, 6)]
        for line, start, end in zip(
            lines[2:],
            ("2 256", f"4 512 {loss:.4f}", "6 768"),  # 4 x 32 tokens a step
            (f"1 {size} 3" for size in sizes),
            strict=True,
        ):
            words = line.split()
            assert " ".join(words).startswith(f"{start} {end} ")
            assert words[-2:] == ["s", "readable"]

    def test_lines_of_json(self, run: Path, capsys: CAPTURE) -> None:
        _, lines, _ = checkpoints(capsys, "list", run, "--json")
        rows = [json.loads(line) for line in lines]
        assert [(row["kind"], row["step"]) for row in rows] == [
            ("checkpoint", s) for s in (2, 4, 6)
        ]
        for row in rows:
            assert row["bytes"] == size(at(run, row["step"]))
            assert row["written"] == at(run, row["step"], RECORD_NAME).stat().st_mtime
            assert (row["processes"], row["files"], row["state"]) == (1, 3, "readable")
        assert [row["validation_loss"] is None for row in rows] == [True, False, True]

    @pytest.mark.parametrize("file", [RECORD_NAME, INDEX_NAME])
    def test_a_damaged_record_or_index(self, run: Path, capsys: CAPTURE, file: str) -> None:
        flip(at(run, 4, file), at(run, 4, file).stat().st_size // 2)
        code, lines, _ = checkpoints(capsys, "list", run)
        assert code == 0
        (reason,) = lines[5:]
        assert reason.startswith("step 4: unreadable: ")
        assert file in reason
        _, lines, _ = checkpoints(capsys, "list", run, "--json")
        rows = [json.loads(line) for line in lines]
        assert [row["state"] for row in rows] == ["readable", "unreadable", "readable"]
        assert file in rows[1]["reason"]

    def test_weights_are_not_read(self, run: Path, capsys: CAPTURE) -> None:
        at(run, 4, MODEL).unlink()
        assert "unreadable" not in "".join(checkpoints(capsys, "list", run)[1])

    def test_what_is_no_checkpoint_and_starts(self, run: Path, capsys: CAPTURE) -> None:
        shutil.copytree(at(run, 4), run / "checkpoints" / "step-00000008.tmp")
        at(run, 2).rename(run / "checkpoints" / "step-00000002.damaged")
        (run / "checkpoints" / "step-of-mine.tmp").mkdir()
        crash(run, 6, 3)
        _, lines, _ = checkpoints(capsys, "list", run)
        assert lines[-3] == "set aside: step-00000002.damaged"
        assert lines[-2] == "unfinished: step-00000008.tmp"
        assert lines[-1].startswith("3 starts from step 6 ")
        _, lines, _ = checkpoints(capsys, "list", run, "--json")
        assert [json.loads(line)["kind"] for line in lines] == [
            *["checkpoint"] * 2,
            *["remains"] * 2,
            "starts",
        ]
        assert json.loads(lines[-1]) == {"kind": "starts", "step": 6, "count": 3}

    def test_no_checkpoints_and_no_run(self, run: Path, tmp_path: Path, capsys: CAPTURE) -> None:
        shutil.rmtree(run / "checkpoints")
        code, lines, _ = checkpoints(capsys, "list", run)
        assert (code, lines) == (0, [f"'{run}' has no checkpoint yet"])
        code, _, err = checkpoints(capsys, "list", tmp_path)
        assert code == 4
        assert "is no run folder: it has no config.yaml" in err


def test_a_table_of_a_large_run_fits(
    run: Path, capsys: CAPTURE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = at(run, 6, RECORD_NAME)
    record = CommitRecord.read(path.read_bytes())
    large = {"tokens": 15 * 10**12, "processes": 16384, "evaluation": 1.98765}
    path.write_text(record.model_copy(update=large).text())
    flip(at(run, 4, RECORD_NAME))
    long_ago = path.stat().st_mtime - 100 * 86400
    os.utime(path, (long_ago, long_ago))
    _, lines, _ = checkpoints(capsys, "list", run)
    words = f"6 15,000,000,000,000 1.9876 16384 {size(at(run, 6)) / 1e3:.1f} kB 3 100 d readable"
    assert lines[4].split() == words.split()
    assert lines[3].split()[-1] == "unreadable"
    assert max(map(len, lines[1:5])) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (99, "99 s"), (100, "1 min"), (5999, "99 min"), (6000, "1 h"), (172800, "2 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class TestVerify:
    def test_sound(self, run: Path, capsys: CAPTURE) -> None:
        code, lines, _ = checkpoints(capsys, "verify", run)
        assert code == 0
        assert [line.partition(" (")[0] for line in lines] == [
            f"step {s}: sound" for s in (2, 4, 6)
        ]
        assert lines[0].endswith(f"(3 files, {size(at(run, 2)) / 1e3:.1f} kB)")

    @pytest.mark.parametrize("file", [MODEL, OPTIMIZER, INDEX_NAME, RECORD_NAME])
    def test_any_byte_that_was_flipped(self, run: Path, capsys: CAPTURE, file: str) -> None:
        flip(at(run, 4, file), at(run, 4, file).stat().st_size // 2)
        code, lines, err = checkpoints(capsys, "verify", run)
        assert code == 4
        assert [": sound (" in line for line in lines] == [True, False, True]
        assert lines[1].startswith("step 4: ")
        assert file in lines[1]
        assert err.startswith("error: 1 of 3 checkpoints in ")
        assert " damaged: 4 - " in err
        assert checkpoints(capsys, "verify", run, "--step", 6)[0] == 0
        assert checkpoints(capsys, "verify", run, "--step", 4)[0] == 4

    def test_a_file_that_is_missing_or_cut(self, run: Path, capsys: CAPTURE) -> None:
        at(run, 2, OPTIMIZER).unlink()
        content = at(run, 6, MODEL).read_bytes()
        at(run, 6, MODEL).write_bytes(content[:-1])
        code, lines, err = checkpoints(capsys, "verify", run)
        assert code == 4
        assert lines[0] == f"step 2: {OPTIMIZER} is missing"
        assert lines[2].startswith(f"step 6: {MODEL} has {len(content) - 1} bytes")
        assert " damaged: 2, 6 - " in err

    def test_a_step_without_a_checkpoint(self, run: Path, capsys: CAPTURE) -> None:
        code, _, err = checkpoints(capsys, "verify", run, "--step", 3)
        assert code == 4
        assert "--step: 3; there are checkpoints of 2, 4, 6" in err

    def test_one_that_the_run_deletes_meanwhile(
        self, run: Path, capsys: CAPTURE, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = LocalStorage.digest

        def deleting(self: LocalStorage, step: int, file: str) -> tuple[int, str]:
            shutil.rmtree(at(run, 2), ignore_errors=True)
            return digest(self, step, file)

        monkeypatch.setattr(LocalStorage, "digest", deleting)
        code, lines, _ = checkpoints(capsys, "verify", run)
        assert code == 0
        assert lines[0] == "step 2: deleted meanwhile, by the run"


class TestPrune:
    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ("", [2, 4, 6]),
            ("--keep 1", [6]),
            ("--keep 2", [4, 6]),
            ("--keep 1 --keep-every 2", [2, 4, 6]),
            ("--keep 1 --keep-best 1", [4, 6]),  # the only one with a validation loss
        ],
    )
    def test_rules(self, run: Path, capsys: CAPTURE, options: str, kept: list[int]) -> None:
        words = options.split()
        code, would, _ = checkpoints(capsys, "prune", run, "--dry-run", *words)
        assert code == 0
        assert steps(run) == [2, 4, 6]
        code, lines, _ = checkpoints(capsys, "prune", run, *words)
        assert code == 0
        assert steps(run) == kept
        assert would == [line.replace(": deleted", ": would be deleted") for line in lines]
        assert lines[-1] == f"kept: {', '.join(map(str, kept))}"
        gone = [step for step in (2, 4, 6) if step not in kept]
        assert [line.partition(" (")[0] for line in lines[:-1]] == [f"step {s}" for s in gone]

    def test_what_the_run_says(self, run: Path, capsys: CAPTURE) -> None:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("  keep: 3\n", "  keep: 1\n"))
        checkpoints(capsys, "prune", run)
        assert steps(run) == [6]

    def test_remains_go(self, run: Path, capsys: CAPTURE) -> None:
        """Also where one has the name that a checkpoint gets while it is removed."""
        names = ["step-00000002.tmp", "step-00000008.damaged", "step-of-mine.tmp"]
        for name in names:
            shutil.copytree(at(run, 4), run / "checkpoints" / name)
        _, lines, _ = checkpoints(capsys, "prune", run, "--keep", 2, "--dry-run")
        assert all((run / "checkpoints" / name).exists() for name in names)
        assert lines[:2] == [
            "step-00000002.tmp (unfinished): would be deleted",
            "step-00000008.damaged (set aside): would be deleted",
        ]
        code, lines, _ = checkpoints(capsys, "prune", run, "--keep", 2)
        assert code == 0
        there = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert there == ["step-00000004", "step-00000006", "step-of-mine.tmp"]

    @pytest.mark.parametrize("file", [MODEL, OPTIMIZER, INDEX_NAME, RECORD_NAME])
    def test_the_newest_sound_one_stays(self, run: Path, capsys: CAPTURE, file: str) -> None:
        flip(at(run, 6, file), at(run, 6, file).stat().st_size // 2)
        code, lines, _ = checkpoints(capsys, "prune", run, "--keep", 1)
        assert code == 0
        assert steps(run) == [4, 6]
        assert lines[0].startswith("step 6: stays, but does not count: ")
        assert file in lines[0]

    def test_nothing_goes_where_none_is_sound(self, run: Path, capsys: CAPTURE) -> None:
        (run / "checkpoints" / "step-00000008.tmp").mkdir()
        for step in (2, 4, 6):
            flip(at(run, step, MODEL))
        code, _, err = checkpoints(capsys, "prune", run, "--keep", 1)
        assert code == 4
        assert "none of 3 checkpoints in" in err
        assert steps(run) == [2, 4, 6]
        assert (run / "checkpoints" / "step-00000008.tmp").exists()

    def test_one_stays_from_which_a_run_can_start(self, run: Path, capsys: CAPTURE) -> None:
        """All starts from the newest one have crashed; a damaged one is no way out."""
        crash(run, 6, 3)
        flip(at(run, 4, MODEL))
        checkpoints(capsys, "prune", run, "--keep", 1)
        assert steps(run) == [2, 4, 6]

    def test_not_while_the_run_is_trained(self, run: Path, capsys: CAPTURE) -> None:
        with lock_folder(run):
            code, lines, err = checkpoints(capsys, "prune", run, "--keep", 1)
        assert (code, lines) == (4, [])
        assert "is being trained by another process" in err
        assert steps(run) == [2, 4, 6]


def plain_mean(folders: Sequence[Path], parameters: set[str]) -> dict[str, Tensor]:
    """By the book; what is no parameter is that of the last."""
    found = [load_file(folder / MODEL) for folder in folders]
    mean = {}
    for name, newest in found[-1].items():
        values = torch.stack([tensors[name].double() for tensors in found])
        mean[name] = values.mean(dim=0).to(newest.dtype) if name in parameters else newest
    return mean


def parameters_of(run: Path) -> set[str]:
    decoder = restore(run, None, "cpu").executor.decoder
    return {name for name, _ in decoder.named_parameters(remove_duplicate=False)}


class TestAverage:
    @pytest.mark.parametrize(
        ("options", "chosen"),
        [("--last 2", (4, 6)), ("--last 3", (2, 4, 6)), ("--steps 4 2 2", (2, 4))],
    )
    def test_the_mean(
        self, run: Path, tmp_path: Path, capsys: CAPTURE, options: str, chosen: tuple[int, ...]
    ) -> None:
        out = tmp_path / "new" / "mean"
        code, lines, _ = checkpoints(capsys, "average", run, out, *options.split())
        assert code == 0
        assert f"averaged steps {', '.join(map(str, chosen))} of " in lines[0]
        newest = chosen[-1]
        assert steps(out) == [newest]
        expected = plain_mean([at(run, step) for step in chosen], parameters_of(run))
        found = load_file(at(out, newest, MODEL))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=0)
        before = load_file(at(run, newest, MODEL))
        assert any(not torch.equal(found[name], before[name]) for name in found)
        for file in (OPTIMIZER, INDEX_NAME):
            assert at(out, newest, file).read_bytes() == at(run, newest, file).read_bytes()
        assert checkpoints(capsys, "verify", out)[0] == 0
        assert steps(run) == [2, 4, 6]

    def test_its_record(self, run: Path, tmp_path: Path, capsys: CAPTURE) -> None:
        """That of the newest, but nobody has evaluated the mean."""
        out = tmp_path / "mean"
        checkpoints(capsys, "average", run, out, "--steps", 2, 4)
        old, new = (CommitRecord.read(at(path, 4, RECORD_NAME).read_bytes()) for path in (run, out))
        assert old.evaluation is not None
        assert new.evaluation is None
        assert new.config["run_dir"] == str(out)
        changed = {"evaluation", "config", "files"}
        assert new.model_dump(exclude=changed) == old.model_dump(exclude=changed)
        assert load_config(out / "config.yaml").run_dir == str(out)

    def test_evaluate_and_generate(self, run: Path, tmp_path: Path, capsys: CAPTURE) -> None:
        out = tmp_path / "mean"
        checkpoints(capsys, "average", run, out, "--last", 2)
        mean = restore(out, None, "cpu").executor.decoder.state_dict()
        expected = plain_mean([at(run, 4), at(run, 6)], parameters_of(run))
        for name, value in expected.items():
            torch.testing.assert_close(mean[name], value, rtol=1e-7, atol=0)
        losses = [command(capsys, "evaluate", path, "--device", "cpu") for path in (run, out)]
        assert [code for code, _, _ in losses] == [0, 0]
        assert losses[0][1] != losses[1][1]
        code, _, _ = command(
            capsys, "generate", out, "--prompt", "def ", "--max-new-tokens", "2", "--device", "cpu"
        )
        assert code == 0

    def test_a_run_goes_on_from_it(self, run: Path, tmp_path: Path, capsys: CAPTURE) -> None:
        """As the old one does with its weights set to the mean by hand."""
        out = tmp_path / "mean"
        checkpoints(capsys, "average", run, out, "--last", 3)
        continued = train_run(load_config(out / "config.yaml"))
        assert continued.step == 8
        config = load_config(run / "config.yaml", [f"run_dir={run}"])
        by_hand = Run(config, open_corpora(config.data), [CheckpointCallback()])
        resume(by_hand)
        mean = plain_mean([at(run, step) for step in (2, 4, 6)], parameters_of(run))
        by_hand.decoder.load_state_dict(mean)
        train(by_hand)
        expected = saved_state(by_hand)
        found = saved_state(continued)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)

    def test_an_existing_folder(self, run: Path, tmp_path: Path, capsys: CAPTURE) -> None:
        (tmp_path / "there").mkdir()
        code, _, err = checkpoints(capsys, "average", run, tmp_path / "there", "--last", 2)
        assert code == 4
        assert "there' exists - choose another folder or delete it" in err
        assert not list((tmp_path / "there").iterdir())

    @pytest.mark.parametrize(("step", "file"), [(4, MODEL), (6, MODEL), (6, OPTIMIZER)])
    def test_damaged_ones(
        self, run: Path, tmp_path: Path, capsys: CAPTURE, step: int, file: str
    ) -> None:
        flip(at(run, step, file))
        code, _, err = checkpoints(capsys, "average", run, tmp_path / "mean", "--last", 2)
        assert code == 4
        assert f"{folder_name(step)}': {file} was changed after its commit" in err
        assert not (tmp_path / "mean").exists()

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            ("--last 4", 4, "--last: 4, but there are 3 checkpoints: 2, 4, 6"),
            ("--steps 2 3", 4, "--steps: 3; there are checkpoints of 2, 4, 6"),
            ("--steps 2 2", 2, "--steps: 2, 2; allowed: two or more different ones of 2, 4, 6"),
        ],
    )
    def test_steps_that_are_not_there(
        self, run: Path, tmp_path: Path, capsys: CAPTURE, options: str, code: int, message: str
    ) -> None:
        found, _, err = checkpoints(capsys, "average", run, tmp_path / "m", *options.split())
        assert found == code
        assert message in err
        assert not (tmp_path / "m").exists()

    def test_a_failure_leaves_no_folder(
        self, run: Path, tmp_path: Path, capsys: CAPTURE, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise CheckpointError("no space left")

        monkeypatch.setattr(LocalStorage, "commit", full)
        code, _, err = checkpoints(capsys, "average", run, tmp_path / "mean", "--last", 2)
        assert (code, err) == (4, "error: no space left\n")
        assert not (tmp_path / "mean").exists()


Cuts = dict[str, Sequence[tuple[str, Box]]]
"""file and box of each part of a tensor, by the tensor's name"""


def written(storage: LocalStorage, step: int, tensors: dict[str, Tensor], cuts: Cuts) -> Checkpoint:
    """A checkpoint as several processes write it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    index, files = {}, dict[str, list[Item]]()
    for name, value in tensors.items():
        parts = cuts.get(name, [(MODEL, Box((0,) * value.dim(), tuple(value.shape)))])
        entry = Entry(tuple(value.shape), names[value.dtype], tuple(Stored(*p) for p in parts))
        index[name] = entry
        for file, box in parts:
            piece = value[box.within(Box((0,) * value.dim(), tuple(value.shape)))]
            item = Item(key(name, entry, box), box.sizes, value.dtype, lambda piece=piece: piece)
            files.setdefault(file, []).append(item)
    storage.begin(step)
    entries = {
        file: write_tensors(storage.scratch(step) / file, items, lambda: None)
        for file, items in files.items()
    }
    text = write_index(index)
    record = CommitRecord(
        step=step,
        position=step,
        tokens=step,
        corpus="",
        config={},
        program=[],
        callbacks={},
        files=entries | {INDEX_NAME: FileEntry.of(text.encode())},
    )
    storage.commit(step, {INDEX_NAME: text, RECORD_NAME: record.text()})
    return open_checkpoint(storage, step)


def test_checkpoints_of_different_layouts(tmp_path: Path) -> None:
    """Boxes are the newest's; integers and what is no parameter, too; sums have no rounding."""
    second = "model-00001.safetensors"
    old: Cuts = {
        "model/w": [(MODEL, Box((0, 0), (4, 2))), (second, Box((0, 2), (4, 4)))],
        "model/b": [(second, Box((0,), (3,)))],
    }
    new: Cuts = {"model/w": [(MODEL, Box((0, 0), (3, 6))), (second, Box((3, 0), (1, 6)))]}
    generator = torch.Generator().manual_seed(0)

    def tensors(number: int) -> dict[str, Tensor]:
        return {
            "model/w": torch.randn(4, 6, generator=generator) * 10**number,
            "model/b": torch.randn(3, generator=generator).bfloat16(),
            "model/scalar": torch.randn((), generator=generator),
            "model/whole": torch.tensor([number, 2]),
            "model/buffer": torch.tensor([1.5 * number]),
        }

    values = [tensors(number) for number in range(3)]
    storage = LocalStorage(tmp_path / "old")
    cuts = (old, {}, new)
    found = [written(storage, n, values[n], cuts[n]) for n in range(3)]
    target = LocalStorage(tmp_path / "new")
    averaged = {f"model/{name}" for name in ("w", "b", "scalar", "whole")}
    average(found, averaged, found[-1].record, target)
    read: dict[str, Tensor] = {}
    for file in (MODEL, second):
        read |= load_file(tmp_path / "new" / folder_name(2) / file)
    assert read.keys() == {"w[0:3,0:6]", "w[3:4,0:6]", "b", "scalar", "whole", "buffer"}
    read["w"] = torch.cat([read.pop("w[0:3,0:6]"), read.pop("w[3:4,0:6]")])
    for name in ("w", "b", "scalar"):
        exact = torch.stack([v[f"model/{name}"].double() for v in values]).mean(0)
        assert read[name].dtype == values[0][f"model/{name}"].dtype
        eps = torch.finfo(read[name].dtype).eps
        assert ((read[name].double() - exact).abs() <= exact.abs() * eps / 2 + 1e-12).all()
    assert read["whole"].tolist() == [2, 2]
    assert read["buffer"].tolist() == [3.0]
    assert open_checkpoint(target, 2).index == found[-1].index


def test_other_models_are_not_averaged(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "old")
    a = written(storage, 1, {"model/a": torch.ones(2)}, {})
    b = written(storage, 2, {"model/a": torch.ones(3)}, {})
    with pytest.raises(
        CheckpointError, match=r"00000001' is of another model .*; checkpoint: a is"
    ):
        average([a, b], {"model/a"}, b.record, LocalStorage(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_checkpoints_at_a_url(
    data_config: DataConfig, manifest: Manifest, tmp_path: Path, capsys: CAPTURE
) -> None:
    url = f"memory://checkpoints-command/{tmp_path.name}"
    tree = tree_in(tmp_path / "run", data_config, dir=url)
    trained = train_run(RunConfig.model_validate(tree), stop_after=6)
    folder, storage = trained.folder, trained.storage
    out = tmp_path / "mean"
    assert checkpoints(capsys, "average", folder, out, "--last", 2)[0] == 0
    assert restore(out, None, "cpu").config.checkpoint.dir is None
    assert steps(out) == [6]
    code, lines, _ = checkpoints(capsys, "list", folder, "--json")
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["written"] > 1.7e9 and row["bytes"] > 0 for row in rows)
    assert checkpoints(capsys, "verify", folder)[0] == 0
    storage.set_aside(2)
    fs, path = storage.fs, storage._path(6, OPTIMIZER)
    fs.pipe_file(path, fs.cat_file(path)[:-1] + b"?")
    code, lines, _ = checkpoints(capsys, "verify", folder)
    assert code == 4
    assert lines[1] == f"step 6: {OPTIMIZER} was changed after its commit"
    code, lines, _ = checkpoints(capsys, "list", folder)
    assert lines[-1] == "unfinished or set aside: step-00000002"
    code, lines, _ = checkpoints(capsys, "prune", folder, "--keep", 1)
    assert code == 0
    assert storage.steps() == [4, 6]
    assert storage.remains() == []
