"""Layouts whose products with models must all give what one process gives, and how that is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moebius.model.context import Recompute, StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import TokenBatch
from moebius.model.ledger import ALL_SAMPLES, Ledger
from moebius.model.moe.config import MoEConfig
from moebius.model.parameters import ParameterSpec, Role, initialize, named_specs
from moebius.parallel.config import ParallelConfig
from moebius.parallel.engine import MakeOptimizer
from moebius.parallel.layout import Layout
from moebius.parallel.rules import Asked, layout_problems
from tests.model.helpers import batch_of, rows_of
from tests.parity.models import VOCABULARY, model_of
from tests.parity.whole import buffer_tensors, model_tensors, whole_tensors

LENGTH = 24
RATE = 0.05
CLIPS = (1e9, 0.05)
"""of two steps: the first leaves gradients as they are, the second clips them"""
FIRST_STEP = 20


@dataclass(frozen=True)
class Case:
    """A layout and how the batch is cut on it."""

    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 4
    micro_batch: int = 4
    recompute: Recompute = "none"
    clips: tuple[float, ...] = CLIPS

    @property
    def config(self) -> ParallelConfig:
        """Of the layout."""
        return ParallelConfig.model_validate(self.options)


ADAPTIVE = {"adaptive": True, "flops_per_byte": 50.0}
"""at which these small models have groups of all sizes"""
LAYOUTS: dict[str, Case] = {
    "ddp": Case(2, {"data": "ddp"}, micro_batch=2),
    "zero1": Case(4, {"data": "zero1"}),
    "zero1-uneven": Case(4, {"data": "zero1"}, rows=6, micro_batch=1),
    "zero1-empty": Case(4, {"data": "zero1"}, rows=3),
    "fsdp2": Case(2, {"data": "fsdp2"}, micro_batch=1),
    "fsdp2-empty": Case(4, {"data": "fsdp2"}, rows=3, recompute="full"),
    "hsdp": Case(4, {"data": "fsdp2", "dp_replicate": 2}),
    "tp": Case(2, {"tp": 2, "sequence_parallel": False}),
    "tp4": Case(4, {"tp": 4, "sequence_parallel": False}, micro_batch=2),
    "sp": Case(2, {"tp": 2}),
    "sp4": Case(4, {"tp": 4}, micro_batch=2, recompute="full"),
    "cp": Case(2, {"cp": 2}),
    "cp4": Case(4, {"cp": 4}, micro_batch=2, recompute="selective"),
    "ep": Case(2, {"ep": 2}),
    "ep-accumulate": Case(4, {"ep": 2, "data": "ddp"}, micro_batch=1, recompute="full"),
    "ep4-empty": Case(4, {"ep": 4}, rows=3),
    "etp": Case(4, {"ep": 2, "etp": 2}),
    "gpipe": Case(2, {"pp": 2, "pipeline": {"schedule": "gpipe"}}, micro_batch=1),
    "1f1b": Case(2, {"pp": 2, "data": "ddp"}, micro_batch=1),
    "1f1b-pp4": Case(4, {"pp": 4}, micro_batch=1, recompute="full"),
    "interleaved": Case(
        2,
        {"pp": 2, "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2}},
        micro_batch=1,
    ),
    "zero-bubble": Case(2, {"pp": 2, "pipeline": {"schedule": "zero_bubble"}}, micro_batch=1),
    "ddp-sp": Case(4, {"data": "ddp", "tp": 2}),
    "zero1-tp": Case(4, {"data": "zero1", "tp": 2, "sequence_parallel": False}, micro_batch=1),
    "zero1-sp": Case(4, {"data": "zero1", "tp": 2}, recompute="selective"),
    "adaptive": Case(2, {"cp": 2, "context": ADAPTIVE}),
    "adaptive4": Case(4, {"cp": 4, "context": ADAPTIVE}, micro_batch=2, recompute="full"),
    "adaptive-sp": Case(4, {"cp": 2, "tp": 2, "context": ADAPTIVE}, micro_batch=1),
    "adaptive-ep": Case(4, {"data": "fsdp2", "cp": 2, "ep": 2, "context": ADAPTIVE}),
    "adaptive-pp": Case(4, {"pp": 2, "cp": 2, "context": ADAPTIVE}, micro_batch=2),
    "zero1-cp": Case(4, {"data": "zero1", "cp": 2}),
    "zero1-cp-sp": Case(8, {"data": "zero1", "cp": 2, "tp": 2}),
    "fsdp2-sp": Case(4, {"data": "fsdp2", "tp": 2}, micro_batch=1),
    "fsdp2-tp": Case(4, {"data": "fsdp2", "tp": 2, "sequence_parallel": False}),
    "fsdp2-cp": Case(4, {"data": "fsdp2", "cp": 2}),
    "fsdp2-ep": Case(4, {"data": "fsdp2", "ep": 2}, micro_batch=1),
    "fsdp2-ep4": Case(4, {"data": "fsdp2", "ep": 4}),
    "fsdp2-ep-sp4": Case(8, {"data": "fsdp2", "ep": 2, "tp": 4}),
    "hsdp-cp-sp": Case(8, {"data": "fsdp2", "dp_replicate": 2, "cp": 2, "tp": 2}),
    "cp-sp": Case(4, {"cp": 2, "tp": 2}),
    "cp-tp": Case(4, {"cp": 2, "tp": 2, "sequence_parallel": False}),
    "ep-sp": Case(2, {"ep": 2, "tp": 2}),
    "ep-tp": Case(4, {"ep": 2, "tp": 2, "sequence_parallel": False}),
    "ep-cp": Case(2, {"ep": 2, "cp": 2}),
    "etp-cp": Case(2, {"etp": 2, "cp": 2}),
    "ep4-cp-sp": Case(8, {"ep": 4, "cp": 2, "tp": 2}),
    "ep-etp-sp": Case(8, {"ep": 2, "etp": 2, "tp": 2}, micro_batch=1),
    "pp-zero1": Case(4, {"pp": 2}, micro_batch=1, recompute="full"),
    "pp-zero1-uneven": Case(4, {"pp": 2}, rows=5, micro_batch=1),
    "pp-sp": Case(4, {"pp": 2, "tp": 2}, micro_batch=2),
    "pp-tp": Case(4, {"pp": 2, "tp": 2, "sequence_parallel": False}, micro_batch=2),
    "pp-cp": Case(4, {"pp": 2, "cp": 2}, micro_batch=2),
    "ddp-cp": Case(4, {"data": "ddp", "cp": 2}, micro_batch=1),
    "hsdp-cp": Case(4, {"data": "fsdp2", "dp_replicate": 2, "cp": 2}),
    "hsdp-sp": Case(8, {"data": "fsdp2", "dp_replicate": 2, "tp": 2}),
    "fsdp2-cp-sp": Case(4, {"data": "fsdp2", "cp": 2, "tp": 2}, micro_batch=2),
    "zero1-sp4": Case(8, {"tp": 4}),
    "pp-ddp": Case(4, {"pp": 2, "data": "ddp"}, micro_batch=1),
    "pp-cp-sp": Case(8, {"pp": 2, "cp": 2, "tp": 2}, micro_batch=2, recompute="full"),
    "pp4-sp": Case(8, {"pp": 4, "tp": 2}, micro_batch=1),
    "gpipe-cp4": Case(8, {"pp": 2, "cp": 4, "pipeline": {"schedule": "gpipe"}}, micro_batch=2),
    "interleaved-sp": Case(
        4,
        {
            "pp": 2,
            "tp": 2,
            "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2},
        },
        micro_batch=1,
    ),
    "pp-ep": Case(4, {"pp": 2, "ep": 2}, micro_batch=1),
    "pp-ep-sp": Case(8, {"pp": 2, "ep": 2, "tp": 2}, micro_batch=1),
    "interleaved-ep-cp": Case(
        8,
        {
            "pp": 2,
            "ep": 2,
            "cp": 2,
            "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2},
        },
        micro_batch=1,
    ),
}


CORE = (
    "fsdp2",
    "tp",
    "sp4",
    "cp4",
    "ep",
    "etp",
    "1f1b",
    "interleaved",
    "zero-bubble",
    "adaptive4",
    "zero1-cp-sp",
    "cp-tp",
    "ep4-cp-sp",
    "pp-ep-sp",
)
"""layouts for models that differ from the others in one part"""
MAIN = ("dense", "moepp", "top_p", "v3", "mor", "moepp_mor")
"""models that are tried on 40 layouts and more"""
MOES = ("moepp", "top_p", "v3")


def is_tried(layout: str, name: str) -> bool:
    """Whether a legal layout is tried with a model: the core with all, others with the main models,
    eight processes with these or the product's own, which runs on every combination besides."""
    few = LAYOUTS[layout].processes < 8
    if layout in CORE:
        return few or name in MAIN
    if name in MOES:  # each leaves out another third
        return few and (list(LAYOUTS).index(layout) + MOES.index(name)) % 3 > 0
    return name in ("dense", "mor") if few else name == "moepp_mor"


