"""Checkpoints: whole or not there, verified, and damage is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from moebius.errors import CheckpointError
from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.model.parameters import ParameterSpec
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.trainer.checkpoint.commit import RECORD_NAME, CommitRecord
from moebius.trainer.checkpoint.store import CheckpointStore
from moebius.trainer.checkpoint.tensors import check_optimizer, load_model
from moebius.trainer.optim import OptimConfig, build_optimizer
from tests.model.helpers import build, random_batch


def record(step: int) -> CommitRecord:
    return CommitRecord(
        step=step,
        position=4 * step,
        tokens=128 * step,
        stream={"block": step},
        corpus="hash",
        config={},
        program=["0@1"],
        callbacks={},
        files={},
    )


def saved(tmp_path: Path, step: int = 3) -> tuple[CheckpointStore, Path]:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    tensors = {
        "model": {"a": torch.arange(6.0), "b": torch.ones(2, 3).T},
        "optimizer": {"a/exp_avg": torch.zeros(6), "a/step": torch.tensor(3.0)},
    }
    return store, store.save(record(step), tensors)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store, folder = saved(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        RECORD_NAME,
        "model.safetensors",
        "optimizer.safetensors",
    ]
    loaded, tensors = store.load(folder)
    assert (loaded.step, loaded.position, loaded.program) == (3, 12, ["0@1"])
    assert (loaded.tokens, loaded.stream) == (384, {"block": 3})
    assert torch.equal(tensors["model"]["b"], torch.ones(3, 2))
    assert tensors["optimizer"]["a/step"] == 3.0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_flipped_bit_is_noticed(tmp_path: Path, name: str, place: str) -> None:
    store, folder = saved(tmp_path)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} was changed after its commit"):
        store.load(folder)


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    store, folder = saved(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, \d+ were"):
        store.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        store.load(folder)


@pytest.mark.parametrize("data", [b"", b"{", b'{"format": 2}', b"\xff"])
def test_a_damaged_record_is_no_checkpoint(tmp_path: Path, data: bytes) -> None:
    store, folder = saved(tmp_path)
    (folder / RECORD_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"no valid commit\.json"):
        store.load(folder)


def test_an_unfinished_save_is_not_found_and_does_not_disturb(tmp_path: Path) -> None:
    store, folder = saved(tmp_path, step=3)
    unfinished = store.root / "step-00000004.tmp"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert store.find() == folder
    _, folder = saved(tmp_path, step=4)
    assert not unfinished.exists()
    assert store.find() == folder


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        store, _ = saved(tmp_path, step=step)
    assert [path.name for path in store.checkpoints()] == ["step-00000002", "step-00000010"]
    assert store.find(2) is not None
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .* there: 2, 10"):
        store.find(1)


def test_other_names_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """A copy made by hand is neither the newest checkpoint nor old enough to be deleted."""
    store, folder = saved(tmp_path, step=3)
    backup = store.root / "step-00000009-backup"
    shutil.copytree(folder, backup)
    assert store.find() == folder
    for step in (4, 5, 6):
        saved(tmp_path, step=step)
    assert backup.is_dir()
    assert not folder.exists()


def test_a_record_without_files_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    folder = store.save(record(1), {})
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        store.load(folder)


def test_a_failed_write_is_named_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from moebius.trainer.checkpoint.store import CheckpointStore\n"
        "from tests.trainer.test_checkpoint import record\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store = CheckpointStore(Path(sys.argv[1]), keep=1)\n"
        "try: store.save(record(1), {'model': {'a': torch.zeros(10_000)}})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(store.find())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    first, second = result.stdout.splitlines()
    assert first.startswith("CheckpointError checkpoint: cannot write '")
    assert second == "None"


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", keep=1).find() is None


def adamw(parameters: Iterable[tuple[nn.Parameter, ParameterSpec]]) -> torch.optim.Optimizer:
    return build_optimizer(parameters, OptimConfig())


def test_model_and_optimizer_state_survive(tmp_path: Path) -> None:
    """Bit for bit, into a model that started from other values."""
    layout, other = (
        Layout(build(seed=seed).decoder, ParallelConfig(), adamw, 8) for seed in (0, 1)
    )
    layout.accumulate_gradients([random_batch(2, 8)], 16, StepContext("topk", Ledger()))
    layout.engine.step(1.0)
    model = layout.engine.model_tensors() | layout.buffers()
    optimizer = layout.engine.optimizer_tensors()
    other.load(model, optimizer)
    for found, expected in [
        (other.engine.model_tensors() | other.buffers(), model),
        (other.engine.optimizer_tensors(), optimizer),
    ]:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    lacking = {name: value for name, value in optimizer.items() if name != "norm.weight/exp_avg"}
    with pytest.raises(CheckpointError, match=r"norm\.weight/exp_avg is not in the checkpoint"):
        check_optimizer(build().decoder, lacking)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    small, large = build(depth={"num_layers": 2}).decoder, build(depth={"num_layers": 3}).decoder
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is not in the checkpoint"):
        load_model(large, small.state_dict())
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is not in the model"):
        load_model(small, large.state_dict())
    small.register_buffer("bias", torch.ones(2))
    with pytest.raises(CheckpointError, match="bias is not in the checkpoint"):
        load_model(small, build(depth={"num_layers": 2}).decoder.state_dict())
    small = build(depth={"num_layers": 2}).decoder
    wide = build(hidden_size=64, depth={"num_layers": 2}).decoder
    with pytest.raises(CheckpointError, match=r"the model's is"):
        load_model(wide, small.state_dict())


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    for path in folder.iterdir():
        head = path.read_bytes()[:2]
        assert head != b"\x80\x04"
        assert head != b"PK"
    json.loads((folder / RECORD_NAME).read_text())
