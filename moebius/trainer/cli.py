"""The command line: subcommands, and errors as one line."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console

from moebius.errors import ConfigError, LayoutError, MoebiusError
from moebius.parallel.world import check_alone, is_first_here, is_main
from moebius.trainer.commands import (
    audit,
    checkpoints,
    convert,
    describe,
    evaluate,
    generate,
    inspect,
    prepare,
    schema,
    status,
    submit,
    sweep,
    train,
)


class Command(Protocol):
    """A module of `moebius.trainer.commands`."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, arguments: argparse.Namespace, console: Console) -> int:
        """Do it; returns the exit code."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "submit": submit,
    "status": status,
    "prepare": prepare,
    "inspect": inspect,
    "audit": audit,
    "describe": describe,
    "evaluate": evaluate,
    "sweep": sweep,
    "convert": convert,
    "checkpoints": checkpoints,
    "generate": generate,
    "schema": schema,
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, `train` where a run file comes first; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="moebius",
        description="Pretraining of language models that are routed over width and over depth.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        title = (command.__doc__ or "").strip().partition(": ")[2]
        command.add_arguments(subparsers.add_parser(name, help=title, description=title))
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml")):
        words.insert(0, "train")
    arguments = parser.parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode still shows the rest
    try:
        if arguments.command != "train":
            check_alone(arguments.command)
        return COMMANDS[arguments.command].run(arguments, Console())
    except MoebiusError as error:
        # What is wrong with a config or a machine is said once for each node.
        if is_first_here() or not isinstance(error, ConfigError | LayoutError):
            where = f" (rank {os.environ['RANK']})" if not is_main() else ""
            print(f"error{where}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        # torch reports a lack of memory as RuntimeError (CPU) or its subclass (CUDA).
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        print(f"error: {reason} - lower train.micro_batch_size or the model", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
