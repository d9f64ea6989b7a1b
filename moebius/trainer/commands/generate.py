"""moebius generate: text from a run's checkpoint."""

import argparse

from rich.console import Console

from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.trainer.commands.arguments import add_run_arguments, non_negative, utf8, whole
from moebius.trainer.generation import generate_ids
from moebius.trainer.restore import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius generate RUN --prompt TEXT`."""
    add_run_arguments(parser)
    parser.add_argument(
        "--prompt", type=utf8, default="", help="text to continue; default: a new document"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=96, metavar="N")
    parser.add_argument(
        "--temperature", type=non_negative, default=0.8, help="0: the most probable token"
    )
    parser.add_argument(
        "--top-k", type=whole(1), default=50, help="sample from so many tokens", metavar="K"
    )
    parser.add_argument("--seed", type=whole(0), default=0)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the prompt and its continuation."""
    model = restore(arguments.run, arguments.step, arguments.device)
    new = generate_ids(
        model.executor,
        model.tokenizer.encode(arguments.prompt, add_special_tokens=False).ids,
        eod_id=model.manifest.tokenizer.eod_id,
        max_new_tokens=arguments.max_new_tokens,
        context_length=model.config.data.sequence_length,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        device=model.device,
        step=StepContext("threshold", Ledger(), model.step, model.config.train.seed),
    )
    console.out(arguments.prompt + model.tokenizer.decode(new), highlight=False)
    return 0
