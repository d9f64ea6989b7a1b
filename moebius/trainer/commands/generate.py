"""moebius generate: text from a run's checkpoint."""

import argparse
from pathlib import Path

from rich.console import Console

from moebius.trainer.generation import generate_ids
from moebius.trainer.restore import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius generate RUN --prompt TEXT`."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--prompt", default="", help="text to continue; default: a new document")
    parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most probable token")
    parser.add_argument("--top-k", type=int, default=50, help="sample from so many tokens")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the prompt and its continuation."""
    model = restore(arguments.run, arguments.step)
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
    )
    console.out(arguments.prompt + model.tokenizer.decode(new), highlight=False)
    return 0
