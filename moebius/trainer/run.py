"""The run: what a config is built into, and what a checkpoint holds of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import yaml

from moebius.data.build import Quarantined, build_stream, validation_readers
from moebius.data.corpus import Corpora
from moebius.data.tokenizer import load_tokenizer, token_bytes
from moebius.errors import CheckpointError, DataError, MoebiusError
from moebius.files import exclusive, write_whole
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.moe.forced import Replay
from moebius.model.moe.replay import RoutingTable
from moebius.model.objective import TeacherModel
from moebius.model.parameters import initialize
from moebius.parallel.layout import Layout
from moebius.parallel.world import agree, is_main, world_size
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.checkpoint.commit import CommitRecord
from moebius.trainer.checkpoint.store import CheckpointStore, step_of
from moebius.trainer.checkpoint.tensors import check_model, check_optimizer
from moebius.trainer.config import RunConfig, depends_on_micro_batch, identity
from moebius.trainer.config_file import load_config
from moebius.trainer.generation import check_causal
from moebius.trainer.machine import AUTOCAST, select_device
from moebius.trainer.optim import build_optimizer
from moebius.trainer.restore import CONFIG_NAME, restore
from moebius.trainer.routing_record import load_routing


class Run:
    """A model in training: decoder, executor, optimizer, data position, step and callbacks.

    Callbacks are sorted by priority; they find everything here, there is no global state.
    """

    def __init__(
        self,
        config: RunConfig,
        corpora: Corpora,
        callbacks: Sequence[Callback],
        quarantined: Quarantined | None = None,
    ) -> None:
        check_vocabulary(config, corpora)
        self.config = config
        self.folder = Path(config.run_dir)
        self.device = select_device(config.train.device)
        self.decoder = Decoder(config.model)
        initialize(self.decoder, config.train.seed)
        with torch.device("meta"):
            self.blueprint = Decoder(config.model)
        """the whole model without numbers: this process may hold a part of it"""
        self.layout = Layout(
            self.decoder,
            config.parallel,
            partial(build_optimizer, config=config.optim),
            config.data.sequence_length,
            AUTOCAST[config.train.precision],
            self.device,
        )
        self.corpus = corpora.fingerprint
        self.validation = validation_readers(config.data, corpora, quarantined or {})
        self.token_bytes_V = torch.from_numpy(token_bytes(load_tokenizer(corpora.tokenizer_file)))
        self.stream = build_stream(
            config.data, corpora, config.train.batch_size, config.train.seed, quarantined or {}
        )
        self.store = CheckpointStore(self.folder / "checkpoints", config.checkpoint.keep)
        self.callbacks = sorted(callbacks, key=lambda callback: callback.priority)
        self.replay = replay_tables(config.model, self.device)
        self.teacher, self.teacher_weights = load_teacher(config, corpora)
        self.step = 0
        self.asked_to_stop: int | None = None
        """signal that this process has got; it may come at any time"""
        self.stop_signal: int | None = None
        """signal with which all processes have agreed to stop"""

    @property
    def step_context(self) -> StepContext:
        """How the coming step is to be trained."""
        config = self.config
        return StepContext(
            "topk",
            Ledger(keep_routings=self.step < config.log.record_routing),
            step=self.step,
            seed=config.train.seed,
            training=True,
            recompute=config.train.recompute,
            replay=self.replay,
        )

    def publish(self, metrics: dict[str, float]) -> None:
        """Give numbers of the present step to every callback that shows or stores them."""
        for callback in self.callbacks:
            callback.on_metrics(self, metrics)

    def save(self) -> None:
        """Write a checkpoint of the present step; a collective call, one process writes."""
        tensors = {
            "model": self.layout.engine.model_tensors() | self.layout.buffers(),
            "optimizer": self.layout.engine.optimizer_tensors(),
        }
        if not is_main():
            return
        record = CommitRecord(
            step=self.step,
            position=self.stream.position,
            tokens=self.stream.position * self.config.data.sequence_length,
            stream=self.stream.state_dict(),
            corpus=self.corpus,
            config=self.config.model_dump(mode="json"),
            program=[f"{visit.layer}@{visit.depth}" for visit in self.decoder.program.visits],
            callbacks={c.name: state for c in self.callbacks if (state := c.state_dict())},
            teacher=self.teacher_weights,
            processes=world_size(),
            files={},
        )
        self.store.save(record, tensors)

    def resume(self) -> RunConfig | None:
        """Go on from the newest checkpoint, whose config is given; a folder without one starts from
        the beginning."""
        folder = self.store.find()
        newest = -1 if folder is None else step_of(folder)
        lowest, highest = -agree(-newest), agree(newest)
        if lowest != highest:
            raise CheckpointError(
                f"run_dir: processes see different checkpoints in '{self.folder}', the newest of "
                f"step {lowest} and of step {highest}",
                "run_dir has to be one folder for all nodes",
            )
        if folder is None:
            return None
        record, tensors = self.store.load(folder)
        try:
            found = RunConfig.model_validate(record.config)
        except ValueError as error:
            raise CheckpointError(f"checkpoint '{folder}': its config is damaged") from error
        check_same_run(self.config, found, folder)
        if record.processes != world_size() and depends_on_micro_batch(self.config.model):
            raise CheckpointError(
                f"checkpoint '{folder}' was trained by {record.processes} processes, and a scope "
                f"of the model is micro_batch; there are {world_size()}",
                "start as many",
            )
        check_mixture(self.config, found, record.tokens)
        if record.corpus != self.corpus:
            raise CheckpointError(
                f"checkpoint '{folder}' was not trained on the corpus '{self.config.data.dir}'",
                "name the data.dir it was trained on, or another run_dir",
            )
        if record.step and record.teacher != self.teacher_weights:
            raise CheckpointError(
                f"checkpoint '{folder}' was distilled from other weights than those of "
                "distillation.teacher",
                "name the teacher and the step it was trained with, or another run_dir",
            )
        check_model(self.blueprint, tensors["model"])
        check_optimizer(self.blueprint, tensors["optimizer"])
        self.layout.load(tensors["model"], tensors["optimizer"])
        self.step = record.step
        self.stream.load(record.position, record.stream)
        for callback in self.callbacks:
            callback.load_state_dict(record.callbacks.get(callback.name, {}))
        return found


def load_teacher(config: RunConfig, corpora: Corpora) -> tuple[TeacherModel | None, str | None]:
    """The model that a run distils from, and the hash of its weights.

    Raises CheckpointError where there is none, DataError where its tokens are other ones.
    """
    node = config.distillation
    if node is None:
        return None, None
    try:
        found = restore(Path(node.teacher), node.step, config.train.device)
        check_causal(found.config.model)
    except MoebiusError as error:
        raise CheckpointError(f"distillation.teacher: {error}") from None
    if (
        found.corpora.tokenizer.sha256 != corpora.tokenizer.sha256
        or found.config.model.vocab_size != config.model.vocab_size
    ):
        raise DataError(
            f"distillation.teacher: '{node.teacher}' has another tokenizer or vocab_size",
            "train the teacher with the tokenizer of data.dir and the same model.vocab_size",
        )
    found.executor.decoder.requires_grad_(False)
    teacher = TeacherModel(
        found.executor, node.coefficient, node.temperature, found.step, found.config.train.seed
    )
    return teacher, found.weights


def replay_tables(model: ModelConfig, device: torch.device) -> dict[str, RoutingTable]:
    """By path, the recorded decisions that routers of a model are to repeat."""
    selectors = [router.selector for router in model.routers.values()]
    paths = {selector.path for selector in selectors if isinstance(selector, Replay)}
    return {path: load_routing(Path(path), device) for path in paths}


def check_vocabulary(config: RunConfig, corpora: Corpora) -> None:
    """Raise DataError where the corpus holds token ids that the embedding does not have."""
    size = corpora.tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size: {config.model.vocab_size}, but the tokenizer of "
            f"'{config.data.dir}' makes token ids up to {size - 1}",
            f"use model.vocab_size={size} or another data.dir",
        )


def check_folder(config: RunConfig) -> None:
    """Raise CheckpointError, naming the differing fields, where the folder holds another run."""
    path = Path(config.run_dir) / CONFIG_NAME
    if path.exists():
        check_same_run(config, load_config(path), Path(config.run_dir))


def check_same_run(config: RunConfig, found: RunConfig, where: Path) -> None:
    """Raise CheckpointError where `found`, read at `where`, is the config of another run."""
    wanted, there = identity(config), identity(found)
    changes = [
        f"{name}: {there.get(name)} -> {wanted.get(name)}"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"run_dir: '{where}' belongs to another config ({'; '.join(changes)})",
            "choose another run_dir or delete the folder",
        )


def check_mixture(config: RunConfig, found: RunConfig, tokens: int) -> None:
    """Raise CheckpointError where phases that a run has gone through were other ones."""
    past = [
        [phase.model_dump() for phase in node.data.mixture if phase.from_tokens < max(tokens, 1)]
        for node in (found, config)
    ]
    if past[0] != past[1]:
        raise CheckpointError(
            f"data.mixture: the {tokens:,} tokens of the checkpoint had the phases {past[0]}, the "
            f"config says {past[1]}",
            "leave these as they were, and add a phase that begins later",
        )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process; two would delete each other's checkpoints.

    Raises CheckpointError where another process trains there. The lock ends with the process,
    however it ends.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder / "lock"))
        except BlockingIOError:
            raise CheckpointError(
                f"run_dir: '{folder}' is being trained by another process",
                "wait for it, stop it, or choose another run_dir",
            ) from None
        yield


def claim_folder(config: RunConfig) -> None:
    """Write the resolved config into the run folder, whose owner it is from now on.

    Corpora are named by their absolute paths, so that commands find them from any working
    directory.
    """
    path = Path(config.run_dir) / CONFIG_NAME
    tree = config.model_dump(mode="json")
    for node in (tree["data"], *tree["data"]["corpora"].values()):
        if node["dir"] is not None and "://" not in node["dir"]:
            node["dir"] = os.path.abspath(node["dir"])
    write_whole(path, yaml.safe_dump(tree, sort_keys=False))
