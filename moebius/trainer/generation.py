"""Sampling text from a trained model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.kernels.random import gumbel
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.generation.engine import generate
from moebius.model.generation.plain import Limits
from moebius.model.ledger import Ledger
from moebius.model.recursion.config import CausalLoss, CausalRouter, ExpertChoiceConfig
from moebius.trainer.restore import TrainedModel


@dataclass(frozen=True)
class Sampler:
    """Draws one of the `top_k` >= 1 most probable ids; `temperature` 0 takes the most probable.

    A draw is a function of seed, prompt and token number: it does not depend on which prompts are
    worked on together.
    """

    temperature: float
    top_k: int
    seed: int

    def __call__(self, logits_V: Tensor, prompt: int, number: int) -> int:
        """An id."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        values, ids = logits_V.float().cpu().topk(min(self.top_k, logits_V.numel()))
        digest = hashlib.sha256(f"{self.seed}/{prompt}/{number}".encode()).digest()
        counter = torch.tensor([number])
        noise = gumbel(int.from_bytes(digest[:8], "big"), counter, len(ids))[0]
        return int(ids[(values / self.temperature + noise).argmax()])


def generate_texts(
    model: TrainedModel,
    prompts: Sequence[str],
    sampler: Sampler,
    max_new_tokens: int,
    num_slots: int,
) -> list[str]:
    """What the model writes after each prompt.

    Raises ConfigError for a model whose depth routers never learned to select causally.
    """
    check_causal(model.config.model)
    eod_id = model.corpora.tokenizer.eod_id
    # A document begins with the end of the one before.
    ids = [
        [eod_id, *model.tokenizer.encode(prompt, add_special_tokens=False).ids]
        for prompt in prompts
    ]
    limits = Limits(max_new_tokens, model.config.data.sequence_length, eod_id)
    step = StepContext("threshold", Ledger(), model.step, model.config.train.seed)
    new = generate(model.executor, ids, sampler, limits, step, min(num_slots, len(ids)))
    return [model.tokenizer.decode(tokens) for tokens in new]


def check_causal(model: ModelConfig) -> None:
    """Raise ConfigError where selecting without looking ahead was not trained."""
    router = model.depth.router
    if not isinstance(router, ExpertChoiceConfig):
        return
    learns = isinstance(router.causal, CausalRouter) or (
        isinstance(router.causal, CausalLoss) and router.causal.weight > 0
    )
    if not learns:
        raise ConfigError(
            "model.depth.router.causal: this model was not trained to choose its tokens without "
            "looking at later ones, so it cannot generate or teach",
            "train with causal.kind loss or router",
        )
