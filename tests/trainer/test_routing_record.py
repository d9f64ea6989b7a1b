"""Decisions of one run, recorded and made again by another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.errors import DataError
from moebius.trainer.config import RunConfig
from moebius.trainer.routing_record import load_routing
from tests.trainer.helpers import error_line, logged, moebius, train_run, write_config

POOL = [{"kind": "ffn", "count": 4, "intermediate_size": 16}, {"kind": "zero"}]


def config_with(
    run_tree: dict[str, Any], folder: Path, selector: dict[str, Any], record: int = 0
) -> RunConfig:
    """A run whose tokens go where a forced selector says, also at a routed depth."""
    router = {"scorer": {"kind": "none"}, "selector": selector, "weights": {"kind": "ones"}}
    ffn = {"kind": "moe", "experts": POOL, "router": router | {"losses": []}}
    log = {"interval": 1, "record_routing": record}
    model = run_tree["model"] | {"ffn": ffn}
    return RunConfig.model_validate(run_tree | {"run_dir": str(folder), "model": model, "log": log})


def train_losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in logged(folder) if "train/loss" in line]


def test_a_replayed_run_is_the_recorded_one(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Random decisions, recorded and replayed: the same losses, also where the batch is cut
    otherwise; another seed of the drawing makes other ones."""
    random = {"kind": "random", "top_k": 2}
    recorded = tmp_path / "recorded"
    train_run(config_with(run_tree, recorded, random, record=6))
    table = load_routing(recorded / "routing", torch.device("cpu"))
    assert table.sample_ids_R.tolist() == list(range(24))
    assert set(table.experts) == {
        "layers.0.ffn@1",
        *(f"layers.{layer}.ffn@{depth}" for layer in (1, 2) for depth in (1, 2)),
        "layers.3.ffn@1",
    }
    replay = {"kind": "replay", "path": str(recorded / "routing"), "top_k": 2}
    train_run(config_with(run_tree, tmp_path / "replayed", replay))
    assert train_losses(tmp_path / "replayed") == train_losses(recorded)

    cut = run_tree | {"train": run_tree["train"] | {"micro_batch_size": 1}}
    train_run(config_with(cut, tmp_path / "cut", replay))
    assert train_losses(tmp_path / "cut") == pytest.approx(train_losses(recorded), rel=1e-5)
    train_run(config_with(run_tree, tmp_path / "other", {"kind": "random", "top_k": 1}))
    assert train_losses(tmp_path / "other") != train_losses(recorded)


def test_a_resumed_run_records_what_the_unbroken_one_did(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    random = {"kind": "random", "top_k": 2}
    for name, stop in (("whole", None), ("broken", 2)):
        config = config_with(run_tree, tmp_path / name, random, record=4)
        train_run(config, stop_after=stop)
    train_run(config_with(run_tree, tmp_path / "broken", random, record=4))
    whole, broken = (
        load_routing(tmp_path / name / "routing", torch.device("cpu"))
        for name in ("whole", "broken")
    )
    assert torch.equal(whole.sample_ids_R, broken.sample_ids_R)
    assert len(whole.sample_ids_R) == 16
    for site, ids in whole.experts.items():
        assert torch.equal(ids, broken.experts[site])


def test_what_cannot_be_replayed_is_one_line(run_tree: dict[str, Any], tmp_path: Path) -> None:
    recorded = tmp_path / "recorded"
    train_run(config_with(run_tree, recorded, {"kind": "random", "top_k": 2}, record=2))
    path = str(recorded / "routing")
    cases = [
        ({"path": str(tmp_path / "nowhere"), "top_k": 2}, "holds no recorded routing"),
        ({"path": path, "top_k": 1}, "has 2 experts per token"),
        ({"path": path, "top_k": 2}, "sample 8 of the training stream was not recorded"),
    ]
    for number, (options, message) in enumerate(cases):
        folder = tmp_path / f"run{number}"
        config = config_with(run_tree, folder, {"kind": "replay", **options})
        file = write_config(config.model_dump(mode="json"), tmp_path / f"{number}.yaml")
        assert message in error_line(moebius("train", file))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="cannot read a file of"):
        load_routing(tmp_path, torch.device("cpu"))
