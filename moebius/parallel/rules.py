"""Which layouts are legal for which model: one function per rule, one message per finding.

What is refused is so for a reason of the layout, never for want of an option: where the numbers of
one process cannot be kept, or where a scheme would bring nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moebius.config import Problem
from moebius.model.config import (
    AttentionConfig,
    DenseConfig,
    MixtureAttentionConfig,
    ModelConfig,
)
from moebius.model.moe.candidates import GroupLimited
from moebius.model.moe.config import ExpertSpec, MoEConfig
from moebius.model.moe.losses import DeviceLoss
from moebius.model.moe.pool import DISPATCHED
from moebius.model.program import build_program
from moebius.model.recursion.config import DoraConfig
from moebius.parallel.config import ContextConfig, DeepSpeedConfig, ParallelConfig, PipelineConfig
from moebius.parallel.deepspeed_rules import deepspeed_problems
from moebius.parallel.ring.rules import ring_rules


@dataclass(frozen=True)
class Asked:
    """What a layout is wanted for."""

    model: ModelConfig
    parallel: ParallelConfig
    row_length: int
    distils: bool = False
    """whether there is a teacher"""

    @property
    def row_parts(self) -> int:
        """Processes that hold different tokens of a row."""
        sequence = self.parallel.tp if self.parallel.sequence_parallel else 1
        return self.parallel.cp * sequence

    @property
    def moes(self) -> list[MoEConfig]:
        """Of each layer that has one."""
        config, count = self.model, len(build_program(self.model.depth).layers)
        ffns = [config.ffn_in(index, count) for index in range(count)]
        return [ffn for ffn in ffns if isinstance(ffn, MoEConfig)]

    @property
    def dispatched(self) -> list[ExpertSpec]:
        """Groups of experts that tokens are sent to, of all layers."""
        return [e for moe in self.moes for e in moe.sorted_experts if e.kind in DISPATCHED]


def head_rules(asked: Asked) -> Iterator[Problem]:
    """Every process of a tensor-parallel group has whole heads."""
    attention, tp = asked.model.attention, asked.parallel.tp
    if tp == 1:
        return
    if isinstance(attention, MixtureAttentionConfig):
        yield Problem(
            "parallel.tp",
            f"{tp}, but a mixture of attention experts is not cut: its tokens choose heads; use cp",
        )
    elif attention.num_heads % tp:
        yield Problem("parallel.tp", f"{tp} does not divide {attention.num_heads} attention heads")
    elif isinstance(attention, AttentionConfig):
        kv_heads = attention.num_kv_heads
        if kv_heads % tp and tp % kv_heads:
            yield Problem("parallel.tp", f"{tp} and {kv_heads} key-value heads do not divide")
        elif attention.depth_attention is not None and tp > kv_heads:
            yield Problem(
                "parallel.tp",
                f"{tp}, but depth attention averages over all query heads of each of {kv_heads} "
                f"key-value heads; use at most {kv_heads}",
            )


def width_rules(asked: Asked) -> Iterator[Problem]:
    """Widths and the vocabulary are cut evenly."""
    model, tp = asked.model, asked.parallel.tp
    widths = {"vocab_size": model.vocab_size}
    if isinstance(model.ffn, DenseConfig):
        widths["ffn.intermediate_size"] = model.ffn.intermediate_size
    if isinstance(model.ffn, MoEConfig):
        if model.ffn.dense is not None:
            widths["ffn.dense.intermediate_size"] = model.ffn.dense.intermediate_size
        if model.ffn.shared is not None:
            shared = model.ffn.shared
            widths["ffn.shared"] = shared.count * shared.intermediate_size
    for name, width in widths.items():
        if width % tp:
            near = -(-width // tp) * tp
            yield Problem(f"model.{name}", f"{width} is not cut into tp = {tp}; nearest: {near}")


def adapter_rules(asked: Asked) -> Iterator[Problem]:
    """The norm of a weight's row needs the whole row."""
    if asked.parallel.tp > 1 and isinstance(asked.model.depth.adapter, DoraConfig):
        yield Problem("parallel.tp", "dora normalises rows of weights that tp cuts; use kind lora")


