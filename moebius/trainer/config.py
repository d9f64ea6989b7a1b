"""The configuration of a run: the rooms' configurations, composed, and the rules across them."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from moebius.config import ConfigNode, Problem
from moebius.data.config import DATA_RULES, DataConfig
from moebius.model.config import ModelConfig
from moebius.model.context import Recompute
from moebius.model.moe.config import MoEConfig
from moebius.model.moe.pool import DISPATCHED
from moebius.model.recursion.config import TokenChoiceConfig
from moebius.model.rules import MODEL_RULES
from moebius.parallel.config import ParallelConfig
from moebius.parallel.rules import Asked, layout_problems
from moebius.trainer.cpu import CPUConfig
from moebius.trainer.kernels import KernelsConfig
from moebius.trainer.optim import OptimConfig
from moebius.trainer.recovery.config import RecoveryConfig
from moebius.trainer.recovery.faults import Fault
from moebius.trainer.schedules import WSDSchedule
from moebius.trainer.watch.profile import ProfileConfig
from moebius.trainer.watch.progress import WatchdogConfig

Device = Literal["auto", "cpu", "cuda"]
PLACES = frozenset(
    {"dir", "source", "corpora", "tokenizer", "cache", "bad_shards", "prefetch", "workers"}
)
"""options of the data that say where it lies and how it is read, not what it is"""


class TrainConfig(ConfigNode):
    """How long, how much at once, on what."""

    num_steps: PositiveInt
    """optimizer steps of the whole run"""
    batch_size: PositiveInt
    """sequences per optimizer step"""
    micro_batch_size: PositiveInt | None = None
    """sequences per forward pass; gradients are accumulated over the rest; null: all at once"""
    seed: NonNegativeInt = 0
    """of initial weights and sample order"""
    time_limit: float | None = Field(None, gt=0)
    """minutes after which the run saves and stops, to be continued; null: none"""
    device: Device = "auto"
    """auto: cuda where there is one"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products under autocast; parameters, routers and losses stay in fp32"""
    recompute: Recompute = "none"
    """activations that are computed again in the backward pass instead of being kept: selective,
    those between the projections of attention and dense feed-forwards; full, all inside of
    sublayers; routers decide once, and the numbers stay the same"""


class DistillationConfig(ConfigNode):
    """Learning another model's predictions beside the text (2410.20672: the unshared model's)."""

    teacher: str
    """run folder of a model with the same tokenizer"""
    step: NonNegativeInt | None = None
    """its checkpoint; null: the newest"""
    coefficient: float = Field(1.0, gt=0)
    """weight of the forward KL divergence beside the cross-entropy"""
    temperature: float = Field(1.0, gt=0)
    """divides the logits of both; the loss is multiplied by its square"""


class EvaluationConfig(ConfigNode):
    """Loss on held-out text."""

    interval: PositiveInt = 100
    """steps between evaluations; there is one before the first and one after the last step too"""
    num_batches: PositiveInt = 8
    """batches (of `train.batch_size`) from the beginning of the validation split"""


class CheckpointConfig(ConfigNode):
    """When to save and what to keep."""

    interval: PositiveInt = 100
    """steps between checkpoints; one is written at the end and on interruption too"""
    dir: str | None = None
    """folder that all nodes see, or a URL that fsspec writes to; null: `checkpoints` in run_dir"""
    keep: PositiveInt = 2
    """newest checkpoints to keep"""
    keep_every: PositiveInt | None = None
    """keep those of steps that this divides, too"""
    keep_best: NonNegativeInt = 0
    """keep so many with the lowest validation loss, too, of steps with an evaluation"""
    host_gigabytes: NonNegativeFloat | None = None
    """host memory of each process for copies, from which it writes while the training goes on; what
    does not fit is written before; null: as much as it takes"""
    max_crashes: PositiveInt = 3
    """starts from one checkpoint that have all crashed at the same step, and none has come further;
    after that, older ones are used"""


class WandbConfig(ConfigNode):
    """Weights & Biases, beside TensorBoard; needs `pip install 'moebius[wandb]'`."""

    project: str
    """of the server"""
    entity: str | None = None
    """user or team; null: who is logged in"""
    name: str | None = None
    """of the run; null: that of its folder"""
    mode: Literal["online", "offline"] = "online"
    """offline: write to the run folder, for `wandb sync`"""


class LogConfig(ConfigNode):
    """What is reported how often."""

    interval: PositiveInt = 10
    """steps between reports to console, TensorBoard and metrics.jsonl; the first step always"""
    picture_interval: PositiveInt = 100
    """steps between heat maps of routing and pages of coloured tokens; the last step always"""
    record_routing: NonNegativeInt = 0
    """write the experts of every token of so many first steps to `<run_dir>/routing`, for the
    selector `replay`"""
    audit: bool = False
    """write which samples each process reads to `<run_dir>/audit`, for `moebius audit`"""
    plan: bool = False
    """simulate the layout before the run starts, as `moebius plan` does, which takes seconds to
    minutes, and report the memory that it needs beside the measured one"""
    wandb: WandbConfig | None = None
    """also send numbers and heat maps to Weights & Biases"""
    trace: bool = False
    """write norms of the gradient and the values of every parameter after every step to
    `<run_dir>/trace.jsonl`, for `moebius compare`"""


