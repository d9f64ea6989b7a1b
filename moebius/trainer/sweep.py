"""Depth oracle: one checkpoint evaluated with other numbers of passes and other shares.

CoLa (arXiv 2507.07996) finds that most samples have a shorter chain of layers that does as well or
better. For a recursive model the chains are numbers of passes and shares of tokens; what the best
one for each sample would give is a bound for every rule that chooses depth by sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebius.data.batch import Batch
from moebius.errors import ConfigError
from moebius.model.config import ModelConfig
from moebius.model.context import Mode, StepContext
from moebius.model.cost import forward_flops
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.model.program import Program, build_program
from moebius.model.recursion.config import DepthConfig, ExpertChoiceConfig
from moebius.trainer.metrics import executed_rows


@dataclass(frozen=True)
class Setting:
    """One way to run the model."""

    recursions: int
    mode: Mode
    scale: float
    """factor on the shares, with mode topk"""

    def __str__(self) -> str:
        passes = f"{self.recursions} pass" + "es" * (self.recursions > 1)
        return passes + (f", shares x{self.scale:g}" if self.mode == "topk" else "")


@dataclass(frozen=True)
class Outcome:
    """What a setting gave."""

    setting: Setting
    sample_losses_R: Tensor
    """mean cross-entropy of each sample, in nats per token"""
    flops_per_token: float

    @property
    def loss(self) -> float:
        """The mean over samples."""
        return float(self.sample_losses_R.mean())


def settings(
    model: ModelConfig, recursions: Sequence[int] | None, scales: Sequence[float]
) -> Iterator[Setting]:
    """All combinations; by default every number of passes up to the trained one.

    Raises ConfigError for more passes than the model has parameters or state for.
    """
    depth = model.depth
    if depth.num_recursions == 1:
        raise ConfigError("model.depth.num_recursions: 1, so there is no depth to sweep")
    chosen = recursions or range(1, depth.num_recursions + 1)
    differs = depth.router is not None or depth.adapter is not None or model.routers
    if max(chosen) > depth.num_recursions and differs:
        raise ConfigError(
            f"--recursions: {max(chosen)}, but the passes of this model differ and it has "
            f"{depth.num_recursions}",
            f"use numbers up to {depth.num_recursions}",
        )
    for number in chosen:
        yield Setting(number, "threshold", 1.0)
        if isinstance(depth.router, ExpertChoiceConfig):
            yield from (Setting(number, "topk", scale) for scale in scales)


def program_of(depth: DepthConfig, setting: Setting, step: int) -> Program:
    """The same layers with another number of passes and other shares."""
    ends = 2 if depth.sharing.startswith("middle") else 0
    unique = (depth.num_layers - ends) // depth.num_recursions
    changes: dict[str, object] = {
        "num_layers": ends + unique * setting.recursions,
        "num_recursions": setting.recursions,
    }
    if isinstance(depth.router, ExpertChoiceConfig):
        shares = depth.router.shares(depth.num_recursions, step)[: setting.recursions]
        scaled = tuple(min(share * setting.scale, 1.0) for share in shares)
        update = {"capacities": scaled, "warmup_steps": 0}
        changes["router"] = depth.router.model_copy(update=update)
    return build_program(depth.model_copy(update=changes))


def sweep(
    executor: LocalExecutor,
    batches: Iterable[Batch],
    chosen: Sequence[Setting],
    device: torch.device,
    step: StepContext,
) -> list[Outcome]:
    """Evaluate every setting on the same samples; `step` says when and with which seed."""
    depth = executor.decoder.config.depth
    executors = [
        LocalExecutor(
            executor.decoder, executor.autocast_dtype, program_of(depth, setting, step.step)
        )
        for setting in chosen
    ]
    losses: list[list[Tensor]] = [[] for _ in chosen]
    flops = [0] * len(chosen)
    num_tokens = 0
    for batch in batches:
        on_device = batch.to(device)
        num_tokens += batch.num_tokens
        for number, (setting, runner) in enumerate(zip(chosen, executors, strict=True)):
            ledger = Ledger()
            context = replace(step, mode=setting.mode, ledger=ledger)
            (losses_T,) = runner.token_losses(on_device, context).values()
            losses_BS = losses_T.double().view(batch.labels_BS.shape)
            losses[number].append(losses_BS.mean(dim=1).cpu())
            flops[number] += forward_flops(executor.decoder, ledger.work, executed_rows(ledger))
    return [
        Outcome(setting, torch.cat(found), total / num_tokens)
        for setting, found, total in zip(chosen, losses, flops, strict=True)
    ]


def best_settings(outcomes: Sequence[Outcome]) -> tuple[float, Tensor]:
    """The loss if each sample had its best setting, and for how many samples each one is that."""
    losses_XR = torch.stack([outcome.sample_losses_R for outcome in outcomes])
    best_R, winner_R = losses_XR.min(dim=0)
    return float(best_R.mean()), torch.bincount(winner_R, minlength=len(outcomes))
