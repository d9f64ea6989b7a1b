"""The output head and its loss in chunks, against logits of all tokens at once.

    .venv/bin/python benchmarks/head.py

4096 tokens of width 512, a vocabulary of 32000, forward and backward:

- `chunked`: `linear_cross_entropy`, as a run uses it;
- `plain`: `F.linear` and `F.cross_entropy` through autograd.

Memory is the peak of the resident set during one step, in a process of its own, less what was
resident before, with malloc as it is; the gradients, which both have, are part of it. Before that a
step of few tokens has made threads and libraries take theirs. Times are taken in turns in one
process that is set up as a run is. In bf16 products run under autocast. Writes
benchmarks/results/head-<machine>.json.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import NO_BF16, has_bf16, parser, precisions, prepare, product_rates, write_result
from models import dense, model_config
from rounds import compare, show
from torch import Tensor

from moebius.kernels.cross_entropy import linear_cross_entropy
from moebius.trainer.kernels import KernelsConfig, choose_kernels

CPU = torch.device("cpu")
MODEL = model_config(64, 1, 2, 256, dense(64))
"""the kernels of the loss are those of any model"""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    tokens: int = 4096
    hidden: int = 512
    vocabulary: int = 32_000
    rounds: int = 7


class Given(NamedTuple):
    """Hidden states, the head and labels."""

    hidden_TD: Tensor
    weight_VD: Tensor
    labels_T: Tensor


def draw(size: Size, tokens: int, number: int) -> Given:
    """Random ones."""
    generator = torch.Generator().manual_seed(number)
    hidden_TD = torch.randn(tokens, size.hidden, generator=generator)
    weight_VD = torch.randn(size.vocabulary, size.hidden, generator=generator) * 0.02
    labels_T = torch.randint(0, size.vocabulary, (tokens,), generator=generator)
    return Given(hidden_TD.requires_grad_(), weight_VD.requires_grad_(), labels_T)


def autocast(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Products in a precision."""
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def chunked(dtype: torch.dtype, given: Given) -> Tensor:
    """Loss and gradients by ours; the loss."""
    hidden_TD, weight_VD, labels_T = given
    kernels, _ = choose_kernels(KernelsConfig(), MODEL, CPU, dtype)
    with autocast(dtype):
        losses = linear_cross_entropy(
            [hidden_TD], weight_VD, labels_T, [1.0], row_losses=kernels.row_losses
        )
    torch.autograd.grad(losses.total, (hidden_TD, weight_VD))
    return losses.total.detach()


def plain(dtype: torch.dtype, given: Given) -> Tensor:
    """Loss and gradients by torch; the loss."""
    hidden_TD, weight_VD, labels_T = given
    with autocast(dtype):
        loss = F.cross_entropy(F.linear(hidden_TD, weight_VD), labels_T, reduction="sum")
    torch.autograd.grad(loss, (hidden_TD, weight_VD))
    return loss.detach()


WAYS: dict[str, Callable[[torch.dtype, Given], Tensor]] = {"plain": plain, "chunked": chunked}


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def extra_memory(way: str, size: Size, dtype: torch.dtype) -> dict[str, float]:
    """Of one step in this process, and its loss."""
    WAYS[way](dtype, draw(size, 8, 0))
    given = draw(size, size.tokens, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmHWM")
    loss = WAYS[way](dtype, given)
    return {"mebibytes": (status("VmHWM") - before) / 2**20, "loss": float(loss) / size.tokens}


def memory(way: str, size: Size, precision: str) -> dict[str, float]:
    """`extra_memory` in a process of its own."""
    task = json.dumps({"way": way, "precision": precision, "size": asdict(size)})
    command = [sys.executable, str(Path(__file__)), "--worker", task]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(size: Size, precision: str, dtype: torch.dtype) -> dict[str, object]:
    """Memory and time of both."""
    candidates = {name: partial(way, dtype) for name, way in WAYS.items()}
    taken = compare(candidates, "plain", partial(draw, size, size.tokens), size.rounds)
    used = {way: memory(way, size, precision) for way in WAYS}
    columns = ("", "extra MiB", "median ms", "time / plain", "loss")
    rows = [
        (way, used[way]["mebibytes"], 1e3 * taken.median(way), taken.ratio(way), used[way]["loss"])
        for way in WAYS
    ]
    show(f"{precision}, {size.tokens} tokens, vocabulary {size.vocabulary}", columns, rows)
    return {
        "extra_mebibytes": {way: round(found["mebibytes"], 1) for way, found in used.items()},
        "loss": {way: found["loss"] for way, found in used.items()},
        "gradients_mebibytes": round(4 * size.hidden * (size.tokens + size.vocabulary) / 2**20, 1),
        "times": taken.report(),
    }


def main() -> None:
    """Measure and write the result."""
    options = parser(__doc__)
    options.add_argument("--worker", help="for processes that this script starts")
    arguments = options.parse_args()
    if arguments.worker:
        task = json.loads(arguments.worker)
        size, dtype = Size(**task["size"]), precisions()[task["precision"]]
        print(json.dumps(extra_memory(task["way"], size, dtype)))
        return
    size = Size(512, 64, 4096, 2) if arguments.quick else Size()
    prepared = prepare()
    found: dict[str, object] = {} if has_bf16() else {"bf16": NO_BF16}
    for precision, dtype in precisions().items():
        found[precision] = measure(size, precision, dtype)
    result = {
        "settings": prepared,
        "product_gflops": product_rates(),
        "size": asdict(size),
        **found,
    }
    write_result("head", result, arguments.out)


if __name__ == "__main__":
    main()