def row_rules(asked: Asked) -> Iterator[Problem]:
    """Rows are cut evenly, and nothing needs neighbouring tokens in one place."""
    parts, model = asked.row_parts, asked.model
    if parts == 1:
        return
    cut = "cp" if asked.parallel.cp > 1 else "sequence_parallel"
    if asked.row_length % parts:
        yield Problem("data.sequence_length", f"{asked.row_length} is not cut into {parts} parts")
    if any(e.kind == "gru" for moe in asked.moes for e in moe.experts):
        yield Problem(f"parallel.{cut}", "gru experts pass through a document token by token")
    if any(router.scorer.granularity == "document" for router in model.routers.values()):
        yield Problem(
            f"parallel.{cut}", "a scorer of granularity document reads the document's first token"
        )
    deep = isinstance(model.attention, AttentionConfig) and model.attention.depth_attention
    if deep and asked.parallel.sequence_parallel and asked.parallel.tp > 1:
        yield Problem(
            "parallel.sequence_parallel",
            "depth attention keeps values of the tokens that attention sees; set it to false",
        )


def context_rules(asked: Asked) -> Iterator[Problem]:
    """Documents are planned onto halves, quarters, ... of the processes; their order is lost."""
    cp, context = asked.parallel.cp, asked.parallel.context
    if cp == 1 and context != ContextConfig():
        yield Problem("parallel.context", "cp is 1, so no row is cut; leave it out")
    if not context.adaptive:
        return
    if cp & (cp - 1):
        near = 1 << cp.bit_length()
        yield Problem(
            "parallel.cp", f"{cp}; context.adaptive needs a power of two, {near // 2} or {near}"
        )
    if any(
        moe.router.capacity and moe.router.capacity.priority == "position" for moe in asked.moes
    ):
        yield Problem(
            "parallel.context.adaptive",
            "it places documents out of order, but capacity.priority: position counts from the "
            "beginning of rows; use priority: score",
        )


def expert_rules(asked: Asked) -> Iterator[Problem]:
    """Every group of experts is cut evenly, and along tp like everything else."""
    parallel, experts = asked.parallel, asked.dispatched
    if parallel.ep * parallel.etp > 1 and not experts:
        yield Problem("parallel.ep", "the model has no experts that tokens are sent to")
    has_same_tokens = parallel.tp > 1 and not parallel.sequence_parallel
    if has_same_tokens and experts and parallel.etp != parallel.tp:
        yield Problem(
            "parallel.etp",
            f"{parallel.etp}; without sequence_parallel all of tp = {parallel.tp} have the same "
            f"tokens, and the width of experts is cut as well: set etp={parallel.tp}",
        )
    for expert in experts:
        count = expert.count
        if isinstance(count, int) and count * _owners(asked) % parallel.ep:
            yield Problem(
                "parallel.ep", f"{parallel.ep} does not divide {count} {expert.kind} experts"
            )
        if expert.intermediate_size and expert.intermediate_size % parallel.etp:
            yield Problem(
                "parallel.etp",
                f"{parallel.etp} does not divide the experts' intermediate_size = "
                f"{expert.intermediate_size}",
            )


def _owners(asked: Asked) -> int:
    ffn = asked.model.ffn
    return ffn.reuse if isinstance(ffn, MoEConfig) else 1


def alignment_rules(asked: Asked) -> Iterator[Problem]:
    """Groups of experts that routing treats as devices lie on devices."""
    ep = asked.parallel.ep
    if ep == 1:
        return
    for moe in asked.moes:
        groups = [
            rule.num_groups for rule in moe.router.candidates if isinstance(rule, GroupLimited)
        ]
        groups += [loss.num_groups for loss in moe.router.losses if isinstance(loss, DeviceLoss)]
        kinds = [expert for expert in moe.sorted_experts if expert.kind in DISPATCHED]
        for number in groups:
            if len(kinds) > 1 or (number % ep and ep % number):
                yield Problem(
                    "parallel.ep",
                    f"{ep}: the router's {number} groups of experts would lie across processes",
                )