class RunConfig(ConfigNode):
    """One file = one run."""

    run_dir: str
    """folder of logs and checkpoints; a run found there is continued"""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    """processes: who holds and does what"""
    kernels: KernelsConfig = KernelsConfig()
    """how operations are computed"""
    cpu: CPUConfig = CPUConfig()
    """where there is no GPU"""
    distillation: DistillationConfig | None = None
    """a teacher"""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    """faults in the numbers"""
    watchdog: WatchdogConfig = WatchdogConfig()
    """processes that hang"""
    log: LogConfig = LogConfig()
    profile: ProfileConfig | None = None
    """a record of what is done in some steps; null: none"""
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = ()
    """what goes wrong on purpose, in tests: refused unless the environment has MOEBIUS_FAULTS=1"""


def identity(config: RunConfig) -> dict[str, Any]:
    """Dotted path -> value of every setting that must stay the same when a run is continued.

    Left out is what reports or places the run, and the batch size, which may be changed on the way:
    samples go on where they were. The corpus is compared by its content instead.
    """
    train = {"device", "recompute", "batch_size", "time_limit"}
    if not depends_on_micro_batch(config.model):
        train.add("micro_batch_size")
    excluded: dict[str, Any] = {
        "run_dir": True,
        "evaluation": True,
        "checkpoint": True,
        "recovery": True,
        "watchdog": True,
        "log": True,
        "profile": True,
        "kernels": True,
        "cpu": True,
        "faults": True,
        "train": train,
        # What comes of a mixture's phases before a checkpoint is compared when it is loaded.
        "data": {*PLACES, "validation_fraction", "mixture"},
    }
    if not depends_on_micro_batch(config.model):  # which data parallelism cuts, too
        excluded["parallel"] = True
    else:
        excluded["parallel"] = {"timeout"}
    leaves = dict(_leaves(config.model_dump(mode="json", exclude=excluded), ()))
    # Where replayed decisions lie may change, too, and where a teacher does: its weights are known.
    moving = ("selector.path", "distillation.teacher", "distillation.step")
    return {name: value for name, value in leaves.items() if not name.endswith(moving)}


def settings(config: RunConfig) -> dict[str, Any]:
    """Dotted path -> value of every setting that all processes of a run have alike. Where data lies
    may differ from node to node."""
    placed = {"data": set(PLACES - {"bad_shards"})}
    return dict(_leaves(config.model_dump(mode="json", exclude=placed), ()))


def depends_on_micro_batch(model: ModelConfig) -> bool:
    """Whether some result depends on how a batch is cut."""
    routers = [*model.routers.values()]
    if isinstance(model.depth.router, TokenChoiceConfig):
        routers.append(model.depth.router.stages)
    nodes = [node for router in routers for node in (*router.losses, router.capacity)]
    scopes = [getattr(node, "scope", None) for node in nodes]
    drawn = model.exits is not None and model.exits.draw == "micro_batch"
    return drawn or "micro_batch" in scopes


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(node, list) and node:
        for number, value in enumerate(node):
            yield from _leaves(value, (*path, str(number)))
    else:
        yield ".".join(path), node


