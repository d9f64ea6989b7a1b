"""A checkpoint of any layout is loaded by any other one, and the next step is the same."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.trainer.checkpoint.commit import CommitRecord
from moebius.trainer.checkpoint.loader import fill, newest_sound
from moebius.trainer.checkpoint.saver import Saver
from moebius.trainer.checkpoint.storage import LocalStorage
from moebius.trainer.config import CheckpointConfig
from moebius.trainer.optim import OptimConfig, build_optimizer
from tests.parity.forks import run_forked
from tests.parity.layouts import LENGTH, Rows, decoder_of, documents
from tests.parity.whole import whole_tensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm")]
MODEL = "moepp_mor"
ROWS = 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp": (2, {"data": "ddp"}),
    "zero1": (3, {"data": "zero1"}),
    "fsdp2": (2, {"data": "fsdp2"}),
    "hsdp": (4, {"data": "fsdp2", "dp_replicate": 2}),
    "tp, ep": (4, {"tp": 2, "ep": 2}),
    "pp": (2, {"pp": 2}),
    "rp": (2, {"rp": 2}),
}


def layout_of(options: dict[str, Any]) -> Layout:
    """A model in training with AdamW in fp64, from initial values."""
    optim = partial(build_optimizer, config=OptimConfig(lr=1e-2))
    decoder = decoder_of(MODEL, torch.float64)
    return Layout(decoder, ParallelConfig.model_validate(options), optim, LENGTH)


def step(layout: Layout, number: int) -> float:
    """A step on the rows of that number; its loss."""
    batch = Rows(**vars(documents(ROWS)))
    batch.tokens_BS.copy_(batch.tokens_BS.roll(number, 1))
    parts = [batch.rows(*part) for part in layout.row_ranges(ROWS, 1)]
    context = StepContext("topk", Ledger(), step=number, seed=7, training=True)
    result = layout.accumulate_gradients(parts, batch.labels_BS.numel(), context)
    layout.engine.step(1.0)
    layout.decoder.update_routers(result.ledger, number)
    return float(result.losses["loss"])


def state(layout: Layout) -> dict[str, Any]:
    return {name: value.numpy() for name, value in whole_tensors(layout.parts()).items()}


def save(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    layout = layout_of(options)
    for number in range(2):
        step(layout, number)
    storage = LocalStorage(folder)
    saver = Saver(storage, CheckpointConfig())
    record = CommitRecord(
        step=2, position=0, tokens=0, corpus="", config={}, program=[], callbacks={}, files={}
    )
    saver.begin(record, layout.parts())
    before = state(layout)
    for number in range(2, 4):  # while it is being written
        step(layout, number)
    saver.settle()
    return before


def load(options: dict[str, Any], folders: list[Path]) -> list[tuple[dict[str, Any], list[float]]]:
    layout = layout_of(options)
    found = []
    for folder in folders:
        checkpoint, _ = newest_sound(LocalStorage(folder), [2])
        assert checkpoint is not None
        parts = layout.parts()
        fill(checkpoint, parts)
        layout.engine.take_over(parts)
        loaded = state(layout)
        found.append((loaded, [step(layout, 2)]))
    return found


def test_eight_layouts_save_and_load_each_other(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(LAYOUTS))]
    saved = {
        name: run_forked(count, save, options, folder)[0]
        for (name, (count, options)), folder in zip(LAYOUTS.items(), folders, strict=True)
    }
    reference: list[float] | None = None
    for name, (count, options) in LAYOUTS.items():
        for rank, found in enumerate(run_forked(count, load, options, folders, timeout=300)):
            for source, (loaded, losses) in zip(LAYOUTS, found, strict=True):
                case = f"{source} -> {name}, rank {rank}"
                assert loaded.keys() == saved[source].keys(), case
                for key, value in loaded.items():
                    assert np.array_equal(value, saved[source][key]), f"{case}: {key}"
                reference = reference or losses
                assert losses == pytest.approx(reference, rel=1e-9), case
