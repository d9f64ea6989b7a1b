"""The command line: subcommands, and errors as one line."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console

from moebius.errors import ConfigError, LayoutError, MoebiusError
from moebius.parallel.world import check_alone, end_threads, is_first_here, is_main
from moebius.trainer.commands import (
    audit,
    calibrate,
    checkpoints,
    compare,
    convert,
    describe,
    evaluate,
    generate,
    inspect,
    plan,
    preflight,
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
    "preflight": preflight,
    "calibrate": calibrate,
    "submit": submit,
    "status": status,
    "prepare": prepare,
    "inspect": inspect,
    "audit": audit,
    "compare": compare,
    "describe": describe,
    "evaluate": evaluate,
    "plan": plan,
    "sweep": sweep,
    "convert": convert,
    "checkpoints": checkpoints,
    "generate": generate,
    "schema": schema,
}
TOGETHER = frozenset({"train", "preflight", "calibrate"})
"""commands that a launcher may start on several processes"""
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
    arguments, rest = parser.parse_known_args(words)
    # argparse takes positional arguments in one run; options of the file may follow others, too.
    if rest and hasattr(arguments, "overrides") and not any(w.startswith("-") for w in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode still shows the rest
    try:
        if arguments.command not in TOGETHER:
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
    finally:
        end_threads()
