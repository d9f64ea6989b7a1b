"""What a step of an optimizer takes, and what it keeps of each parameter.

    .venv/bin/python benchmarks/optimizers.py

On the parameters of a MoE decoder of 15.7 million (width 256, 4 layers, 8 experts of width 512,
vocabulary 8192), with random gradients, each optimizer on a copy of its own, in turns:

- `adamw`, `adamw_foreach`, `adamw_fused`: torch's AdamW by default, over lists of tensors, and in
  one kernel, which is what runs use;
- `muon`: ours for matrices and experts, fused AdamW for the rest.

Clipping is not part of it. Bytes are those of tensors in the optimizer's state. Writes
benchmarks/results/optimizers-<machine>.json.
"""

from collections.abc import Callable
from typing import Any

import torch
from machine import parser, prepare, product_rates, write_result
from models import model_config, routed
from rounds import call, compare, nothing, show
from torch import Tensor

from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.model.parameters import initialize, named_specs
from moebius.trainer.muon import MuonConfig
from moebius.trainer.optim import OptimConfig, build_optimizer

LEARNING_RATE = 3e-4
Make = Callable[[Decoder], torch.optim.Optimizer]


def adamw(**flags: Any) -> Make:
    """Torch's, with flags."""
    return lambda decoder: torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE, **flags)


def muon(decoder: Decoder) -> torch.optim.Optimizer:
    """Ours, as a run builds it."""
    pairs = [(parameter, spec) for _, parameter, spec in named_specs(decoder)]
    return build_optimizer(pairs, OptimConfig(lr=LEARNING_RATE, muon=MuonConfig()))


OPTIMIZERS: dict[str, Make] = {
    "adamw": adamw(),
    "adamw_foreach": adamw(foreach=True),
    "adamw_fused": adamw(fused=True),
    "muon": muon,
}


def with_gradients(config: ModelConfig) -> Decoder:
    """A model with random gradients."""
    decoder = Decoder(config)
    initialize(decoder, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return decoder


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors that it keeps."""
    kept = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__).parse_args()
    if arguments.quick:
        config, rounds = model_config(64, 1, 2, 256, routed(64, 4)), 2
    else:
        config, rounds = model_config(256, 4, 8, 8192, routed(512, 8)), 15
    prepared = prepare()
    made = {name: make(with_gradients(config)) for name, make in OPTIMIZERS.items()}
    candidates = {name: call(optimizer.step) for name, optimizer in made.items()}
    taken = compare(candidates, "adamw_fused", nothing, rounds)
    parameters = sum(p.numel() for p in Decoder(config).parameters())
    kept = {name: state_bytes(optimizer) / parameters for name, optimizer in made.items()}
    rows = [(name, 1e3 * taken.median(name), taken.ratio(name), kept[name]) for name in OPTIMIZERS]
    columns = ("", "median ms", "time / adamw_fused", "state bytes / parameter")
    show(f"{parameters:,} parameters, fp32", columns, rows)
    result = {
        "settings": prepared,
        "product_gflops": product_rates(),
        "parameters": parameters,
        "rounds": rounds,
        "times": taken.report(),
        "state_bytes_per_parameter": {name: round(size, 3) for name, size in kept.items()},
    }
    write_result("optimizers", result, arguments.out)


if __name__ == "__main__":
    main()
