"""Generation by definition, and models whose every part matters, for the generation tests."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebius.kernels.random import gumbel
from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.generation.engine import DepthBatchedGenerator
from moebius.model.generation.plain import Limits
from moebius.model.ledger import Ledger
from moebius.model.parameters import Role, named_specs
from tests.model.helpers import batch_of, build

VOCAB_SIZE = 96
DENSE = {"kind": "dense", "intermediate_size": 48}
NOISE = {Role.EMBED: 0.4, Role.ROUTER: 0.6, Role.AUX_ROUTER: 0.6}


def loop(sharing: str = "middle_cycle", recursions: int = 3, **depth: Any) -> dict[str, Any]:
    """A depth config of two looped layers, between two unique ones with `middle_*`."""
    ends = 2 if sharing.startswith("middle") else 0
    layers = ends + 2 * recursions * depth.get("groups", 1)
    return {"num_layers": layers, "sharing": sharing, "num_recursions": recursions} | depth


def lively(seed: int = 0, **changes: Any) -> LocalExecutor:
    """A model in fp64 with noise on every parameter: all tokens differ, zeros are none any more."""
    changes = {"vocab_size": VOCAB_SIZE, "ffn": DENSE} | changes
    executor = build(torch.float64, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter, spec in named_specs(executor.decoder):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += NOISE.get(spec.role, 0.2) * noise
    return executor


class Choice:
    """Draws ids by prompt and number and remembers the logits they were drawn from."""

    def __init__(self, stops: Sequence[tuple[int, int]] = ()) -> None:
        self.logits: dict[tuple[int, int], Tensor] = {}
        self.stops = stops
        """(prompt, number) of the tokens that shall be the stop id"""

    def __call__(self, logits_V: Tensor, prompt: int, number: int) -> int:
        assert (prompt, number) not in self.logits, "a token is chosen once"
        self.logits[prompt, number] = logits_V.clone()
        if (prompt, number) in self.stops:
            return STOP
        noise = gumbel(prompt, torch.tensor([number]), len(logits_V))[0]
        noise[STOP] = -torch.inf
        return int((logits_V + noise).argmax())


STOP = 7


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def reference(
    executor: LocalExecutor, prompts: Sequence[Sequence[int]], choose: Choice, limits: Limits
) -> list[list[int]]:
    """Each token from a forward pass over all tokens it sees, without any cache."""
    half = -(-limits.context_length // 2)
    everything = []
    for prompt_number, prompt in enumerate(prompts):
        ids, new, start = list(prompt), [], 0
        while len(new) < limits.max_new_tokens:
            while len(ids) - start > limits.context_length:
                start += half
            batch = batch_of(torch.tensor([ids[start:]]))
            with torch.no_grad():
                hidden_BSD = executor.hidden(batch, StepContext("threshold", Ledger()))
                logits_V = executor.decoder.logits(hidden_BSD)[0, -1]
            token = choose(logits_V, prompt_number, len(new))
            if token == limits.stop_id:
                break
            ids.append(token)
            new.append(token)
        everything.append(new)
    return everything


def engine(executor: LocalExecutor, limits: Limits, num_slots: int) -> DepthBatchedGenerator:
    """The generator to be tested."""
    return DepthBatchedGenerator(executor, num_slots, limits, StepContext("threshold", Ledger()))


def assert_same(
    executor: LocalExecutor,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    slots: Sequence[int] = (1, 3, 8),
    stops: Sequence[tuple[int, int]] = (),
) -> list[DepthBatchedGenerator]:
    """Ids and logits of the depth-batched engine are those of the reference, token by token."""
    wanted = Choice(stops)
    expected = reference(executor, prompts, wanted, limits)
    engines = []
    for num_slots in slots:
        got = Choice(stops)
        engines.append(engine(executor, limits, num_slots))
        assert engines[-1].run(prompts, got) == expected
        assert got.logits.keys() == wanted.logits.keys()
        for key, logits_V in wanted.logits.items():
            torch.testing.assert_close(got.logits[key], logits_V, rtol=0, atol=1e-9)
    return engines
