"""moebius generate: text from a run's checkpoint."""

import argparse
import dataclasses
import sys
from pathlib import Path

from rich.console import Console

from moebius.errors import DataError
from moebius.model.executor import LocalExecutor
from moebius.trainer.commands.arguments import (
    add_run_arguments,
    chosen_exit,
    non_negative,
    utf8,
    whole,
)
from moebius.trainer.generation import Sampler, generate_texts
from moebius.trainer.restore import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius generate RUN --prompt TEXT`."""
    add_run_arguments(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", type=utf8, default="", help="text to continue; default: a new document"
    )
    prompts.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt on each line; -: standard input"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=96, metavar="N")
    parser.add_argument(
        "--temperature", type=non_negative, default=0.8, help="0: the most probable token"
    )
    parser.add_argument(
        "--top-k", type=whole(1), default=50, help="sample from so many tokens", metavar="K"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument(
        "--slots", type=whole(1), default=8, help="prompts to work on at a time", metavar="N"
    )
    parser.add_argument(
        "--exit", type=whole(1), help="read the head after so many layers", metavar="N"
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print each prompt and its continuation."""
    prompts = [arguments.prompt]
    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts)
    model = restore(arguments.run, arguments.step, arguments.device)
    if arguments.exit is not None:
        program = chosen_exit(model.executor.program, arguments.exit)
        executor = LocalExecutor(model.executor.decoder, model.executor.autocast_dtype, program)
        model = dataclasses.replace(model, executor=executor)
    sampler = Sampler(arguments.temperature, arguments.top_k, arguments.seed)
    texts = generate_texts(model, prompts, sampler, arguments.max_new_tokens, arguments.slots)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if number:
            console.out("")
        console.out(prompt + text, highlight=False)
    return 0


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, empty ones left out. Raises DataError where it is not UTF-8 or empty."""
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts: '{path}' is not UTF-8 text ({error.reason})") from None
    prompts = [line.rstrip("\r") for line in text.split("\n") if line.rstrip("\r")]
    if not prompts:
        raise DataError(f"--prompts: '{path}' holds no line", "write a prompt on each line")
    return prompts