def batch_rules(config: RunConfig) -> Iterator[Problem]:
    """A batch must be a whole number of micro-batches."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if micro is not None and batch % micro:
        yield Problem("train.micro_batch_size", f"{micro} does not divide batch_size = {batch}")


def schedule_rules(config: RunConfig) -> Iterator[Problem]:
    """Warm-up must end before the run does."""
    warmup = config.optim.schedule.warmup_steps
    if warmup >= config.train.num_steps:
        yield Problem(
            "optim.schedule.warmup_steps",
            f"{warmup} of train.num_steps = {config.train.num_steps}; allowed: less",
        )
    schedule = config.optim.schedule
    if isinstance(schedule, WSDSchedule):
        stable = (1 - schedule.decay_fraction) * config.train.num_steps
        if stable < warmup < config.train.num_steps:
            yield Problem(
                "optim.schedule.decay_fraction",
                f"{schedule.decay_fraction} begins the decay at step {stable:.0f}, "
                f"before warmup_steps = {warmup} are over",
            )


def vocabulary_rules(config: RunConfig) -> Iterator[Problem]:
    """A trained tokenizer must fit the embedding."""
    size = config.data.tokenizer.vocab_size
    if size is None and config.data.tokenizer.path is None and config.model.vocab_size < 257:
        yield Problem(
            "model.vocab_size",
            f"{config.model.vocab_size} is too small for a byte-level tokenizer; allowed: >= 257",
        )
    if size is not None and size > config.model.vocab_size:
        yield Problem(
            "data.tokenizer.vocab_size",
            f"{size} token ids do not fit model.vocab_size = {config.model.vocab_size}",
        )


def repeat_rules(config: RunConfig) -> Iterator[Problem]:
    """DeepSpeed takes gradients away while they arise."""
    interval = config.recovery.repeat_interval
    if interval is not None and config.parallel.engine == "deepspeed":
        yield Problem(
            "recovery.repeat_interval", f"{interval} with parallel.engine=deepspeed; use native"
        )


def muon_rules(config: RunConfig) -> Iterator[Problem]:
    """Muon needs whole matrices: a part of one is made orthogonal in another way."""
    muon, parallel = config.optim.muon, config.parallel
    if muon is None:
        return
    if parallel.engine == "deepspeed":
        yield Problem(
            "parallel.engine",
            "deepspeed flattens and cuts what it updates, and optim.muon needs whole matrices; use "
            "native with data ddp or zero1",
        )
    if parallel.tp > 1 and "matrix" in muon.roles:
        yield Problem(
            "parallel.tp",
            f"{parallel.tp} cuts matrices, and optim.muon needs whole ones; use cp, ep, pp or rp, "
            "or optim.muon.roles [expert]",
        )
    if parallel.etp > 1 and "expert" in muon.roles:
        yield Problem(
            "parallel.etp",
            f"{parallel.etp} cuts the matrices of experts, and optim.muon needs whole ones; use "
            "ep, or optim.muon.roles [matrix]",
        )
    if parallel.engine == "native" and parallel.data == "fsdp2" and "matrix" in muon.roles:
        yield Problem(
            "parallel.data",
            "fsdp2 cuts the rows of matrices, and optim.muon needs whole ones; use zero1, or "
            "optim.muon.roles [expert], which it cuts by experts",
        )


def compile_rules(config: RunConfig) -> Iterator[Problem]:
    """Compiled code is one piece, and an exchange between processes would cut it."""
    if not config.kernels.compile:
        return
    parallel = config.parallel
    for name in ("tp", "cp", "ep", "etp", "rp"):
        size = getattr(parallel, name)
        if size > 1:
            yield Problem(
                "kernels.compile",
                f"true, but parallel.{name}={size} lets layers talk to others",
            )
    if parallel.engine == "deepspeed":
        yield Problem("kernels.compile", "true with parallel.engine=deepspeed; use native")
    ffn = config.model.ffn
    if isinstance(ffn, MoEConfig) and sum(kind in DISPATCHED for kind, _ in ffn.pool.groups) > 1:
        yield Problem(
            "kernels.compile", "true, but numbers of rows of several kinds of experts vary"
        )
    attention = config.kernels.attention
    if attention not in (None, "sdpa"):
        yield Problem("kernels.attention", f"{attention} with kernels.compile=true; use sdpa")
    for name, chosen in config.kernels:
        if name != "attention" and chosen == "cpp":
            yield Problem(f"kernels.{name}", "cpp with kernels.compile=true; use torch")


def plan_rules(config: RunConfig) -> Iterator[Problem]:
    """The planner knows not every run."""
    for option, is_there in (
        ("parallel.engine=deepspeed", config.parallel.engine == "deepspeed"),
        ("a teacher (distillation)", config.distillation is not None),
    ):
        if config.log.plan and is_there:
            yield Problem("log.plan", f"true, but {option} is not simulated; use false")


def profile_rules(config: RunConfig) -> Iterator[Problem]:
    """Steps of a profile must be steps of the run."""
    if config.profile is None:
        return
    (first, last), count = config.profile.steps, config.train.num_steps
    if not first <= last <= count:
        yield Problem(
            "profile.steps",
            f"[{first}, {last}]; allowed: a first and a last step of 1 to train.num_steps = "
            f"{count}, in this order",
        )


RUN_RULES = (
    batch_rules,
    schedule_rules,
    vocabulary_rules,
    repeat_rules,
    muon_rules,
    compile_rules,
    profile_rules,
    plan_rules,
)


def problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with a well-typed configuration: every rule of every room."""
    tables: tuple[tuple[str, Any, tuple[Callable[[Any], Iterator[Problem]], ...]], ...] = (
        ("model.", config.model, MODEL_RULES),
        ("data.", config.data, DATA_RULES),
        ("", config, RUN_RULES),
    )
    found = 0
    for prefix, node, rules in tables:
        for rule in rules:
            for path, message in rule(node):
                found += 1
                yield Problem(prefix + path, message)
    if not found:  # whether a layout fits is a question about a valid model
        yield from layout_problems(
            Asked(
                config.model,
                config.parallel,
                config.data.sequence_length,
                distils=config.distillation is not None,
            )
        )
