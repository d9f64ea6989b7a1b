"""Arguments that several commands share, checked where they are parsed."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from moebius.errors import ConfigError
from moebius.model.program import Program


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """A run folder, which of its checkpoints, and where to run it."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--step", type=whole(0), help="checkpoint to use; default: the newest", metavar="N"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def whole(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """A parser of whole numbers in a range, for argparse."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number >= {minimum}")
        return value

    return parse


def non_negative(text: str) -> float:
    """A finite number that is not negative, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number >= 0")
    return value


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = non_negative(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if value == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number > 0")
    return value


def share(text: str) -> float:
    """A number between 0 and 1, for argparse."""
    try:
        value = positive(text)
    except argparse.ArgumentTypeError:
        value = 1.0
    if value >= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number > 0 and < 1")
    return value


def utf8(text: str) -> str:
    """Text that can be encoded, for argparse; undecodable bytes of the shell cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not UTF-8 text") from None
    return text


def chosen_exit(program: Program, number: int) -> Program:
    """The program that ends after so many visits. Raises ConfigError where it has no exit there."""
    if number not in program.exits:
        allowed = ", ".join(str(exit_number) for exit_number in program.exits)
        raise ConfigError(f"--exit: {number}; allowed: {allowed}")
    return program.until(number)
