"""moebius prepare: make the corpora of a run file, or go on where a killed preparation was."""

import argparse

from rich.console import Console

from moebius.data.prepare import prepare
from moebius.trainer.commands.arguments import whole
from moebius.trainer.commands.preparing import workshop
from moebius.trainer.config_file import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius prepare CONFIG [path.to.option=value ...] [--processes N]`."""
    parser.add_argument("config", help="run file, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file, as data.dir=data/mine")
    parser.add_argument(
        "--processes", type=whole(1), help="that encode; default: one for each core", metavar="N"
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Prepare what `moebius train` with the same arguments would, and say what is there."""
    config = load_config(arguments.config, arguments.overrides)
    with workshop(console, arguments.processes) as tools:
        corpora = prepare(config.data, config.model.vocab_size, tools)
    for name, corpus in corpora.members.items():
        for split, found in corpus.manifest.splits.items():
            console.print(
                f"{name + ' ' if name else ''}{split}: {found.documents:,} documents, "
                f"{found.tokens:,} tokens, {found.bytes / 1e6:,.1f} MB of text, "
                f"{len(found.shards)} shards in {corpus.storage.location}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    return 0
