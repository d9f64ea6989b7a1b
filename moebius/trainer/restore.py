"""A trained model from its run folder, for commands that only read it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from moebius.data.corpus import Corpora, open_corpora
from moebius.data.tokenizer import load_tokenizer, token_bytes
from moebius.errors import CheckpointError, DataError
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.trainer.checkpoint.loader import (
    Checkpoint,
    files_of,
    fill,
    open_checkpoint,
    verify,
)
from moebius.trainer.checkpoint.plan import check_index
from moebius.trainer.checkpoint.storage import Storage, open_storage
from moebius.trainer.checkpoint.tensors import model_parts, model_shapes
from moebius.trainer.config import Device, RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.folder import CONFIG_NAME
from moebius.trainer.machine import AUTOCAST, select_device


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint, ready to run."""

    config: RunConfig
    executor: LocalExecutor
    corpora: Corpora
    tokenizer: Tokenizer
    token_bytes_V: Tensor
    device: torch.device
    step: int
    position: int
    """samples it was trained on"""
    weights: str
    """fingerprint of the files that the weights were read from"""


def restore(folder: Path, step: int | None, device_name: Device) -> TrainedModel:
    """The model of a run folder at a step, by default the newest, on a device.

    Raises CheckpointError where the folder holds no run or no checkpoint, DataError where its
    corpus (which holds the tokenizer) is gone or has changed.
    """
    config, checkpoint = open_run(folder, step)
    record = checkpoint.record
    corpora = open_corpora(config.data)
    if corpora.fingerprint != record.corpus:
        raise DataError(
            f"data.dir: '{config.data.dir}' is not the corpus that '{folder}' was trained on"
        )
    decoder = Decoder(config.model)
    load_model(checkpoint, decoder)
    device = select_device(device_name)
    executor = LocalExecutor(decoder.to(device), AUTOCAST[config.train.precision])
    tokenizer = load_tokenizer(corpora.tokenizer_file)
    lengths_V = torch.from_numpy(token_bytes(tokenizer))
    return TrainedModel(
        config,
        executor,
        corpora,
        tokenizer,
        lengths_V,
        device,
        record.step,
        record.position,
        record.weights,
    )


def open_run(folder: Path, step: int | None) -> tuple[RunConfig, Checkpoint]:
    """Config and checkpoint of a run folder, by default the newest, whose files of the model are
    verified.

    Raises CheckpointError where the folder holds no run or no such checkpoint, or it is damaged.
    """
    config, storage = open_folder(folder)
    steps = storage.steps()
    if not steps:
        raise CheckpointError(f"'{folder}' has no checkpoint yet")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(
            f"no checkpoint of step {step} in '{storage.location}'; there: {there}"
        )
    found = open_checkpoint(storage, steps[-1] if step is None else step)
    verify(found, files_of(found.record, ("model",)))
    return config, found


def open_folder(folder: Path) -> tuple[RunConfig, Storage]:
    """Config and checkpoints of a run folder. Raises CheckpointError where it is none."""
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise CheckpointError(f"'{folder}' is no run folder: it has no {CONFIG_NAME}")
    config = load_config(config_path)
    return config, open_storage(config.checkpoint.dir or str(folder / "checkpoints"))


def load_model(checkpoint: Checkpoint, decoder: nn.Module) -> None:
    """Fill a whole model. Raises CheckpointError where the checkpoint is another model's."""
    check_index(checkpoint.index, model_shapes(decoder), ("model",))
    fill(checkpoint, model_parts(decoder))
