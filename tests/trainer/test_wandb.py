"""Weights & Biases without a server: what its own files hold."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from wandb.proto import wandb_internal_pb2

from moebius.trainer.config import RunConfig
from tests.trainer.helpers import error_line, moebius, train_run, write_config

HEADER, BLOCK = 7, 32768
"""bytes"""
FULL, LAST = 1, 4
"""kinds of pieces that end a record"""
OFFLINE = {"wandb": {"project": "test", "mode": "offline"}, "interval": 1, "picture_interval": 3}


def records(folder: Path) -> list[Any]:
    """All records of a session: a log as LevelDB writes them, behind a header of its own."""
    (path,) = folder.glob("run-*.wandb")
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    found, pieces, at = [], b"", HEADER
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:  # no room for another one in the block
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            found.append(wandb_internal_pb2.Record.FromString(pieces))
            pieces = b""
    return found


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
        for row in rows
    ]


def test_a_session_has_the_numbers_and_pictures_and_a_second_one_goes_on(
    run_tree: dict[str, Any],
) -> None:
    config = RunConfig.model_validate(run_tree | {"log": OFFLINE, "checkpoint": {"interval": 2}})
    folder = train_run(config, stop_after=4).folder
    (first,) = folder.glob("wandb/offline-run-*")
    train_run(config)
    sessions = sorted(folder.glob("wandb/offline-run-*"))
    assert len(sessions) == 2
    second = next(path for path in sessions if path != first)

    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    found = {}
    for session, steps in ((first, range(1, 5)), (second, range(5, 7))):
        rows = history(records(session))
        own = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
        assert set(own) == set(steps)
        found |= own
    assert found == losses

    (run,) = [r.run for r in records(second) if r.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.run_id) == ("test", (folder / "wandb.id").read_text())
    pictures = list(first.glob("files/media/images/width/load_3_*.png"))
    assert len(pictures) == 1
    assert np.asarray(Image.open(pictures[0])).std() > 0


def test_without_the_package(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """An interpreter that finds none says so in one line, before it trains."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "wandb.py").write_text("raise ImportError('none here')")
    config = write_config(run_tree | {"log": OFFLINE}, tmp_path / "run.yaml")
    result = moebius("train", config, env={"PYTHONPATH": f"{hidden}:{':'.join(sys.path)}"})
    assert "the package wandb cannot be imported (none here)" in error_line(result)
    assert "pip install 'moebius[wandb]'" in error_line(result)


def test_nobody_is_logged_in(run_tree: dict[str, Any], tmp_path: Path) -> None:
    node = {"wandb": {"project": "test"}}
    config = write_config(run_tree | {"log": node}, tmp_path / "run.yaml")
    env = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    line = error_line(moebius("train", config, env=env, stdin=subprocess.DEVNULL))
    assert line.endswith("log in (wandb login), or set log.wandb.mode=offline")
    assert "log.wandb: No API key configured" in line
