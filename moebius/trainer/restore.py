"""A trained model from its run folder, for commands that only read it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moebius.data.corpus import Corpora, open_corpora
from moebius.data.tokenizer import load_tokenizer, token_bytes
from moebius.errors import CheckpointError, DataError
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor
from moebius.trainer.checkpoint.commit import CommitRecord
from moebius.trainer.checkpoint.store import CheckpointStore, Tensors
from moebius.trainer.checkpoint.tensors import load_model
from moebius.trainer.config import Device, RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.machine import AUTOCAST, select_device

CONFIG_NAME = "config.yaml"


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
    """hash of the file that the weights were read from"""


def restore(folder: Path, step: int | None, device_name: Device) -> TrainedModel:
    """The model of a run folder at a step, by default the newest, on a device.

    Raises CheckpointError where the folder holds no run or no checkpoint, DataError where its
    corpus (which holds the tokenizer) is gone or has changed.
    """
    config, record, tensors = read_run(folder, step)
    corpora = open_corpora(config.data)
    if corpora.fingerprint != record.corpus:
        raise DataError(
            f"data.dir: '{config.data.dir}' is not the corpus that '{folder}' was trained on"
        )
    decoder = Decoder(config.model)
    load_model(decoder, tensors["model"])
    device = select_device(device_name)
    executor = LocalExecutor(decoder.to(device), AUTOCAST[config.train.precision])
    tokenizer = load_tokenizer(corpora.tokenizer_file)
    lengths_V = torch.from_numpy(token_bytes(tokenizer))
    weights = record.files["model.safetensors"].sha256
    return TrainedModel(
        config,
        executor,
        corpora,
        tokenizer,
        lengths_V,
        device,
        record.step,
        record.position,
        weights,
    )


def read_run(folder: Path, step: int | None) -> tuple[RunConfig, CommitRecord, Tensors]:
    """Config and verified checkpoint of a run folder, by default the newest.

    Raises CheckpointError where the folder holds no run or no checkpoint.
    """
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise CheckpointError(f"'{folder}' is no run folder: it has no {CONFIG_NAME}")
    config = load_config(config_path)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    checkpoint = store.find(step)
    if checkpoint is None:
        raise CheckpointError(f"'{folder}' has no checkpoint yet")
    return config, *store.load(checkpoint)
