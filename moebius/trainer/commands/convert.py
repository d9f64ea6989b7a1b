"""moebius convert: a trained model as the beginning of a run with other sharing of layers."""

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import get_args

from rich.console import Console

from moebius.data.prepare import prepare
from moebius.errors import CheckpointError, ConfigError
from moebius.model.recursion.convert import Method, conversion_problems, convert
from moebius.trainer.commands.arguments import whole
from moebius.trainer.commands.preparing import workshop
from moebius.trainer.config_file import load_config
from moebius.trainer.folder import check_folder, claim_folder, lock_folder
from moebius.trainer.restore import restore
from moebius.trainer.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius convert SOURCE CONFIG [path.to.option=value ...]`."""
    parser.add_argument("source", type=Path, help="run folder of the trained model")
    parser.add_argument("config", help="run file of the new run")
    parser.add_argument("overrides", nargs="*", help="options of the file, as optim.lr=3e-4")
    parser.add_argument(
        "--step", type=whole(0), help="checkpoint to use; default: the newest", metavar="N"
    )
    parser.add_argument(
        "--init",
        choices=get_args(Method),
        default="stepwise",
        help="which layers shared ones are made of: equally spaced ones, the mean of those they "
        "stand for, the first or the last; adapters get the rest (default: stepwise)",
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Write the first checkpoint of the new run, from which `moebius train` goes on."""
    config = load_config(arguments.config, arguments.overrides)
    check_folder(config)
    source = restore(arguments.source, arguments.step, "cpu")
    problems = list(conversion_problems(source.config.model, config.model))
    if problems:
        lines = [f"{arguments.config}: model.{path}: {message}" for path, message in problems]
        raise ConfigError("\n".join(lines))
    show = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    with workshop(console) as tools:
        corpora = prepare(config.data, config.model.vocab_size, tools)
    if corpora.tokenizer.sha256 != source.corpora.tokenizer.sha256:
        raise ConfigError(
            f"data.dir: '{config.data.dir}' has another tokenizer than '{arguments.source}'",
            "use the source's corpus, or prepare one with data.tokenizer.path",
        )
    target = Run(config, corpora, [])
    with lock_folder(target.folder):
        if target.storage.steps():
            raise CheckpointError(
                f"run_dir: '{target.folder}' holds a run already",
                "choose another run_dir or delete the folder",
            )
        try:
            kept = convert(source.executor.decoder, target.decoder.cpu(), arguments.init)
        except ValueError as error:
            raise ConfigError(f"{arguments.config}: model: {error}") from None
        target.save()
        target.saver.settle()
        claim_folder(config)
    show(f"converted '{arguments.source}' at step {source.step} to '{target.folder}' at step 0")
    if kept:
        show(f"new, with initial values: {', '.join(kept)}")
    again = shlex.join(["moebius", "train", arguments.config, *arguments.overrides])
    show(f"train it: {again}")
    return 0
