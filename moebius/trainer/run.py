"""The run: what a config is built into, and what a checkpoint holds of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moebius.data.build import Quarantined, build_stream, validation_readers
from moebius.data.corpus import Corpora
from moebius.data.tokenizer import load_tokenizer, token_bytes
from moebius.errors import CheckpointError, DataError, MoebiusError, TrainingError
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.ledger import NO_SAMPLES, Ledger
from moebius.model.moe.forced import Replay
from moebius.model.moe.replay import RoutingTable
from moebius.model.objective import TeacherModel
from moebius.model.parameters import initialize
from moebius.parallel.consensus import Consensus
from moebius.parallel.layout import Layout
from moebius.parallel.part import Parts
from moebius.parallel.together import from_first, together
from moebius.parallel.world import agree, world_size
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.checkpoint.commit import CommitRecord
from moebius.trainer.checkpoint.saver import Saver
from moebius.trainer.checkpoint.storage import open_storage
from moebius.trainer.config import RunConfig
from moebius.trainer.generation import check_causal
from moebius.trainer.kernels import choose_kernels
from moebius.trainer.machine import AUTOCAST, select_device
from moebius.trainer.optim import build_optimizer, muon_roles
from moebius.trainer.recovery.rewind import Rewind
from moebius.trainer.restore import restore
from moebius.trainer.resume import load
from moebius.trainer.routing_record import load_routing
from moebius.trainer.trails import ROWS
from moebius.trainer.watch.progress import Progress, Section

QUESTIONS = ("stop", "rewind", "writing")
"""what processes agree on after every step: to stop, and why (`callbacks.interrupt`); to go back
to a checkpoint; whether one of them still writes one"""


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
        progress: Progress | None = None,
    ) -> None:
        check_vocabulary(config, corpora)
        self.config = config
        self.folder = Path(config.run_dir)
        self.device = select_device(config.train.device)
        self.progress = progress or Progress(config.watchdog)
        precision = AUTOCAST[config.train.precision]
        self.kernels, self.kernel_names = choose_kernels(
            config.kernels, config.model, self.device, precision or torch.float32
        )
        self.decoder = Decoder(config.model)
        initialize(self.decoder, config.train.seed)
        with torch.device("meta"):
            self.blueprint = Decoder(config.model)
        """the whole model without numbers: this process may hold a part of it"""
        self.layout = Layout(
            self.decoder,
            config.parallel,
            partial(build_optimizer, config=config.optim, muon_dtype=self._muon_dtype),
            config.data.sequence_length,
            precision,
            self.device,
            whole=muon_roles(config.optim),
        )
        self.corpus = corpora.fingerprint
        self.validation = validation_readers(config.data, corpora, quarantined or {})
        self.tokenizer = load_tokenizer(corpora.tokenizer_file)
        self.token_bytes_V = torch.from_numpy(token_bytes(self.tokenizer))
        self.stream = build_stream(
            config.data, corpora, config.train.batch_size, config.train.seed, quarantined or {}
        )
        self.storage = open_storage(config.checkpoint.dir or str(self.folder / "checkpoints"))
        self.saver = Saver(
            self.storage, config.checkpoint, partial(self.announce, "save"), self.progress.mark
        )
        self.callbacks = sorted(callbacks, key=lambda callback: callback.priority)
        self.replay = replay_tables(config.model, self.device)
        self.teacher, self.teacher_weights = load_teacher(config, corpora)
        self.step = 0
        self.consensus = Consensus(QUESTIONS)
        self.loss_limit = float("inf")
        """a step with a larger loss changes nothing"""
        self.evaluated: tuple[int, float] | None = None
        """step and validation loss of the last evaluation"""
        self.skipped: list[tuple[int, int]] = []
        """positions of the stream that were left out where the run went back"""
        self.rewound: list[tuple[int, int]] = []
        """steps to which and from which the run went back; until it has come further"""

    @property
    def _muon_dtype(self) -> torch.dtype | None:
        """Of Muon's products: CPUs are no faster in less precision."""
        return AUTOCAST[self.config.train.precision] if self.device.type == "cuda" else None

    @property
    def agreed(self) -> dict[str, int]:
        """What all processes have agreed on last, see `QUESTIONS`."""
        return self.consensus.agreed

    def agree(self) -> None:
        """Agree on what is next, and tell every callback; a collective call."""
        self.consensus.vote("writing", int(self.saver.writing))
        self.consensus.decide()
        for callback in self.callbacks:
            callback.on_agreed(self, self.agreed)

    @property
    def reports(self) -> bool:
        """Whether numbers of the present step are reported."""
        interval, last = self.config.log.interval, self.config.train.num_steps
        return self.step in (1, last) or self.step % interval == 0

    @property
    def draws(self) -> bool:
        """Whether the present step is drawn, see `log.picture_interval`."""
        return self._is_drawn(self.step)

    def _is_drawn(self, step: int) -> bool:
        config = self.config
        return step == config.train.num_steps or step % config.log.picture_interval == 0

    @property
    def _samples_to_keep(self) -> range:
        """Of the batch that was taken last, the samples whose decisions are to be kept."""
        config = self.config
        first = self.stream.position - config.train.batch_size
        if self.step < config.log.record_routing:
            return range(first, first + config.train.batch_size)
        return range(first, first + ROWS) if self._is_drawn(self.step + 1) else NO_SAMPLES

    @property
    def step_context(self) -> StepContext:
        """How the batch that was taken last is to be trained on."""
        config = self.config
        return StepContext(
            "topk",
            Ledger(keep=self._samples_to_keep),
            step=self.step,
            seed=config.train.seed,
            training=True,
            recompute=config.train.recompute,
            replay=self.replay,
            kernels=self.kernels,
            compile=config.kernels.compile,
            mark=self.progress.mark,
        )

    def announce(self, section: Section, phase: str) -> None:
        """Tell listeners of the progress what another thread than the main one does."""
        for listener in self.progress.listeners:
            listener(section, phase)

    def publish(self, metrics: dict[str, float]) -> None:
        """Give numbers of the present step to every callback that shows or stores them."""
        for callback in self.callbacks:
            callback.on_metrics(self, metrics)

    def show(self, name: str, image_HWC: Tensor) -> None:
        """Give a picture of the present step to every callback that shows or stores it."""
        for callback in self.callbacks:
            callback.on_picture(self, name, image_HWC)

    def show_text(self, name: str, markdown: str) -> None:
        """Give a text of the present step to every callback that shows or stores it."""
        for callback in self.callbacks:
            callback.on_text(self, name, markdown)

    def tell(self, kind: str, text: str) -> None:
        """Tell every callback that shows or stores it of something out of the ordinary."""
        for callback in self.callbacks:
            callback.on_event(self, kind, text)

    def save(self) -> None:
        """Begin to write a checkpoint of the present step, see `Saver`; a collective call.

        Raises TrainingError where a value is not finite: the checkpoints of before stay.
        """
        if self.rewound and self.step > self.rewound[-1][1]:
            self.rewound = []
        parts = self.layout.parts()
        if agree(int(not all_finite(parts))):
            raise TrainingError(
                f"a parameter or the optimizer's state is not finite after step {self.step}",
                "start again: the run goes on from the last checkpoint",
            )
        self.saver.begin(self._record(), parts)

    def _record(self) -> CommitRecord:
        step, loss = self.evaluated or (-1, 0.0)
        return CommitRecord(
            step=self.step,
            position=self.stream.position,
            tokens=self.stream.position * self.config.data.sequence_length,
            skipped=self.skipped,
            rewound=self.rewound,
            stream=self.stream.state_dict(),
            corpus=self.corpus,
            config=self.config.model_dump(mode="json"),
            program=[f"{visit.layer}@{visit.depth}" for visit in self.decoder.program.visits],
            callbacks={c.name: state for c in self.callbacks if (state := c.state_dict())},
            teacher=self.teacher_weights,
            processes=world_size(),
            evaluation=loss if step == self.step and math.isfinite(loss) else None,
            files={},
        )

    def rewind(self, fault: Rewind) -> None:
        """Go back to the last sound checkpoint, but not in the data: what was read since is left
        out. A collective call.

        Where the run has already gone back to that one, the one before is taken.
        """
        at, end, rewound = self.step, self.stream.position, self.rewound
        self.saver.settle()
        there = from_first(together(self.storage.steps, CheckpointError))
        steps = [step for step in there if step <= at]
        used = {step for step, _ in rewound}
        targets = [step for step in steps if step not in used]
        reason = ""
        if len(rewound) >= self.config.recovery.max_rewinds:
            reason = f"the run has gone back {len(rewound)} times (recovery.max_rewinds)"
        elif not targets:
            reason = f"there is no {'other ' if rewound else ''}checkpoint to go back to"
        if reason:
            raise TrainingError(
                f"{fault}; {reason}", "lower optim.lr or raise optim.schedule.warmup_steps"
            )
        newer = [(step, f"step {step} led to it") for step in steps if step > targets[-1]]
        with self.progress.section("load"):
            load(self, targets, newer, allow_changes=True)  # they were looked at before
        self.rewound = [*rewound, (self.step, at)]
        self.skipped.append((self.stream.position, end))
        self.stream.skip_to(end)
        self.saver.amend(self._record())  # a restart goes on from here, too
        self.tell(
            "rewound",
            f"{fault}; from step {at} back to step {self.step}, without samples "
            f"{self.skipped[-1][0]} to {end - 1}",
        )


def all_finite(parts: Parts) -> bool:
    """Whether all that a process holds is finite; each device is asked once."""
    norms: dict[torch.device, list[torch.Tensor]] = {}
    for part in parts.values():
        for chunk in part.chunks if part.dtype.is_floating_point else ():
            if chunk.box.numel:
                norm = torch.linalg.vector_norm(chunk.tensor, float("inf"))
                norms.setdefault(norm.device, []).append(norm.double())
    return all(bool(torch.stack(own).isfinite().all()) for own in norms.values())


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