def pipeline_rules(asked: Asked) -> Iterator[Problem]:
    """Stages hold whole units; some things cannot be in several stages."""
    parallel, model = asked.parallel, asked.model
    if parallel.pp == 1:
        if parallel.pipeline != PipelineConfig():
            yield Problem("parallel.pipeline", "pp is 1, so there are no stages; leave it out")
        return
    units = len(build_program(model.depth).units)
    stages = parallel.pp * parallel.pipeline.stages_per_rank
    if stages > units:
        yield Problem("parallel.pp", f"{stages} stages, but the model has {units} units to cut")
    costs = parallel.pipeline.costs
    if costs is not None and len(costs) != units + 1:
        yield Problem(
            "parallel.pipeline.costs",
            f"{len(costs)} numbers, but the model has {units} units and a head",
        )
    if model.exits is not None:
        yield Problem(
            "parallel.pp", "exits read the stream before the last stage, where the head is"
        )
    if parallel.engine == "native" and parallel.data == "fsdp2":
        yield Problem(
            "parallel.data", "fsdp2 would gather parameters for every micro-batch; use zero1"
        )
    schedule = parallel.pipeline.schedule
    if schedule == "1f1b" and parallel.pipeline.stages_per_rank > 1:
        yield Problem(
            "parallel.pipeline.schedule", "1f1b has one stage per rank; use interleaved_1f1b"
        )
    if schedule == "zero_bubble" and is_shared(model):
        yield Problem(
            "parallel.pipeline.schedule",
            "zero_bubble puts off the gradients of weights, of which a shared layer has some on "
            "every stage; use interleaved_1f1b",
        )


def is_shared(model: ModelConfig) -> bool:
    """Whether some layer or pool is used by several layers of the unrolled program."""
    reuse = model.ffn.reuse if isinstance(model.ffn, MoEConfig) else 1
    return model.depth.num_recursions > 1 or reuse > 1


def data_rules(asked: Asked) -> Iterator[Problem]:
    """Replicas are groups of shards."""
    parallel = asked.parallel
    is_native = parallel.engine == "native"
    if is_native and parallel.dp_replicate > 1 and parallel.data != "fsdp2":
        yield Problem(
            "parallel.dp_replicate",
            f"{parallel.dp_replicate}, but with data: {parallel.data} nothing is replicated apart; "
            "use 1 or data: fsdp2",
        )


def teacher_rules(asked: Asked) -> Iterator[Problem]:
    """A teacher's predictions are of whole rows and the whole vocabulary."""
    if asked.distils and asked.parallel.tp * asked.parallel.cp > 1:
        yield Problem("parallel.tp", "a teacher predicts whole rows; use tp = cp = 1 to distil")


def deepspeed_rules(asked: Asked) -> Iterator[Problem]:
    """What DeepSpeed's ZeRO cannot do under our layers."""
    if asked.parallel.engine == "native" and asked.parallel.deepspeed != DeepSpeedConfig():
        yield Problem("parallel.deepspeed", "engine is native; set it to deepspeed or leave it out")
    yield from deepspeed_problems(asked.parallel, asked.model)


LAYOUT_RULES: tuple[Callable[[Asked], Iterator[Problem]], ...] = (
    head_rules,
    width_rules,
    adapter_rules,
    row_rules,
    context_rules,
    expert_rules,
    alignment_rules,
    pipeline_rules,
    ring_rules,
    data_rules,
    teacher_rules,
    deepspeed_rules,
)


def layout_problems(asked: Asked) -> Iterator[Problem]:
    """Everything that stands against a layout."""
    found = (problem for rule in LAYOUT_RULES for problem in rule(asked))
    yield from dict.fromkeys(found)