def combinations() -> dict[str, Case]:
    """Every way to combine a scheme of data parallelism, tensor and sequence parallelism, context,
    pipeline or ring, and expert parallelism: each axis off or 2 long, on at most 8 processes."""
    found = {}
    axes = product(
        ("ddp", "zero1", "fsdp2", "hsdp"),
        ("", "tp", "sp"),
        ("", "cp"),
        ("", "pp", "rp"),
        ("", "ep", "ep-etp"),
    )
    for data, tensor, context, depth, experts in axes:
        options: dict[str, Any] = {"data": "fsdp2" if data == "hsdp" else data}
        options["tp"] = 2 if tensor else 1
        options["sequence_parallel"] = tensor != "tp"
        options["cp"] = 2 if context else 1
        options["pp"] = 2 if depth == "pp" else 1
        options["rp"] = 2 if depth == "rp" else 1
        options["ep"] = 2 if experts else 1
        options["dp_replicate"] = 2 if data == "hsdp" else 1
        options["etp"] = 2 if "etp" in experts or tensor == "tp" else 1
        of_depth = options["pp"] * options["rp"]
        processes = options["tp"] * options["cp"] * of_depth * options["dp_replicate"]
        if data not in ("fsdp2", "hsdp") or not context:  # then there is something to share out
            processes *= 2 if processes < 8 else 1
        needed = of_depth * options["ep"] * options["etp"]
        processes = max(processes, needed)
        name = "-".join(part for part in (data, tensor, context, depth, experts) if part)
        shards = processes // (options["tp"] * options["cp"] * of_depth)
        micro_batch = max(2 // shards, 1) if depth else 4
        found[name] = Case(processes, options, micro_batch=micro_batch)
    return found


COMBINATIONS = combinations()


@cache
def has_state(name: str) -> bool:
    """Whether a model's controllers or routers remember anything from step to step."""
    decoder = decoder_of(name)
    return not decoder.state_dict().keys() <= dict(decoder.named_parameters()).keys()


def case_of(layout: str, name: str) -> Case:
    """A layout for a model: where tokens are the same along tp, experts are cut like the rest; one
    step is enough where no controller steers the second by what the first has left."""
    case = LAYOUTS[layout] if layout in LAYOUTS else COMBINATIONS[layout]
    if not has_state(name):
        case = replace(case, clips=CLIPS[1:])
    config = case.config
    if config.tp > 1 and not config.sequence_parallel and isinstance(model_of(name).ffn, MoEConfig):
        return replace(case, options=case.options | {"etp": config.tp})
    return case


def refusal(layout: str, name: str) -> str | None:
    """Why a layout is refused for a model."""
    asked = Asked(model_of(name), case_of(layout, name).config, LENGTH)
    return next((f"{path}: {message}" for path, message in layout_problems(asked)), None)


def decoder_of(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """A model with weights large enough for every part to show in the gradients."""
    decoder = Decoder(model_of(name))
    initialize(decoder, 3)
    generator = torch.Generator().manual_seed(5)
    for _, parameter, spec in named_specs(decoder):
        if spec.std == 0.0 and spec.mean == 0.0:  # what begins with zeros would hide others
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return decoder.to(dtype)


def documents(rows: int) -> TokenBatch:
    """Rows of several documents each.

    No token follows itself: at the beginning of a document the two would be alike but for rounding,
    and routers that compare tokens would choose by that.
    """
    generator = torch.Generator().manual_seed(11)
    steps = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator)
    tokens = steps.cumsum(dim=1) % VOCABULARY
    begins = torch.rand(rows, LENGTH, generator=generator) < 0.15
    batch = batch_of(tokens, begins.cumsum(dim=1))
    batch.sample_ids_B = torch.arange(rows) + 7  # type: ignore[misc]
    return batch


class Rows(SimpleNamespace):
    """A batch that can be cut, as the data room's can."""

    def rows(self, start: int, end: int) -> TokenBatch:
        """Some of the rows."""
        return Rows(**vars(rows_of(self, start, end)))  # type: ignore[arg-type]


def sgd(parameters: Iterable[tuple[nn.Parameter, ParameterSpec]]) -> torch.optim.Optimizer:
    """Plain steps, in which gradients show."""
    trained = [p for p, spec in parameters if spec.role is not Role.FROZEN]
    return torch.optim.SGD(trained or [nn.Parameter(torch.zeros(0))], lr=RATE)


def train(
    name: str,
    case: Case,
    dtype: torch.dtype = torch.float64,
    make: MakeOptimizer = sgd,
    in_one_piece: frozenset[Role] = frozenset(),
) -> dict[str, Any]:
    """A step per clip; everything that they leave behind, as arrays by name."""
    decoder = decoder_of(name, dtype)
    layout = Layout(decoder, case.config, make, LENGTH, whole=in_one_piece)
    batch = documents(case.rows)
    whole = Rows(**vars(batch))
    parts = [whole.rows(*part) for part in layout.row_ranges(case.rows, case.micro_batch)]
    before = dict(decoder_of(name, dtype).named_parameters())
    left: dict[str, Any] = {}

    def keep(tensors: Mapping[Any, Tensor]) -> None:
        found = {f"{number}/{k}": v.detach().double().numpy().copy() for k, v in tensors.items()}
        left.update(found)

    for number, clip_norm in enumerate(case.clips):
        step = FIRST_STEP + number
        context = StepContext(
            "topk",
            Ledger(keep=ALL_SAMPLES),
            step=step,
            seed=7,
            training=True,
            recompute=case.recompute,
        )
        result = layout.accumulate_gradients(parts, batch.labels_BS.numel(), context)
        weights = layout.mesh.world.all_reduce(layout.engine.weight_square())
        keep({"weight_norm": weights.sqrt(), "grad_norm": layout.engine.step(clip_norm)})
        decoder.update_routers(result.ledger, step)
        keep({f"loss/{name}": loss for name, loss in result.losses.items()})
        keep({f"auxiliary/{name}": loss for name, loss in result.ledger.losses.items()})
        for site, sums in result.ledger.statistics.items():
            keep({f"{site}/{key}": value for key, value in sums.items()})
        keep({f"{site}/experts": ids for site, ids in result.ledger.routings.items()})
        keep(buffer_tensors(layout))
    evaluation = StepContext("threshold", Ledger(), step=FIRST_STEP + len(case.clips), seed=7)
    left |= {
        f"evaluation/{name}": loss.detach().numpy()
        for name, loss in layout.loss_sums(whole, evaluation).items()
    }
    after = model_tensors(layout.engine.parts())
    state = {n: part for n, part in layout.engine.parts().items() if n.startswith("optimizer/")}
    keep(whole_tensors(state))
    keep({f"update/{name}": (after[name] - before[name]) / RATE for name in after})
    return left
