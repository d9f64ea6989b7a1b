"""Models to measure, random batches for them, and a training step as a run makes it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from moebius.data.batch import Batch, make_batch
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.cost import training_flops
from moebius.model.decoder import Decoder
from moebius.model.ledger import Ledger
from moebius.model.parameters import initialize
from moebius.parallel.config import ParallelConfig
from moebius.parallel.layout import Layout
from moebius.trainer.kernels import KernelsConfig, choose_kernels
from moebius.trainer.metrics import executed_rows
from moebius.trainer.optim import OptimConfig, build_optimizer

TOP_K = 2


def routed(width: int, count: int, balanced: bool = False) -> dict[str, Any]:
    """A feed-forward of so many SwiGLU experts of a width, top-2, weights as Mixtral's; with
    `balanced` they take turns, whatever the router says."""
    return {
        "kind": "moe",
        "experts": [{"kind": "ffn", "count": count, "intermediate_size": width}],
        "router": {
            "selector": {"kind": "balanced" if balanced else "top_k", "top_k": TOP_K},
            "weights": {"kind": "renormalize"},
            "losses": [{"kind": "switch", "coefficient": 0.01}],
        },
    }


def dense(width: int) -> dict[str, Any]:
    """One SwiGLU for all tokens."""
    return {"kind": "dense", "intermediate_size": width}


def model_config(
    hidden: int, layers: int, heads: int, vocabulary: int, ffn: dict[str, Any]
) -> ModelConfig:
    """A decoder with as many key-value heads as heads, tied embeddings."""
    tree = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": hidden // heads},
        "ffn": ffn,
        "depth": {"num_layers": layers},
    }
    return ModelConfig.model_validate(tree)


def random_batches(
    rows: int, length: int, vocabulary: int, device: torch.device
) -> Callable[[int], Batch]:
    """Batches of random tokens by number; every row is one document."""

    def draw(number: int) -> Batch:
        generator = np.random.default_rng(number)
        windows = generator.integers(1, vocabulary, (rows, length + 1))
        samples = [[window] for window in windows]
        return make_batch(samples, length, eod_id=0, first_sample=number * rows).to(device)

    return draw


class Trainee:
    """A decoder with what a run would choose for it on a device: kernels, precision, optimizer."""

    def __init__(
        self,
        config: ModelConfig,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        kernels: KernelsConfig | None = None,
    ) -> None:
        device = device or torch.device("cpu")
        chosen = kernels or KernelsConfig()
        self.kernels, self.kernel_names = choose_kernels(chosen, config, device, dtype)
        decoder = Decoder(config)
        initialize(decoder, 0)
        make = partial(build_optimizer, config=OptimConfig())
        autocast = None if dtype == torch.float32 else dtype
        self.layout = Layout(decoder, ParallelConfig(), make, length, autocast, device)
        self.number = 0
        self.ledger = Ledger()

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(p.numel() for p in self.layout.decoder.parameters())

    @property
    def flops(self) -> int:
        """Executed FLOPs of the last step, forward and backward."""
        ledger = self.ledger
        return training_flops(self.layout.decoder, ledger.work, executed_rows(ledger))

    def step(self, batch: Batch) -> None:
        """Forward, backward, clipping, optimizer; router statistics as a run keeps them."""
        context = StepContext(
            "topk", Ledger(), step=self.number, training=True, kernels=self.kernels
        )
        result = self.layout.accumulate_gradients([batch], batch.num_tokens, context)
        self.layout.engine.step(1.0)
        self.layout.decoder.update_routers(result.ledger, self.number)
        self.ledger, self.number = result.ledger, self.number + 1
